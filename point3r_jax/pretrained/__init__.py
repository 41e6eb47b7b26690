"""Checkpoints that come with the package, each a folder beside this file.

| file | content |
| --- | --- |
| `params.safetensors` | parameters in bfloat16, layers not stacked |
| `config.json` | the model and where it came from, as in every checkpoint |
| `training.json` | what the run of each stage noted down: config, data, step |
| `curve.csv` | losses over the steps of all stages |
| `metrics.json` | of `evaluate.py` |

`checkpoints.load_checkpoint` takes their names; `cli/embed.py` makes them.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from point3r_jax.array_files import CheckpointError

FOLDER = pathlib.Path(__file__).parent
PARAMS_FILE = "params.safetensors"


def names() -> list[str]:
  """Returns the names of the checkpoints in the package."""
  return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def find(checkpoint: str | os.PathLike) -> pathlib.Path | None:
  """Returns the folder of a checkpoint in the package.

  Args:
    checkpoint: a name; anything else, a path object too, is none.

  Returns:
    The folder, or None if there is no checkpoint of this name.
  """
  # A path "./tiny" is "tiny" once it is a path object.
  named = isinstance(checkpoint, str) and checkpoint in names()
  return FOLDER / checkpoint if named else None


def pack_params(params: Mapping[str, Any]) -> bytes:
  """Returns parameters as a safetensors file, rounded to bfloat16.

  Args:
    params: nested dictionary of arrays.

  Returns:
    The file, the same for the same values; names are joined by slashes.

  Raises:
    CheckpointError: if a value is not finite.
  """
  tensors = {
    name: np.ascontiguousarray(np.asarray(x).astype(ml_dtypes.bfloat16))
    for name, x in flax.traverse_util.flatten_dict(params, sep="/").items()
  }
  broken = [n for n, x in tensors.items() if not np.isfinite(x).all()]
  if broken:
    raise CheckpointError(
      f"{len(broken)} parameters are not finite in bfloat16: "
      f"{', '.join(broken)}; take an earlier step of the run"
    )
  return save(tensors)


def read_params(path: pathlib.Path) -> dict:
  """Reads what `pack_params` returned.

  Args:
    path: the file.

  Returns:
    A nested dictionary of float32 NumPy arrays, which hold any bfloat16.

  Raises:
    CheckpointError: if it cannot be read.
  """
  try:
    tensors = load_file(path)
  except (SafetensorError, OSError) as error:
    raise CheckpointError(
      f"{path} cannot be read; copy or install it again ({error})"
    ) from error
  return flax.traverse_util.unflatten_dict(
    {name: x.astype(np.float32) for name, x in tensors.items()}, sep="/"
  )
