"""What only a model with a memory is asked."""
