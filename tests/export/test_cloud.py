import logging
import time

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from point3r_jax.export import cloud

_settings = settings(deadline=None, max_examples=60)


def _scene(rng, count, spread):
  points = rng.normal(scale=spread, size=(count, 3)).astype(np.float32)
  return points, rng.integers(0, 256, (count, 3), dtype=np.uint8)


def _means(points, colors, size):
  """Brute force: a dictionary from cell to the means of its points."""
  cells = {}
  for point, color in zip(points.astype(np.float64), colors, strict=True):
    cell = tuple(np.floor(point / size).astype(int))
    cells.setdefault(cell, []).append(np.concatenate([point, color]))
  return {cell: np.mean(rows, axis=0) for cell, rows in cells.items()}


def _assert_equals(result, expected):
  """Checks a cloud's arrays against cells, in the order of their voxels."""
  points, colors = result
  assert points.dtype == np.float32
  assert colors.dtype == np.uint8
  rows = np.array([expected[cell] for cell in sorted(expected)])
  rows = rows.reshape(-1, 6)
  np.testing.assert_allclose(points, rows[:, :3], rtol=1e-5, atol=1e-6)
  # Means next to a half may round to either side.
  assert np.abs(colors - rows[:, 3:]).max(initial=0) <= 0.5 + 1e-3


def _cuts(count):
  """Places where a list of points is cut into frames."""
  return st.lists(st.integers(0, count), max_size=6).map(sorted)


@_settings
@given(
  seed=st.integers(0, 2**32 - 1),
  spread=st.sampled_from([0.1, 1.0, 30.0]),
  cuts=_cuts(80),
  buffer_points=st.integers(1, 100),
  threads=st.integers(1, 9),
)
def test_voxels_are_means_however_the_points_arrive(
  seed, spread, cuts, buffer_points, threads
):
  rng = np.random.default_rng(seed)
  points, colors = _scene(rng, 80, spread)
  expected = _means(points, colors, 0.5)
  order = rng.permutation(80)
  voxels = cloud.VoxelCloud(0.5, buffer_points=buffer_points, threads=threads)
  for part in np.split(order, cuts):
    voxels.add(points[part], colors[part])
  _assert_equals(voxels.arrays(), expected)
  summary = voxels.summary()
  assert summary.points == len(expected)
  assert summary.added == 80
  assert summary.doublings == 0


@_settings
@given(
  seed=st.integers(0, 2**32 - 1),
  cuts=_cuts(80),
  buffer_points=st.integers(1, 100),
  max_points=st.integers(8, 60),
)
def test_doubling_keeps_all_points(seed, cuts, buffer_points, max_points):
  rng = np.random.default_rng(seed)
  points, colors = _scene(rng, 80, 2.0)
  doublings = 0
  while len(_means(points, colors, 0.25 * 2**doublings)) > max_points:
    doublings += 1
  expected = _means(points, colors, 0.25 * 2**doublings)
  voxels = cloud.VoxelCloud(0.25, max_points, buffer_points)
  for part in np.split(rng.permutation(80), cuts):
    voxels.add(points[part], colors[part])
  summary = voxels.summary()
  assert summary.doublings == doublings
  assert summary.voxel_size == 0.25 * 2**doublings
  assert summary.points == len(expected) <= max_points
  assert voxels._held.voxels.count.sum() == 80
  _assert_equals(voxels.arrays(), expected)


def test_doubling_is_logged(caplog):
  voxels = cloud.VoxelCloud(1.0, max_points=8, buffer_points=1)
  points = np.arange(27).reshape(9, 3).astype(np.float32)
  with caplog.at_level(logging.WARNING):
    voxels.add(points, np.zeros((9, 3), np.uint8))
    voxels.summary()
  assert "voxel size doubled to 2" in caplog.text


def test_result_does_not_depend_on_time(monkeypatch):
  """How far away a point may be depends on the size of voxels."""
  rng = np.random.default_rng(0)
  points, colors = _scene(rng, 4000, 20.0)
  points[::7] = [1e6, 0, 0]
  average = cloud._average_frames

  def run(late):
    def slow(frames, voxel_size):
      result = average(frames, voxel_size)
      time.sleep(0.01 * (int(frames[0][1].sum()) % 3 == late))
      return result

    monkeypatch.setattr(cloud, "_average_frames", slow)
    voxels = cloud.VoxelCloud(0.25, 300, buffer_points=100, threads=3)
    for first in range(0, 4000, 50):
      part = slice(first, first + 50)
      voxels.add(points[part], colors[part])
      time.sleep(0.001 * (first % 3 == late))
    return voxels.summary(), voxels.arrays()

  facts, expected = run(0)
  assert facts.doublings > 2 and facts.out_of_range > 20
  for late in (1, 2):
    found_facts, found = run(late)
    assert found_facts == facts
    chex.assert_trees_all_equal(found, expected)


def test_frames_can_follow_after_reading():
  rng = np.random.default_rng(0)
  points, colors = _scene(rng, 60, 1.0)
  voxels = cloud.VoxelCloud(0.5)
  voxels.add(points[:30], colors[:30])
  first = voxels.arrays()
  copies = [array.copy() for array in first]
  voxels.add(points[30:], colors[30:])
  _assert_equals(voxels.arrays(), _means(points, colors, 0.5))
  for array, copy in zip(first, copies, strict=True):
    np.testing.assert_array_equal(array, copy)


