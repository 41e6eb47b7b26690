"""Kernels for Hopper GPUs, interpreted on a CPU, with a watch for races.

There matrix units read at once, and blocks do not end: only a GPU could show
that a place is given back too early to these, or a cluster ends too early.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import (
  hopper_attention,
  hopper_attention_gradient,
  hopper_gelus,
  hopper_parts,
  hopper_product,
)
from point3r_jax.models.attention import attention
from point3r_jax.models.hopper_attention import hopper_attention as attend
from point3r_jax.models.rotary import apply_rotary, rotary_2d, rotary_3d
from point3r_jax.models.row_kernels import gelu_slope

pytestmark = pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason="JAX before 0.12 does not interpret these",
)

MULTIPROCESSORS = 4


class Sum:
  """A sum in registers that products are added to."""

  def __init__(self, value):
    self.value = value


def run_state(multiply):
  """Does what `pallas.run_state` does with sums of products."""

  def run(sums):
    leaves, tree = jax.tree.flatten(
      sums, is_leaf=lambda x: isinstance(x, plgpu.ACC)
    )
    totals = [Sum(x._init) for x in leaves]
    multiply(tree.unflatten(totals))
    return tree.unflatten([x.value for x in totals])

  return run


def add_product(wgmma, total, x, y):
  """Adds a product to a sum, whose first factor may be in registers, too."""
  if not isinstance(total, Sum):
    return wgmma(total, x, y)
  x, y = (z if isinstance(z, jax.Array) else z[...] for z in (x, y))
  plgpu.commit_smem()  # Unlike matrix units, loads have to be fenced.
  total.value += jnp.dot(x, y, preferred_element_type=jnp.float32)


@pytest.fixture
def interpreted(monkeypatch):
  """Interprets kernels, for few multiprocessors."""
  for module in (hopper_attention, hopper_product):
    monkeypatch.setattr(module, "multiprocessors", lambda: MULTIPROCESSORS)
  # The interpreter does not know what these are made of.
  monkeypatch.setattr(
    hopper_gelus, "_sum_rows", lambda x, scratch: x.sum(axis=0)
  )
  monkeypatch.setattr(pl, "run_state", run_state)
  product = functools.partial(add_product, plgpu.wgmma)
  monkeypatch.setattr(plgpu, "wgmma", product)
  params = plgpu.InterpretGPUParams(detect_races=True)
  with plgpu.force_gpu_interpret_mode(params):
    yield


def draw(number, *shape):
  x = jax.random.normal(jax.random.key(number), shape)
  return x.astype(jnp.bfloat16)


def wide(*arrays):
  return [x.astype(jnp.float32) for x in arrays]


def assert_close(found, expected, tolerance=0.01):
  found, expected = np.float32(found), np.float32(expected)
  error = np.linalg.norm(found - expected)
  assert error < tolerance * np.linalg.norm(expected)


# Tiles of three rows of clusters, the last one beyond the rows; one tile.
@pytest.mark.parametrize(
  ("rows", "depth", "columns"), [((2, 264), 128, 256), ((1, 8), 64, 128)]
)
def test_gelus_within_products(interpreted, rows, depth, columns):
  x, bias = draw(0, *rows, depth), draw(1, 1, columns)
  kernel = draw(2, 1, depth, columns) / 8
  result, product = hopper_gelus.product_gelu.__wrapped__(x, kernel, bias)
  x, kernel, bias = wide(x, kernel[0], bias[0])
  expected = x @ kernel + bias
  assert_close(product, expected)
  assert_close(result, jax.nn.gelu(expected))


@pytest.mark.parametrize(
  ("rows", "depth", "columns"), [((2, 264), 128, 256), ((1, 8), 64, 128)]
)
def test_gradients_of_gelus_within_products(interpreted, rows, depth, columns):
  gradient, x = draw(0, *rows, depth), draw(1, *rows, columns)
  kernel = draw(2, 1, columns, depth)
  result, sums = hopper_gelus.gelu_gradient_product.__wrapped__(
    gradient, kernel, x
  )
  gradient, kernel, x = wide(gradient, kernel[0], x)
  expected = gradient @ kernel.T * gelu_slope(x)
  assert_close(result, expected)
  assert_close(sums.sum(axis=0), expected.sum(axis=(0, 1)))


# Rotated heads, values, and a table whose groups differ; two tables, heads that
# no tile begins with, and three tiles of rows of clusters.
@pytest.mark.parametrize(
  ("rows", "width", "channels", "forms"),
  [
    ((1, 8), 128, (32,), [(2, 0), (2, None), (4, 1)]),
    ((2, 264), 384, (48,), [(6, 0), (8, 1)]),
  ],
)
def test_parts_of_a_product(interpreted, rows, width, channels, forms):
  position = jax.random.normal(jax.random.key(3), (*rows, 3))
  tables = [
    rotary_2d((1, rows[1]), 64),
    *(rotary_3d(position, size, (10.0,)) for size in channels),
  ]
  columns = len(forms) * width
  x, bias = draw(0, *rows, 64), draw(1, 1, columns)
  kernel = draw(2, 1, 64, columns) / 8
  found = hopper_parts.product_parts.__wrapped__(
    x, kernel, bias, tables, tuple(forms)
  )
  x, kernel, bias = wide(x, kernel[0], bias[0])
  products = jnp.split(x @ kernel + bias, len(forms), axis=-1)
  for part, product, (heads, table) in zip(found, products, forms, strict=True):
    expected = product.reshape(*rows, heads, -1)
    if table is not None:
      expected = apply_rotary(expected, tables[table])
    assert part.dtype == jnp.bfloat16
    assert_close(part, expected)


# One block of keys in the backward pass, or more; of one sample's queries the
# last ones are in steps that nothing is to be done for.
@pytest.mark.parametrize("form", [None, *hopper_attention_gradient.FORMS])
@pytest.mark.parametrize(
  ("tokens", "channels", "queries", "lengths"),
  [
    ((200, 136), 64, (200, 70), (136, 3)),
    ((72, 264), 48, (5, 72), (257, 264)),
  ],
)
def test_attention(
  monkeypatch, interpreted, tokens, channels, queries, lengths, form
):
  """Without a backward pass, and with one of some form."""
  query = draw(0, 2, tokens[0], 2, channels)
  key, value = (draw(i, 2, tokens[1], 2, channels) for i in (1, 2))
  queries, lengths = (
    jnp.array(queries, jnp.int32),
    jnp.array(lengths, jnp.int32),
  )
  valid = jnp.arange(tokens[0]) < queries[:, None]
  kernel = functools.partial(attend.__wrapped__, keep_log_sum=form is not None)
  result = kernel(query, key, value, queries, lengths)
  exact = functools.partial(attention, key_length=lengths, implementation="xla")
  expected, pullback = jax.vjp(exact, *wide(query, key, value))
  if form is None:
    assert_close(result[valid], expected[valid])
    return
  result, log_sum = result
  assert_close(result[valid], expected[valid])
  gradient = jnp.where(valid[..., None, None], draw(3, *query.shape), 0)
  monkeypatch.setattr(hopper_attention_gradient, "FORMS", (form,))
  backward = hopper_attention_gradient.hopper_attention_gradient.__wrapped__
  found = backward(
    query, key, value, queries, lengths, result, log_sum, gradient
  )
  assert not found[0][~valid].any()
  for one, other in zip(found, pullback(*wide(gradient)), strict=True):
    assert_close(one, other)
