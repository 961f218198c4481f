"""Batch jobs of images: prompt files, the runner, PNG files."""
