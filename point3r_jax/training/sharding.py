"""Where arrays live: the mesh, and rules from a parameter's path to its axes.

The mesh has two axes, 'data' and 'fsdp'. Batches, and with them the pointer
memories, are split over both; parameters and optimiser state over 'fsdp'. With
one of the axes of size 1 that is plain data parallelism, or fully sharded.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")

# Path → what to do; the first expression that is found in the path decides.
Rules = Sequence[tuple[str, str]]
RULES: Rules = ((".*", "fsdp"),)
TACTICS = ("fsdp", "replicate")

# Smaller arrays are copied to all devices: splitting them saves nothing.
_MIN_SIZE = 2**16


def make_mesh(
  data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Returns the mesh; -1 takes all devices that the other axis leaves.

  Raises:
    ValueError: if the axes do not use all devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if data == -1:
    data = count // fsdp if fsdp > 0 else 0
  elif fsdp == -1:
    fsdp = count // data if data > 0 else 0
  if data < 1 or fsdp < 1 or data * fsdp != count:
    raise ValueError(
      f"a mesh of data={data}, fsdp={fsdp} does not use {count} devices; their "
      "product must be the number of devices (-1: what the other axis leaves)"
    )
  types = (AxisType.Auto,) * 2
  networks = len({getattr(device, "slice_index", 0) for device in devices})
  if networks == 1:
    # An axis of the mesh may take part of an axis of a pod, which jax.make_mesh
    # allows on few kinds of TPUs.
    grid = mesh_utils.create_device_mesh(
      (data, fsdp), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)
  # Several nodes with GPUs, or slices of TPUs. What 'fsdp' sends is the most:
  # it stays within one of them as far as it can.
  inner = math.gcd(fsdp, count // networks)
  within = (count // networks // inner, inner)
  grid = mesh_utils.create_hybrid_device_mesh(
    within,
    (data // within[0], fsdp // within[1]),
    devices,
    allow_split_physical_axes=True,
  )
  return Mesh(grid, AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays with a leading batch axis."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def on_each_part(
  function: Callable[[Any, Any], tuple[Any, Any]],
  cast: Callable[[Any], Any] = lambda params: params,
  rules: Rules = RULES,
) -> Callable[[Any, Any], tuple[Any, Any]]:
  """Lets every device of the mesh in use take its part of a batch by itself.

  So nothing of a sequence crosses devices, whatever the compiler thinks best.
  Parameters are gathered once, and not anew for each layer and frame; their
  gradients are added up on each device and summed over devices once, where a
  parameter is split each part on the device that has it.

  Args:
    function: of parameters and arrays (B, …), to a memory of B samples and
      predictions (T, B, …).
    cast: changes the types of parameters, a nested dictionary, and nothing
      else. In these they are gathered; gradients are summed in their own.
    rules: where parameters live.

  Returns:
    The same function of parameters in their own types and of the whole batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return lambda params, arrays: function(cast(params), arrays)
  split = PartitionSpec(AXES)

  def run(params, arrays):
    specs = _param_specs(mesh.shape["fsdp"], params, rules)
    wanted = jax.eval_shape(cast, params)

    def run_part(params, arrays):
      params = jax.tree.map(
        lambda x, spec, like: _gather(x, spec, like.dtype),
        *(params, specs, wanted),
      )
      return function(params, arrays)

    return jax.shard_map(
      run_part,
      in_specs=(specs, split),
      out_specs=(split, PartitionSpec(None, AXES)),
      check_vma=False,
    )(params, arrays)

  return run


