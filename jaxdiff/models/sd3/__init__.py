"""SD3Transformer2DModel: its config, its modules, and the adapter through which it is called."""
