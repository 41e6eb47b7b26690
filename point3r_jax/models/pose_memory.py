"""The pose memory: a fixed set of slots, read and rewritten every frame."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from point3r_jax.config import ModelConfig
from point3r_jax.models.blocks import DecoderBlock
from point3r_jax.models.compute import Compute
from point3r_jax.models.linear import Linear
from point3r_jax.models.parameter import parameter

# Blocks that read from, and blocks that write to, the slots.
_DEPTH = 2


class PoseMemory(nn.Module):
  """Slots of width 2D, read for a pose query and rewritten every frame."""

  config: ModelConfig
  compute: Compute

  def setup(self):
    """Creates the slots' start, the query's blank half and the blocks."""
    width = self.config.decoder_width
    self.initial_slots = parameter(
      self, "slots", (self.config.pose_slots, 2 * width)
    )
    self.masked_token = parameter(self, "masked_token", (width,))
    self.projection = Linear(
      width, self.compute.dtype, result=self.compute.wide_residual
    )
    sizes = (self.config.decoder_heads, self.config.mlp_ratio, self.compute)
    block = self.compute.remat_block(DecoderBlock)
    self.read_blocks = [block(*sizes, alike=True) for _ in range(_DEPTH)]
    self.write_blocks = [block(*sizes) for _ in range(_DEPTH)]

  def summarise(self, tokens: jax.Array) -> jax.Array:
    """Makes the frame's half of what the slots are asked for, and rewritten by.

    Args:
      tokens: (B, h, w, E), the frame's encoder tokens.

    Returns:
      (B, n, D), n like rows: see `Compute.fill_block`.
    """
    # Row by row first: one sum of all tokens leaves most of a GPU idle.
    mean = tokens.mean(axis=2).mean(axis=1)
    return self.projection(self.compute.fill_block(mean))

  def inquire(self, summary: jax.Array, slots: jax.Array) -> jax.Array:
    """Asks the slots for a pose token.

    Args:
      summary: (B, n, D) from `summarise`.
      slots: (B, S, 2D).

    Returns:
      (B, D) float32.
    """
    blank = jnp.broadcast_to(self.masked_token, summary.shape)
    x = jnp.concatenate([summary, blank], axis=-1)
    x, slots = self._begin(x, slots)
    for block in self.read_blocks:
      x = block(x, slots)
    return x[:, 0, summary.shape[-1] :].astype(jnp.float32)

  def update(
    self, summary: jax.Array, pose_token: jax.Array, slots: jax.Array
  ) -> jax.Array:
    """Writes a frame into the slots.

    Args:
      summary: (B, n, D) from `summarise`.
      pose_token: (B, D), the decoded pose token.
      slots: (B, S, 2D).

    Returns:
      The new slots, (B, S, 2D) float32.
    """
    context = jnp.concatenate([summary[:, 0], pose_token], axis=-1)[:, None]
    slots, context = self._begin(slots, context)
    for block in self.write_blocks:
      slots = block(slots, context)
    return slots.astype(jnp.float32)

  def _begin(self, *streams: jax.Array) -> list[jax.Array]:
    """Returns what blocks read in their type."""
    return [x.astype(self.compute.wide_residual) for x in streams]
