"""The wiring of each kind of training: data, logging, sample grids, export."""
