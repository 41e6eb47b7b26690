"""Points as discs: where they are, and which of them is seen."""

import numpy as np
import pytest

from point3r_jax.export import splat

pytestmark = pytest.mark.filterwarnings("error")

SIZE = (41, 61)
MIDDLE = (20, 30)  # Row and column.
VIEW = splat.View(np.eye(4), 50.0, SIZE)
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def draw(points, colors, radius=0.0, view=VIEW, **options):
  options = {"supersampling": 1, "edges": 0, **options}
  return splat.render_points(
    view, np.array(points, float), np.array(colors, np.uint8), radius, **options
  )


def is_color(image, color):
  return (image == color).all(axis=-1)


def test_projection_is_a_pinhole_camera_s():
  points = np.array([[0, 0, 2.0], [0.4, -0.2, 2.0], [0, 0, -1.0]])
  pixels, depth = VIEW.project(points)
  np.testing.assert_allclose(pixels[:2], [[30, 20], [40, 15]])
  assert np.isnan(pixels[2]).all()
  np.testing.assert_allclose(depth, [2, 2, -1])


def test_look_at_aims_and_is_upright():
  position, target = np.array([1.0, -2, 3]), np.array([-1.0, 0, 5])
  up = np.array([0, -3.0, 0])
  pose = splat.look_at(position, target, up)
  np.testing.assert_allclose(
    pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12
  )
  assert np.linalg.det(pose) > 0
  view = splat.View(pose, 50.0, SIZE)
  pixels, depth = view.project(np.array([target, target + 0.1 * up]))
  np.testing.assert_allclose(pixels[0], MIDDLE[::-1], atol=1e-9)
  assert pixels[1, 1] < pixels[0, 1] and abs(pixels[1, 0] - 30) < 1e-9
  assert depth[0] == pytest.approx(np.linalg.norm(target - position))


def test_a_scaled_view_sees_the_same():
  points = np.array([[0.3, 0.2, 1.5]])
  pixels, _ = VIEW.scaled(2).project(points)
  expected = 2 * VIEW.project(points)[0] + 0.5  # Centres of pixels.
  np.testing.assert_allclose(pixels, expected)
  assert VIEW.scaled(0.01).image_size == (1, 1)


def test_a_point_is_where_it_projects_and_of_its_size():
  image = draw([[0.4, -0.2, 2.0]], [RED])
  assert is_color(image, RED).sum() == 1 and is_color(image[15, 40], RED)
  disc = is_color(draw([[0, 0, 2.0]], [RED], radius=0.2), RED)
  rows, columns = np.nonzero(disc)
  assert (np.ptp(rows), np.ptp(columns)) == (10, 10)  # 50 * 0.2 / 2 each way.
  assert disc.sum() == pytest.approx(np.pi * 25, rel=0.1)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_the_nearer_point_hides_the_farther(order, radius):
  points = np.array([[0, 0, 2.0], [0, 0, 2.1]])[order]
  colors = np.array([RED, BLUE])[order]
  image = draw(points, colors, radius)
  assert is_color(image[MIDDLE], RED) and not is_color(image, BLUE).any()


def test_a_large_disc_behind_does_not_cover_a_small_one():
  image = draw([[0, 0, 3.0], [0, 0, 2.0]], [BLUE, RED], np.array([0.5, 0.0]))
  assert is_color(image, RED).sum() == 1 and is_color(image[MIDDLE], RED)
  assert is_color(image, BLUE).sum() > 100


def test_discs_of_one_surface_meet_half_way():
  points, colors = [[-0.1, 0, 2.0], [0.1, 0, 2.0]], [RED, BLUE]
  image = draw(points, colors, radius=0.2)
  assert is_color(image[20, 25:30], RED).all()
  assert is_color(image[20, 31:36], BLUE).all()


def test_indices_and_depths_of_pixels():
  points = np.array([[9.0, 9, 1], [0, 0, -2], [0, 0, 3.0], [0, 0, 5.0]])
  index, depth = splat.nearest_points(VIEW, points, 0.0)
  assert index[MIDDLE] == 2 and depth[MIDDLE] == 3
  assert (index == -1).sum() == np.isinf(depth).sum() == index.size - 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_or_behind_is_not_drawn(bad):
  points = [[0, 0, bad], [bad, 0, 1], [0, 0, -1], [0, 0, 0]]
  image = draw(points, [RED] * 4, 0.1, background=BLUE)
  assert is_color(image, BLUE).all()


def test_no_points_are_only_background():
  image = draw(np.zeros((0, 3)), np.zeros((0, 3)), supersampling=2, edges=5)
  assert image.shape == (*SIZE, 3) and is_color(image, WHITE).all()


def test_supersampling_smooths_edges():
  image = draw([[0, 0, 2.0]], [BLUE], radius=0.2, supersampling=3)
  assert is_color(image[MIDDLE], BLUE)
  mixed = ~is_color(image, BLUE) & ~is_color(image, WHITE)
  assert 10 < mixed.sum() < 60


def test_edges_darken_what_is_behind():
  depth = np.full((8, 12), 4.0)
  depth[:, 6:], depth[:, 10:] = 2.0, np.inf
  shade = splat.edge_shade(depth, 1, 10.0)
  assert (shade[:, 5] < 0.9).all()
  np.testing.assert_array_equal(np.delete(shade, 5, axis=1), 1)
