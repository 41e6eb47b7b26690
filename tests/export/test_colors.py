"""Colours: their order, their scales, and what is no depth."""

import numpy as np
import pytest

from point3r_jax.export import colors

pytestmark = pytest.mark.filterwarnings("error")


def test_a_table_goes_through_its_stops():
  table = colors.color_table("000000 ff0000 ffff00")
  assert table.shape == (256, 3) and table.dtype == np.uint8
  np.testing.assert_array_equal(table[[0, 255]], [[0, 0, 0], [255, 255, 0]])
  assert (np.diff(table.astype(int), axis=0) >= 0).all()
  assert (table[:127, 1] == 0).all() and (table[129:, 0] == 255).all()


def test_levels_outside_have_the_end_colours():
  level = np.array([-1.0, 0.0, 0.5, 1.0, 7.0])
  got = colors.colorize(level, colors.VIRIDIS)
  np.testing.assert_array_equal(got, colors.VIRIDIS[[0, 0, 128, 255, 255]])


def test_near_is_red_and_far_is_blue():
  near, far = colors.NEAR_IS_RED[[10, 245]].astype(int)
  assert near[0] > near[2] and far[2] > far[0]


def test_the_usual_range_is_of_measures_alone():
  values = np.linspace(1, 101, 101)
  odd = np.array([np.nan, np.inf, -5.0, 0.0])
  assert colors.usual_range(np.append(values, odd)) == (3.0, 99.0)
  assert colors.usual_range(odd) == (1.0, 2.0)
  low, high = colors.usual_range(np.full(4, 3.0))
  assert low == 3.0 < high


def test_equal_ratios_are_equal_steps():
  ramp = np.stack([np.arange(256)] * 3, axis=-1).astype(np.uint8)
  depth = np.array([[0.5, 1.0, 2.0, 4.0, 8.0]])
  got = colors.log_colors(depth, (1.0, 4.0), ramp)
  np.testing.assert_array_equal(got[0, :, 0], [0, 0, 128, 255, 255])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, 0.0])
def test_what_is_no_depth_has_its_own_colour(bad):
  depth = np.array([1.0, bad])
  good, missing = colors.log_colors(depth, (1.0, 2.0), colors.TURBO)
  assert tuple(missing) == colors.BROKEN != tuple(good)
  _, missing = colors.log_colors(depth, (1, 2), colors.TURBO, colors.NO_TRUTH)
  assert tuple(missing) == colors.NO_TRUTH
  got = colors.error_colors(np.array([1, bad, bad]), np.array([bad, 1, bad]), 1)
  want = [colors.NO_TRUTH, colors.BROKEN, colors.NO_TRUTH]
  np.testing.assert_array_equal(got, want)


def test_errors_are_relative():
  true = np.array([1.0, 4.0, 4.0, 4.0])
  predicted = np.array([1.0, 5.0, 3.0, 40.0])
  got = colors.error_colors(predicted, true, 0.5)
  np.testing.assert_array_equal(got, colors.INFERNO[[0, 128, 128, 255]])
