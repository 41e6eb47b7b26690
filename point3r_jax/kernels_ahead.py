"""Kernels of ours, compiled while XLA works on the program around them.

XLA compiles Pallas kernels for GPUs (Mosaic) one after the other at the end,
those of a stream's step for 10 s on an H200's host, but keeps them as long as
the process runs. So all are compiled beforehand, side by side, each as a
program of its own.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Of a call in a lowered program: the operation, the beginning of what it calls,
# where its settings are, and which of them is as different as kernels are.
_CALL = "stablehlo.custom_call"
_MOSAIC = "mosaic_gpu"
_SETTINGS = "mhlo.backend_config"
_DIGEST = "kernel_hash"

_DTYPES = {
  "i32": jnp.int32,
  "f32": jnp.float32,
  "f16": jnp.float16,
  "bf16": jnp.bfloat16,
}

_MOST_THREADS = 16


class Kernel(NamedTuple):
  """A program of one kernel: `jax.jit(kernel.run).lower(*kernel.operands)`."""

  run: Callable[..., Any]
  operands: tuple[jax.ShapeDtypeStruct, ...]


def find_kernels(lowered: jax.stages.Lowered) -> list[Kernel]:
  """Returns the Mosaic kernels of a program for GPUs, each of them once."""
  calls = {}
  for operation in _calls(lowered):
    settings = operation.attributes[_SETTINGS]
    settings = {x.name: _value(x.attr) for x in settings}
    calls[settings[_DIGEST]] = (operation, settings)
  return [_kernel(*call) for call in calls.values()]


def has_kernels(lowered: jax.stages.Lowered) -> bool:
  """Returns whether there are Mosaic kernels in a program for GPUs."""
  return any(True for _ in _calls(lowered))


def compile_kernels(
  lowered: jax.stages.Lowered,
) -> list[concurrent.futures.Future]:
  """Begins to compile a program's Mosaic kernels.

  Args:
    lowered: for the default device; to be compiled next, which also says what
      is wrong with a kernel.

  Returns:
    What need not be waited for.
  """
  kernels = find_kernels(lowered)
  if not kernels:
    return []

  def compile_one(kernel):
    return jax.jit(kernel.run).lower(*kernel.operands).compile()

  threads = min(_MOST_THREADS, os.cpu_count() or 1)
  pool = concurrent.futures.ThreadPoolExecutor(threads, "kernels-ahead")
  futures = [pool.submit(compile_one, kernel) for kernel in kernels]
  pool.shutdown(wait=False)
  return futures


def _calls(lowered: jax.stages.Lowered) -> Iterator[Any]:
  """Yields the calls of Mosaic kernels in a lowered program."""
  for operation in _operations(lowered.compiler_ir("stablehlo").operation):
    if operation.name == _CALL and _called(operation).startswith(_MOSAIC):
      yield operation


def _operations(operation: Any) -> Iterator[Any]:
  """Yields an operation of MLIR and all that are within it."""
  yield operation
  for region in operation.regions:
    for block in region:
      for inner in block:
        yield from _operations(inner.operation)


def _called(operation: Any) -> str:
  return operation.attributes["call_target_name"].value


def _value(attribute: Any) -> bytes | bool:
  """Returns what an attribute of MLIR holds, whose texts may be any bytes."""
  if hasattr(attribute, "value_bytes"):
    return attribute.value_bytes
  return attribute.value


def _shapes(values: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
  types = [x.type for x in values]
  return tuple(
    jax.ShapeDtypeStruct(x.shape, _DTYPES[str(x.element_type)]) for x in types
  )


def _kernel(operation: Any, settings: dict[str, bytes | bool]) -> Kernel:
  """Returns a program of the one call that an operation is."""
  call = jax.ffi.ffi_call(_called(operation), _shapes(operation.results))

  def run(*operands):
    return call(*operands, **settings)

  return Kernel(run, _shapes(operation.operands))
