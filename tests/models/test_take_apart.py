"""Products taken apart: with kernels, interpreted, and with XLA's forms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import parts as parts_module
from point3r_jax.models.layers import query_key_value
from point3r_jax.models.parts import Part, take_apart
from point3r_jax.models.rotary import apply_rotary, rotary_2d, rotary_3d
from point3r_jax.models.rotary_kernels import join_gradients
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


# Heads with alike groups, of all samples; three groups that are even and alike,
# even but not alike, and odd; two kinds of heads in one product, as decoders
# have; one part; without rotation; more heads than a kernel takes at a time, a
# number of heads that is no power of two.
CASES = {
  "image": (2, 4, 64, query_key_value(4, rotary_2d((4, 4), 16))),
  "alike": (2, 6, 96, query_key_value(2, *tables(2, 6, 48))),
  "even": (1, 18, 32, query_key_value(1, *tables(1, 18, 32))),
  "odd": (2, 4, 66, query_key_value(3, *tables(2, 4, 22))),
  "decoder": (
    2,
    10,
    192,
    [
      part
      for heads, table in zip((3, 4), tables(2, 10, 64, 48), strict=True)
      for part in query_key_value(heads, table)
    ],
  ),
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
    y, bias, y.dtype, parts=parts, values_stay=True
  )
  whole = (y + bias).reshape(*y.shape[:2], 6, width // 2)
  for number, part in enumerate((query, key)):
    own = whole[:, :, 2 * number : 2 * number + 2]
    chex.assert_trees_all_equal(part, apply_rotary(own, parts[0].rotary))
  chex.assert_trees_all_equal(value, whole)
