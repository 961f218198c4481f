"""Kandinsky 2.1's multilingual text encoder."""
