"""Training runs: one `get_config()` a file, made from `base`."""
