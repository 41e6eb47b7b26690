"""The picture of a scene: what is in it, and where it is seen from."""

import numpy as np
import pytest

from point3r_jax.export import overview

pytestmark = pytest.mark.filterwarnings("error")

SIZE = (90, 140)
UP = np.array([0.0, -1.0, 0.0])
ORANGE, WHITE, BLACK = (255, 128, 0), (255, 255, 255), (0, 0, 0)
GREY, RED = (128, 128, 128), (255, 0, 0)


def grid(x, y, z):
  """Returns the points of a grid; the arguments are low, high, count."""
  axes = (np.linspace(*ends) for ends in (x, y, z))
  return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 3)


@pytest.fixture
def room():
  """A floor, a far wall and a ceiling (red); cameras go ahead, 1.4 m high."""
  floor = grid((-2, 2, 81), (0, 0, 1), (0, 4, 81))
  wall = grid((-2, 2, 81), (-2.5, 0, 51), (4, 4, 1))
  ceiling = grid((-2, 2, 81), (-2.5, -2.5, 1), (0, 4, 81))
  points = np.concatenate([floor, wall, ceiling])
  colors = np.full(points.shape, 128, np.uint8)
  colors[-len(ceiling) :] = RED
  poses = np.tile(np.eye(4), (10, 1, 1))
  poses[:, 1, 3], poses[:, 2, 3] = -1.4, np.linspace(-0.5, 1.5, 10)
  return points, colors, overview.Cameras(poses, 50.0, (48, 64))


def test_the_ceiling_is_cut_off(room):
  points, _, cameras = room
  keep = overview.below_ceiling(points, cameras, UP)
  assert not keep[points[:, 1] < -2.2].any()
  assert keep[points[:, 1] > -2.0].all()
  assert overview.below_ceiling(points[:0], cameras, UP).shape == (0,)


def test_what_is_no_room_is_left_whole(room):
  points, _, cameras = room
  assert overview.below_ceiling(points - 9 * UP, cameras, -UP).all()


def test_points_are_as_large_as_pixels_of_the_nearest_camera(room):
  _, _, cameras = room
  points = cameras.positions[[0, 9]] + np.array([[0, 0, -1.0], [0, 0, 2.0]])
  radius = overview.point_radius(points, cameras)
  assert radius[1] == pytest.approx(2 * radius[0])
  assert 0.5 / 50 < radius[0] < 1.5 / 50


def test_the_view_is_from_behind_and_above_and_has_all_in_it(room):
  points, _, cameras = room
  points = points[overview.below_ceiling(points, cameras, UP)]
  view = overview.choose_view(points, cameras, UP, SIZE)
  position, forward = view.camera_to_world[:3, 3], view.camera_to_world[:3, 2]
  assert position @ UP > 2.5 and forward[2] > 0.3 and forward @ UP < -0.3
  pixels, _ = view.project(np.concatenate([points, cameras.positions]))
  inside = ((pixels > -0.5) & (pixels < np.array(SIZE[::-1]) - 0.5)).all(-1)
  assert inside[len(points) :].all() and inside.mean() > 0.97
  # It fills the picture along one side at least.
  assert (np.ptp(pixels, axis=0) / SIZE[::-1]).max() > 0.85
  low, high = view.project(np.array([[0, 0, 2.0], [0, -1, 2.0]]))[0][:, 1]
  assert high < low  # Up is up.


def test_a_picture_has_cloud_and_paths_but_no_ceiling(room):
  points, colors, cameras = room
  paths = [
    overview.Path(cameras.positions, ORANGE, 3),
    overview.Path(cameras.positions + 0.3, WHITE, 2),
  ]
  picture = overview.draw_overview(
    points, colors, cameras, UP, SIZE, paths, background=BLACK
  )
  assert picture.size == SIZE[::-1]
  pixels = np.asarray(picture).astype(int)

  def count(color, tolerance=40):
    return (np.abs(pixels - color).max(axis=-1) < tolerance).sum()

  assert count(GREY) > 2000 and count(ORANGE) > 50 and count(WHITE) > 30
  assert count(BLACK, 1) > 500 and count(RED) == 0


def test_cameras_that_look_all_around_or_down(room):
  points = room[0]
  turn = np.diag([-1.0, 1, -1, 1])
  poses = np.stack([np.eye(4), turn])
  down = np.eye(4)
  down[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
  for camera_to_world in (poses, down[None]):
    odd = overview.Cameras(camera_to_world, 50.0, (48, 64))
    view = overview.choose_view(points, odd, UP, SIZE)
    assert np.isfinite(view.camera_to_world).all()


@pytest.mark.parametrize("points", [np.zeros((0, 3)), np.full((5, 3), np.nan)])
def test_nothing_to_see(room, points):
  cameras = room[2]
  colors = np.zeros(points.shape, np.uint8)
  picture = overview.draw_overview(points, colors, cameras, UP, SIZE)
  assert picture.getcolors() == [(SIZE[0] * SIZE[1], WHITE)]


def test_a_single_place_and_an_impossible_lens(room):
  points, colors = np.zeros((4, 3)), np.zeros((4, 3), np.uint8)
  cameras = overview.Cameras(np.eye(4)[None], 0.0, (48, 64))
  paths = [overview.Path(cameras.positions, ORANGE)]
  picture = overview.draw_overview(points, colors, cameras, UP, SIZE, paths)
  assert picture.size == SIZE[::-1]
