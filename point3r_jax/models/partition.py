"""What the compiler cannot split over devices by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def divide_batch(kernel: Callable[..., Any]) -> Callable[..., Any]:
  """Splits the leading axis of all arrays of a kernel over the devices.

  Those of a mesh (`jax.set_mesh`), if there is one.
  """
  axes = jax.sharding.get_abstract_mesh().auto_axes
  if not axes:
    return kernel
  return jax.shard_map(
    kernel,
    in_specs=PartitionSpec(axes),
    out_specs=PartitionSpec(axes),
    check_vma=False,
  )