def _gather(x: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
  """Returns a whole parameter in a type, within `jax.shard_map`.

  What is sent is of that type, but gradients are summed in the parameter's.
  """
  if "fsdp" not in spec:
    return x.astype(dtype)
  axis, before = spec.index("fsdp"), x.dtype

  # Parts are sent whole, one after the other. For GPUs XLA gathers and scatters
  # along the axis that comes first in memory: were it this one, parameters and
  # the optimiser's state would be transposed, and back, for their gradients.
  @jax.custom_vjp
  def gather(x):
    parts = jax.lax.all_gather(x.astype(dtype), "fsdp")
    return jax.lax.collapse(jnp.moveaxis(parts, 0, axis), axis, axis + 2)

  def backward(_, gradient):
    split = gradient.reshape(*x.shape[:axis], -1, *x.shape[axis:])
    parts = jnp.moveaxis(split.astype(before), axis, 0)
    return (jax.lax.psum_scatter(parts, "fsdp"),)

  gather.defvjp(lambda x: (gather(x), None), backward)
  return gather(x)


def _spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
  """Splits the largest dimension that divides; small arrays are not split.

  So products of a matrix with itself, of which Muon makes many, are sums over
  devices of its smaller side's square. Otherwise the whole would be sent.
  """
  dimensions = [i for i, size in enumerate(shape) if size % devices == 0]
  if devices == 1 or np.prod(shape) < _MIN_SIZE or not dimensions:
    return PartitionSpec()
  largest = max(dimensions, key=lambda i: shape[i])
  return PartitionSpec(*largest * [None], "fsdp")


def _param_specs(devices: int, params: Any, rules: Rules) -> Any:
  """Returns how each parameter is split over so many devices of 'fsdp'."""
  for _, tactic in rules:
    if tactic not in TACTICS:
      raise ValueError(f"unknown tactic {tactic!r}; there are {TACTICS}")

  def split(path, leaf):
    name = "/".join(entry.key for entry in path)
    for pattern, tactic in rules:
      if re.search(pattern, name):
        return _spec(leaf.shape, devices if tactic == "fsdp" else 1)
    raise ValueError(f"no sharding rule for the parameter {name}")

  return jax.tree_util.tree_map_with_path(split, params)


def param_shardings(mesh: Mesh, params: Any, rules: Rules = RULES) -> Any:
  """Returns a sharding for each parameter.

  Args:
    mesh: from `make_mesh`.
    params: nested dictionary of anything with a shape.
    rules: see `Rules`.

  Returns:
    The same tree of shardings.

  Raises:
    ValueError: for an unknown tactic, or a path without a rule.
  """
  specs = _param_specs(mesh.shape["fsdp"], params, rules)
  return jax.tree.map(functools.partial(NamedSharding, mesh), specs)


def _square(arrays: Sequence[jax.Array]) -> jax.Array:
  """Sums the squares of all numbers.

  Row by row first, and then all rows at once: XLA would make two kernels for
  each array, most of which are small.
  """
  if not arrays:
    return jnp.zeros(())
  rows = [
    jnp.square(x).sum(axis=-1).ravel() if x.ndim > 1 else jnp.square(x).ravel()
    for x in arrays
  ]
  # Or XLA would take the sum apart again.
  return jax.lax.optimization_barrier(jnp.concatenate(rows)).sum()


def global_norm(tree: Any, rules: Rules = RULES) -> jax.Array:
  """Returns the norm of all arrays of a tree that lives where parameters do.

  Devices add up what they have before sums cross devices, in one. Left to XLA
  each parameter's sum crosses by itself; and as some wait for sums of gradients
  and others do not, it joins few of either.
  """
  mesh = jax.sharding.get_abstract_mesh()
  leaves = jax.tree.leaves(tree)
  if mesh.empty:
    return jnp.sqrt(_square(leaves))
  specs = jax.tree.leaves(_param_specs(mesh.shape["fsdp"], tree, rules))
  split, whole = [], []
  for x, spec in zip(leaves, specs, strict=True):
    (split if "fsdp" in spec else whole).append(x)
  square = _square(whole)
  if split:
    square += jax.shard_map(
      lambda parts: jax.lax.psum(_square(parts), "fsdp"),
      in_specs=([spec for spec in specs if "fsdp" in spec],),
      out_specs=PartitionSpec(),
      check_vma=False,
    )(split)
  return jnp.sqrt(square)


def optimizer_shardings(
  mesh: Mesh,
  optimizer: optax.GradientTransformation,
  trained: Any,
  rules: Rules,
) -> Any:
  """Returns shardings of the optimiser's state: as the parameters it is of.

  What is of a parameter stands at the end of that parameter's path.
  """
  shards = flax.traverse_util.flatten_dict(
    param_shardings(mesh, trained, rules)
  )

  def shard(path, _):
    keys = itertools.takewhile(
      lambda entry: isinstance(entry, jax.tree_util.DictKey), reversed(path)
    )
    name = tuple(entry.key for entry in keys)[::-1]
    return shards.get(name, replicated(mesh))

  return jax.tree_util.tree_map_with_path(
    shard, jax.eval_shape(optimizer.init, trained)
  )
