"""Images and depth maps as benchmarks store them, read strictly.

Every reader raises `InputError` that names the file and what is wrong with it.
Those called `*_size` look at the header alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from point3r_jax.errors import InputError, one_line

# Files of MPI Sintel begin with this number as a little-endian float32.
SINTEL_TAG = np.float32(202021.25)
_DPT_HEADER = np.dtype([("tag", "<f4"), ("width", "<i4"), ("height", "<i4")])


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
  """Opens a file to read bytes; what the system refuses is an `InputError`."""
  try:
    with path.open("rb") as file:
      yield file
  except FileNotFoundError:
    raise InputError(f"{path}: no such file") from None
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({one_line(error)})") from error


def image_size(path: Path) -> tuple[int, int]:
  """The (height, width) that an image file announces."""
  with _image(path) as image:
    return image.height, image.width


def read_rgb(path: Path) -> np.ndarray:
  """Reads (H, W, 3) uint8 as OpenCV's colour mode does: alpha is dropped."""
  with _image(path) as image:
    if image.mode.startswith(("I", "F")):
      raise InputError(f"{path}: has more than 8 bits a channel")
    return np.array(image.convert("RGB"))


def png16_size(path: Path) -> tuple[int, int]:
  """The (height, width) of a 16-bit grey PNG."""
  with _image(path) as image:
    _require_16_bits(path, image)
    return image.height, image.width


def read_png16(path: Path) -> np.ndarray:
  """Reads (H, W) uint16 from a 16-bit grey PNG."""
  with _image(path) as image:
    _require_16_bits(path, image)
    return np.array(image).astype(np.uint16)


def read_depth_png(path: Path, steps_per_metre: int) -> np.ndarray:
  """Reads a true depth map of Bonn or KITTI.

  Returns:
    (H, W) float64 metres, -1 where nothing was measured.

  Raises:
    InputError: also for a map without a value above 255: like the published
      readers, this takes it for 8 bits that were saved as 16.
  """
  raw = read_png16(path)
  if raw.max() <= 255:
    raise InputError(f"{path}: no value exceeds 255, as if it were of 8 bits")
  return np.where(raw == 0, -1.0, raw / steps_per_metre)


def dpt_size(path: Path) -> tuple[int, int]:
  """The (height, width) of a Sintel depth map whose tag and length are good."""
  with opened(path) as file:
    header = file.read(_DPT_HEADER.itemsize)
    file_bytes = file.seek(0, 2)
  if len(header) < _DPT_HEADER.itemsize:
    raise InputError(f"{path}: is cut short, it has no .dpt header")
  tag, width, height = np.frombuffer(header, _DPT_HEADER)[0].tolist()
  if tag != SINTEL_TAG:
    raise InputError(f"{path}: is no .dpt file, its tag is {tag:g}")
  if width < 1 or height < 1:
    raise InputError(f"{path}: its header says {width}x{height} pixels")
  expected = _DPT_HEADER.itemsize + 4 * width * height
  if file_bytes != expected:
    raise InputError(
      f"{path}: {file_bytes} bytes instead of {expected} for {width}x{height}"
      " pixels"
    )
  return height, width


def read_dpt(path: Path) -> np.ndarray:
  """Reads a Sintel depth map, (H, W) float32 metres.

  Infinity passes: the limit of 70 m that goes with Sintel masks it.
  """
  shape = dpt_size(path)
  depth = np.fromfile(path, "<f4", offset=_DPT_HEADER.itemsize)
  if np.isnan(depth).any():
    raise InputError(f"{path}: has depths that are not a number")
  return depth.reshape(shape)


def npy_size(path: Path) -> tuple[int, int]:
  """The (height, width) of a depth map in a .npy file of full length."""
  return _npy(path).shape


def read_npy(path: Path) -> np.ndarray:
  """Reads a depth map from a .npy file, (H, W) of the file's float type."""
  depth = np.array(_npy(path))
  if not np.isfinite(depth).all():
    raise InputError(f"{path}: has depths that are not finite")
  return depth


@contextlib.contextmanager
def _image(path: Path) -> Iterator[Image.Image]:
  """Opens an image; what goes wrong until it is closed is an `InputError`."""
  with opened(path) as file:
    try:
      with Image.open(file) as image:
        yield image
    except InputError:
      raise
    except Image.UnidentifiedImageError:
      raise InputError(f"{path}: is not an image") from None
    except Exception as error:  # Damaged files raise nearly any type.
      raise InputError(
        f"{path}: cannot read the image ({one_line(error)})"
      ) from error


def _require_16_bits(path: Path, image: Image.Image) -> None:
  # Older Pillow has "I" for what is "I;16"; in a PNG both mean 16 bits.
  if image.format != "PNG" or not image.mode.startswith("I"):
    raise InputError(
      f"{path}: is {image.format} of mode {image.mode}, not a 16-bit grey PNG"
    )


def _npy(path: Path) -> np.ndarray:
  """Maps a depth map into memory, without reading it."""
  with opened(path):
    pass
  try:
    depth = np.load(path, mmap_mode="r", allow_pickle=False)
  except Exception as error:
    raise InputError(
      f"{path}: cannot read the array ({one_line(error)})"
    ) from error
  if not isinstance(depth, np.ndarray):
    raise InputError(f"{path}: is not a .npy file")
  if depth.ndim != 2 or not np.issubdtype(depth.dtype, np.floating):
    raise InputError(
      f"{path}: {depth.dtype} of shape {depth.shape} is no depth map"
    )
  return depth
