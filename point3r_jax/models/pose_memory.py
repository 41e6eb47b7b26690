"""The pose memory: a fixed set of slots, read and rewritten every frame."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from point3r_jax.config import ModelConfig
from point3r_jax.models.compute import Compute
from point3r_jax.models.layers import DecoderBlock, Linear

# Blocks that read from, and blocks that write to, the slots.
_DEPTH = 2


class PoseMemory(nn.Module):
  """Slots of width 2D, read for a pose query and rewritten every frame."""

  config: ModelConfig
  compute: Compute

  def setup(self):
    """Creates the slots' start, the query's blank half and the blocks."""
    width = self.config.decoder_width
    zeros = nn.initializers.zeros
    self.initial_slots = self.param(
      "slots", zeros, (self.config.pose_slots, 2 * width)
    )
    self.masked_token = self.param("masked_token", zeros, (width,))
    self.projection = Linear(width, self.compute.dtype, result=jnp.float32)
    sizes = (self.config.decoder_heads, self.config.mlp_ratio, self.compute)
    block = self.compute.remat_block(DecoderBlock)
    self.read_blocks = [block(*sizes, alike=True) for _ in range(_DEPTH)]
    self.write_blocks = [block(*sizes) for _ in range(_DEPTH)]

  def _pair(self, summary: jax.Array, token: jax.Array) -> jax.Array:
    """Joins summaries (B, n, E) and tokens (B, n, D) to (B, n, 2D)."""
    return jnp.concatenate([self.projection(summary), token], axis=-1)

  def inquire(self, summary: jax.Array, slots: jax.Array) -> jax.Array:
    """Asks the slots for a pose token.

    Args:
      summary: (B, E), the frame's mean encoder token.
      slots: (B, S, 2D).

    Returns:
      (B, D) float32.
    """
    batch, width = summary.shape[0], self.config.decoder_width
    # Norms and products of one row would take many kernels.
    copies = -(-self.compute.token_block // batch)
    blank = jnp.broadcast_to(self.masked_token, (batch, copies, width))
    x = self._pair(jnp.repeat(summary[:, None], copies, axis=1), blank)
    for block in self.read_blocks:
      x = block(x, slots)
    return x[:, 0, width:]

  def update(
    self, summary: jax.Array, pose_token: jax.Array, slots: jax.Array
  ) -> jax.Array:
    """Writes a frame into the slots.

    Args:
      summary: (B, E), the frame's mean encoder token.
      pose_token: (B, D), the decoded pose token.
      slots: (B, S, 2D).

    Returns:
      The new slots, (B, S, 2D) float32.
    """
    context = self._pair(summary[:, None], pose_token[:, None])
    for block in self.write_blocks:
      slots = block(slots, context)
    return slots
