"""Blocks in training against plain differentiation."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax.models import norms
from point3r_jax.models.blocks import (
  DecoderBlock,
  EncoderBlock,
  ModulatedBlock,
)
from point3r_jax.models.compute import Compute
from point3r_jax.params import fold_norms
from point3r_jax.precision import get_precision

WIDTH = 32
# Shapes of what blocks are given; how many gradients of biases norms make.
BLOCKS = {
  EncoderBlock: ([(2, 12, WIDTH)], 2),
  DecoderBlock: ([(2, 12, WIDTH), (2, 16, WIDTH)], 3),
  ModulatedBlock: ([(2, 12, WIDTH), (2, WIDTH)], 2),
}


def draw_tree(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32),
    shapes,
  )


def bias_gradients(block, precision, remat, params, inputs):
  """Gradients of a block's biases by path, of a sum with random weights."""
  compute = Compute(get_precision(precision), "xla", remat)
  module = compute.remat_block(block)(2, 2, compute)
  weights = draw_tree(inputs[0], 2)

  @jax.jit
  @jax.grad
  def gradients(params):
    streams = [x.astype(compute.dtype) for x in inputs]
    return jnp.vdot(
      module.apply({"params": params}, *streams).astype(jnp.float32), weights
    )

  found = flax.traverse_util.flatten_dict(gradients(params))
  return {path: x for path, x in found.items() if path[-1] == "bias"}


@pytest.fixture
def summed(monkeypatch):
  """Lists the shapes of what norms sum for biases."""
  shapes, gradient = [], norms._gradient_by_xla

  def listed(*arrays):
    of_x, sums = gradient(*arrays)
    shapes.extend(len(sums) * [of_x.shape])
    return of_x, sums

  monkeypatch.setattr(norms, "_gradient_by_xla", listed)
  return shapes


@pytest.mark.parametrize("remat", ["none", "elementwise", "blocks"])
@pytest.mark.parametrize(
  ("block", "folded"),
  [
    (EncoderBlock, True),
    (EncoderBlock, False),
    (DecoderBlock, True),
    (DecoderBlock, False),
    (ModulatedBlock, True),  # Its norms stay as they are.
  ],
)
def test_biases_have_the_gradients_of_float32(summed, block, folded, remat):
  """Whether norms make them or the linear maps that have the biases."""
  shapes, count = BLOCKS[block]
  inputs = draw_tree([jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes], 0)
  plain = block(2, 2, Compute(get_precision("float32"), "xla"))
  params = draw_tree(
    jax.eval_shape(plain.init, jax.random.key(0), *inputs)["params"], 1
  )
  if folded:
    params = fold_norms(params)
  expected = bias_gradients(block, "float32", remat, params, inputs)
  assert not summed
  found = bias_gradients(block, "bfloat16", remat, params, inputs)
  assert summed == folded * count * [inputs[0].shape]
  assert found.keys() == expected.keys()
  # All but those of keys, which softmax does not see, are larger than the
  # tolerance, those that norms make by far.
  largest = max(np.abs(x).max() for x in expected.values())
  for path, x in expected.items():
    assert found[path].dtype == x.dtype
    assert np.abs(found[path] - x).max() < 0.015 * largest, path
    assert np.abs(x).max() > 0.02 * largest or "key" in path


@pytest.mark.parametrize("block", BLOCKS)
def test_streams_have_norms_of_their_own(monkeypatch, block):
  """In float32, and without sums of gradients, which are not to come."""

  def refuse(*_):
    raise AssertionError

  monkeypatch.setattr(norms, "_normalize", refuse)
  inputs = [jnp.zeros(shape, jnp.bfloat16) for shape in BLOCKS[block][0]]
  module = block(2, 2, Compute(get_precision("bfloat16"), "xla"))
  params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  jax.eval_shape(
    lambda params: module.apply({"params": fold_norms(params)}, *inputs), params
  )
  training = block(2, 2, Compute(get_precision("bfloat16"), "xla", "none"))
  with pytest.raises(AssertionError):
    jax.eval_shape(
      lambda params: training.apply({"params": fold_norms(params)}, *inputs),
      params,
    )


def test_norms_own_maps_have_the_gradients_of_float32():
  """In training in 16 bits, too, where these are summed in two steps."""
  x, weights = draw_tree(2 * [jax.ShapeDtypeStruct((2, 128, 24), "float32")], 0)
  params = draw_tree(dict.fromkeys(("scale", "bias"), x[0, 0]), 1)

  def run(precision, remat):
    compute = Compute(get_precision(precision), "xla", remat)
    norm = norms.layer_norm(compute)

    @jax.jit
    @jax.value_and_grad
    def total(inputs):
      params, x = inputs
      return jnp.vdot(norm.apply({"params": params}, x), weights)

    return total((params, x))

  found, expected = run("bfloat16", "none"), run("float32", None)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    found,
    expected,
  )
