"""Local Branch Routing on transformers models: tree, cache, attention plug-in, loop, and ``generate``."""
