"""Trees of arrays on disk, in Orbax's format."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from point3r_jax.errors import UserError


class CheckpointError(UserError):
  """A checkpoint that is missing, incomplete or of another model."""


async def _settle(read: Callable[..., Awaitable], *lists: Sequence) -> list:
  """Awaits a read for each array; raises the first error when all have ended.

  Orbax stops at the first error and closes its event loop, and each read that
  ends later prints a traceback: "Event loop is closed".
  """
  reads = [read(*([x] for x in row)) for row in zip(*lists, strict=True)]
  results = await asyncio.gather(*reads, return_exceptions=True)
  for result in results:
    if isinstance(result, BaseException):
      raise result
  return [array for (array,) in results]


class _Settling:
  """Makes a type handler of Orbax end what it began, also after an error."""

  async def metadata(self, infos):
    """See `ocp.type_handlers.TypeHandler`."""
    return await _settle(super().metadata, infos)

  async def deserialize(self, infos, args):
    """See `ocp.type_handlers.TypeHandler`."""
    return await _settle(super().deserialize, infos, args)


class _NumpyHandler(_Settling, ocp.type_handlers.NumpyHandler):
  """Reads to the host."""


class _ArrayHandler(_Settling, ocp.type_handlers.ArrayHandler):
  """Reads to devices."""


def _reader() -> ocp.PyTreeCheckpointHandler:
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, _NumpyHandler()), (jax.Array, _ArrayHandler())
    )
  )


@contextlib.contextmanager
def _named_errors(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError:
    raise  # The device's: most likely out of memory.
  except Exception as error:  # Orbax raises errors of any type.
    raise CheckpointError(
      f"{path} cannot be read; convert or copy the checkpoint again, or remove "
      f"a run's step to use the one before it ({error})"
    ) from error


def array_writer() -> ocp.PyTreeCheckpointHandler:
  """Returns a writer that holds little besides the arrays."""
  # Weights hardly compress.
  return ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=1, use_compression=False
  )


def read_arrays(path: pathlib.Path, like: dict | None = None) -> dict:
  """Reads a tree of arrays.

  Args:
    path: the directory it was written to.
    like: the same tree of `jax.ShapeDtypeStruct` with shardings, to read to
      devices; None reads NumPy arrays.

  Returns:
    A nested dictionary of arrays.

  Raises:
    CheckpointError: if it cannot be read.
  """
  path, reader = epath.Path(path), _reader()
  with _named_errors(path):
    if like is None:
      arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        reader.metadata(path).tree,
      )
    else:
      arguments = jax.tree.map(
        lambda x: ocp.ArrayRestoreArgs(
          sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
        ),
        like,
      )
    return reader.restore(
      path, args=ocp.args.PyTreeRestore(like, restore_args=arguments)
    )


def stored_types(path: pathlib.Path) -> dict[str, str]:
  """Returns `array_types` of a tree on disk.

  Raises:
    CheckpointError: if it cannot be read.
  """
  with _named_errors(path):
    return array_types(_reader().metadata(epath.Path(path)).tree)


def array_types(tree: Mapping[str, Any]) -> dict[str, str]:
  """Returns path → type and shape, such as `float32[8, 4]`, of a tree."""
  flat = flax.traverse_util.flatten_dict(tree, sep="/")
  return {
    path: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    for path, leaf in flat.items()
  }
