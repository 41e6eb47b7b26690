"""Tests of point3r_jax.data.images."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from point3r_jax.data.images import (
  Preparation,
  load_image,
  network_size,
  prepare_image,
  to_rgb,
)
from point3r_jax.errors import InputError


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def write_png16(path, pixels: np.ndarray) -> None:
  """Writes 16-bit RGB, which Pillow cannot."""
  height, width, _ = pixels.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

  def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return (
      struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    )

  path.write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )


# What a camera stores for an upright scene, by EXIF orientation.
STORED = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.transpose(1, 0, 2),
  6: lambda a: np.rot90(a, 1),
  7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
  8: lambda a: np.rot90(a, -1),
}


class TestLoadImage:
  @pytest.mark.parametrize("orientation", range(1, 9))
  @pytest.mark.parametrize("kind", ["png", "tiff"])
  def test_applies_exif_orientation(self, tmp_path, orientation, kind):
    upright = np.asarray(noise(5, 7))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{kind}"
    stored = np.ascontiguousarray(STORED[orientation](upright))
    Image.fromarray(stored).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path)), upright)

  def test_applies_exif_orientation_of_jpeg(self, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert load_image(path).size == (20, 40)

  @pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff"])
  def test_ignores_damaged_exif(self, tmp_path, exif):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert load_image(path).size == (40, 20)

  def test_keeps_rgb_pixels(self, tmp_path):
    noise(6, 4).save(tmp_path / "a.png")
    loaded = load_image(str(tmp_path / "a.png"))
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(noise(6, 4)))

  def test_scales_16_bit_grey(self, tmp_path):
    grey = np.array([[0, 128, 129, 257, 300 * 100, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "a.tif")
    for name in ["a.png", "a.tif"]:
      pixels = np.asarray(load_image(tmp_path / name))
      assert pixels[0].tolist() == [[v] * 3 for v in [0, 0, 1, 1, 117, 255]]

  def test_scales_16_bit_colour(self, tmp_path):
    colour = np.array([[[0, 65535, 0x80FF]]], np.uint16)
    write_png16(tmp_path / "a.png", colour)
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [
      [[0, 255, 128]]
    ]

  def test_composites_alpha_over_white(self, tmp_path):
    pixels = np.array([[[9, 8, 7, 0], [9, 8, 7, 255], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = np.asarray(load_image(tmp_path / "a.png"))
    assert loaded.tolist() == [[[255] * 3, [9, 8, 7], [204] * 3]]

  def test_palettes(self, tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "a.png")
    palette.save(tmp_path / "b.png", transparency=1)
    assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [
      [[10, 20, 30], [40, 50, 60]]
    ]
    assert np.asarray(load_image(tmp_path / "b.png")).tolist() == [
      [[10, 20, 30], [255] * 3]
    ]

  @pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "HSV"])
  def test_other_modes(self, mode):
    image = Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode)
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    assert np.asarray(converted).min() >= 254

  def test_cmyk_jpeg(self, tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = np.asarray(load_image(tmp_path / "a.jpg"))[4, 4]
    assert red[0] > 240 and red[1:].max() < 15

  @pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp", "tif"])
  def test_cut_short(self, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    noise(64, 64).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"a\.{kind}: cannot read|not an im"):
      load_image(path)

  def test_missing_or_no_image(self, tmp_path):
    with pytest.raises(InputError, match="no such file"):
      load_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a folder"):
      load_image(tmp_path)
    for name in ["text.jpg", "empty.png"]:
      (tmp_path / name).write_text("hello" * (name == "text.jpg"))
      with pytest.raises(InputError, match=f"{name}: not an image"):
        load_image(tmp_path / name)

  def test_heic_without_plugin(self, tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(InputError, match=r"a\.HEIC"):
      load_image(tmp_path / "a.HEIC")

  def test_unsupported_depths(self):
    with pytest.raises(InputError, match="floating-point"):
      to_rgb(Image.fromarray(np.zeros((2, 2), np.float32)))
    with pytest.raises(InputError, match="16 bits"):
      to_rgb(Image.fromarray(np.full((2, 2), 70000, np.int32)))


# Source (W, H), scaled (W, H), network (W, H), crop offset (x, y):
# evaluation.md, 1.2.
TABLE = [
  ((640, 480), (512, 384), (512, 384), (0, 0)),
  ((1024, 436), (512, 218), (512, 208), (0, 5)),
  ((1242, 375), (512, 155), (512, 144), (0, 5)),
  ((1216, 352), (512, 148), (512, 144), (0, 2)),
  ((1296, 968), (512, 382), (512, 368), (0, 7)),
]


class TestPrepareImage:
  @pytest.mark.parametrize("source, scaled, network, offset", TABLE)
  def test_published_sizes(self, source, scaled, network, offset):
    image = noise(*source[::-1])
    pixels, record = prepare_image(image)
    filter_ = Image.Resampling.LANCZOS
    expected = np.asarray(image.resize(scaled, filter_))
    x, y = offset
    expected = expected[y : y + network[1], x : x + network[0]]
    np.testing.assert_array_equal(pixels, expected)
    assert record == Preparation(
      source[::-1], scaled[::-1], offset, network[::-1]
    )

    pixels, record = prepare_image(image, crop=False)
    expected = image.resize(scaled, filter_).resize(network, filter_)
    np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert record == Preparation(
      source[::-1], network[::-1], (0, 0), network[::-1]
    )

  def test_enlarges_bicubically(self):
    image = noise(60, 80)
    pixels, _ = prepare_image(image)
    expected = image.resize((512, 384), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels, np.asarray(expected))

  def test_portrait(self):
    pixels, record = prepare_image(noise(436, 300))
    assert pixels.shape == (512, 352, 3)
    assert record.offset == (0, 0)

  @pytest.mark.parametrize("crop, offset", [(True, (0, 64)), (False, (0, 0))])
  def test_square_becomes_landscape(self, crop, offset):
    pixels, record = prepare_image(noise(100, 100), crop=crop)
    assert pixels.shape == (384, 512, 3)
    assert record.offset == offset
    assert prepare_image(noise(9, 9), 32, crop)[0].shape == (16, 32, 3)
    assert prepare_image(noise(9, 9), 16, crop)[0].shape == (16, 16, 3)

  @pytest.mark.parametrize(
    "source, offset",
    [((480, 640), (37, 0)), ((640, 480), (0, 37)), ((100, 100), (0, 0))],
  )
  def test_224_is_the_central_square(self, source, offset):
    pixels, record = prepare_image(noise(*source), 224)
    assert pixels.shape == (224, 224, 3)
    assert record.offset == offset
    assert min(record.resized_size) == 224

  @settings(max_examples=200, deadline=None)
  @given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([16, 224, 512, 1024]),
  )
  def test_sizes_are_whole_patches(self, height, width, size):
    try:
      sides = network_size((height, width), size)
    except InputError:
      assert max(height, width) > 16 * min(height, width) or size == 16
      return
    assert all(0 < side <= size and side % 16 == 0 for side in sides)
    if size == 224:
      assert sides == (224, 224)

  def test_conforms_to_a_network_size(self):
    image = noise(100, 50)
    pixels, record = prepare_image(image, network_size=(384, 512))
    assert pixels.shape == (384, 512, 3)
    assert record == Preparation((100, 50), (1024, 512), (0, 320), (384, 512))
    expected = image.resize((512, 1024), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels, np.asarray(expected)[320:704])

  def test_accepts_arrays_and_other_modes(self):
    image = noise(48, 64)
    expected, _ = prepare_image(image, 64)
    np.testing.assert_array_equal(
      prepare_image(np.asarray(image), 64)[0], expected
    )
    grey, clear = image.convert("L"), image.convert("RGBA")
    for other in (grey, clear):
      expected = prepare_image(other, 64)[0]
      assert expected.shape == (48, 64, 3)
      np.testing.assert_array_equal(
        prepare_image(np.asarray(other), 64)[0], expected
      )

  def test_result_is_writable(self):
    pixels, _ = prepare_image(noise(384, 512))
    pixels[0] = 0

  def test_too_elongated(self):
    for size in [512, 224]:
      with pytest.raises(InputError, match="too elongated"):
        prepare_image(Image.new("RGB", (3000, 10)), size)
    with pytest.raises(InputError, match="too elongated"):
      prepare_image(Image.new("RGB", (3000, 10)), network_size=(384, 512))

  def test_sizes_must_be_multiples(self):
    for size in [0, -16, 500]:
      with pytest.raises(InputError, match="multiple of 16"):
        prepare_image(noise(9, 9), size)
    with pytest.raises(InputError, match="multiples of 16"):
      prepare_image(noise(9, 9), network_size=(380, 512))


class TestPreparation:
  def test_scale_about_pixel_centres(self):
    record = Preparation((200, 400), (100, 200), (10, 4), (96, 176))
    intrinsics = np.array([[300.0, 0, 80], [0, 310, 40], [0, 0, 1]])
    source = record.intrinsics_to_source(intrinsics)
    np.testing.assert_allclose(
      source, [[600, 0, 180.5], [0, 620, 88.5], [0, 0, 1]], atol=1e-12
    )

  @settings(max_examples=50, deadline=None)
  @given(
    st.integers(20, 900),
    st.integers(20, 900),
    st.sampled_from([64, 224]),
    st.booleans(),
    st.sampled_from([None, (48, 64)]),
  )
  def test_round_trip(self, height, width, size, crop, conform):
    blank = Image.new("RGB", (width, height))
    try:
      _, record = prepare_image(blank, size, crop, conform)
    except InputError:
      return
    intrinsics = np.array([[50.0, 0.1, 31], [0, 55, 20], [0, 0, 1]])
    there = record.intrinsics_to_source(intrinsics)
    back = record.intrinsics_to_network(there)
    np.testing.assert_allclose(back, intrinsics, atol=1e-9)
    # A ray hits the same place in both images.
    ray = np.array([0.1, -0.2, 1])
    in_network = (intrinsics @ ray)[:2]
    in_source = (there @ ray)[:2]
    np.testing.assert_allclose(
      (in_source + 0.5) * record.scale - 0.5 - record.offset, in_network
    )

  @pytest.mark.parametrize("crop", [True, False])
  def test_agrees_with_the_pixels(self, crop):
    """A blob is found where the record says."""
    v, u = np.mgrid[:300, :500]
    blob = 255 * np.exp(-((u - 330.0) ** 2 + (v - 120.0) ** 2) / 200)
    image = Image.fromarray(blob.astype(np.uint8))
    pixels, record = prepare_image(image, 128, crop)
    weights = pixels[..., 0].astype(float)
    v, u = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    found = [(u * weights).sum(), (v * weights).sum()] / weights.sum()
    expected = record.network_from_source @ [330, 120, 1]
    np.testing.assert_allclose(found, expected[:2], atol=0.02)

  def test_batches_of_intrinsics(self):
    record = Preparation((20, 40), (32, 64), (0, 0), (32, 64))
    assert record.intrinsics_to_source(np.ones((4, 3, 3))).shape == (4, 3, 3)
