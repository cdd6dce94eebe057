"""The processes of a run: started, of one mind, and sharing its work."""
