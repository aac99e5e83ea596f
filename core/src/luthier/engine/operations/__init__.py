"""Named operations of the engine, each with its plain-torch reference, and their place in a transformers model."""
