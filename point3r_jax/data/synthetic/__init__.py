"""Synthetic scenes with exact geometry, rendered by JAX."""
