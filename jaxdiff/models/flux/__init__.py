"""FluxTransformer2DModel: its config, its blocks, and the adapter through which it is called."""
