"""The interleaved decoders: image stream and pointer stream, layer by layer."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax

from point3r_jax.config import ModelConfig
from point3r_jax.models.blocks import DecoderBlock
from point3r_jax.models.compute import Compute
from point3r_jax.models.layers import (
  attending,
  key_value,
  query_key_value,
)
from point3r_jax.models.norms import layer_norm, normalize
from point3r_jax.models.rotary import (
  RotaryTable,
  disable_where,
  rotary_3d,
  surround_by_identity,
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
  padding: int = 0,
) -> DecoderRotary:
  """Builds a frame's tables for the blocks with this many heads.

  Args:
    config: the model's sizes.
    heads: heads of the blocks that use the tables.
    image_position: (B, N, 3) positions of the image tokens: the previous
      frame's patch-averaged world points.
    pointer_position: (B, C, 3).
    first: (B,) bool; a sample's first frame is not rotated.
    padding: rows behind the image tokens, not rotated.

  Returns:
    Tables with 1+N+padding and C rows; the pose token in front is not rotated.
  """
  head_dim = config.decoder_width // heads

  def build(position):
    table = rotary_3d(position, head_dim, config.rotary_bases)
    return disable_where(table, first)

  return DecoderRotary(
    image=surround_by_identity(build(image_position), 1, padding),
    pointers=build(pointer_position),
  )


class DecoderLayer(nn.Module):
  """One layer of both streams; both read the previous layer's outputs.

  Attributes:
    config: the model's sizes.
    compute: precision and kernels.
    last: whether the pointers' update is not used by anything: then it is not
      computed; its parameters exist because checkpoints hold them.
  """

  config: ModelConfig
  compute: Compute
  last: bool = False

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    pointers: jax.Array,
    pointer_count: jax.Array,
    image_rotary: DecoderRotary | None,
    pointer_rotary: DecoderRotary | None,
    image_length: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Updates the streams; see `InterleavedDecoder` for the arguments.

    Returns:
      The image stream and the pointers, in their types; the latter as they came
      in if this is the last layer.
    """
    config, ratio = self.config, self.config.mlp_ratio
    scanned = config.scan_layers and not self.last
    block = self.compute.remat_block(DecoderBlock, scanned)
    image_block = block(
      config.decoder_heads, ratio, self.compute, name="image_block"
    )
    pointer_block = block(
      config.pointer_heads, ratio, self.compute, name="pointer_block"
    )

    def take(x, name, own, other):
      """What each block reads of x, if `params` made it one map, and x."""
      if not self.has_variable("params", name):
        return None, None, x
      normed, x = normalize(self.compute, x)
      taken = attending(self.compute, normed, own + other, name)
      return taken[: len(own)], taken[len(own) :], x

    image_own, image_other, image = take(
      image,
      "image_products",
      query_key_value(
        config.decoder_heads, image_rotary and image_rotary.image
      ),
      key_value(config.pointer_heads, pointer_rotary and pointer_rotary.image),
    )
    pointers_own, pointers_other, pointers = take(
      pointers,
      "pointer_products",
      query_key_value(
        config.pointer_heads, pointer_rotary and pointer_rotary.pointers
      ),
      key_value(config.decoder_heads, image_rotary and image_rotary.pointers),
    )
    next_image = image_block(
      image,
      pointers,
      image_rotary and image_rotary.image,
      image_rotary and image_rotary.pointers,
      image_length,
      pointer_count,
      image_own,
      pointers_other,
    )
    if self.last and not self.is_initializing():
      return next_image, pointers
    next_pointers = pointer_block(
      pointers,
      image,
      pointer_rotary and pointer_rotary.pointers,
      pointer_rotary and pointer_rotary.image,
      pointer_count,
      image_length,
      pointers_own,
      image_other,
    )
    return next_image, next_pointers


class InterleavedDecoder(nn.Module):
  """L layers in which the image stream and the pointers look at each other.

  With `config.scan_layers` all layers but the last are one scanned layer with
  stacked parameters (`layers`) instead of one a layer (`layer_0`, …).
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
    image_length: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the decoders.

    Args:
      image: (B, N+1, D) float32, the pose token first.
      pointers: (B, C, D) float32.
      pointer_count: (B,) int32, the valid prefix of the pointers.
      image_rotary: tables at the image blocks' head size, or None.
      pointer_rotary: tables at the pointer blocks' head size, or None.
      image_length: (B,) int32, the valid prefix of the image stream, or None
        for all. What follows is finite and without meaning.

    Returns:
      The image stream (B, N+1, D) after layers L/2 and 3L/4, in its residual's
      type, and float32 after layer L and the final norm.
    """
    depth = self.config.decoder_depth
    context = (pointer_count, image_rotary, pointer_rotary, image_length)
    last = depth - 1
    image = image.astype(self.compute.wide_residual)
    pointers = pointers.astype(self.compute.dtype)

    def layer(name: str, **options) -> DecoderLayer:
      return DecoderLayer(self.config, self.compute, name=name, **options)

    if self.config.scan_layers:

      def body(module, carry):
        carry = module(*carry, *context)
        return carry, carry[0]

      scanned = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=last,
      )
      (image, pointers), outputs = scanned(layer("layers"), (image, pointers))
    else:
      outputs = []
      for i in range(last):
        image, pointers = layer(f"layer_{i}")(image, pointers, *context)
        outputs.append(image)
    image, pointers = layer(f"layer_{last}", last=True)(
      image, pointers, *context
    )
    if self.is_initializing():
      layer_norm(self.compute, "pointer_norm")(pointers)
    half, three_quarters = outputs[depth // 2 - 1], outputs[3 * depth // 4 - 1]
    return half, three_quarters, layer_norm(self.compute, "norm")(image)
