"""One image: from a file to the pixels that the network sees.

`load_image` gives an upright 8-bit RGB image whatever the file holds;
`prepare_image` scales and crops it to a network size and records how, so that
intrinsics found at network resolution can be mapped back to the photo.

Pixel centres lie at integer coordinates throughout: a resize by a factor s
maps the coordinate u to (u + 0.5) s - 0.5, a crop at x maps it to u - x.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from point3r_jax.errors import InputError, one_line

# Sides of images are multiples of the patch of all published weights. It is not
# taken from a `ModelConfig`: data know no models, and a model checks its own.
PATCH = 16

HEIF_EXTENSIONS = (".heic", ".heif")

LANCZOS = Image.Resampling.LANCZOS
_BICUBIC = Image.Resampling.BICUBIC

# Of Pillow, or uint8 (H, W, 3) pixels.
AnyImage = Image.Image | np.ndarray
# (RGB image, (height, width), filter) → the image in this size, as of Pillow.
Resize = Callable[[AnyImage, tuple[int, int], Image.Resampling], AnyImage]

# More elongated images would be blown up to absurd sizes before the crop.
_MAX_ELONGATION = 64

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Preparation:
  """How an image became a network input: scaled, then cropped.

  Attributes:
    source_size: (height, width) of the upright source image.
    resized_size: (height, width) after scaling.
    offset: (x, y) of the crop in the scaled image.
    network_size: (height, width) of the network input.
  """

  source_size: tuple[int, int]
  resized_size: tuple[int, int]
  offset: tuple[int, int]
  network_size: tuple[int, int]

  @property
  def scale(self) -> tuple[float, float]:
    """Scaled pixels per source pixel along (x, y)."""
    (source_h, source_w), (resized_h, resized_w) = (
      self.source_size,
      self.resized_size,
    )
    return resized_w / source_w, resized_h / source_h

  @property
  def network_from_source(self) -> np.ndarray:
    """(3, 3) map of homogeneous source pixels to network pixels."""
    scale = np.array(self.scale)
    matrix = np.diag([*scale, 1.0])
    matrix[:2, 2] = 0.5 * scale - 0.5 - np.array(self.offset)
    return matrix

  def intrinsics_to_source(self, intrinsics: np.ndarray) -> np.ndarray:
    """Maps (..., 3, 3) intrinsics of the network input to the source image."""
    return np.linalg.inv(self.network_from_source) @ np.asarray(intrinsics)

  def intrinsics_to_network(self, intrinsics: np.ndarray) -> np.ndarray:
    """Maps (..., 3, 3) intrinsics of the source image to the network input."""
    return self.network_from_source @ np.asarray(intrinsics)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
  """Opens an image file as upright 8-bit RGB.

  EXIF orientation is applied; see `to_rgb` for what becomes of other modes.
  The first frame of an animated file is used.

  Raises:
    InputError: The file is missing, unreadable, cut short or no image.
  """
  name = os.fspath(path)
  if not os.path.exists(name):
    raise InputError(f"{name}: no such file")
  if os.path.isdir(name):
    raise InputError(f"{name}: is a folder, not an image")
  if name.lower().endswith(HEIF_EXTENSIONS):
    _register_heif()
  try:
    with Image.open(name) as image:
      image.load()
      return to_rgb(_upright(image))
  except Image.UnidentifiedImageError:
    message = "not an image, or of a kind that Pillow cannot read"
    if name.lower().endswith(HEIF_EXTENSIONS):
      message = "HEIC needs `pip install pillow-heif`, or convert it to JPEG"
    raise InputError(f"{name}: {message}") from None
  except Exception as error:  # Damaged files raise nearly any type.
    message = f"cannot read the image ({one_line(error)})"
    raise InputError(f"{name}: {message}") from error


def to_rgb(image: Image.Image) -> Image.Image:
  """Converts any Pillow mode to RGB.

  Transparent pixels are composited over white, 16-bit grey is scaled to 8 bits
  (16-bit colour already has been by Pillow), everything else is as in Pillow.
  """
  if image.mode == "RGB" and "transparency" not in image.info:
    return image.copy()
  if image.mode.startswith("I"):
    return _grey16_to_rgb(image)
  if image.mode == "F":
    raise InputError("floating-point images are not supported")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")


def image_size(image: AnyImage) -> tuple[int, int]:
  """Returns (height, width)."""
  if isinstance(image, np.ndarray):
    return image.shape[:2]
  return image.height, image.width


def resize(
  image: AnyImage, size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
  """Scales an RGB image to (height, width) with Pillow."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  return image.resize(size[::-1], resampling)


def check_size(size: int) -> None:
  """Raises `InputError` unless images can be prepared at this size."""
  if size < PATCH or size % PATCH:
    raise InputError(f"image size {size} is not a multiple of {PATCH}")


