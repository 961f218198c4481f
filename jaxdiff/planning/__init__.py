"""Plans: compile a training step or a sampling loop for chips that are not present."""
