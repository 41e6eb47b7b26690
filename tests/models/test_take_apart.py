"""Products taken apart: with kernels, interpreted, and with XLA's forms."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import hopper_parts
from point3r_jax.models import parts as parts_module
from point3r_jax.models.blocks import EncoderBlock
from point3r_jax.models.compute import Compute
from point3r_jax.models.layers import query_key_value
from point3r_jax.models.linear import Factors
from point3r_jax.models.parts import Part, take_apart
from point3r_jax.models.rotary import apply_rotary, rotary_2d, rotary_3d
from point3r_jax.models.rotary_kernels import join_gradients
from point3r_jax.precision import get_precision
from point3r_jax.training.sharding import make_mesh

BASES = (100.0, 10.0)


@pytest.fixture
def interpreted(monkeypatch):
  """Lets products take the kernel, on a CPU."""
  kernel = functools.partial(join_gradients, interpret=True)
  monkeypatch.setattr(parts_module, "join_gradients", kernel)
  monkeypatch.setattr(parts_module, "suit_rows", lambda *_: True)


def draw(number, shape):
  return jax.random.normal(jax.random.key(number), shape).astype(jnp.bfloat16)


def tables(batch, height, *channels):
  """Tables of samples' own positions in space, of so many channels."""
  position = jax.random.normal(jax.random.key(9), (batch, 4 * height, 3))
  return [rotary_3d(position, size, BASES) for size in channels]


def two_kinds(*heads):
  """Parts as decoders have them, heads of 64 and of 48 channels."""
  return [
    part
    for number, table in zip(heads, tables(2, 10, 64, 48), strict=True)
    for part in query_key_value(number, table)
  ]


