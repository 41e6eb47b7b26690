"""Images and videos in; knows nothing of models."""
