"""A picture of a whole scene: its cloud from above and behind, and its cameras.

The viewer stands behind the middle of the path, raised, and looks the way that
the cameras look. So walls that cameras face are seen from the side that they
saw, and what is behind the cameras is not in the way; a ceiling would be, and
is cut off by height. Of a few such places, to the left and to the right, the
one is taken from which most of the cloud is seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from point3r_jax.export.splat import (
  View,
  look_at,
  nearest_points,
  render_points,
)

# Where the viewer may stand, in degrees.
_AZIMUTHS = (-40, -25, 25, 40)
_ELEVATION = 36
_ANGLE = 40  # Of view, along the longer side.
_MARGIN = 0.04  # Of the picture, on each side.
_ROUNDS = 8  # To find the distance; each is nearer to it than the last.
_SAMPLE = 20_000  # Points to choose the viewer's place by.

# What is higher above the cameras than this share of their own height above
# the floor is cut off, and so is the top of what is left: the ceiling.
_HEADROOM = 0.9
_TOP = 0.15  # As a share of the scene's height.
_INLIERS = (0.5, 99.5)  # Percentiles; points between are in the picture.

_SPACING = 0.9  # Radius of a point, in pixels of the nearest camera.
_FRUSTUM = 0.035  # Length of a camera's pyramid, as a share of the scene.
_THIN = 1.5  # Width of its lines, in pixels.
_FINE = 4  # Samples a pixel along each side, of lines.


@dataclasses.dataclass(frozen=True)
class Cameras:
  """T cameras of one lens.

  Attributes:
    camera_to_world: (T, 4, 4) rigid, OpenCV axes.
    focal: in pixels.
    image_size: (H, W).
  """

  camera_to_world: np.ndarray
  focal: float
  image_size: tuple[int, int]

  @property
  def positions(self) -> np.ndarray:
    """(T, 3) in the world."""
    return self.camera_to_world[:, :3, 3]


@dataclasses.dataclass(frozen=True)
class Path:
  """A line through the scene.

  Attributes:
    positions: (T, 3) in the world.
    color: RGB.
    width: in pixels.
  """

  positions: np.ndarray
  color: tuple[int, int, int]
  width: float = 3.0


def below_ceiling(
  points: np.ndarray, cameras: Cameras, up: np.ndarray
) -> np.ndarray:
  """Returns which of (N, 3) points are not too high to look over, (N,) bool.

  Args:
    points: in the world.
    cameras: that saw them.
    up: (3,) unit vector.
  """
  if not len(points):
    return np.zeros(0, bool)
  height = points @ up
  floor, top = np.percentile(height, [2, 99.5])
  eye = np.median(cameras.positions @ up)
  if not floor < eye:  # Whatever this is, it is no room.
    return np.ones(len(points), bool)
  limit = eye + _HEADROOM * (eye - floor)
  return height <= min(limit, top - _TOP * (top - floor))


def point_radius(points: np.ndarray, cameras: Cameras) -> np.ndarray:
  """Returns how large points must be to leave no gaps, (N,).

  Args:
    points: (N, 3) in the world.
    cameras: that saw them.
  """
  nearest = np.full(len(points), np.inf)
  for position in cameras.positions:
    offset = points - position
    np.minimum(nearest, np.einsum("ni,ni->n", offset, offset), out=nearest)
  return _SPACING * np.sqrt(nearest) / max(cameras.focal, 1)


def _heading(cameras: Cameras, up: np.ndarray) -> np.ndarray:
  """Returns the level direction (3,) in which cameras look on average."""
  forward = cameras.camera_to_world[:, :3, 2]
  # They may look all around, or the first one straight down.
  for line in (
    forward.mean(axis=0),
    *(cameras.camera_to_world[0, :3, 2::-1]).T,
  ):
    level = line - (line @ up) * up
    if np.linalg.norm(level) > 0.1:
      break
  return level / np.linalg.norm(level)


def _place(
  points: np.ndarray,
  path: np.ndarray,
  line: np.ndarray,
  up: np.ndarray,
  image_size: tuple[int, int],
) -> View:
  """Returns the view along a line in which a scene fills the image.

  Args:
    points: (N, 3) of the cloud; outliers may be out of sight.
    path: (T, 3) of the cameras, none of which may.
    line: (3,) unit vector from the viewer.
    up: (3,) unit vector.
    image_size: (H, W).
  """
  size = np.array(image_size[::-1])
  focal = size.max() / 2 / np.tan(np.deg2rad(_ANGLE) / 2)
  target = np.median(points, axis=0)
  spread = np.linalg.norm(np.concatenate([points, path]) - target, axis=1)
  distance = 3 * np.percentile(spread, 90) + 1e-6
  for _ in range(_ROUNDS):
    view = View(
      look_at(target - distance * line, target, up), focal, image_size
    )
    pixels = np.nanpercentile(view.project(points)[0], _INLIERS, axis=0)
    pixels = np.concatenate([pixels, view.project(path)[0]])
    low, high = np.nanmin(pixels, axis=0), np.nanmax(pixels, axis=0)
    aside = (low + high - size + 1) / 2
    target = target + view.camera_to_world[:3, :2] @ aside * distance / focal
    fill = np.max((high - low) / size) / (1 - 2 * _MARGIN)
    distance *= np.clip(fill, 0.5, 2)
  return view


def choose_view(
  points: np.ndarray,
  cameras: Cameras,
  up: np.ndarray,
  image_size: tuple[int, int],
) -> View:
  """Finds a place from which a scene is seen well; see the module.

  Args:
    points: (N, 3) finite, N > 0.
    cameras: that saw them.
    up: (3,) unit vector.
    image_size: (H, W) of the picture.
  """
  points = points[:: -(-len(points) // _SAMPLE)]
  radius = 3 * point_radius(points, cameras)
  heading = _heading(cameras, up)
  views = []
  for azimuth in _AZIMUTHS:
    a, e = np.deg2rad([azimuth, _ELEVATION])
    level = np.cos(a) * heading + np.sin(a) * np.cross(up, heading)
    line = np.cos(e) * level - np.sin(e) * up
    views.append(_place(points, cameras.positions, line, up, image_size))

  def seen(view: View) -> int:
    small = view.scaled(1 / 4)
    return len(np.unique(nearest_points(small, points, radius)[0]))

  return max(views, key=seen)


def _draw_lines(
  picture: Image.Image,
  lines: Sequence[np.ndarray],
  color: tuple[int, int, int],
  width: float,
  opacity: float = 1.0,
) -> None:
  """Draws (n, 2) pixel lines, smoothly; those with NaN are left out."""
  mask = Image.new("L", [_FINE * n for n in picture.size])
  draw = ImageDraw.Draw(mask)
  for line in lines:
    if np.isfinite(line).all() and (np.abs(line) < 1e5).all():
      fine = [tuple(place) for place in _FINE * (line + 0.5)]
      thick = round(_FINE * width)
      draw.line(fine, round(255 * opacity), thick, joint="curve")
      for x, y in (fine[0], fine[-1]):  # Round ends.
        r = thick / 2
        draw.ellipse((x - r, y - r, x + r, y + r), round(255 * opacity))
  picture.paste(color, (0, 0), mask.reduce(_FINE))


def _frusta(cameras: Cameras, shown: np.ndarray, length: float) -> np.ndarray:
  """Returns the pyramids of cameras as lines (n, 8, 3) in the world."""
  height, width = cameras.image_size
  # No lens is wider than a right angle.
  x, y = np.array([width, height]) / max(2 * cameras.focal, width)
  corners = np.array([[-x, -y, 1], [x, -y, 1], [x, y, 1], [-x, y, 1]])
  apex = np.zeros(3)
  # One stroke: around the base, and to the apex and back.
  a, b, c, d = length * corners
  stroke = np.array([a, b, c, d, a, apex, b, c, apex, d])
  poses = cameras.camera_to_world[shown]
  return stroke @ np.swapaxes(poses[:, :3, :3], 1, 2) + poses[:, None, :3, 3]


def draw_overview(
  points: np.ndarray,
  colors: np.ndarray,
  cameras: Cameras,
  up: np.ndarray,
  image_size: tuple[int, int],
  paths: Sequence[Path] = (),
  background: tuple[int, int, int] = (255, 255, 255),
  frusta: int = 6,
) -> Image.Image:
  """Draws a scene.

  Paths and cameras are drawn over the cloud: nothing hides them.

  Args:
    points: (N, 3) in the world.
    colors: (N, 3) uint8 RGB.
    cameras: that saw them; finite.
    up: (3,) unit vector, away from the floor.
    image_size: (H, W) of the picture.
    paths: to draw, the last on top. The first has the cameras' pyramids.
    background: RGB.
    frusta: how many pyramids, evenly along the path.

  Returns:
    RGB.
  """
  keep = np.isfinite(points).all(axis=1)
  points, colors = points[keep].astype(np.float64), colors[keep]
  keep = below_ceiling(points, cameras, up)
  points, colors = points[keep], colors[keep]
  if not len(points):
    return Image.new("RGB", image_size[::-1], background)
  view = choose_view(points, cameras, up, image_size)
  radius = point_radius(points, cameras)
  picture = Image.fromarray(
    render_points(view, points, colors, radius, background)
  )
  extent = np.linalg.norm(
    np.ptp(np.percentile(points, [2, 98], axis=0), axis=0)
  )
  strokes = [
    ([view.project(path.positions)[0]], path.color, path.width)
    for path in paths
  ]
  if paths:
    shown = np.linspace(0, len(cameras.positions) - 1, frusta).round()
    pyramids = _frusta(cameras, shown.astype(int), _FRUSTUM * extent)
    pixels = list(view.project(pyramids)[0])
    strokes.insert(0, (pixels, paths[0].color, _THIN))
  for lines, _, width in strokes:  # So that they stand out against the cloud.
    _draw_lines(picture, lines, background, width + 2.5, 0.6)
  for stroke in strokes:
    _draw_lines(picture, *stroke)
  return picture
