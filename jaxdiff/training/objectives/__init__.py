"""Objectives as training tasks: their networks, initial parameters and loss."""
