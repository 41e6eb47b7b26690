"""Made-up scenes with exact geometry, rendered by JAX."""
