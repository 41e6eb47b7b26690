"""Random arrays, and how close those that kernels make are to others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def draw(number, shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(number), shape).astype(dtype)


def assert_close(found, expected, atol):
  """Compares trees whose leaves may be rounded to bfloat16."""
  chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
  found, expected = (
    jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    for tree in (found, expected)
  )
  chex.assert_trees_all_close(found, expected, rtol=2**-7, atol=atol)
