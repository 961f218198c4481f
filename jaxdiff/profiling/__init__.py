"""What a program costs."""
