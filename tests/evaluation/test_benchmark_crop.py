"""Tests of point3r_jax.evaluation.benchmarks.crop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.crop import orient, plan_crop

LANDSCAPE = (384, 512)


def camera(focal: float, x: float, y: float) -> np.ndarray:
  return np.array([[focal, 0, x], [0, focal, y], [0, 0, 1]])


class TestPlanCrop:
  """The check values are those of datasets.md, 2.4."""

  def test_published_frames(self):
    crop = plan_crop((480, 640), camera(525, 320, 240), LANDSCAPE)
    assert crop.window == (0, 0, 640, 480)
    assert crop.scale == pytest.approx(0.80000001, abs=1e-15)
    assert crop.scaled_size == crop.target_size == LANDSCAPE
    assert crop.offset == (0, 0)
    expected = camera(420.00000525, 255.9, 191.9)
    np.testing.assert_allclose(crop.intrinsics, expected, atol=1e-9)

  def test_with_margin(self):
    source = camera(1580, 953.3, 715.9)
    crop = plan_crop((1440, 1920), source, LANDSCAPE, margin=7)
    assert crop.window == (0, 0, 1906, 1432)
    assert crop.scale == pytest.approx(0.2730447027, abs=1e-10)
    assert crop.scaled_size == (391, 520)
    assert crop.offset == (4, 4)
    expected = camera(431.41063, 255.71844, 191.10922)
    np.testing.assert_allclose(crop.intrinsics, expected, atol=6e-6)

  def test_does_not_change_its_input(self):
    intrinsics = camera(525, 320, 240)
    plan_crop((480, 640), intrinsics, LANDSCAPE)
    np.testing.assert_array_equal(intrinsics, camera(525, 320, 240))

  def test_rounds_halves_to_even(self):
    assert plan_crop((48, 64), camera(50, 30.5, 24), (48, 64)).window[2] == 60
    assert plan_crop((48, 64), camera(50, 31.5, 24), (48, 64)).window[2] == 64

  @pytest.mark.parametrize("x, y", [(12, 24), (52, 24), (32, 9), (-5, 24)])
  def test_principal_point_far_from_the_middle(self, x, y):
    with pytest.raises(InputError, match=rf"principal point \({x}, {y}\)"):
      plan_crop((48, 64), camera(50, x, y), (48, 64))

  @settings(max_examples=200, deadline=None)
  @given(
    st.integers(40, 2000),
    st.integers(40, 2000),
    st.floats(0.25, 0.75),
    st.floats(0.25, 0.75),
    st.sampled_from([(384, 512), (224, 224), (512, 160)]),
    st.integers(0, 15),
    st.floats(-0.3, 0.3),
    st.floats(-0.3, 0.3),
  )
  def test_points_stay_on_their_pixels(
    self, height, width, px, py, target, margin, x, y
  ):
    """A ray hits the result where the pixels of the source have moved to."""
    source = camera(0.8 * width, px * width, py * height)
    try:
      crop = plan_crop((height, width), source, target, margin)
    except InputError:
      return
    # The scaled image covers the target, and the cut lies in it.
    for offset, length, whole in zip(
      crop.offset[::-1], target, crop.scaled_size, strict=True
    ):
      assert offset >= 0 and offset + length <= whole
    ray = np.array([x, y, 1])
    left, top, right, bottom = crop.window
    window = np.array([right - left, bottom - top])
    pixel = (source @ ray)[:2] - (left, top) + 0.5  # From the window's corner.
    moved = pixel * crop.scaled_size[::-1] / window - 0.5 - crop.offset
    # The scaled size is rounded down: the camera's image exceeds that of the
    # pixels by less than one, spread over the window from its middle.
    error = abs((crop.intrinsics @ ray)[:2] - moved)
    assert (error <= abs(pixel / window - 0.5) + 1e-6).all()


class TestCrop:
  @pytest.mark.parametrize(
    "size, filter_",
    [
      ((60, 80), Image.Resampling.LANCZOS),
      ((24, 32), Image.Resampling.BICUBIC),
    ],
  )
  def test_pixels(self, size, filter_):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    depth = rng.uniform(1, 5, size).astype(np.float32)
    middle = camera(50, size[1] / 2, size[0] / 2)
    crop = plan_crop(size, middle, (48, 64))
    expected = Image.fromarray(image).resize((64, 48), filter_)
    np.testing.assert_array_equal(crop.image(image), np.asarray(expected))
    # OpenCV's nearest: the pixel at floor(i source / target).
    rows = np.arange(48) * size[0] // 48
    columns = np.arange(64) * size[1] // 64
    np.testing.assert_array_equal(
      crop.depth(depth), depth[rows[:, None], columns]
    )

  def test_cuts_around_the_principal_point(self):
    depth = np.arange(100 * 90, dtype=np.float32).reshape(100, 90)
    crop = plan_crop((100, 90), camera(50, 40, 60), (80, 80))
    assert crop.window == (0, 20, 80, 100)
    np.testing.assert_array_equal(crop.depth(depth), depth[20:, :80])
    with pytest.raises(ValueError):
      crop.depth(depth[1:])

  def test_finds_a_blob_where_the_camera_says(self):
    v, u = np.mgrid[:300, :420]
    blob = 255 * np.exp(-((u - 250.0) ** 2 + (v - 120.0) ** 2) / 200)
    source = camera(400, 200, 160)
    crop = plan_crop((300, 420), source, (96, 128))
    pixels = crop.image(np.repeat(blob.astype(np.uint8)[..., None], 3, -1))
    weights = pixels[..., 0].astype(float)
    v, u = np.mgrid[:96, :128]
    found = [(u * weights).sum(), (v * weights).sum()] / weights.sum()
    ray = np.linalg.inv(source) @ [250, 120, 1]
    np.testing.assert_allclose(found, (crop.intrinsics @ ray)[:2], atol=0.3)


class TestOrient:
  def orient(self, size, target=LANDSCAPE):
    found = [orient(size, target, np.random.default_rng(s)) for s in range(40)]
    return set(found)

  def test_landscape_is_kept(self):
    assert self.orient((480, 640)) == {LANDSCAPE}
    assert self.orient((90, 100)) == {LANDSCAPE}

  def test_portrait_is_swapped(self):
    assert self.orient((640, 480)) == {(512, 384)}

  def test_near_squares_are_swapped_at_random(self):
    for size in [(100, 100), (109, 100), (91, 100)]:
      assert self.orient(size) == {LANDSCAPE, (512, 384)}
    assert self.orient((110, 100)) == {LANDSCAPE}

  def test_square_targets(self):
    assert self.orient((100, 100), (224, 224)) == {(224, 224)}

  def test_plan_swaps(self):
    rng = np.random.default_rng(0)
    crop = plan_crop((80, 60), camera(60, 30, 40), (48, 64), orientation=rng)
    assert crop.target_size == (64, 48)
    kept = plan_crop((80, 60), camera(60, 30, 40), (48, 64))
    assert kept.target_size == (48, 64)
