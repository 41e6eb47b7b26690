"""The vision transformer behind both encoders: of images and of point maps."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from point3r_jax.models.blocks import EncoderBlock
from point3r_jax.models.compute import Compute
from point3r_jax.models.linear import Linear
from point3r_jax.models.norms import layer_norm
from point3r_jax.models.rotary import rotary_2d, surround_by_identity


def patchify(image: jax.Array, patch: int) -> jax.Array:
  """Cuts (B, H, W, K) into (B, h·w, patch·patch·K) rows, row-major."""
  batch, height, width, channels = image.shape
  x = image.reshape(
    batch, height // patch, patch, width // patch, patch, channels
  )
  return x.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


class VisionTransformer(nn.Module):
  """Patch embedding, pre-norm blocks with 2D rotary embedding, final norm.

  Attributes:
    width: channels of a token.
    depth: number of blocks.
    heads: attention heads.
    patch_size: side of a patch in pixels.
    mlp_ratio: hidden over outer width.
    compute: precision and kernels.
    scan_layers: one scanned block with stacked parameters (`blocks`) instead of
      one block a layer (`block_0`, `block_1`, …).
  """

  width: int
  depth: int
  heads: int
  patch_size: int
  mlp_ratio: int
  compute: Compute
  scan_layers: bool = False

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Encodes a map (B, H, W, K) float32 to tokens (B, h·w, width) float32."""
    grid = tuple(side // self.patch_size for side in image.shape[1:3])
    # Float32 operands under every policy, as point maps have a wide range.
    x = Linear(self.width, jnp.float32, name="patch_embed")(
      patchify(image, self.patch_size)
    ).astype(self.compute.dtype)
    rotary = rotary_2d(grid, self.width // self.heads)
    tokens = x.shape[1]
    x, padding, length = self.compute.pad_tokens(x)
    rotary = surround_by_identity(rotary, 0, padding)

    def block(name: str) -> EncoderBlock:
      encoder_block = self.compute.remat_block(EncoderBlock, self.scan_layers)
      return encoder_block(self.heads, self.mlp_ratio, self.compute, name=name)

    if self.scan_layers:
      scanned = nn.scan(
        lambda module, carry: (module(carry, rotary, length), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=self.depth,
      )
      x, _ = scanned(block("blocks"), x)
    else:
      for layer in range(self.depth):
        x = block(f"block_{layer}")(x, rotary, length)
    return layer_norm(self.compute, "norm")(x[:, :tokens])
