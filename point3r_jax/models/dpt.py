"""The dense prediction head (DPT): four token maps to one map of the image."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from point3r_jax.config import ModelConfig
from point3r_jax.models.compute import Compute
from point3r_jax.models.linear import (
  Finish,
  Linear,
  add_bias,
  leave_apart,
  sum_blocks,
  sum_products,
  sum_rows,
)
from point3r_jax.models.map_kernels import (
  MAP_CHANNELS,
  double_map,
  halve_map,
  read_out_gradient,
)
from point3r_jax.models.parameter import parameter
from point3r_jax.models.partition import divide_batch
from point3r_jax.models.row_kernels import suit_rows


@jax.custom_jvp
def relu(x: jax.Array) -> jax.Array:
  """Rectifies; the derivative is told from the result, not from x.

  So x need not be kept, and is not even made where a convolution rectifies.
  """
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
  y = relu(*primals)
  # XLA would take y > 0 for x > 0, and make x.
  return y, jnp.where(y != 0, tangents[0], 0)


class Conv(nn.Module):
  """A 3×3 convolution with padding 1; channels last.

  Attributes:
    features: output channels.
    dtype: type of operands and result.
    stride: step in pixels.
    use_bias: whether a bias is added.
  """

  features: int
  dtype: jnp.dtype
  stride: int = 1
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, finish: Finish | None = None) -> Any:
    """Maps x (B, H, W, K) to (B, ⌈H/stride⌉, ⌈W/stride⌉, features).

    Args:
      x: what is mapped.
      finish: instead of adding the bias, if there is one.
    """
    channels = x.shape[-1]
    kernel = parameter(self, "kernel", (3, 3, channels, self.features))
    x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      window_strides=(self.stride, self.stride),
      padding=((1, 1), (1, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if self.use_bias:
      bias = parameter(self, "bias", (self.features,))
      bias = bias.astype(self.dtype)
      x = finish(x, bias, self.dtype) if finish else add_bias(x, bias)
    return x


def _two_numbers(x: jax.Array) -> jax.Array:
  """Writes x (…, n) float32 as sums of two bfloat16 numbers: (…, 2n).

  The first n are x rounded, the others what is missing, to 16 bits together.
  """
  kind = jnp.finfo(jnp.bfloat16)
  rounded = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
  return jnp.concatenate([rounded, x - rounded], axis=-1).astype(jnp.bfloat16)


@jax.custom_vjp
def _read_out(x: jax.Array, bias: jax.Array, kernel: jax.Array) -> jax.Array:
  """Rectifies x (…, K) plus a bias (K,), both bfloat16, times a kernel.

  Of (K, n), n small, in float32. Products of float32 would first copy x, and
  are slow with few columns. So the kernel, and for its own gradient that of the
  result, count to 16 bits.
  """
  return _read_out_forward(x, bias, kernel)[0]


def _read_out_forward(x, bias, kernel):
  x, features = relu(x + bias), kernel.shape[-1]
  columns = _two_numbers(kernel)
  # More of them, zeros, than needed: kernels for so many are faster.
  columns = jnp.pad(columns, ((0, 0), (0, -2 * features % 16)))
  y = jnp.matmul(x, columns, preferred_element_type=jnp.float32)
  y = y[..., :features] + y[..., features : 2 * features]
  return y, (x, kernel)


def _read_out_backward(saved, gradient):
  x, kernel = saved
  channels, features = kernel.shape
  if suit_rows(x.shape, x.dtype, MAP_CHANNELS):
    kernels = kernel[None]  # All devices have all of it.
    to_x, sums = divide_batch(read_out_gradient)(x, gradient, kernels)
    to_bias = sum_blocks(sums)
  else:
    to_x = sum(gradient[..., i, None] * kernel[:, i] for i in range(features))
    to_x = jnp.where(x != 0, to_x, 0).astype(x.dtype)
    to_bias = sum_rows(to_x)
  to_kernel = sum_products(x, _two_numbers(gradient))
  to_kernel = to_kernel.reshape(channels, 2, features).sum(axis=1)
  return to_x, to_bias.astype(x.dtype), to_kernel.astype(kernel.dtype)


_read_out.defvjp(_read_out_forward, _read_out_backward)


class Readout(nn.Module):
  """A rectified linear unit, then a linear map to a few channels in float32.

  Attributes:
    features: output channels.
  """

  features: int

  @nn.compact
  def __call__(self, x: jax.Array, before: jax.Array) -> jax.Array:
    """Maps x (…, K) to (…, features) float32.

    Args:
      x: a convolution.
      before: (K,) of x's type, its bias.
    """
    kernel = parameter(self, "kernel", (x.shape[-1], self.features))
    bias = parameter(self, "bias", (self.features,))
    if x.dtype == jnp.bfloat16:
      return _read_out(x, before, kernel) + bias
    x = relu(x + before).astype(jnp.float32)
    return jnp.matmul(x, kernel, precision="highest") + bias


class TransposedConv(nn.Module):
  """A transposed convolution whose stride is its kernel's side: no overlaps.

  Attributes:
    scale: side of the kernel, and how much larger the output is.
    dtype: type of operands and result.
  """

  scale: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, h, w, K) to (B, scale·h, scale·w, K)."""
    batch, height, width, channels = x.shape
    kernel = parameter(
      self, "kernel", (channels, self.scale, self.scale, channels)
    )
    bias = parameter(self, "bias", (channels,))
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    x = add_bias(jnp.einsum("bhwk,kijo->bhiwjo", x, kernel), bias)
    return x.reshape(batch, self.scale * height, self.scale * width, channels)


