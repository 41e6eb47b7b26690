"""Products of GELUs, whose gradients Hopper GPUs make within a product."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import hopper_product, linear
from point3r_jax.models.compute import Compute
from point3r_jax.models.layers import EncoderBlock
from point3r_jax.models.linear import gelu_slope, multiply_gelu
from point3r_jax.precision import get_precision
from point3r_jax.training.sharding import make_mesh

ROWS, HIDDEN, WIDTH = (8, 6), 128, 64


def draw(number, *shape):
  x = jax.random.normal(jax.random.key(number), shape)
  return x.astype(jnp.bfloat16)


def operands():
  y, bias = draw(0, *ROWS, HIDDEN), draw(1, HIDDEN)
  return (y, bias, draw(2, HIDDEN, WIDTH)), draw(3, *ROWS, WIDTH)


def pull(y, bias, kernel, gradient):
  """Returns the product and the gradients of all operands."""

  def multiply(y, bias, kernel):
    return multiply_gelu(
      y, kernel, bias=bias, dtype=y.dtype, preferred_element_type=y.dtype
    )

  result, pullback = jax.vjp(multiply, y, bias, kernel)
  return result, *pullback(gradient)


def stand_in(sizes, gradient, kernel, x):
  """Does what the GPU's kernel does, with sums over two blocks."""
  sizes.append(gradient.shape)
  wide = (z.astype(jnp.float32) for z in (gradient, kernel[0], x))
  gradient, kernel, rows = wide
  of_x = (gradient @ kernel.T) * gelu_slope(rows)
  sums = of_x.reshape(2, -1, of_x.shape[-1]).sum(axis=1)
  return of_x.astype(x.dtype), sums


@pytest.fixture
def sizes(monkeypatch):
  """Lets products take the stand-in; lists what it is given."""
  sizes = []
  monkeypatch.setattr(linear, "compute_capability", lambda: "9.0")
  kernel = functools.partial(stand_in, sizes)
  monkeypatch.setattr(hopper_product, "gelu_gradient_product", kernel)
  return sizes


def assert_close(found, expected):
  chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
  for one, other in zip(found, expected, strict=True):
    one, other = np.float32(one), np.float32(other)
    assert np.abs(one - other).max() < 0.01 * np.abs(other).max()


def test_gradients_with_and_without_the_kernel(request):
  arrays, gradient = operands()
  expected = pull(*arrays, gradient)
  sizes = request.getfixturevalue("sizes")
  assert_close(pull(*arrays, gradient), expected)
  assert sizes == [(*ROWS, WIDTH)]


def test_a_mesh_splits_rows_alone(sizes):
  arrays, gradient = operands()
  expected = pull(*arrays, gradient)
  with jax.set_mesh(make_mesh()):
    found = jax.jit(pull)(*arrays, gradient)
  assert_close(found, expected)
  assert sizes[-1] == (ROWS[0] // len(jax.devices()), ROWS[1], WIDTH)


def test_blocks_take_the_kernel_in_training(request):
  compute = Compute(get_precision("bfloat16"), "xla", "none")
  block = EncoderBlock(2, HIDDEN // WIDTH, compute)
  x, gradient = draw(0, *ROWS, WIDTH), draw(1, *ROWS, WIDTH)
  leaves, tree = jax.tree.flatten(block.init(jax.random.key(0), x))
  params = tree.unflatten(
    [0.3 * draw(i, *leaf.shape) for i, leaf in enumerate(leaves)]
  )

  def gradients():
    _, pullback = jax.vjp(block.apply, params, x)
    return jax.tree.leaves(pullback(gradient))

  expected = gradients()
  sizes = request.getfixturevalue("sizes")
  assert_close(gradients(), expected)
  assert sizes == [(*ROWS, WIDTH)]


@pytest.mark.parametrize(
  ("shape", "dtype", "result"),
  [
    ((120, WIDTH), jnp.bfloat16, jnp.bfloat16),
    ((HIDDEN, 72), jnp.bfloat16, jnp.bfloat16),
    ((HIDDEN, WIDTH), jnp.bfloat16, jnp.float32),
    ((HIDDEN, WIDTH), jnp.float32, jnp.float32),
  ],
)
def test_what_the_kernel_does_not_take(sizes, shape, dtype, result):
  y, bias, kernel = (
    draw(number, *size).astype(dtype)
    for number, size in enumerate([(4, shape[0]), shape[:1], shape])
  )

  def total(y):
    return multiply_gelu(
      y, kernel, bias=bias, dtype=dtype, preferred_element_type=result
    ).sum()

  jax.grad(total)(y)
  assert not sizes


def test_the_kernel_lowers_and_has_the_registers_that_it_asks_for():
  """More would be waited for without an end."""
  computing, fetching = hopper_product._REGISTERS
  warpgroups = hopper_product._COMPUTING + 1
  at_first = 65536 // (128 * warpgroups) // 8 * 8
  most = warpgroups * at_first
  assert hopper_product._COMPUTING * computing + fetching <= most
  x, gradient, kernel = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for shape in ((2, 200, 256), (2, 200, 128), (1, 256, 128))
  )
  traced = hopper_product.gelu_gradient_product.trace(gradient, kernel, x)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # Two pairs of tiles of rows.
  assert "mosaic_gpu" in text
  assert "tensor<4x256xf32>" in text
