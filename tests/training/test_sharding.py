"""Training over meshes of eight CPU devices: the same numbers as on one."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from point3r_jax.params import merge, param_shapes, stack_layers
from point3r_jax.training import sharding
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
def run(freeze, shape):
  """Returns loss, gradient and the compiled program of a mesh."""
  mesh = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
  params, batch = stack_layers(micro.params()), batches.batch(8, 2)
  shards, split = param_shardings(mesh, params), batch_sharding(mesh)

  def gradient(params, batch):
    trained, frozen = split_frozen(params, [freeze] if freeze else [])

    def loss(trained):
      return sequence_loss(CONFIG, merge(trained, frozen), batch)[0]

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
  sizes = {tuple(x.shape) for x in jax.tree.leaves(param_shapes(CONFIG.model))}
  for name, array, kind in moved:
    dimensions = tuple(map(int, re.findall(r"\d+", array.split("{")[0])[1:]))
    assert kind == "all-gather" and dimensions in sizes, (name, array)
  assert bool(moved) == (shape[1] > 1)
  assert "collective-permute" not in program


def test_parameters_are_split_along_their_largest_dimension():
  mesh = make_mesh(2, 4)
  shapes = {
    "wide": jax.ShapeDtypeStruct((24, 64, 256), "float32"),
    "odd": jax.ShapeDtypeStruct((513, 1001), "float32"),
    "small": jax.ShapeDtypeStruct((8,), "float32"),
    "kept": jax.ShapeDtypeStruct((64, 256), "float32"),
  }
  specs = param_shardings(mesh, shapes, [("kept", "replicate"), (".*", "fsdp")])
  assert {name: x.spec for name, x in specs.items()} == {
    "wide": PartitionSpec(None, None, "fsdp"),
    "odd": PartitionSpec(),
    "small": PartitionSpec(),
    "kept": PartitionSpec(),
  }
  with pytest.raises(ValueError, match="unknown tactic 'fdsp'"):
    param_shardings(mesh, shapes, [(".*", "fdsp")])
  with pytest.raises(
    ValueError, match="no sharding rule for the parameter kept"
  ):
    param_shardings(mesh, shapes, [("wide", "fsdp")])


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
