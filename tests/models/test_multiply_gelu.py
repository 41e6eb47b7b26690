"""GELUs and their gradients within products, as Hopper GPUs make them."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import gelus, hopper_gelus, hopper_product
from point3r_jax.models.blocks import EncoderBlock
from point3r_jax.models.compute import Compute
from point3r_jax.models.gelus import multiply_gelu
from point3r_jax.models.linear import Factors
from point3r_jax.models.row_kernels import gelu_slope
from point3r_jax.precision import get_precision
from point3r_jax.training.sharding import make_mesh

ROWS, HIDDEN, WIDTH = (8, 16), 128, 64


def draw(number, *shape):
  x = jax.random.normal(jax.random.key(number), shape)
  return x.astype(jnp.bfloat16)


def operands():
  x, bias = draw(0, *ROWS, WIDTH), draw(1, HIDDEN)
  first, second = draw(2, WIDTH, HIDDEN) / 8, draw(3, HIDDEN, WIDTH)
  return (x, first, bias, second), draw(4, *ROWS, WIDTH)


def multiply(x, first, bias, second, sums=None):
  """Multiplies, in sums of some type, x's by default."""
  return multiply_gelu(
    Factors(x, first, x.dtype),
    second,
    bias=bias,
    dtype=x.dtype,
    preferred_element_type=sums or x.dtype,
  )


def pull(*arrays):
  """Returns the product and the gradients of all operands."""
  *arrays, gradient = arrays
  result, pullback = jax.vjp(multiply, *arrays)
  return result, *pullback(gradient)


def product_gelu(sizes, x, kernel, bias):
  """Does what the GPU's kernel does."""
  sizes.append(x.shape)
  wide, kernel, bias = (z.astype(jnp.float32) for z in (x, kernel[0], bias[0]))
  y = wide @ kernel + bias
  return jax.nn.gelu(y).astype(x.dtype), y.astype(x.dtype)


def gelu_gradient_product(sizes, gradient, kernel, x):
  """The same, with sums over two blocks."""
  sizes.append(gradient.shape)
  gradient, kernel, rows = (
    z.astype(jnp.float32) for z in (gradient, kernel[0], x)
  )
  of_x = (gradient @ kernel.T) * gelu_slope(rows)
  sums = of_x.reshape(2, -1, of_x.shape[-1]).sum(axis=1)
  return of_x.astype(x.dtype), sums


@pytest.fixture
def sizes(monkeypatch):
  """Lets products take the stand-ins; lists what these are given."""
  sizes = []
  monkeypatch.setattr(gelus, "compute_capability", lambda: "9.0")
  for kernel in (product_gelu, gelu_gradient_product):
    stand_in = functools.wraps(kernel)(functools.partial(kernel, sizes))
    monkeypatch.setattr(hopper_gelus, kernel.__name__, jax.jit(stand_in))
  return sizes


def assert_close(found, expected):
  """To what 16 bits allow where a CPU, or devices, sum in them."""
  chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
  for one, other in zip(found, expected, strict=True):
    one, other = np.float32(one), np.float32(other)
    assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)


def test_gradients_with_and_without_the_kernel(request):
  arrays, gradient = operands()
  expected = pull(*arrays, gradient)
  sizes = request.getfixturevalue("sizes")
  assert_close(pull(*arrays, gradient), expected)
  assert sizes == 2 * [(*ROWS, WIDTH)]


