"""The networks: a config dataclass and a module each, presets as data."""
