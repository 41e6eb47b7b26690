"""The dense heads' own layers: up-sampling, rectifying, reading out."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from point3r_jax.models import dpt


@hypothesis.given(height=st.integers(1, 7), width=st.integers(1, 7))
@hypothesis.settings(deadline=None, max_examples=10)
def test_upsample_is_bilinear_with_aligned_corners(height, width):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, height, width, 2)).astype(np.float32)
  rows = np.linspace(0, height - 1, 2 * height)
  columns = np.linspace(0, width - 1, 2 * width)
  expected = np.empty((1, 2 * height, 2 * width, 2))
  for k in range(2):
    tall = [np.interp(rows, np.arange(height), c) for c in x[0, :, :, k].T]
    wide = [np.interp(columns, np.arange(width), r) for r in np.transpose(tall)]
    expected[0, ..., k] = wide
  upsample = jax.jit(dpt.upsample, static_argnames="keep")
  np.testing.assert_allclose(upsample(x), expected, atol=1e-5)
  cropped = upsample(x, keep=(2 * height - 1, width))
  np.testing.assert_allclose(cropped, expected[:, :-1, :width], atol=1e-5)


def test_upsample_keeps_constants_in_bfloat16():
  x = jnp.full((1, 5, 7, 1), 3.0, jnp.bfloat16)
  np.testing.assert_array_equal(dpt.upsample(x).astype(np.float32), 3.0)


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (7, 2)])
def test_gradient_of_upsample_is_its_transpose(size):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((1, *size, 2)).astype(np.float32)
  weight = rng.standard_normal((1, 2 * size[0], 2 * size[1], 2))

  @jax.jit
  def run(x):
    gradient = jax.grad(lambda x: jnp.vdot(dpt.upsample(x), weight))(x)
    columns = jax.vmap(dpt.upsample)(jnp.eye(x.size).reshape(-1, *x.shape))
    return gradient, columns

  gradient, columns = run(x)
  expected = np.tensordot(columns, weight, axes=weight.ndim)
  np.testing.assert_allclose(gradient.ravel(), expected, atol=1e-5)


def test_relu_has_no_slope_at_zero():
  x = jnp.asarray([-2.0, -0.0, 0.0, 3.0])
  np.testing.assert_array_equal(dpt.relu(x), [0, 0, 0, 3])
  slope = jax.grad(lambda x: dpt.relu(x).sum())(x)
  np.testing.assert_array_equal(slope, [0, 0, 0, 1])


@pytest.mark.parametrize("pixels", [64, 7])
def test_maps_in_16_bits_are_read_out_in_float32(pixels):
  """Products with a kernel in float32, as are gradients."""
  rng = np.random.default_rng(0)
  # Eighths, which are added without rounding.
  eighths = rng.integers(-16, 17, (2, pixels, 5, 32)) / 8
  x, bias = jnp.asarray(eighths, jnp.bfloat16), jnp.full(32, 0.5, jnp.bfloat16)
  params = {
    "kernel": jnp.asarray(rng.standard_normal((32, 4)), jnp.float32),
    "bias": jnp.asarray(rng.standard_normal(4), jnp.float32),
  }
  weight = rng.standard_normal((2, pixels, 5, 4)).astype(np.float32)
  head = dpt.Readout(4)

  def run(params, x, bias):
    y = head.apply({"params": params}, x, bias)
    return jnp.vdot(y, weight), y

  gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
  (of_params, of_x, of_bias), y = gradient(params, x, bias)
  (expected_of_params, expected_of_x, expected_of_bias), expected = gradient(
    params, x.astype(jnp.float32), bias.astype(jnp.float32)
  )
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  for name, found in of_params.items():
    np.testing.assert_allclose(
      found, expected_of_params[name], rtol=1e-4, atol=1e-3
    )
  np.testing.assert_allclose(
    of_x.astype(np.float32), expected_of_x, rtol=2**-8, atol=1e-6
  )
  np.testing.assert_allclose(
    of_bias.astype(np.float32), expected_of_bias, rtol=2**-7, atol=0.2
  )
