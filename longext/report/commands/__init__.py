"""What commands other than evaluations show and write."""