def test_input_is_not_kept():
  points, colors = np.ones((4, 3), np.float32), np.ones((4, 3), np.uint8)
  voxels = cloud.VoxelCloud(1.0)
  voxels.add(points, colors)
  points[:], colors[:] = 7, 7
  np.testing.assert_array_equal(voxels.arrays()[0], [[1, 1, 1]])
  np.testing.assert_array_equal(voxels.arrays()[1], [[1, 1, 1]])


def test_image_shaped_frames():
  points = np.zeros((4, 5, 3), np.float32)
  colors = np.full((4, 5, 3), 9, np.uint8)
  voxels = cloud.VoxelCloud(1.0)
  voxels.add(points, colors)
  assert voxels.summary().added == 20
  np.testing.assert_array_equal(voxels.arrays()[1], [[9, 9, 9]])


def test_what_is_left_out_is_counted():
  points = np.zeros((6, 3), np.float32)
  points[0, 1] = np.nan
  points[1, 2] = -np.inf
  points[2, 0] = 2.0**20  # The first cell beyond the range.
  points[3, 0] = -(2.0**20)  # The last one within.
  points[4, 2] = 3e38
  voxels = cloud.VoxelCloud(1.0)
  voxels.add(points, np.zeros((6, 3), np.uint8))
  summary = voxels.summary()
  assert summary.added == 6
  assert summary.non_finite == 2
  assert summary.out_of_range == 2
  np.testing.assert_array_equal(
    voxels.arrays()[0], [[-(2.0**20), 0, 0], [0, 0, 0]]
  )


def test_keys_reach_the_ends_of_the_range():
  ends = np.array([-(2**20), -1, 0, 2**20 - 1])
  cells = np.stack(np.meshgrid(ends, ends, ends), axis=0).reshape(3, -1)
  keys = cloud._pack(cells)
  assert keys.min() >= 0
  assert len(np.unique(keys)) == 64
  np.testing.assert_array_equal(
    cloud._parent_keys(keys), cloud._pack(cells // 2)
  )


def test_empty_cloud():
  voxels = cloud.VoxelCloud()
  voxels.add(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8))
  voxels.add(np.full((2, 3), np.nan, np.float32), np.zeros((2, 3), np.uint8))
  points, colors = voxels.arrays()
  assert points.shape == colors.shape == (0, 3)
  assert voxels.summary() == cloud.CloudSummary(0, None, 0, 2, 2, 0)


def test_voxel_size_from_the_first_frame():
  rng = np.random.default_rng(0)
  points = rng.uniform(0, 10, (20000, 3)).astype(np.float32)
  points[:100] *= 1e6  # Half a percent of outliers.
  nothing = np.full((5, 3), np.nan, np.float32)
  for none in (None, 0):
    voxels = cloud.VoxelCloud(none)
    voxels.add(nothing, np.zeros((5, 3), np.uint8))
    voxels.add(points, np.zeros((20000, 3), np.uint8))
    voxels.add(points * 50, np.zeros((20000, 3), np.uint8))
    expected = 9 * np.sqrt(3) / 500
    assert voxels.summary().voxel_size == pytest.approx(expected, rel=0.02)


def test_voxel_size_of_degenerate_frames():
  assert cloud.automatic_voxel_size(np.full((4, 3), -5.0)) == 5 / 500
  assert cloud.automatic_voxel_size(np.zeros((4, 3))) == 1 / 500


@pytest.mark.parametrize("size", [-1.0, np.nan, np.inf])
def test_wrong_voxel_sizes_are_refused(size):
  with pytest.raises(ValueError, match="voxel_size"):
    cloud.VoxelCloud(size)


def test_wrong_arrays_are_refused():
  voxels = cloud.VoxelCloud(1.0)
  points = np.zeros((4, 3), np.float32)
  with pytest.raises(ValueError, match="uint8"):
    voxels.add(points, points)
  with pytest.raises(ValueError, match="3"):
    voxels.add(points, np.zeros((5, 3), np.uint8))
  with pytest.raises(ValueError, match="max_points"):
    cloud.VoxelCloud(1.0, max_points=7)


@_settings
@given(st.floats(0, 100), st.integers(0, 2**32 - 1))
def test_confidence_mask_keeps_the_share(percentile, seed):
  confidence = np.random.default_rng(seed).random((12, 16), np.float32)
  mask = cloud.confidence_mask(confidence, percentile)
  assert mask.dtype == bool
  share = 1 - percentile / 100
  assert abs(mask.mean() - share) <= 1 / mask.size + 1e-9
  if not mask.all():
    assert confidence[mask].min() > confidence[~mask].max()


def test_confidence_mask_edges():
  confidence = np.array([[1, 2, np.nan], [np.inf, 3, np.inf]], np.float32)
  assert cloud.confidence_mask(confidence, 0).all()
  np.testing.assert_array_equal(
    cloud.confidence_mask(confidence, 60),
    [[False, False, False], [True, False, True]],
  )
  nothing = np.full((2, 2), np.nan)
  assert not cloud.confidence_mask(nothing, 10).any()
  assert cloud.confidence_mask(np.ones((2, 2)), 90).all()
  with pytest.raises(ValueError, match="percentile"):
    cloud.confidence_mask(confidence, 101)