def network_size(source_size: tuple[int, int], size: int) -> tuple[int, int]:
  """The network size (height, width) of an image under the rule of `size`.

  Raises:
    InputError: No network size fits, or `size` is not a multiple of 16.
  """
  return _network_size(_resized_size(source_size, size), size)


def prepare_image(
  image: AnyImage,
  size: int = 512,
  crop: bool = True,
  network_size: tuple[int, int] | None = None,
  resize: Resize = resize,
) -> tuple[np.ndarray, Preparation]:
  """Scales and crops an image to a network input.

  There are two rules. `size=224` scales the short side to 224 and keeps the
  central square. Any other multiple of 16 scales the long side to `size` and
  rounds both sides down to multiples of 16, where a square loses height: it
  becomes 4:3 (the nearest multiple of 16 below).

  Args:
    image: An RGB image, or uint8 (H, W, 3) pixels.
    size: 512 and 224 are what the published weights were trained for.
    crop: Whether excess is cut off around the centre; if not, the whole image
      is squeezed in, at the cost of its aspect ratio.
    network_size: A (height, width) to conform to instead: the image is scaled
      to cover it and cropped around the centre. For images that join a stream
      of another shape; `size` and `crop` play no role.
    resize: What scales.

  Returns:
    The uint8 (H, W, 3) pixels, and how they were made.

  Raises:
    InputError: The image is too elongated, or a size is not a multiple of 16.
  """
  if isinstance(image, np.ndarray) and image.shape[2:] != (3,):
    image = Image.fromarray(image)
  if isinstance(image, Image.Image) and image.mode != "RGB":
    image = to_rgb(image)
  source = image_size(image)
  if network_size is not None:
    resized, target = _covering_size(source, network_size), network_size
  else:
    resized = _resized_size(source, size)
    target = _network_size(resized, size)
  down = max(source) > max(resized)
  image = resize(image, resized, LANCZOS if down else _BICUBIC)
  if network_size is None and not crop:
    image, resized = resize(image, target, LANCZOS), target
  x = resized[1] // 2 - target[1] // 2
  y = resized[0] // 2 - target[0] // 2
  pixels = np.asarray(image)[y : y + target[0], x : x + target[1]].copy()
  return pixels, Preparation(source, resized, (x, y), target)


def _register_heif() -> None:
  """Teaches Pillow HEIC if the optional plugin is installed."""
  try:
    import pillow_heif
  except ImportError:
    return
  pillow_heif.register_heif_opener()


def _upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation; damaged EXIF data count as none."""
  try:
    orientation = image.getexif().get(_EXIF_ORIENTATION)
  except Exception:
    return image
  method = _UPRIGHT.get(orientation)
  return image if method is None else image.transpose(method)


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
  """Converts 16-bit grey, which Pillow would clip instead of scale."""
  grey = np.asarray(image)
  if grey.min() < 0 or grey.max() > 65535:
    raise InputError("grey images of more than 16 bits are not supported")
  grey = np.round(grey / 257).astype(np.uint8)
  return Image.fromarray(grey).convert("RGB")


def _resized_size(source: tuple[int, int], size: int) -> tuple[int, int]:
  """The (height, width) to scale to before the crop."""
  check_size(size)
  long = size
  if size == 224:
    _check_elongation(source)
    long = round(size * (max(source) / min(source)))
  height, width = (round(side * long / max(source)) for side in source)
  return height, width


def _network_size(resized: tuple[int, int], size: int) -> tuple[int, int]:
  """The (height, width) of the crop around the centre of a scaled image."""
  height, width = (side // 2 * 2 // PATCH * PATCH for side in resized)
  if size == 224:
    height = width = min(resized) // 2 * 2
  elif resized[0] == resized[1]:
    height = max(width * 3 // 4 // PATCH, 1) * PATCH
  if not (height and width):
    raise InputError(
      f"the image is too elongated: scaled to {resized[1]}x{resized[0]} pixels"
      f" it has no room for a patch of {PATCH}x{PATCH}"
    )
  return height, width


def _covering_size(
  source: tuple[int, int], target: tuple[int, int]
) -> tuple[int, int]:
  """The smallest (height, width) of the source's shape that holds `target`."""
  if any(side < PATCH or side % PATCH for side in target):
    raise InputError(f"network size {target} is not in multiples of {PATCH}")
  _check_elongation(source)
  scale = max(target[0] / source[0], target[1] / source[1])
  height = max(round(source[0] * scale), target[0])
  width = max(round(source[1] * scale), target[1])
  return height, width


def _check_elongation(source: tuple[int, int]) -> None:
  if max(source) > _MAX_ELONGATION * min(source):
    raise InputError(
      f"the image is too elongated ({source[1]}x{source[0]} pixels)"
    )
