"""Pictures of point clouds: every point a small disc, the nearest one wins.

Plain NumPy, no graphics card. Cameras are OpenCV's (x right, y down, z
forward), lengths in the unit of the points, integer pixel coordinates are
pixel centres.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_MAX_RADIUS = 12  # Pixels; larger discs are cut down to it.
_NEAR = 1e-6  # Least depth, as a share of the greatest.


@dataclasses.dataclass(frozen=True)
class View:
  """A pinhole camera with its principal point in the middle of the image.

  Attributes:
    camera_to_world: (4, 4) rigid.
    focal: focal length in pixels.
    image_size: (H, W).
  """

  camera_to_world: np.ndarray
  focal: float
  image_size: tuple[int, int]

  def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds where points are in the image.

    Args:
      points: (..., 3) in the world.

    Returns:
      (..., 2) pixels x, y and (...) z-depth; the pixels of points that are not
      in front of the camera are NaN.
    """
    rotation = self.camera_to_world[:3, :3]
    local = (points - self.camera_to_world[:3, 3]) @ rotation
    depth = local[..., 2]
    front = np.where(depth > 0, depth, np.nan)[..., None]
    middle = (np.array(self.image_size[::-1]) - 1) / 2
    return self.focal * local[..., :2] / front + middle, depth

  def scaled(self, factor: float) -> View:
    """Returns the same view with `factor` times as many pixels a side."""
    size = tuple(max(round(factor * n), 1) for n in self.image_size)
    return View(self.camera_to_world, factor * self.focal, size)


def look_at(
  position: np.ndarray, target: np.ndarray, up: np.ndarray
) -> np.ndarray:
  """Aims a camera.

  Args:
    position: (3,) of the camera.
    target: (3,) what is in the middle of its image.
    up: (3,) what is up in it, of any length, not along the line of sight.

  Returns:
    (4, 4) camera-to-world.
  """
  forward = (target - position) / np.linalg.norm(target - position)
  right = np.cross(forward, up)
  right /= np.linalg.norm(right)
  pose = np.eye(4)
  pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
  pose[:3, 3] = position
  return pose


def _disc(radius: int) -> list[tuple[int, int, int]]:
  """Returns squared distance, x and y of all pixels of a disc, from within."""
  steps = range(-radius, radius + 1)
  offsets = [(x * x + y * y, x, y) for y in steps for x in steps]
  return sorted(offset for offset in offsets if offset[0] <= radius**2)


def nearest_points(
  view: View, points: np.ndarray, radius: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the point that is seen in each pixel.

  Discs bulge towards the viewer like shields, so that where those of one
  surface overlap, a pixel belongs to the disc in whose middle it is.

  Args:
    view: where from.
    points: (N, 3) finite, in the world.
    radius: (N,) or one for all, of the discs, in the points' unit. No disc is
      smaller than a pixel.

  Returns:
    (H, W) int64 indices of points, -1 where there is none, and (H, W) float32
    z-depth of the discs: a point's own in the middle, up to a radius more at
    the edge; infinite where there is none.
  """
  height, width = view.image_size
  pixel, depth = view.project(points)
  size = np.broadcast_to(radius, depth.shape)
  inside = depth > _NEAR * depth.max(initial=0)
  reach = np.zeros(depth.shape)
  np.divide(view.focal * size, depth, out=reach, where=inside)
  reach = np.clip(reach, 0.5, _MAX_RADIUS)
  inside &= (pixel > -reach[:, None]).all(axis=1)
  inside &= (pixel < np.array([width, height]) + reach[:, None]).all(axis=1)
  # The largest discs first: those that reach a pixel are a prefix.
  index = np.flatnonzero(inside)
  index = index[np.argsort(-reach[index], kind="stable")]
  column, row = np.rint(pixel[index]).astype(np.int64).T
  depth, size, square_reach = depth[index], size[index], reach[index] ** 2

  # Depth and index in one number, the smallest of which is what is seen: the
  # bits of positive floats are ordered as they are.
  nothing = np.iinfo(np.uint64).max
  seen = np.full(height * width, nothing)
  for square, x, y in _disc(_MAX_RADIUS):
    count = np.searchsorted(-square_reach, -square, side="right")
    u, v = column[:count] + x, row[:count] + y
    within = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    bulge = size[:count] * square / square_reach[:count]
    bits = (depth[:count] + bulge)[within].astype(np.float32).view(np.uint32)
    key = bits.astype(np.uint64) << np.uint64(32)
    key |= index[:count][within].astype(np.uint64)
    np.minimum.at(seen, (v * width + u)[within], key)
  found = (seen & np.uint64(0xFFFFFFFF)).astype(np.int64)
  found = np.where(seen == nothing, -1, found)
  nearest = (seen >> np.uint64(32)).astype(np.uint32).view(np.float32)
  nearest = np.where(seen == nothing, np.float32(np.inf), nearest)
  return found.reshape(height, width), nearest.reshape(height, width)


def edge_shade(depth: np.ndarray, reach: int, strength: float) -> np.ndarray:
  """Returns how bright pixels are that have something nearer beside them.

  "Eye-dome lighting": it separates what is in front from what is behind, and
  needs neither normals nor lights.

  Args:
    depth: (H, W) z-depth, infinite where nothing is.
    reach: pixels to the neighbours, along rows, columns and diagonals.
    strength: of the darkening.

  Returns:
    (H, W) in (0, 1].
  """
  height, width = depth.shape
  level = np.log(np.where(np.isfinite(depth), depth, 1))
  level[~np.isfinite(depth)] = np.inf
  padded = np.pad(level, reach, mode="edge")
  total = np.zeros_like(level)
  for y in (0, reach, 2 * reach):
    for x in (0, reach, 2 * reach):
      with np.errstate(invalid="ignore"):
        nearer = level - padded[y : y + height, x : x + width]
      total += np.clip(np.nan_to_num(nearer, posinf=0.0), 0, 0.1)
  return np.exp(-strength * total / 8)


def render_points(
  view: View,
  points: np.ndarray,
  colors: np.ndarray,
  radius: np.ndarray | float,
  background: tuple[int, int, int] = (255, 255, 255),
  supersampling: int = 2,
  edges: float = 6.0,
) -> np.ndarray:
  """Draws a cloud.

  Args:
    view: where from.
    points: (N, 3) in the world; those that are not finite are left out.
    colors: (N, 3) uint8 RGB.
    radius: (N,) or one for all, of the points, in their unit.
    background: colour of pixels without a point.
    supersampling: samples along each side of a pixel, against jagged edges.
    edges: how dark things are beside nearer ones; 0: not at all.

  Returns:
    (H, W, 3) uint8 RGB.
  """
  finite = np.isfinite(points).all(axis=1)
  radius = np.broadcast_to(radius, finite.shape)[finite]
  points, colors = points[finite], colors[finite]
  fine = view.scaled(supersampling)
  index, depth = nearest_points(fine, points, radius)
  table = np.concatenate([colors, [background]])  # The last one is index -1.
  shade = edge_shade(depth, supersampling, edges)
  image = table[index] * shade[..., None]
  height, width = view.image_size
  blocks = image.reshape(height, supersampling, width, supersampling, 3)
  return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
