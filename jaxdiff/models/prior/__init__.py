"""PriorTransformer: its config, its modules, and the adapter through which it is called."""
