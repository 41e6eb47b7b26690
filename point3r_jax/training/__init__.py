"""Training: the recurrent model, sharded, from configs to checkpoints."""
