"""Poses, quaternions, and the pinhole camera; pure functions for jit and grad.

Cameras follow OpenCV: x right, y down, z forward. A pose maps camera
coordinates to global ones (camera-to-world), and the global frame is the first
camera's. Lengths are in the model's predicted scale; focal lengths are pixels.
Pixel (u, v) is column u and row v, integers being pixel centres. A quaternion
is (w, x, y, z), real part first.

Letters: H W image rows and columns, N points; `...` are batch axes.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Matrix units may round float32 operands to 10 mantissa bits or fewer, which
# is millimetres at a few metres: too coarse for coordinates.
_EXACT = lax.Precision.HIGHEST


def quaternion_to_matrix(quaternion: jax.Array) -> jax.Array:
  """Turns quaternions of any length into rotation matrices.

  Args:
    quaternion: (..., 4) w, x, y, z. Need not be of unit length; zero gives the
      identity.

  Returns:
    (..., 3, 3) rotation matrices.
  """
  w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
  norm = jnp.sum(quaternion * quaternion, axis=-1)
  s = 2.0 / jnp.where(norm > 0, norm, 1.0)
  elements = [
    [1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)],
    [s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x)],
    [s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)],
  ]
  return jnp.stack([jnp.stack(row, axis=-1) for row in elements], axis=-2)


def matrix_to_quaternion(rotation: jax.Array) -> jax.Array:
  """Turns rotation matrices into unit quaternions with real part >= 0.

  The entries of a rotation give 4 q qᵀ. Its row with the largest diagonal
  entry is a multiple of q of length at least 1, so normalising that row loses
  no precision at any angle and its gradient is finite everywhere.

  Args:
    rotation: (..., 3, 3) rotation matrices.

  Returns:
    (..., 4) w, x, y, z. The two signs of a half turn (w = 0) are not told
    apart.
  """
  r = rotation
  m00, m11, m22 = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
  wx, wy, wz = (
    r[..., 2, 1] - r[..., 1, 2],
    r[..., 0, 2] - r[..., 2, 0],
    r[..., 1, 0] - r[..., 0, 1],
  )
  xy, xz, yz = (
    r[..., 0, 1] + r[..., 1, 0],
    r[..., 0, 2] + r[..., 2, 0],
    r[..., 1, 2] + r[..., 2, 1],
  )
  diagonal = jnp.stack(
    [
      1 + m00 + m11 + m22,
      1 + m00 - m11 - m22,
      1 - m00 + m11 - m22,
      1 - m00 - m11 + m22,
    ],
    axis=-1,
  )
  ww, xx, yy, zz = jnp.moveaxis(diagonal, -1, 0)
  rows = [[ww, wx, wy, wz], [wx, xx, xy, xz], [wy, xy, yy, yz]]
  rows.append([wz, xz, yz, zz])
  outer = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)
  largest = jnp.argmax(diagonal, axis=-1)[..., None, None]
  row = jnp.take_along_axis(outer, largest, axis=-2)[..., 0, :]
  unit = row / jnp.linalg.norm(row, axis=-1, keepdims=True)
  return jnp.where(unit[..., :1] < 0, -unit, unit)


def _rigid(rotation: jax.Array, translation: jax.Array) -> jax.Array:
  """Joins (..., 3, 3) and (..., 3) to (..., 4, 4)."""
  top = jnp.concatenate([rotation, translation[..., None]], axis=-1)
  bottom = jnp.array([[0, 0, 0, 1]], top.dtype)
  bottom = jnp.broadcast_to(bottom, (*top.shape[:-2], 1, 4))
  return jnp.concatenate([top, bottom], axis=-2)


def pose_to_matrix(pose: jax.Array) -> jax.Array:
  """Turns the model's poses into camera-to-world matrices.

  Args:
    pose: (..., 7) translation, then quaternion w, x, y, z of any length.

  Returns:
    (..., 4, 4) rigid matrices, last row 0 0 0 1.
  """
  return _rigid(quaternion_to_matrix(pose[..., 3:]), pose[..., :3])


def matrix_to_pose(matrix: jax.Array) -> jax.Array:
  """Turns rigid matrices into translation and quaternion.

  Args:
    matrix: (..., 4, 4) rigid, camera-to-world.

  Returns:
    (..., 7) translation, then unit quaternion w, x, y, z with w >= 0.
  """
  quaternion = matrix_to_quaternion(matrix[..., :3, :3])
  return jnp.concatenate([matrix[..., :3, 3], quaternion], axis=-1)


def invert_pose(matrix: jax.Array) -> jax.Array:
  """Inverts rigid matrices: camera-to-world becomes world-to-camera.

  Args:
    matrix: (..., 4, 4) rigid.

  Returns:
    (..., 4, 4) inverses, rigid as well.
  """
  rotation = jnp.swapaxes(matrix[..., :3, :3], -1, -2)
  translation = jnp.einsum(
    "...ij,...j->...i", rotation, matrix[..., :3, 3], precision=_EXACT
  )
  return _rigid(rotation, -translation)


def transform_points(matrix: jax.Array, points: jax.Array) -> jax.Array:
  """Applies affine matrices to points.

  Args:
    matrix: (..., 4, 4); the last row is taken to be 0 0 0 1.
    points: (..., H, W, 3) or (..., N, 3) in the source frame. The axes `...`
      are as many as the matrix has, and broadcast against its own.

  Returns:
    Points of the same layout in the target frame.
  """
  batch = matrix.ndim - 2
  flat = points.reshape(*points.shape[:batch], -1, 3)
  rotation = jnp.swapaxes(matrix[..., :3, :3], -1, -2)
  # Sums, which are exact anywhere: a GPU has no matrix units for three columns.
  moved = matrix[..., None, :3, 3] + sum(
    flat[..., axis, None] * rotation[..., None, axis, :] for axis in range(3)
  )
  return moved.reshape(*moved.shape[:batch], *points.shape[batch:])


def _pixel_grid(height: int, width: int, dtype) -> jax.Array:
  """Pixel coordinates (u, v) of an image, (H, W, 2)."""
  u = jnp.arange(width, dtype=dtype)
  v = jnp.arange(height, dtype=dtype)
  return jnp.stack(jnp.meshgrid(u, v), axis=-1)


def _ratio_or_zero(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Quotient, zero where it is not finite; gradients stay finite as well."""
  finite = jnp.isfinite(numerator / denominator)
  denominator = jnp.where(finite, denominator, 1)
  return jnp.where(finite, numerator, 0) / denominator