# Heads with alike groups, of all samples; three groups that are even and alike,
# even but not alike, and odd; two kinds of heads in one product, as decoders
# have; one part; without rotation; more heads than a kernel takes at a time, a
# number of heads that is no power of two.
CASES = {
  "image": (2, 4, 64, query_key_value(4, rotary_2d((4, 4), 16))),
  "alike": (2, 6, 96, query_key_value(2, *tables(2, 6, 48))),
  "even": (1, 18, 32, query_key_value(1, *tables(1, 18, 32))),
  "odd": (2, 4, 66, query_key_value(3, *tables(2, 4, 22))),
  "decoder": (2, 10, 192, two_kinds(3, 4)),
  "query": (1, 2, 768, [Part(12, *tables(1, 2, 64))]),
  "plain": (3, 2, 64, query_key_value(2, None)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_without_the_kernel(request, name):
  batch, height, width, parts = CASES[name]
  shape = batch, 4 * height, len(parts) * width
  y, bias = draw(0, shape), draw(1, shape[-1:])

  def run():
    taken, pullback = jax.vjp(
      lambda y, bias: take_apart(y, bias, y.dtype, parts=parts), y, bias
    )
    return taken, pullback([draw(i, x.shape) for i, x in enumerate(taken)])

  taken, (of_y, of_bias) = run()
  request.getfixturevalue("interpreted")
  again, (of_y_again, of_bias_again) = run()
  chex.assert_trees_all_equal(again, taken)
  chex.assert_trees_all_close(
    *(np.float32(x) for x in (of_y_again, of_y)), rtol=2**-7, atol=1e-6
  )
  # Summed before what is summed is rounded.
  chex.assert_trees_all_close(
    *(np.float32(x) for x in (of_bias_again, of_bias)), rtol=2**-7, atol=0.1
  )
  assert of_bias_again.dtype == bias.dtype


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["image", "alike"])
def test_devices_of_a_mesh_share_the_samples(monkeypatch, name):
  """But each of them has a table that holds for all samples."""
  batches = []

  def kernel(gradients, tables):
    batches.append({len(x) for x in (*gradients, *jax.tree.leaves(tables))})
    return join_gradients(gradients, tables, interpret=True)

  monkeypatch.setattr(parts_module, "join_gradients", kernel)
  _, height, width, parts = CASES[name]
  if name == "alike":
    parts = query_key_value(2, *tables(8, height, 48))
  shape = 8, 4 * height, 3 * width
  y, bias = draw(0, shape), draw(1, shape[-1:])

  @jax.jit
  def gradients(y, bias):
    def total(y, bias):
      taken = take_apart(y, bias, y.dtype, parts=parts)
      return sum(
        jnp.vdot(x, draw(i, x.shape).astype(jnp.float32))
        for i, x in enumerate(taken)
      )

    return jax.grad(total, (0, 1))(y, bias)

  expected = gradients(y, bias)
  with jax.set_mesh(make_mesh(2, 4)):
    found = gradients(y, bias)
  assert batches == [{8, len(parts[0].rotary.cos)}, {1}]
  chex.assert_trees_all_equal(found[0], expected[0])
  chex.assert_trees_all_close(
    *(np.float32(x[1]) for x in (found, expected)), rtol=2**-7, atol=0.05
  )


@pytest.mark.usefixtures("interpreted")
def test_values_can_stay_where_they_are():
  batch, height, width, parts = CASES["alike"]
  y = draw(0, (batch, 4 * height, 3 * width))
  bias = draw(1, (3 * width,))
  query, key, value = take_apart(
    y, bias, y.dtype, parts=parts, forward_only=True
  )
  whole = (y + bias).reshape(*y.shape[:2], 6, width // 2)
  for number, part in enumerate((query, key)):
    own = whole[:, :, 2 * number : 2 * number + 2]
    chex.assert_trees_all_equal(part, apply_rotary(own, parts[0].rotary))
  chex.assert_trees_all_equal(value, whole)


def product_parts(x, kernel, bias, tables, forms):
  """Does what the kernel for Hopper GPUs does."""
  y = x.astype(jnp.float32) @ kernel[0].astype(jnp.float32) + bias[0]
  parts = []
  for (heads, table), part in zip(
    forms, jnp.split(y, len(forms), axis=-1), strict=True
  ):
    part = part.reshape(*x.shape[:2], heads, -1)
    table = None if table is None else tables[table]
    parts.append(apply_rotary(part, table).astype(x.dtype))
  return parts


@pytest.fixture
def within(monkeypatch, interpreted):
  """Lets products be taken apart where they are made; lists their rows."""
  sizes = []

  def stand_in(x, *others, forms):
    sizes.append(x.shape)
    return product_parts(x, *others, forms)

  monkeypatch.setattr(parts_module, "compute_capability", lambda: "9.0")
  monkeypatch.setattr(hopper_parts, "product_parts", stand_in)
  monkeypatch.setattr(hopper_parts, "_JOINS_COLUMNS", True)
  return sizes


def pull_product(batch, height, width, parts, sums=jnp.bfloat16):
  """Returns parts of a product, and gradients of what it is made of."""
  x, bias = draw(0, (batch, 4 * height, 64)), draw(1, (len(parts) * width,))
  kernel = draw(2, (64, len(parts) * width)) / 8

  def run(x, kernel, bias):
    y = Factors(x, kernel, sums)
    return take_apart(y, bias.astype(sums), x.dtype, parts=parts)

  taken, pullback = jax.vjp(run, x, kernel, bias)
  gradients = pullback([draw(i, part.shape) for i, part in enumerate(taken)])
  return *taken, *gradients


def assert_near(found, expected):
  """To what 16 bits allow where a CPU, or devices, sum in them."""
  for one, other in zip(found, expected, strict=True):
    assert one.shape == other.shape
    one, other = np.float32(one), np.float32(other)
    assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)


# Parts that share a table; two tables, values.
PRODUCTS = {
  "query": (8, 2, 128, [Part(2, *tables(1, 2, 64))]),
  "image": (2, 4, 128, query_key_value(2, rotary_2d((4, 4), 64))),
  "decoder": (2, 10, 384, two_kinds(6, 8)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_parts_and_gradients_are_those_of_a_product(request, name):
  case = PRODUCTS[name]
  expected = pull_product(*case)
  sizes = request.getfixturevalue("within")
  found = pull_product(*case)
  assert sizes == [(case[0], 4 * case[1], 64)]
  assert_near(found, expected)


def test_a_mesh_splits_the_rows_of_a_product(within):
  case = PRODUCTS["query"]
  expected = pull_product(*case)
  with jax.set_mesh(make_mesh(2, 4)):
    found = jax.jit(lambda: pull_product(*case))()
  assert within[1:] == [(1, 8, 64)]
  assert_near(found, expected)


@pytest.mark.parametrize(
  ("batch", "height", "width", "heads", "sums"),
  [
    (2, 2, 64, 1, jnp.bfloat16),  # Not whole tiles of columns.
    (1, 1, 128, 2, jnp.bfloat16),  # Four rows.
    (2, 2, 128, 2, jnp.float32),
  ],
)
def test_what_the_kernel_for_products_does_not_take(
  within, batch, height, width, heads, sums
):
  pull_product(batch, height, width, [Part(heads)], sums)
  assert not within


@pytest.mark.parametrize(("remat", "taken"), [("none", True), (None, False)])
def test_blocks_take_products_apart_in_training(within, remat, taken):
  block = EncoderBlock(2, 4, Compute(get_precision("bfloat16"), "xla", remat))
  x = draw(0, (2, 8, 128))
  params = block.init(jax.random.key(0), x)
  jax.grad(lambda x: block.apply(params, x).sum().astype(jnp.float32))(x)
  assert set(within) == ({x.shape} if taken else set())


@pytest.mark.parametrize(
  ("name", "rows", "taken"),
  [("image", 32, True), ("image", 33, False), ("query", 1, False)],
)
def test_without_a_backward_pass_many_rows_are_taken_apart_if_any_rotate(
  monkeypatch, within, name, rows, taken
):
  """Heads of 64 channels do not in space: an axis has 21 or 22."""
  monkeypatch.setattr(parts_module, "_MANY_ROWS", rows)
  batch, height, width, parts = PRODUCTS[name]
  x = draw(0, (batch, 4 * height, 64))
  y = Factors(x, draw(1, (64, len(parts) * width)) / 8, x.dtype)
  bias = draw(2, (len(parts) * width,))
  expected = take_apart(y.multiply(), bias, x.dtype, parts=parts)
  found = take_apart(y, bias, x.dtype, parts=parts, forward_only=True)
  assert within == taken * [x.shape]
  assert_near([part[:, :, -parts[0].heads :] for part in found], expected)


def test_jax_has_to_join_columns_in_registers(monkeypatch, within):
  monkeypatch.setattr(hopper_parts, "_JOINS_COLUMNS", False)
  pull_product(*PRODUCTS["query"])
  assert not within


@pytest.mark.skipif(
  not hopper_parts._JOINS_COLUMNS, reason="JAX before 0.11 does not lower it"
)
def test_the_kernel_for_products_lowers():
  _, _, width, parts = PRODUCTS["decoder"]
  forms, tables = parts_module._number_tables(parts)
  assert forms == ((6, 0), (6, 0), (6, None), (8, 1), (8, 1), (8, None))
  operands = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for shape in ((2, 40, 64), (1, 64, 6 * width), (1, 6 * width))
  ]
  traced = hopper_parts.product_parts.trace(*operands, tables, forms=forms)
  lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
  results = ", ".join(6 * [f"tensor<80x{width}xbf16>"])
  assert re.search(rf"@mosaic_gpu\S*\(.*-> \({results}\)", lowered)
