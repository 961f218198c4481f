"""What `train` does around the loop, for each objective."""
