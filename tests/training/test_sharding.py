"""Training over meshes of eight CPU devices: the same numbers as on one."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from point3r_jax.params import merge, param_shapes, stack_layers
from point3r_jax.training import sharding
from point3r_jax.training.collectives import count_collectives
from point3r_jax.training.optimizer import split_frozen
from point3r_jax.training.sharding import (
  batch_sharding,
  make_mesh,
  param_shardings,
  replicated,
)
from point3r_jax.training.step import sequence_loss
from tests import micro
from tests.training import batches

CONFIG = batches.step_config()
# Gradients of all parameters compile for minutes; the quick case has some, on
# the mesh that splits both the batch and the parameters.
SOME = r"(?!pose_head/|camera_dense/head_)"
CASES = [
  (SOME, (2, 4)),
  *(
    pytest.param(None, shape, marks=pytest.mark.slow)
    for shape in [(8, 1), (1, 8), (2, 4)]
  ),
]


@pytest.fixture(autouse=True)
def split_small_arrays(monkeypatch):
  monkeypatch.setattr(sharding, "_MIN_SIZE", 256)


@functools.cache
def run(freeze, shape, config=CONFIG):
  """Returns loss, gradient and the compiled program of a mesh."""
  mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
  params, batch = stack_layers(micro.params()), batches.batch(8, 2)
  shards, split = param_shardings(mesh, params), batch_sharding(mesh)

  def gradient(params, batch):
    trained, frozen = split_frozen(params, [freeze] if freeze else [])

    def loss(trained):
      return sequence_loss(config, merge(trained, frozen), batch)[0]

    return jax.value_and_grad(loss)(trained)

  trained, _ = split_frozen(params, [freeze] if freeze else [])

  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(
        gradient,
        in_shardings=(shards, split),
        out_shardings=(replicated(mesh), param_shardings(mesh, trained)),
      )
      .lower(params, batch)
      .compile()
    )
  result = compiled(
    jax.device_put(params, shards), jax.device_put(batch, split)
  )
  return *jax.device_get(result), compiled.as_text()


@pytest.mark.parametrize(("freeze", "shape"), CASES)
def test_loss_and_gradient_are_those_of_one_device(freeze, shape):
  single = run(freeze, (1, 1))
  loss, gradient, program = run(freeze, shape)
  np.testing.assert_allclose(loss, single[0], rtol=1e-5)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(single[1]))
  chex.assert_trees_all_close(
    gradient, single[1], rtol=1e-5, atol=1e-5 * largest
  )

  # Parameters are gathered and gradients summed; memories, tokens and images
  # stay where they are.
  moved = re.findall(r"(\S+) = (\S+) (all-gather|all-to-all)[-a-z]*\(", program)
  shapes = param_shapes(CONFIG.model)
  sizes = {
    (shape[1], *shards.shard_shape(x.shape))
    for x, shards in zip(
      jax.tree.leaves(shapes),
      jax.tree.leaves(param_shardings(make_mesh(*shape), shapes)),
      strict=True,
    )
  }
  for name, array, kind in moved:
    dimensions = tuple(map(int, re.findall(r"\d+", array.split("{")[0])[1:]))
    assert kind == "all-gather" and dimensions in sizes, (name, array)
  assert bool(moved) == (shape[1] > 1)
  assert "collective-permute" not in program
  # Each device sums its own parts: of what is split, none is sent in full.
  traffic = count_collectives(program).traffic
  assert ("reduce-scatter" in traffic) == (shape[1] > 1)
  parts = jax.tree.map(
    lambda x, shards: (
      x.nbytes
      * (shape[0] > 1 or shards.is_fully_replicated)
      // (x.size // np.prod(shards.shard_shape(x.shape)))
    ),
    gradient,
    param_shardings(make_mesh(*shape), gradient),
  )
  rest = traffic["all-reduce"].bytes - sum(jax.tree.leaves(parts))
  assert rest < 4096  # What the loss adds up. Not all parameters are used.


@pytest.mark.slow
def test_in_bfloat16_they_differ_by_rounding():
  """There norms are folded into linear maps, whose parts are on all devices."""
  step = {"precision": "bfloat16", "remat": "elementwise"}
  config = batches.step_config(step)
  loss, gradient, _ = run(SOME, (2, 4), config)
  single_loss, single, _ = run(SOME, (1, 1), config)
  np.testing.assert_allclose(loss, single_loss, rtol=1e-3)
  difference = jax.tree.map(np.subtract, gradient, single)
  assert optax.tree.norm(difference) < 0.02 * optax.tree.norm(single)


@pytest.mark.parametrize("rules", [sharding.RULES, [(".*", "replicate")]])
@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_what_is_sent_is_cast_and_what_is_summed_is_not(shape, rules):
  mesh = make_mesh(*shape)
  kernel = np.linspace(1, 2, 64 * 32, dtype=np.float32).reshape(64, 32)
  params = {"linear": {"kernel": kernel}}
  arrays = np.float32([1, 2, 4, 256, 8, 16, 32, 64])

  def cast(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

  def function(params, arrays):
    kernel = params["linear"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and kernel.shape == (64, 32)
    total = jnp.sum(kernel.astype(jnp.float32)) * arrays
    return total, total[None]

  def loss(params):
    run = sharding.on_each_part(function, cast, rules)
    memory, predictions = run(params, arrays)
    return jnp.sum(memory) + jnp.sum(predictions)

  with jax.set_mesh(mesh):
    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    value, gradient = traced.lower().compile()(params)
    jaxpr = str(traced.jaxpr)
  sent = re.findall(r":(\w+)\[[\d,]*\] = (all_gather|reduce_scatter)\[", jaxpr)
  split = rules is sharding.RULES and shape[1] > 1
  both = [("bf16", "all_gather"), ("f32", "reduce_scatter")]
  assert sorted(sent) == (both if split else [])
  rounded = kernel.astype(jnp.bfloat16).astype(np.float32)
  # bfloat16 holds each device's gradient, but not their sum, nor that of four.
  total = 2 * arrays.sum()
  assert total != total.astype(jnp.bfloat16)
  np.testing.assert_allclose(value, rounded.sum() * total, rtol=1e-6)
  np.testing.assert_array_equal(
    gradient["linear"]["kernel"], np.full((64, 32), total)
  )


@pytest.mark.parametrize("rules", [sharding.RULES, [(".*", "replicate")]])
def test_of_a_norm_one_number_is_sent(rules):
  rng = np.random.default_rng(0)
  shapes = {"kernel": (64, 32), "stack": (3, 16, 64), "bias": (32,)}
  tree = {k: rng.normal(size=x).astype(np.float32) for k, x in shapes.items()}
  mesh = make_mesh(2, 4)
  placed = jax.device_put(tree, param_shardings(mesh, tree, rules))
  norm = functools.partial(sharding.global_norm, rules=rules)
  with jax.set_mesh(mesh):
    compiled = jax.jit(norm).lower(placed).compile()
  np.testing.assert_allclose(compiled(placed), optax.tree.norm(tree), rtol=1e-6)
  sent = count_collectives(compiled.as_text()).traffic
  if rules is sharding.RULES:
    assert sent.pop("all-reduce").bytes == 4
  assert not sent


@pytest.mark.parametrize("shapes", [[], [(3, 16, 64), (64, 32), (32,), ()]])
def test_the_norm_on_one_device_is_optaxs(shapes):
  rng = np.random.default_rng(0)
  tree = [jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes]
  norm = jax.jit(sharding.global_norm)(tree)
  np.testing.assert_allclose(norm, optax.tree.norm(tree), rtol=1e-6)


def test_parameters_are_split_along_their_largest_dimension():
  mesh = make_mesh(2, 4)
  shapes = {
    "stack": jax.ShapeDtypeStruct((24, 64, 256), "float32"),
    "wide": jax.ShapeDtypeStruct((6, 3, 64, 256), "float32"),
    "odd": jax.ShapeDtypeStruct((513, 1001), "float32"),
    "small": jax.ShapeDtypeStruct((8,), "float32"),
    "kept": jax.ShapeDtypeStruct((64, 256), "float32"),
  }
  specs = param_shardings(mesh, shapes, [("kept", "replicate"), (".*", "fsdp")])
  assert {name: x.spec for name, x in specs.items()} == {
    "stack": PartitionSpec(None, None, "fsdp"),
    "wide": PartitionSpec(None, None, None, "fsdp"),
    "odd": PartitionSpec(),
    "small": PartitionSpec(),
    "kept": PartitionSpec(),
  }
  with pytest.raises(ValueError, match="unknown tactic 'fdsp'"):
    param_shardings(mesh, shapes, [(".*", "fdsp")])
  with pytest.raises(
    ValueError, match="no sharding rule for the parameter kept"
  ):
    param_shardings(mesh, shapes, [("stack|wide", "fsdp")])


@pytest.mark.parametrize("axes", [(3, 1), (-1, 3), (0, 8), (2, 2)])
def test_a_mesh_uses_all_devices(axes):
  with pytest.raises(ValueError, match="does not use 8 devices"):
    make_mesh(*axes)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What is asked of a chip of a pod to place it in a mesh."""

  id: int
  coords: tuple[int, int, int]
  slice_index: int
  platform: str = "tpu"
  device_kind: str = "TPU v5"
  core_on_chip: int = 0
  process_index: int = 0


def pod(slices):
  """Returns the chips of slices of 4x4x4."""
  places = itertools.product(range(slices), *[range(4)] * 3)
  return [Chip(i, tuple(coords), n) for i, (n, *coords) in enumerate(places)]


@pytest.mark.parametrize("fsdp", [1, 2, 8, 32, 64])
def test_axes_need_not_be_those_of_a_pod(fsdp):
  chips = pod(1)
  mesh = make_mesh(-1, fsdp, chips)
  assert dict(mesh.shape) == {"data": 64 // fsdp, "fsdp": fsdp}
  assert set(mesh.devices.flat) == set(chips)


@pytest.mark.parametrize(
  ("fsdp", "slices"), [(1, 1), (8, 1), (64, 1), (128, 2)]
)
def test_parameters_are_gathered_within_slices(fsdp, slices):
  mesh = make_mesh(-1, fsdp, pod(2))
  assert mesh.shape["fsdp"] == fsdp
  for row in mesh.devices:
    assert len({chip.slice_index for chip in row}) == slices
