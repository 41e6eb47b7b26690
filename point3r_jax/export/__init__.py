"""Results out: clouds, cameras, depth; knows nothing of models."""
