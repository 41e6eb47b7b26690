"""Pillow's Lanczos on a device: the same pixels to the last bit.

A processor takes 16 to 26 ms to scale a frame of 1920×1080 down, more than for
all else that is done to read it. This does what Pillow does for 8-bit images:
one axis after the other, by weights in fixed point, rounded to 8 bits each.
"""

from __future__ import annotations

import functools
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from point3r_jax.data import images
from point3r_jax.errors import one_line

# Half the width of the window, in pixels of the image or, if that is larger, of
# the result.
_LOBES = 3.0

# Bits after the point of a weight, which leave room for sums in 32.
_FRACTION = 22

# Of axes; which one Pillow takes depends on its version and on the sizes.
_ORDERS = ((0, 1), (1, 0))

_log = logging.getLogger(__name__)


def _weights(source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns what to sum for each pixel along an axis.

  Args:
    source: pixels along the axis.
    target: pixels that they become.

  Returns:
    (target,) int32, the first source pixel; (target, taps) int32, the weights
    of this one and of those after it. Those beyond the axis are zero.
  """
  scale = source / target
  stretch = max(scale, 1.0)
  support = _LOBES * stretch
  center = (np.arange(target) + 0.5) * scale
  first = np.maximum((center - support + 0.5).astype(int), 0)
  end = np.minimum((center + support + 0.5).astype(int), source)
  pixel = first[:, None] + np.arange(2 * int(np.ceil(support)) + 1)
  x = (pixel - center[:, None] + 0.5) * (1 / stretch)
  inside = (pixel < end[:, None]) & (abs(x) < _LOBES)
  weights = np.where(inside, np.sinc(x) * np.sinc(x / _LOBES), 0.0)
  weights /= weights.sum(axis=1, keepdims=True)
  fixed = weights * (1 << _FRACTION)
  fixed = np.trunc(fixed + np.copysign(0.5, fixed))
  return first.astype(np.int32), fixed.astype(np.int32)


def _resample(pixels: jax.Array, axis: int, target: int) -> jax.Array:
  """Scales (H, W, 3) uint8 pixels along an axis."""
  source = pixels.shape[axis]
  total = jnp.int32(1 << (_FRACTION - 1))  # So that it is rounded below.
  first, weights = _weights(source, target)
  for tap, weight in enumerate(weights.T):
    place = np.minimum(first + tap, source - 1)  # Beyond, weights are zero.
    taken = jnp.take(pixels, place, axis, mode="clip").astype(jnp.int32)
    total += taken * jnp.expand_dims(weight, range(1, taken.ndim - axis))
  return jnp.clip(total >> _FRACTION, 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("size", "order"))
def lanczos(
  pixels: jax.Array, size: tuple[int, int], order: tuple[int, int] = (1, 0)
) -> jax.Array:
  """Scales an image with Lanczos; the window grows as the image shrinks.

  Args:
    pixels: (H, W, 3) uint8.
    size: (height, width) to scale to.
    order: of the axes.

  Returns:
    (height, width, 3) uint8.
  """
  for axis in order:
    if size[axis] != pixels.shape[axis]:
      pixels = _resample(pixels, axis, size[axis])
  return pixels


def _pillow_order(
  noise: np.ndarray, scaled: np.ndarray
) -> tuple[int, int] | None:
  """Returns in which order Pillow has scaled an image of noise; None: none."""
  size = scaled.shape[:2]
  for order in _ORDERS:
    between = list(noise.shape[:2])
    between[order[0]] = size[order[0]]
    once = images.resize(noise, tuple(between), images.LANCZOS)
    if np.array_equal(images.resize(once, size, images.LANCZOS), scaled):
      return order
  return None


def _has_gpu() -> bool:
  """Asked late, for this starts the GPU."""
  return jax.default_backend() == "gpu"


class DeviceResize:
  """Scales as `images.resize` does, on JAX's default device if that is a GPU.

  It is meant for videos: only the first size that is asked for is scaled there,
  for each takes a second to compile and to try, and only if noise comes out as
  by Pillow, which scales all else. It waits for what the device has been given
  before, so it wants to be called in several threads.
  """

  def __init__(self):
    """Compiles nothing yet."""
    self._lock = threading.Lock()
    self._sizes = self._order = None

  def __call__(
    self,
    image: images.AnyImage,
    size: tuple[int, int],
    resampling: Image.Resampling,
  ) -> images.AnyImage:
    """See `images.resize`."""
    source = images.image_size(image)
    if resampling == images.LANCZOS and source != size and _has_gpu():
      with self._lock:
        if self._sizes is None:
          self._sizes = source, size
          self._order = self._try(source, size)
      if self._order and self._sizes == (source, size):
        return np.asarray(lanczos(np.asarray(image), size, self._order))
    return images.resize(image, size, resampling)

  def _try(
    self, source: tuple[int, int], size: tuple[int, int]
  ) -> tuple[int, int] | None:
    """Returns the order of axes with which the device does what Pillow does."""
    noise = np.random.default_rng(0).integers(0, 256, (*source, 3), np.uint8)
    expected = np.asarray(images.resize(noise, size, images.LANCZOS))
    order = _pillow_order(noise, expected)
    if order is None:
      return None
    try:
      same = np.array_equal(lanczos(noise, size, order), expected)
    except jax.errors.JaxRuntimeError as error:  # Such as too little memory.
      _log.warning("images are scaled on the host: %s", one_line(error))
      return None
    return order if same else None
