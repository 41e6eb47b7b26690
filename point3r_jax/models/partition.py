"""What the compiler cannot split over devices by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def divide_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """Splits the leading axis of a kernel's arrays over the devices.

  Those of a mesh (`jax.set_mesh`), if there is one. All devices have the whole
  of arrays that hold for every sample: their leading axis is 1, the first
  array's is not.
  """
  axes = jax.sharding.get_abstract_mesh().auto_axes
  if not axes:
    return kernel
  split = PartitionSpec(axes)

  def divided(*arrays):
    batch = len(jax.tree.leaves(arrays)[0])
    specs = jax.tree.map(
      lambda x: PartitionSpec() if batch > 1 and len(x) == 1 else split, arrays
    )
    return jax.shard_map(
      kernel, in_specs=specs, out_specs=split, check_vma=False
    )(*arrays)

  return divided