def test_a_mesh_splits_rows_alone(sizes):
  arrays, gradient = operands()
  expected = pull(*arrays, gradient)
  with jax.set_mesh(make_mesh()):
    found = jax.jit(pull)(*arrays, gradient)
  assert_close(found, expected)
  assert sizes[-1] == (ROWS[0] // len(jax.devices()), ROWS[1], WIDTH)


@pytest.mark.parametrize(
  ("remat", "kept", "runs"),
  [("none", 2, 1), ("elementwise", 1, 1), ("blocks", 0, 2)],
)
def test_blocks_take_the_kernels_in_training(
  request, capsys, remat, kept, runs
):
  """And keep a product and its GELU, the product alone, or neither."""
  compute = Compute(get_precision("bfloat16"), "xla", remat)
  block = compute.remat_block(EncoderBlock)(2, HIDDEN // WIDTH, compute)
  x, gradient = draw(0, *ROWS, WIDTH), draw(1, *ROWS, WIDTH)
  leaves, tree = jax.tree.flatten(block.init(jax.random.key(0), x))
  params = tree.unflatten(
    [0.3 * draw(i, *leaf.shape) for i, leaf in enumerate(leaves)]
  )

  def gradients(params, x):
    _, pullback = jax.vjp(block.apply, params, x)
    return jax.tree.leaves(pullback(gradient))

  expected = gradients(params, x)
  sizes = request.getfixturevalue("sizes")
  jax.clear_caches()  # Of blocks that were traced without.
  assert_close(gradients(params, x), expected)
  assert set(sizes) == {(*ROWS, WIDTH)}
  program = str(jax.make_jaxpr(gradients)(params, x))
  assert program.count("name=product_gelu") == runs
  jax.ad_checkpoint.print_saved_residuals(block.apply, params, x)
  hidden = f"bf16[{ROWS[0]},{ROWS[1]},{HIDDEN}]"
  assert capsys.readouterr().out.count(hidden) == kept


def test_without_a_backward_pass_there_is_no_kernel(sizes):
  arrays, _ = operands()
  multiply(*arrays)
  assert not sizes


@pytest.mark.parametrize(
  ("rows", "widths", "dtype", "sums"),
  [
    ((8, 8), (WIDTH, 120, WIDTH), jnp.bfloat16, jnp.bfloat16),
    ((8, 8), (72, HIDDEN, WIDTH), jnp.bfloat16, jnp.bfloat16),
    ((8, 8), (WIDTH, HIDDEN, 40), jnp.bfloat16, jnp.bfloat16),
    ((8, 3), (WIDTH, HIDDEN, WIDTH), jnp.bfloat16, jnp.bfloat16),
    ((8,), (WIDTH, HIDDEN, WIDTH), jnp.bfloat16, jnp.bfloat16),
    ((8, 8), (WIDTH, HIDDEN, WIDTH), jnp.bfloat16, jnp.float32),
    ((8, 8), (WIDTH, HIDDEN, WIDTH), jnp.float32, jnp.bfloat16),
    ((8, 8), (WIDTH, HIDDEN, WIDTH), jnp.float32, jnp.float32),
  ],
)
def test_what_the_kernels_do_not_take(sizes, rows, widths, dtype, sums):
  x, first, bias, second = (
    draw(number, *size).astype(dtype)
    for number, size in enumerate(
      [(*rows, widths[0]), widths[:2], widths[1:2], widths[1:]]
    )
  )
  jax.grad(lambda x: multiply(x, first, bias, second, sums).sum())(x)
  assert not sizes


def test_the_kernels_have_the_registers_that_they_ask_for():
  """More would be waited for without an end."""
  computing, fetching = hopper_product._REGISTERS
  warpgroups = hopper_product.COMPUTING + 1
  at_first = 65536 // (128 * warpgroups) // 8 * 8
  most = warpgroups * at_first
  assert hopper_product.COMPUTING * computing + fetching <= most


def shapes(*shapes):
  return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


@pytest.mark.parametrize(
  ("kernel", "operands", "result"),
  [
    (
      hopper_gelus.product_gelu,
      shapes((2, 200, 128), (1, 128, 256), (1, 256)),
      "tensor<400x256xbf16>, tensor<400x256xbf16>",
    ),
    (  # Sums of two pairs of tiles of rows.
      hopper_gelus.gelu_gradient_product,
      shapes((2, 200, 128), (1, 256, 128), (2, 200, 256)),
      "tensor<400x256xbf16>, tensor<4x256xf32>",
    ),
  ],
)
def test_the_kernels_lower(kernel, operands, result):
  lowered = kernel.trace(*operands).lower(lowering_platforms=("cuda",))
  assert re.search(rf"@mosaic_gpu\S*\(.*-> \({result}\)", lowered.as_text())


def test_few_instructions_make_the_same_gelu():
  x = jnp.linspace(-6, 6, 1001)
  found = hopper_gelus._gelu(x), hopper_gelus._slope(x)
  expected = jax.nn.gelu(x, approximate=True), gelu_slope(x)
  chex.assert_trees_all_close(found, expected, atol=1e-5)
