"""Random numbers for code that draws many small things."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


class Draws:
  """Hands out uniform numbers of a block that is drawn at once.

  Compiling a call of the generator takes longer than compiling what is made of
  its numbers, so a scene's hundred draws share one call. Lives within a trace.
  """

  def __init__(self, key: jax.Array, count: int):
    """Draws a block of `count` numbers; asking for more is an IndexError."""
    self._block = jax.random.uniform(key, (count,))
    self._used = 0

  def uniform(self, low=0.0, high=1.0, shape: tuple[int, ...] = ()):
    """Returns numbers in [low, high); the bounds broadcast against `shape`."""
    start, self._used = self._used, self._used + math.prod(shape)
    if self._used > self._block.size:
      raise IndexError(f"more than the {self._block.size} numbers were drawn")
    numbers = self._block[start : self._used].reshape(shape)
    return low + (high - low) * numbers

  def log_uniform(self, low: float, high: float, shape: tuple[int, ...] = ()):
    """Returns numbers in [low, high) whose logarithms are uniform."""
    return jnp.exp(self.uniform(np.log(low), np.log(high), shape))

  def chance(self, probability, shape: tuple[int, ...] = ()):
    """Returns booleans, true with the given probability."""
    return self.uniform(shape=shape) < probability

  def sign(self, shape: tuple[int, ...] = ()):
    """Returns -1 or 1."""
    return jnp.where(self.chance(0.5, shape), -1.0, 1.0)

  def integer(self, count: int, shape: tuple[int, ...] = ()):
    """Returns int32 in [0, count)."""
    numbers = self.uniform(0, count, shape).astype(jnp.int32)
    return jnp.minimum(numbers, count - 1)  # The product may round up.
