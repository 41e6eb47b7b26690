"""The network: a frame and the past, to predictions and new pointers."""

from __future__ import annotations

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from point3r_jax.config import ModelConfig
from point3r_jax.models.compute import Compute
from point3r_jax.models.decoder import InterleavedDecoder, decoder_rotary
from point3r_jax.models.dpt import DenseHead
from point3r_jax.models.encoder import VisionTransformer
from point3r_jax.models.heads import WorldHead, point_map, pose_encoding
from point3r_jax.models.layers import Mlp
from point3r_jax.models.linear import Linear
from point3r_jax.models.parameter import parameter
from point3r_jax.models.pose_memory import PoseMemory

HEADS = ("both", "camera", "world")


@flax.struct.dataclass
class Context:
  """What the network reads of the past.

  Attributes:
    position: (B, C, 3) float32, pointers in the global frame.
    feature: (B, C, D) float32, pointer features.
    count: (B,) int32, the valid prefix of the pointers.
    pose_slots: (B, S, 2D) float32.
    image_position: (B, N, 3) float32, the previous frame's pointer positions.
    first: (B,) bool, whether this is the sample's first frame; everything else
      is then ignored.
  """

  position: jax.Array
  feature: jax.Array
  count: jax.Array
  pose_slots: jax.Array
  image_position: jax.Array
  first: jax.Array


@flax.struct.dataclass
class FrameOutput:
  """What the network makes of a frame.

  Attributes:
    points_camera: (B, H, W, 3) float32 in the camera's frame, or None.
    confidence_camera: (B, H, W) float32, or None.
    points_world: (B, H, W, 3) float32 in the global frame.
    confidence_world: (B, H, W) float32.
    pose: (B, 7) float32 camera-to-world: translation, quaternion wxyz.
    position: (B, N, 3) float32, the frame's own pointers.
    feature: (B, N, D) float32, their features.
    pose_slots: (B, S, 2D) float32, the rewritten pose memory.
    maps: four token maps (B, N, ·), what the dense heads read.
  """

  points_camera: jax.Array | None
  confidence_camera: jax.Array | None
  points_world: jax.Array
  confidence_world: jax.Array
  pose: jax.Array
  position: jax.Array
  feature: jax.Array
  pose_slots: jax.Array
  maps: tuple[jax.Array, ...]


@flax.struct.dataclass
class BegunFrame:
  """A frame before the decoders: what does not depend on pointers in memory.

  Attributes:
    image: (B, N+padding, D), the image stream but for its pose query, of
      `Compute.wide_residual` as all that has no other type.
    image_length: (B,) int32, its valid prefix 1+N, or None without padding.
    own: (B, N, D), the pointers of a first frame.
    count: (B,) int32, the valid prefix of the pointers that decoders see.
    summary: (B, n, D), see `PoseMemory.summarise`.
    pose_slots: (B, S, 2D) float32.
  """

  image: jax.Array
  image_length: jax.Array | None
  own: jax.Array
  count: jax.Array
  summary: jax.Array
  pose_slots: jax.Array


