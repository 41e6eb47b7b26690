"""Tests of point3r_jax.data.resampling."""

import concurrent.futures

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from point3r_jax.data import images, resampling
from point3r_jax.data.frames import open_frames
from point3r_jax.data.resampling import DeviceResize, lanczos
from tests.data.media import save_image, save_video


def noise(height: int, width: int, contrast: bool = False) -> np.ndarray:
  rng = np.random.default_rng(height * width)
  pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
  return np.where(pixels < 128, 0, 255).astype(np.uint8) if contrast else pixels


def by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  image = Image.fromarray(pixels)
  return np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
  monkeypatch.setattr(resampling, "_has_gpu", lambda: True)


@pytest.fixture
def asked(monkeypatch):
  """Sizes that the device is asked for."""
  sizes = []

  def spy(pixels, size, order):
    sizes.append(size)
    return lanczos(pixels, size, order)

  monkeypatch.setattr(resampling, "lanczos", spy)
  return sizes


@settings(max_examples=6, deadline=None)
@given(
  source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
  size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
  contrast=st.booleans(),
)
def test_one_axis_and_both_are_as_by_pillow(source, size, contrast):
  pixels = noise(*source, contrast)
  # Pillow's order of axes is its own affair.
  rows = by_pillow(pixels, (size[0], source[1]))
  both = by_pillow(rows, size)
  np.testing.assert_array_equal(lanczos(pixels, rows.shape[:2]), rows)
  np.testing.assert_array_equal(lanczos(pixels, size, (0, 1)), both)


@pytest.mark.parametrize(
  ("source", "size"), [((270, 480), (72, 128)), ((182, 177), (17, 95))]
)
def test_first_size_is_the_devices(asked, source, size):
  resize, pixels = DeviceResize(), noise(*source)
  for image in (pixels, Image.fromarray(pixels)):
    asked.clear()
    got = resize(image, size, images.LANCZOS)
    np.testing.assert_array_equal(got, by_pillow(pixels, size))
    assert asked[-1] == size
  # Others are Pillow's.
  asked.clear()
  other = resize(pixels, (30, 40), images.LANCZOS)
  np.testing.assert_array_equal(other, by_pillow(pixels, (30, 40)))
  cubic = resize(pixels, size, Image.Resampling.BICUBIC)
  expected = images.resize(pixels, size, Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(cubic, expected)
  assert not asked


def test_a_cpu_is_not_asked(monkeypatch, asked):
  monkeypatch.setattr(resampling, "_has_gpu", lambda: False)
  got = DeviceResize()(noise(64, 96), (16, 24), images.LANCZOS)
  np.testing.assert_array_equal(got, by_pillow(noise(64, 96), (16, 24)))
  assert not asked


def test_device_that_does_otherwise_is_not_asked(monkeypatch):
  def off_by_one(pixels, size, order):
    return lanczos(pixels, size, order) ^ 1

  monkeypatch.setattr(resampling, "lanczos", off_by_one)
  pixels = noise(64, 96)
  got = DeviceResize()(pixels, (16, 24), images.LANCZOS)
  np.testing.assert_array_equal(got, by_pillow(pixels, (16, 24)))


def test_device_that_fails_is_not_asked(monkeypatch, caplog):
  def fail(pixels, size, order):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

  monkeypatch.setattr(resampling, "lanczos", fail)
  got = DeviceResize()(noise(64, 96), (16, 24), images.LANCZOS)
  np.testing.assert_array_equal(got, by_pillow(noise(64, 96), (16, 24)))
  assert "RESOURCE_EXHAUSTED" in caplog.text


def test_pillow_that_takes_axes_in_no_order_is_asked(monkeypatch, asked):
  def both_at_once(image, size, _):
    pixels = np.asarray(image)
    both = size[0] != len(pixels) and size[1] != len(pixels[0])
    return by_pillow(pixels, size) ^ np.uint8(both)

  monkeypatch.setattr(images, "resize", both_at_once)
  got = DeviceResize()(noise(64, 96), (17, 24), images.LANCZOS)
  np.testing.assert_array_equal(got, by_pillow(noise(64, 96), (17, 24)) ^ 1)
  assert not asked


def test_threads_share_it(asked):
  resize = DeviceResize()
  frames = [noise(60, 80 + 10 * (i % 2)) + np.uint8(i) for i in range(16)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    scaled = list(
      pool.map(lambda x: resize(x, (24, 32), images.LANCZOS), frames)
    )
  for frame, got in zip(frames, scaled, strict=True):
    np.testing.assert_array_equal(got, by_pillow(frame, (24, 32)))
  assert len(asked) > 1  # One of them to try.


@pytest.mark.parametrize(
  "options", [{"size": 256}, {"size": 256, "crop": False}, {"size": 224}]
)
def test_frames_are_the_same(tmp_path, asked, options):
  clip = save_video(tmp_path / "clip.mp4", size=(480, 270))
  expected, got = (
    [frame.image for frame in open_frames(clip, on_device=x, **options)]
    for x in (False, True)
  )
  assert len(asked) > 1  # One of them to try.
  np.testing.assert_array_equal(got, expected)


def test_images_of_files_are_pillows(tmp_path, asked):
  """Each may have a size of its own."""
  for name in "ab":
    save_image(tmp_path / f"{name}.png", size=(120, 90))
  sources = [open_frames(tmp_path, size=64, on_device=x) for x in (False, True)]
  expected, got = ([frame.image for frame in source] for source in sources)
  assert not asked
  np.testing.assert_array_equal(got, expected)
