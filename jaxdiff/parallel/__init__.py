"""Devices as one mesh, and how arrays lie on them."""
