"""The interleaved decoders: image stream and pointer stream, layer by layer."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax

from point3r_jax.config import ModelConfig
from point3r_jax.models.layers import Compute, DecoderBlock, layer_norm
from point3r_jax.models.rotary import (
  RotaryTable,
  disable_where,
  prepend_identity,
  rotary_3d,
)


@flax.struct.dataclass
class DecoderRotary:
  """Rotary tables of both streams' positions for one kind of block.

  Attributes:
    image: table of the pose token and the N image tokens.
    pointers: table of the C pointers.
  """

  image: RotaryTable
  pointers: RotaryTable


def decoder_rotary(
  config: ModelConfig,
  heads: int,
  image_position: jax.Array,
  pointer_position: jax.Array,
  first: jax.Array,
) -> DecoderRotary:
  """Builds a frame's tables for the blocks with this many heads.

  Args:
    config: the model's sizes.
    heads: heads of the blocks that use the tables.
    image_position: (B, N, 3) positions of the image tokens: the previous
      frame's patch-averaged world points.
    pointer_position: (B, C, 3).
    first: (B,) bool; a sample's first frame is not rotated.

  Returns:
    Tables with N+1 and C rows; the pose token in front is not rotated.
  """
  head_dim = config.decoder_width // heads

  def build(position):
    table = rotary_3d(position, head_dim, config.rotary_bases)
    return disable_where(table, first)

  return DecoderRotary(
    image=prepend_identity(build(image_position)),
    pointers=build(pointer_position),
  )


class InterleavedDecoder(nn.Module):
  """L layers in which the image stream and the pointers look at each other.

  Both blocks of a layer read the previous layer's outputs. The pointer stream's
  last output is not used by anything, so its last block is not computed; its
  parameters exist because checkpoints hold them.
  """

  config: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    pointers: jax.Array,
    pointer_count: jax.Array,
    image_rotary: DecoderRotary | None,
    pointer_rotary: DecoderRotary | None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the decoders.

    Args:
      image: (B, N+1, D) float32, the pose token first.
      pointers: (B, C, D) float32.
      pointer_count: (B,) int32, the valid prefix of the pointers.
      image_rotary: tables at the image blocks' head size, or None.
      pointer_rotary: tables at the pointer blocks' head size, or None.

    Returns:
      The image stream (B, N+1, D) float32 after layers L/2 and 3L/4, and after
      layer L and the final norm.
    """
    depth, ratio = self.config.decoder_depth, self.config.mlp_ratio
    taps = {}
    for layer in range(depth):
      image_block = DecoderBlock(
        self.config.decoder_heads,
        ratio,
        self.compute,
        name=f"image_block_{layer}",
      )
      pointer_block = DecoderBlock(
        self.config.pointer_heads,
        ratio,
        self.compute,
        name=f"pointer_block_{layer}",
      )
      next_image = image_block(
        image,
        pointers,
        image_rotary and image_rotary.image,
        image_rotary and image_rotary.pointers,
        context_length=pointer_count,
      )
      if layer < depth - 1 or self.is_initializing():
        pointers = pointer_block(
          pointers,
          image,
          pointer_rotary and pointer_rotary.pointers,
          pointer_rotary and pointer_rotary.image,
          length=pointer_count,
        )
      image = taps[layer + 1] = next_image
    if self.is_initializing():
      layer_norm("pointer_norm")(pointers)
    image = layer_norm("norm")(image)
    return taps[depth // 2], taps[3 * depth // 4], image
