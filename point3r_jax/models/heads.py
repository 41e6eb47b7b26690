"""Heads: point maps with confidence in two frames, and the camera pose."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from point3r_jax.config import ModelConfig
from point3r_jax.models.blocks import ModulatedBlock
from point3r_jax.models.compute import Compute
from point3r_jax.models.dpt import DenseHead
from point3r_jax.models.rotary import rotary_2d

# Modulated blocks in front of the world head.
_WORLD_DEPTH = 2


def _exponential_length(v: jax.Array) -> jax.Array:
  """Stretches vectors (…, 3) to the length expm1(‖v‖); gradient 0 at 0."""
  square = jnp.sum(v * v, axis=-1, keepdims=True)
  nonzero = square > 0
  length = jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, square, 1.0)), 0.0)
  return v / jnp.maximum(length, 1e-8) * jnp.expm1(length)


def point_map(raw: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Activates a dense head's output (…, 4).

  Returns:
    Points (…, 3) and confidences (…), the latter 1 or more.
  """
  return _exponential_length(raw[..., :3]), 1 + jnp.exp(raw[..., 3])


def pose_encoding(raw: jax.Array) -> jax.Array:
  """Activates the pose head's output (…, 7).

  Returns:
    (…, 7): translation, then a unit quaternion (w, x, y, z) with w ≥ 0.
  """
  quaternion = raw[..., 3:]
  square = jnp.sum(quaternion * quaternion, axis=-1, keepdims=True)
  quaternion = quaternion * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
  quaternion = jnp.where(quaternion[..., :1] < 0, -quaternion, quaternion)
  translation = _exponential_length(raw[..., :3])
  return jnp.concatenate([translation, quaternion], axis=-1)


class WorldHead(nn.Module):
  """Global points: the last map is turned by the pose token, then a DPT."""

  config: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(
    self,
    maps: tuple[jax.Array, ...],
    pose_token: jax.Array,
    grid: tuple[int, int],
  ) -> jax.Array:
    """Predicts four channels a pixel.

    Args:
      maps: four token maps (B, h·w, ·), see `DenseHead`.
      pose_token: (B, D), decoded.
      grid: (h, w).

    Returns:
      (B, 16h, 16w, 4) float32, before activations.
    """
    config = self.config
    rotary = rotary_2d(grid, config.decoder_width // config.decoder_heads)
    x = maps[-1].astype(self.compute.wide_residual)
    for layer in range(_WORLD_DEPTH):
      x = self.compute.remat_block(ModulatedBlock)(
        config.decoder_heads,
        config.mlp_ratio,
        self.compute,
        name=f"block_{layer}",
      )(x, pose_token, rotary)
    dense = self.compute.remat_dense(DenseHead)
    return dense(config, self.compute, name="dense")((*maps[:-1], x), grid)
