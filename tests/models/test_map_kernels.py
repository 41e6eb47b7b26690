"""Kernels over maps, interpreted, against XLA's forms of the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import dpt, map_kernels
from point3r_jax.training.sharding import make_mesh
from tests.models.arrays import assert_close, draw

KERNELS = "double_map", "halve_map", "read_out_gradient"


@pytest.fixture
def shapes(monkeypatch):
  """Has maps take the kernels, on a CPU; a list of what these are called with.

  Whatever number of channels there is.
  """
  called = []

  def run(kernel, *arrays):
    called.append([x.shape for x in arrays])
    return kernel(*arrays, interpret=True)

  for name in KERNELS:
    kernel = functools.partial(run, getattr(map_kernels, name))
    monkeypatch.setattr(dpt, name, kernel)
  monkeypatch.setattr(dpt, "suit_rows", lambda *_: True)
  return called


def compiled(run):
  """Runs a function, traced anew, since what it calls may have changed."""
  return jax.jit(lambda: run())()


# Of one line, of several blocks and a last one that is not whole, of several
# samples and parts of their channels.
@pytest.mark.parametrize(
  "shape", [(1, 1, 1, 128), (1, 2, 40, 128), (1, 3, 1, 128), (2, 5, 16, 384)]
)
def test_maps_are_doubled(request, shape):
  x = draw(0, shape, jnp.float32)
  batch, height, width, channels = shape
  doubled = batch, 2 * height, 2 * width, channels
  gradient = draw(1, doubled, jnp.float32)

  def run():
    result, pullback = jax.vjp(dpt.upsample, x)
    return result, pullback(gradient)

  expected = compiled(run)
  called = request.getfixturevalue("shapes")
  assert_close(compiled(run), expected, atol=1e-5)
  assert called == [[x.shape], [gradient.shape]]


def test_maps_of_16_bits_are_doubled_in_float32(request):
  x = draw(0, (1, 4, 6, 128))
  gradient = draw(1, (1, 8, 12, 128))

  def run():
    result, pullback = jax.vjp(dpt.upsample, x)
    return result, pullback(gradient)

  expected = compiled(run)
  request.getfixturevalue("shapes")
  assert_close(compiled(run), expected, atol=1e-2)


def test_weights_of_pixels_sum_to_one():
  """Of those that become one, and of one in all that it becomes."""
  x = jnp.ones((1, 4, 18, 128))
  doubled = map_kernels.double_map(x, interpret=True)
  np.testing.assert_allclose(doubled, 1, rtol=1e-6)
  of_x = map_kernels.halve_map(draw(0, x.shape, jnp.float32), interpret=True)
  total = draw(0, x.shape, jnp.float32).sum()
  np.testing.assert_allclose(of_x.sum(), total, rtol=1e-4)


# A block of them, several and a last one that is not whole, and fewer rows.
@pytest.mark.parametrize(
  "shape", [(2, 16, 32, 128), (1, 24, 26, 128), (1, 4, 2, 256)]
)
def test_maps_are_read_out(request, shape):
  x, kernel = draw(0, shape), draw(1, (shape[-1], 4), jnp.float32)
  bias = draw(2, shape[-1:])
  gradient = draw(3, (*shape[:-1], 4), jnp.float32)

  def run():
    result, pullback = jax.vjp(dpt._read_out, x, bias, kernel)
    return result, *pullback(gradient)

  result, of_x, of_bias, of_kernel = compiled(run)
  request.getfixturevalue("shapes")
  again, of_x_again, of_bias_again, of_kernel_again = compiled(run)
  assert_close(
    (again, of_x_again, of_kernel_again), (result, of_x, of_kernel), atol=1e-5
  )
  expected = np.float32(of_x).sum((0, 1, 2)).astype(bias.dtype)
  # Rows of a gradient are rounded before XLA sums them, or after.
  for found in (of_bias, of_bias_again):
    assert_close(found, expected, atol=0.5)


def test_devices_of_a_mesh_share_the_maps(shapes):
  """But each of them has the whole kernel of what is read out."""
  x, bias = draw(0, (8, 2, 2, 128)), draw(1, (128,))
  kernel = draw(2, (128, 4), jnp.float32)

  @jax.jit
  def gradients(x, bias, kernel):
    def total(x, bias):
      return jnp.sum(dpt._read_out(dpt.upsample(x), bias, kernel) ** 2)

    return jax.grad(total, argnums=(0, 1))(x, bias)

  expected = gradients(x, bias, kernel)
  with jax.set_mesh(make_mesh(2, 4)):
    found = gradients(x, bias, kernel)
  maps = [
    [(batch, size, size, channels) for size, channels in sizes]
    for batch in (8, 1)
    for sizes in ([(2, 128)], [(4, 128), (4, 4)], [(4, 128)])
  ]
  for call in (maps[1], maps[4]):
    call.append((1, 128, 4))
  assert shapes == maps
  assert_close(found, expected, atol=0.1)
