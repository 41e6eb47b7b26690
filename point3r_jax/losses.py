"""The training loss: confidence-weighted point maps and poses, masks only.

Paper, section 3.5; the constants are the published training's. Letters: T
frames, B batch, H W image. Frames are OpenCV, poses camera-to-world. Every
shape is static: pixels and samples that do not count are masked, not dropped.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from point3r_jax.geometry import (
  invert_pose,
  matrix_to_pose,
  transform_points,
  unproject,
)
from point3r_jax.streaming import Prediction

# Scales below this are not trusted: points are divided by no less, and poses
# of such samples do not count.
_MIN_SCALE = 1e-3
# Camera-only samples compare viewing rays, cut off at this tangent.
_MAX_TANGENT = 2.0


@dataclasses.dataclass(frozen=True)
class LossOptions:
  """Which loss, with the published constants.

  Attributes:
    per_sample: normalise depth-only and single-view samples by themselves (the
      later stages' loss); False treats all samples alike (stage 1).
    alpha: weight of the term that keeps confidences up.
    points_weight: of the mean over all point map terms.
    pose_weight: of the pose term.
    pose_clip: the pose term is cut off above, and then has no gradient.
    sky_loss: what a sky pixel is taken to cost: it trains confidence only.
  """

  per_sample: bool = True
  alpha: float = 0.2
  points_weight: float = 2.0
  pose_weight: float = 5.0
  pose_clip: float = 0.3
  sky_loss: float = 2.0


@flax.struct.dataclass
class Targets:
  """What the predictions of a batch of sequences should be.

  Attributes:
    points_camera: (T, B, H, W, 3) float32, points in each frame's own camera.
    points_world: (T, B, H, W, 3) float32, in the first frame's camera.
    pose: (T, B, 7) float32, camera-to-world in the first frame's camera:
      translation, unit quaternion wxyz with w ≥ 0.
    valid: (T, B, H, W) bool, pixels with a known point.
    sky: (T, B, H, W) bool, pixels that see the sky.
    is_metric: (B,) bool, lengths are metres and are to be learnt as such.
    camera_only: (B,) bool, only viewing rays and poses are known.
    depth_only: (B,) bool, depth is known up to scale and shift.
    single_view: (B,) bool, the frames have nothing to do with each other.
  """

  points_camera: jax.Array
  points_world: jax.Array
  pose: jax.Array
  valid: jax.Array
  sky: jax.Array
  is_metric: jax.Array
  camera_only: jax.Array
  depth_only: jax.Array
  single_view: jax.Array


def make_targets(
  depth: jax.Array,
  intrinsics: jax.Array,
  camera_to_world: jax.Array,
  **flags: jax.Array,
) -> Targets:
  """Builds targets from depth maps and cameras.

  Args:
    depth: (T, B, H, W) float32 z-depth; 0 is not measured, below 0 is sky.
    intrinsics: (T, B, 3, 3) in pixels.
    camera_to_world: (T, B, 4, 4) in any common frame of a sequence.
    **flags: the (B,) bool fields of `Targets`.

  Returns:
    Targets in the first frame's camera.
  """
  to_first = jnp.einsum(
    "bij,tbjk->tbik",
    invert_pose(camera_to_world[0]),
    camera_to_world,
    precision="highest",
  )
  points = unproject(depth, intrinsics)
  finite = jnp.all(jnp.isfinite(points), axis=-1)
  # The published loss lets sky pixels, whose points mean nothing, into the
  # means that depth-only and single-view samples are normalised by.
  points = jnp.where(finite[..., None], points, 0.0)
  return Targets(
    points_camera=points,
    points_world=transform_points(to_first, points),
    pose=matrix_to_pose(to_first),
    valid=(depth > 0) & finite,
    sky=depth < 0,
    **flags,
  )


def _norm(x: jax.Array) -> jax.Array:
  """Euclidean norm of the last axis; its gradient is 0 at 0."""
  square = jnp.sum(x * x, axis=-1)
  zero = square == 0  # And not "> 0", which would hide NaN.
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def _mean(x: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
  """Mean of x where the mask is set; 0 where it is nowhere."""
  total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis)
  return total / jnp.maximum(jnp.sum(mask, axis=axis), 1)


def _per_sample(flag: jax.Array, like: jax.Array) -> jax.Array:
  """Reshapes flags (B,) to broadcast against (T, B, …)."""
  return flag.reshape(1, -1, *[1] * (like.ndim - 2))


def _points_scale(
  maps: tuple[jax.Array, jax.Array],
  weights: tuple[jax.Array, jax.Array],
  valid: jax.Array,
) -> jax.Array:
  """Returns (B,) mean distances of both maps' points, weighted."""
  pixels = (0, 2, 3)
  total = sum(
    jnp.sum(jnp.where(valid, weight * _norm(points), 0.0), pixels)
    for points, weight in zip(maps, weights, strict=True)
  )
  weight = sum(jnp.sum(jnp.where(valid, w, 0.0), pixels) for w in weights)
  return jnp.maximum(total / (weight + 1e-8), 1e-8)


def _tangents(points: jax.Array) -> jax.Array:
  """Divides points by their depth, and cuts off."""
  depth = jnp.maximum(points[..., 2:], 1e-6)
  return jnp.clip(points / depth, -_MAX_TANGENT, _MAX_TANGENT)


def _shape_distance(
  predicted: jax.Array, target: jax.Array, mask: jax.Array
) -> jax.Array:
  """Distance of maps, each divided by its own view's mean length."""

  def normalise(points):
    length = _mean(_norm(points), mask, axis=(2, 3))
    return points / jnp.maximum(length, 1e-6)[:, :, None, None, None]

  return _norm(normalise(predicted) - normalise(target))


def _depth_distance(
  predicted: jax.Array, target: jax.Array, mask: jax.Array
) -> jax.Array:
  """Distance of depths, each up to its own view's shift and scale."""

  def normalise(points):
    depth = points[..., 2]
    depth = depth - _mean(depth, mask, axis=(2, 3))[:, :, None, None]
    spread = _mean(jnp.abs(depth), mask, axis=(2, 3))
    return depth / jnp.maximum(spread, 1e-6)[:, :, None, None]

  return jnp.abs(normalise(predicted) - normalise(target))


def _pixel_loss(
  predicted: jax.Array,
  target: jax.Array,
  mask: jax.Array,
  sky: jax.Array,
  targets: Targets,
  options: LossOptions,
) -> jax.Array:
  """Returns (T, B, H, W) distances of scaled maps (T, B, H, W, 3)."""
  loss = _norm(predicted - target)
  if options.per_sample:
    shape = targets.single_view & ~targets.is_metric
    loss = jnp.where(
      _per_sample(shape, loss), _shape_distance(predicted, target, mask), loss
    )
    loss = jnp.where(
      _per_sample(targets.depth_only, loss),
      _depth_distance(predicted, target, mask),
      loss,
    )
  return jnp.where(sky, options.sky_loss, loss)


def _pose_loss(
  prediction: Prediction,
  targets: Targets,
  scale: jax.Array,
  target_scale: jax.Array,
) -> jax.Array:
  """Returns the mean distance of translations and quaternions.

  The scales (B,) are those of the predicted and the true points.
  """
  translation, target = prediction.pose[..., :3], targets.pose[..., :3]
  length = jnp.mean(_norm(translation), axis=0)
  target_length = jnp.mean(_norm(target), axis=0)
  length = jnp.where(targets.is_metric, target_length, length)
  scale = jnp.where(targets.camera_only, length, scale)
  target_scale = jnp.where(targets.camera_only, target_length, target_scale)
  counts = (scale > _MIN_SCALE) & (target_scale > _MIN_SCALE)
  divisor, target_divisor = (
    jnp.maximum(s, _MIN_SCALE)[None, :, None] for s in (scale, target_scale)
  )
  distance = _norm(translation / divisor - target / target_divisor)
  turn = _norm(prediction.pose[..., 3:] - targets.pose[..., 3:])
  return _mean(distance + turn, jnp.broadcast_to(counts, turn.shape))


def point3r_loss(
  prediction: Prediction, targets: Targets, options: LossOptions
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the loss of a batch of sequences, and its parts.

  Each sample's points are divided by their confidence-weighted mean distance,
  the true ones by the true one; metric samples are all divided by the true one,
  so that their scale is learnt.

  Args:
    prediction: of `scan`, both heads, with a leading T.
    targets: what it should have been.
    options: which loss.

  Returns:
    The loss, and scalars or (T,) vectors by name: `camera` and `world` (mean
    distances after scaling), `camera_confidence` and `world_confidence` (the
    terms of the loss), `pose`.
  """
  confidences = (prediction.confidence_camera, prediction.confidence_world)
  predicted = (prediction.points_camera, prediction.points_world)
  target = (targets.points_camera, targets.points_world)
  valid = targets.valid
  weights = tuple(
    jax.lax.stop_gradient(jnp.maximum(jnp.log(c), 1e-3)) for c in confidences
  )
  target_scale = _points_scale(target, weights, valid)
  scale = _points_scale(predicted, weights, valid)
  scale = jnp.where(targets.is_metric, target_scale, scale)
  pose = _pose_loss(prediction, targets, scale, target_scale)

  sky = targets.sky & ~valid
  mask = valid | sky
  parts = {}
  for name, points, true, confidence in zip(
    ("camera", "world"), predicted, target, confidences, strict=True
  ):
    points = points / _per_sample(jnp.maximum(scale, _MIN_SCALE), points)
    true = true / _per_sample(jnp.maximum(target_scale, _MIN_SCALE), true)
    counted = mask
    if name == "camera":
      rays = _per_sample(targets.camera_only, points)
      points = jnp.where(rays, _tangents(points), points)
      true = jnp.where(rays, _tangents(true), true)
    else:
      counted = mask & ~_per_sample(targets.camera_only, mask)
    loss = _pixel_loss(points, true, mask, sky, targets, options)
    confident = confidence * loss - options.alpha * jnp.log(confidence)
    parts[name] = _mean(loss, counted, axis=(1, 2, 3))
    parts[f"{name}_confidence"] = _mean(confident, counted, axis=(1, 2, 3))
  parts["pose"] = pose

  terms = parts["camera_confidence"], parts["world_confidence"]
  total = options.points_weight * jnp.mean(jnp.stack(terms))
  total += options.pose_weight * jnp.minimum(pose, options.pose_clip)
  return total, parts
