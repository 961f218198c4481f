"""What everything leans on: array types, validators, pytree and config helpers."""