class Point3R(nn.Module):
  """Point3R for one frame a sample (paper, section 3).

  Attributes:
    config: the model's sizes.
    compute: precision and kernels.
    rotary: whether the decoders use the 3D rotary embedding.
    camera_head: whether the camera-frame points are computed. (World points
      always are: the new pointers are made of them.)
  """

  config: ModelConfig
  compute: Compute
  rotary: bool = True
  camera_head: bool = True

  def setup(self):
    """Creates the parts; their names are the parameters' names."""
    config, compute = self.config, self.compute
    encoder = {
      "width": config.encoder_width,
      "heads": config.encoder_heads,
      "patch_size": config.patch_size,
      "mlp_ratio": config.mlp_ratio,
      "compute": compute,
      "scan_layers": config.scan_layers,
    }
    self.encoder = VisionTransformer(depth=config.encoder_depth, **encoder)
    self.value_encoder = VisionTransformer(depth=config.value_depth, **encoder)
    wide = compute.wide_residual
    linear = functools.partial(Linear, dtype=compute.dtype, result=wide)
    self.image_projection = linear(config.decoder_width)
    self.pointer_projection = linear(config.decoder_width)
    self.decoder = InterleavedDecoder(config, compute)
    self.pose_token = parameter(self, "pose_token", (config.decoder_width,))
    self.pose_memory = PoseMemory(config, compute)
    self.pose_head = Mlp(4 * config.decoder_width, 7, jnp.float32, "highest")
    self.camera_dense = compute.remat_dense(DenseHead)(config, compute)
    self.world_head = WorldHead(config, compute)
    self.key_head = Mlp(
      config.encoder_width + config.decoder_width,
      config.encoder_width,
      compute.dtype,
      result=wide,
      exact=compute.exact_gelu,
      sums=compute.inner_sums,
    )
    self.value_projection = linear(config.encoder_width)

  def encode(self, images: jax.Array) -> jax.Array:
    """Encodes frames, each by itself.

    Args:
      images: (B, H, W, 3) uint8, or float32 in [-1, 1].

    Returns:
      Tokens (B, N, E) float32.
    """
    if images.dtype == jnp.uint8:
      images = images.astype(jnp.float32) / 127.5 - 1
    return self.encoder(images)

  def __call__(
    self, tokens: jax.Array, context: Context, grid: tuple[int, int]
  ) -> FrameOutput:
    """Lets encoded frames interact with what is remembered.

    Args:
      tokens: (B, N, E) float32 from `encode`.
      context: the past, C ≥ N.
      grid: (h, w) with h·w = N.

    Returns:
      Predictions, the frame's pointers and the rewritten pose memory.
    """
    begun = self.begin(tokens, context, grid)
    decoded = self.decode(begun, context)
    return self.finish(tokens, begun, decoded, grid)

  def begin(
    self, tokens: jax.Array, context: Context, grid: tuple[int, int]
  ) -> BegunFrame:
    """Makes what needs no pointers in memory; see `__call__` for arguments."""
    first, num_tokens = context.first, tokens.shape[1]
    slots = jnp.where(
      first[:, None, None], self.pose_memory.initial_slots, context.pose_slots
    )
    image, _, length = self.compute.pad_tokens(
      self.image_projection(tokens), before=1
    )
    return BegunFrame(
      image=image,
      image_length=length,
      own=self.pointer_projection(tokens),
      count=jnp.where(first, num_tokens, context.count),
      summary=self.pose_memory.summarise(
        tokens.reshape(-1, *grid, tokens.shape[-1])
      ),
      pose_slots=slots,
    )

  def decode(
    self, begun: BegunFrame, context: Context
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs the decoders, and makes the pose query and the pointers they read.

    Args:
      begun: from `begin`.
      context: of which rows of pointers beyond `begun.count` may be left out.

    Returns:
      What `InterleavedDecoder` does, padded to (B, 1+N+padding, D).
    """
    config, first = self.config, context.first
    query = jnp.where(
      first[:, None],
      self.pose_token,
      self.pose_memory.inquire(begun.summary, begun.pose_slots),
    )
    self.sow("intermediates", "pose_query", query)
    image = jnp.concatenate([query[:, None], begun.image], axis=1)
    padding = begun.image.shape[1] - begun.own.shape[1]
    rows = context.feature.shape[1]
    own = begun.own[:, :rows]
    own = jnp.pad(own, ((0, 0), (0, rows - own.shape[1]), (0, 0)))
    pointers = jnp.where(first[:, None, None], own, context.feature)
    tables = [
      decoder_rotary(
        config, heads, context.image_position, context.position, first, padding
      )
      if self.rotary
      else None
      for heads in (config.decoder_heads, config.pointer_heads)
    ]
    return self.decoder(
      image, pointers, begun.count, *tables, begun.image_length
    )

  def finish(
    self,
    tokens: jax.Array,
    begun: BegunFrame,
    decoded: tuple[jax.Array, jax.Array, jax.Array],
    grid: tuple[int, int],
  ) -> FrameOutput:
    """Makes the output of a frame.

    Args:
      tokens: (B, N, E) float32 from `encode`.
      begun: from `begin`.
      decoded: from `decode`, three times (B, 1+N+padding, D).
      grid: (h, w) with h·w = N.

    Returns:
      As `__call__`.
    """
    half, three_quarters, last = (x[:, : tokens.shape[1] + 1] for x in decoded)
    self.sow("intermediates", "decoder_half", half)
    self.sow("intermediates", "decoder_three_quarters", three_quarters)
    self.sow("intermediates", "decoder_last", last)
    pose_token, last = last[:, 0], last[:, 1:]
    slots = self.pose_memory.update(begun.summary, pose_token, begun.pose_slots)

    maps = (tokens, half[:, 1:], three_quarters[:, 1:], last)
    raw_world = self.world_head(maps, pose_token, grid)
    points_world, confidence_world = point_map(raw_world)
    raw_camera = self.camera_dense(maps, grid) if self.camera_head else None
    # New pointers wait for these points, nothing waits for the camera's: XLA is
    # not to make both in one kernel, nor these again for the pointers.
    points_world, raw_camera = jax.lax.optimization_barrier(
      (points_world, raw_camera)
    )
    points_camera, confidence_camera = (
      point_map(raw_camera) if self.camera_head else (None, None)
    )
    position, feature = self._new_pointers(tokens, last, points_world, grid)
    return FrameOutput(
      points_camera=points_camera,
      confidence_camera=confidence_camera,
      points_world=points_world,
      confidence_world=confidence_world,
      pose=pose_encoding(self.pose_head(pose_token)),
      position=position,
      feature=feature,
      pose_slots=slots,
      maps=maps,
    )

  def camera_points(
    self, maps: tuple[jax.Array, ...], grid: tuple[int, int]
  ) -> tuple[jax.Array, jax.Array]:
    """Predicts the points in frames' own cameras, each frame by itself.

    Args:
      maps: of `FrameOutput`.
      grid: (h, w) with h·w = N.

    Returns:
      Points (B, H, W, 3) and confidences (B, H, W), float32.
    """
    return point_map(self.camera_dense(maps, grid))

  def _new_pointers(
    self,
    tokens: jax.Array,
    decoded: jax.Array,
    points_world: jax.Array,
    grid: tuple[int, int],
  ) -> tuple[jax.Array, jax.Array]:
    """Makes a pointer of each token: position (B, N, 3), feature (B, N, D).

    No gradient flows into what enters here: only the weights of these parts
    learn, from what later frames read.
    """
    tokens, decoded, points_world = jax.lax.stop_gradient(
      (tokens, decoded, points_world)
    )
    key = self.key_head(jnp.concatenate([tokens, decoded], axis=-1))
    value = self.value_projection(self.value_encoder(points_world))
    # In this order: the key, which is there sooner, is added within the product
    # that gives the value.
    feature = self.pointer_projection(value + key).astype(jnp.float32)
    batch, patch = tokens.shape[0], self.config.patch_size
    patches = points_world.reshape(batch, grid[0], patch, grid[1], patch, 3)
    position = patches.mean(axis=(2, 4)).reshape(batch, -1, 3)
    return position, feature