def estimate_focal(points_camera: jax.Array) -> jax.Array:
  """Estimates the focal length that explains a point map.

  The principal point is taken to be (W // 2, H // 2) and pixels square. The
  sum of distances between each pixel and its reprojected point is minimised by
  iteratively reweighted least squares (Weiszfeld), from the least-squares
  start, with a fixed number of rounds.

  Args:
    points_camera: (..., H, W, 3) points in the frame's own camera. Pixels whose
      x/z or y/z is not finite count as zero.

  Returns:
    (...) focal lengths in pixels, >= 0; zero where none can be found.
  """
  points_camera = jnp.asarray(points_camera)
  height, width = points_camera.shape[-3:-1]
  p = _pixel_grid(height, width, points_camera.dtype)
  p = p - jnp.array([width // 2, height // 2], p.dtype)
  q = _ratio_or_zero(points_camera[..., :2], points_camera[..., 2:])
  pq = jnp.sum(p * q, axis=-1)  # (..., H, W)
  qq = jnp.sum(q * q, axis=-1)
  pixels = (-2, -1)
  start = _ratio_or_zero(jnp.mean(pq, pixels), jnp.mean(qq, pixels))

  def reweight(_, focal):
    residual = p - focal[..., None, None, None] * q
    squared = jnp.sum(residual * residual, axis=-1)
    # 1 / max(distance, 1e-8), written so that its gradient is finite at 0.
    weight = lax.rsqrt(jnp.maximum(squared, 1e-16))
    return _ratio_or_zero(
      jnp.mean(weight * pq, pixels), jnp.mean(weight * qq, pixels)
    )

  return jnp.maximum(lax.fori_loop(0, 10, reweight, start), 0)


def intrinsics_matrix(
  focal: jax.Array, image_size: tuple[int, int]
) -> jax.Array:
  """Builds pinhole intrinsics with the estimate's own principal point.

  Args:
    focal: (...) focal lengths in pixels.
    image_size: (height, width) in pixels; the principal point is
      (width // 2, height // 2), as in `estimate_focal`.

  Returns:
    (..., 3, 3) matrices that map camera rays to homogeneous pixels.
  """
  height, width = image_size
  focal = jnp.asarray(focal)
  zero, one = jnp.zeros_like(focal), jnp.ones_like(focal)
  elements = [
    [focal, zero, one * (width // 2)],
    [zero, focal, one * (height // 2)],
    [zero, zero, one],
  ]
  return jnp.stack([jnp.stack(row, axis=-1) for row in elements], axis=-2)


def unproject(depth: jax.Array, intrinsics: jax.Array) -> jax.Array:
  """Lifts depth maps to points in the camera frame.

  Args:
    depth: (..., H, W) z-depth (along the optical axis, not along the ray).
    intrinsics: (..., 3, 3), upper triangular, in pixels of this image.

  Returns:
    (..., H, W, 3) points, in the depth's unit.
  """
  k = intrinsics[..., None, None, :, :]
  u, v = jnp.moveaxis(_pixel_grid(*depth.shape[-2:], depth.dtype), -1, 0)
  y = (v - k[..., 1, 2]) / k[..., 1, 1]
  x = (u - k[..., 0, 2] - k[..., 0, 1] * y) / k[..., 0, 0]
  return jnp.stack([x * depth, y * depth, depth], axis=-1)


def project(points: jax.Array, intrinsics: jax.Array) -> jax.Array:
  """Projects points in the camera frame onto the image.

  Args:
    points: (..., H, W, 3) or (..., N, 3) in the camera frame. The axes `...`
      are as many as the intrinsics have.
    intrinsics: (..., 3, 3), upper triangular, in pixels.

  Returns:
    (..., H, W, 2) or (..., N, 2) pixels (u, v); NaN for points that are not in
    front of the camera (z <= 0), which have no image.
  """
  extra = points.ndim - 1 - (intrinsics.ndim - 2)
  k = intrinsics.reshape(*intrinsics.shape[:-2], *(1,) * extra, 3, 3)
  front = points[..., 2:] > 0
  ray = points[..., :2] / jnp.where(front, points[..., 2:], 1)
  x, y = ray[..., 0], ray[..., 1]
  u = k[..., 0, 0] * x + k[..., 0, 1] * y + k[..., 0, 2]
  v = k[..., 1, 1] * y + k[..., 1, 2]
  return jnp.where(front, jnp.stack([u, v], axis=-1), jnp.nan)