def _doubling(size: int) -> np.ndarray:
  """Returns the matrix (2n, n) that doubles n pixels with ends aligned.

  Position i of the result lies at i·(n-1)/(2n-1).
  """
  index = np.arange(2 * size)
  low, rest = np.divmod(index * (size - 1), 2 * size - 1)
  share = rest / (2 * size - 1)
  matrix = np.zeros((2 * size, size))
  matrix[index, low] = 1 - share
  matrix[index, np.minimum(low + 1, size - 1)] += share
  return matrix


def _taps(matrix: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns what makes each line's product with a vector, as few gatherings.

  Args:
    matrix: (p, n), zeros but for a few numbers close together in each line.

  Returns:
    Indices (p,) into the vector, and their weights (p,) float32, for each.
  """
  used = matrix != 0
  count = used.sum(axis=1).max()
  first = np.minimum(used.argmax(axis=1), matrix.shape[1] - count)
  index = first[:, None] + np.arange(count)
  weight = np.take_along_axis(matrix, index, axis=1).astype(np.float32)
  return list(zip(index.T, weight.T, strict=True))


def _combine(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """Multiplies rows and columns of pixels by sparse matrices.

  What a pixel of the result needs is gathered: compilers make one kernel of
  that, which reads and writes each map once.

  Args:
    x: (B, h, w, K).
    rows: (p, h), see `_taps`.
    columns: (q, w), alike.

  Returns:
    (B, p, q, K), summed in float32.
  """
  columns = _taps(columns)

  def along(row):
    return sum(
      weight[:, None] * x[:, row[:, None], column].astype(jnp.float32)
      for column, weight in columns
    )

  total = sum(weight[:, None, None] * along(row) for row, weight in _taps(rows))
  return total.astype(x.dtype)


@jax.custom_vjp
def _double(x: jax.Array) -> jax.Array:
  """Doubles a map (B, h, w, K) to (B, 2h, 2w, K)."""
  if suit_rows(x.shape, x.dtype, MAP_CHANNELS):
    return divide_batch(double_map)(x)
  return _combine(x, *map(_doubling, x.shape[1:3]))


def _double_forward(x):
  return _double(x), None


def _double_backward(_, gradient):
  if suit_rows(gradient.shape, gradient.dtype, MAP_CHANNELS):
    return (divide_batch(halve_map)(gradient),)
  # JAX would make a scattering of the gathering.
  rows, columns = (_doubling(side // 2).T for side in gradient.shape[1:3])
  return (_combine(gradient, rows, columns),)


_double.defvjp(_double_forward, _double_backward)


def upsample(x: jax.Array, keep: tuple[int, int] | None = None) -> jax.Array:
  """Doubles a map (B, h, w, K) bilinearly with corners aligned.

  There is no forward-mode derivative.

  Args:
    x: (B, h, w, K).
    keep: rows and columns to return, the first of the doubled map; None: all.

  Returns:
    (B, 2h, 2w, K), or (B, *keep, K).
  """
  y = _double(x)
  return y if keep is None else y[:, : keep[0], : keep[1]]


class ResidualConv(nn.Module):
  """x + conv(relu(conv(relu(x))))."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (B, h, w, K) to the same shape."""
    y = Conv(x.shape[-1], self.dtype, name="conv_0")(relu(x))
    y = Conv(x.shape[-1], self.dtype, name="conv_1")(relu(y))
    return x + y


class Refine(nn.Module):
  """One step of the fusion path, from a coarse map to the next finer one."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    skip: jax.Array | None,
    keep: tuple[int, int] | None = None,
  ) -> jax.Array:
    """Adds a skip map, refines and doubles.

    Args:
      x: (B, h, w, K).
      skip: (B, h, w, K) of the encoder side; None at the coarsest step.
      keep: size to crop the result to, or None.

    Returns:
      (B, 2h, 2w, K), or cropped to `keep`.
    """
    unit = ResidualConv(self.dtype, name="skip_unit")
    if skip is not None:
      x = x + unit(skip)
    elif self.is_initializing():
      unit(x)  # Not used, but checkpoints hold its parameters.
    x = ResidualConv(self.dtype, name="unit")(x)
    # A pointwise linear map and an interpolation commute: the cheaper order.
    x = Linear(x.shape[-1], self.dtype, name="output")(x)
    return upsample(x, keep)


class DenseHead(nn.Module):
  """DPT: reassembles four token maps and fuses them from coarse to fine."""

  config: ModelConfig
  compute: Compute

  @nn.compact
  def __call__(
    self, maps: tuple[jax.Array, ...], grid: tuple[int, int]
  ) -> jax.Array:
    """Predicts four channels a pixel.

    Args:
      maps: four token maps (B, h·w, ·): encoder output, decoder layers L/2,
        3L/4 and L.
      grid: (h, w).

    Returns:
      (B, 16h, 16w, 4) float32, before activations.
    """
    dtype, config = self.compute.precision.dense_dtype, self.config
    layers = []
    for k, (tokens, width) in enumerate(
      zip(maps, config.dpt_widths, strict=True)
    ):
      x = Linear(width, dtype, name=f"project_{k}")(tokens)
      x = x.reshape(x.shape[0], *grid, width)
      if k < 2:
        x = TransposedConv((4, 2)[k], dtype, name=f"resize_{k}")(x)
      elif k == 3:
        x = Conv(width, dtype, stride=2, name=f"resize_{k}")(x)
      layers.append(
        Conv(config.dpt_features, dtype, use_bias=False, name=f"layer_{k}")(x)
      )
    # The coarsest map has ⌈h/2⌉ rows: doubled it may be one row too large.
    x = Refine(dtype, name="refine_3")(layers[3], None, keep=grid)
    for k in (2, 1, 0):
      x = Refine(dtype, name=f"refine_{k}")(x, layers[k])
    x = Conv(config.dpt_features // 2, dtype, name="head_0")(x)
    x = upsample(x)
    last = Conv(config.dpt_head_width, dtype, name="head_1")
    return Readout(4, name="head_2")(*last(x, leave_apart))
