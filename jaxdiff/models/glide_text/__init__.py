"""The text encoder of GLIDE."""
