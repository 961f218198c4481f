"""ChromaTransformer2DModel: its config, its module, and the adapter through which it is called."""
