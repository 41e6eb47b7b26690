"""Kernels over maps, interpreted, against XLA's forms of the same."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import dpt, map_kernels
from point3r_jax.training.sharding import make_mesh

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


def draw(number, shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(number), shape).astype(dtype)


def assert_close(found, expected, atol):
  chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
  found, expected = (
    jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    for tree in (found, expected)
  )
  chex.assert_trees_all_close(found, expected, rtol=2**-7, atol=atol)


# Of one line, of several blocks and a last one that is not whole.
@pytest.mark.parametrize("size", [(1, 1), (2, 40), (9, 16), (3, 1)])
@pytest.mark.parametrize("batch, channels", [(1, 128), (2, 384)])
def test_maps_are_doubled(request, size, batch, channels):
  x = draw(0, (batch, *size, channels), jnp.float32)
  gradient = draw(1, (batch, 2 * size[0], 2 * size[1], channels), jnp.float32)

  def run():
    result, pullback = jax.vjp(dpt.upsample, x)
    return result, pullback(gradient)

  expected = run()
  called = request.getfixturevalue("shapes")
  assert_close(run(), expected, atol=1e-5)
  assert called == [[x.shape], [gradient.shape]]


def test_maps_of_16_bits_are_doubled_in_float32(request):
  x = draw(0, (1, 4, 6, 128))
  gradient = draw(1, (1, 8, 12, 128))

  def run():
    result, pullback = jax.vjp(dpt.upsample, x)
    return result, pullback(gradient)

  expected = run()
  request.getfixturevalue("shapes")
  assert_close(run(), expected, atol=1e-2)


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
  before, bias = draw(2, shape[-1:]), draw(3, (4,), jnp.float32)
  gradient = draw(4, (*shape[:-1], 4), jnp.float32)

  def run():
    result, pullback = jax.vjp(dpt._read_out, x, before, kernel, bias)
    of_x, of_before, *of_map = pullback(gradient)
    return (result, of_x, of_map), of_before

  expected, of_before = run()
  request.getfixturevalue("shapes")
  found, of_before_again = run()
  assert_close(found, expected, atol=1e-4)
  of_x = np.float32(expected[1])
  expected = of_x.sum((0, 1, 2)).astype(before.dtype)
  # Rows of a gradient are rounded before XLA sums them, or after.
  for found in (of_before, of_before_again):
    assert_close(found, expected, atol=0.5)


def test_devices_of_a_mesh_share_the_maps(shapes):
  """But each of them has the whole kernel of what is read out."""
  x, before = draw(0, (8, 2, 2, 128)), draw(1, (128,))
  kernel, bias = draw(2, (128, 4), jnp.float32), draw(3, (4,), jnp.float32)

  @jax.jit
  def gradients(x, before, kernel, bias):
    def total(x, before, bias):
      return jnp.sum(dpt._read_out(dpt.upsample(x), before, kernel, bias) ** 2)

    return jax.grad(total, argnums=(0, 1, 2))(x, before, bias)

  expected = gradients(x, before, kernel, bias)
  with jax.set_mesh(make_mesh(2, 4)):
    found = gradients(x, before, kernel, bias)
  maps = [
    [(batch, size, size, channels) for size, channels in sizes]
    for batch in (8, 1)
    for sizes in ([(2, 128)], [(4, 128), (4, 4)], [(4, 128)])
  ]
  for call in (maps[1], maps[4]):
    call.append((1, 128, 4))
  assert shapes == maps
  assert_close(found, expected, atol=0.1)
