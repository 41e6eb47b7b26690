"""Checkpoints: a directory with the model's config and Orbax parameters.

`DIR/config.json` holds the config (and where the weights came from),
`DIR/params/` the parameters, encoder blocks unstacked.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from point3r_jax.config import PRESETS, ModelConfig, preset
from point3r_jax.params import (
  cast_params,
  flat_shapes,
  init_params,
  param_shapes,
  stack_layers,
)
from point3r_jax.precision import Precision

_CONFIG = "config.json"
_PARAMS = "params"
# Prefix of names that stand for a preset with random weights.
UNTRAINED = "untrained:"


class CheckpointError(ValueError):
  """A checkpoint that is missing, incomplete or of another model."""


def _checkpointer() -> ocp.Checkpointer:
  """Returns a reader and writer that holds little besides the parameters."""
  return ocp.Checkpointer(
    # Weights hardly compress.
    ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, use_compression=False)
  )


def list_problems(problems: Mapping[str, Sequence[str]]) -> str:
  """Says how many names of each kind there are, and which; none is left out."""
  return "; ".join(
    f"{len(names)} {kind}: {', '.join(names)}"
    for kind, names in problems.items()
    if names
  )


def check_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
  """Raises CheckpointError unless the tree is just what the config needs."""
  want = flat_shapes(param_shapes(config))
  have = flat_shapes(params)
  problems = {
    "missing": sorted(set(want) - set(have)),
    "unexpected": sorted(set(have) - set(want)),
    "of another shape": [
      f"{name} {have[name]} instead of {want[name]}"
      for name in sorted(set(want) & set(have))
      if want[name] != have[name]
    ],
  }
  if any(problems.values()):
    raise CheckpointError(
      f"parameters do not fit the model config: {list_problems(problems)}"
    )


def save_checkpoint(
  directory: str | os.PathLike,
  config: ModelConfig,
  params: Mapping[str, Any],
  *,
  metadata: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes a checkpoint; the directory appears complete or not at all.

  Args:
    directory: to make.
    config: the model's sizes.
    params: nested dictionary of arrays, encoder blocks unstacked.
    metadata: JSON-friendly facts to keep beside the config, such as the source.
    overwrite: replace an existing checkpoint.

  Raises:
    CheckpointError: if the directory exists, or the parameters do not fit.
  """
  check_params(config, params)
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and not overwrite:
    raise CheckpointError(f"{directory} exists; choose another or overwrite it")
  if directory.exists() and not (directory / _CONFIG).is_file():
    raise CheckpointError(
      f"{directory} is not a checkpoint, so it is not overwritten"
    )
  part = directory.with_name(f".{directory.name}.part")
  old = directory.with_name(f".{directory.name}.old")
  for leftover in (part, old):
    shutil.rmtree(leftover, ignore_errors=True)
  try:
    part.mkdir(parents=True)
    contents = {"model": config.to_dict(), "metadata": dict(metadata or {})}
    (part / _CONFIG).write_text(json.dumps(contents, indent=2) + "\n")
    with _checkpointer() as checkpointer:
      checkpointer.save(part / _PARAMS, ocp.args.PyTreeSave(params))
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
  if directory.exists():
    directory.rename(old)
  part.rename(directory)
  shutil.rmtree(old, ignore_errors=True)


def load_metadata(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns what `save_checkpoint` was given as metadata."""
  return _read_config(pathlib.Path(directory))[1]


def _read_config(
  directory: pathlib.Path,
) -> tuple[ModelConfig, dict[str, Any]]:
  path = directory / _CONFIG
  if not path.is_file():
    raise CheckpointError(
      f"{directory} is not a checkpoint: it has no {_CONFIG}. Make one from "
      "PyTorch weights with convert_torch_weights.py"
    )
  try:
    contents = json.loads(path.read_text())
    return ModelConfig.from_dict(contents["model"]), contents["metadata"]
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _restore(path: pathlib.Path) -> dict:
  """Reads parameters to host memory."""
  try:
    with _checkpointer() as checkpointer:
      tree = checkpointer.metadata(path).item_metadata.tree
      as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
      arguments = jax.tree.map(lambda _: as_numpy, tree)
      return checkpointer.restore(
        path, args=ocp.args.PyTreeRestore(restore_args=arguments)
      )
  except (ValueError, OSError, AttributeError) as error:
    raise CheckpointError(
      f"the parameters in {path} cannot be read; convert or copy the "
      f"checkpoint again ({error})"
    ) from error


def load_params_to_host(
  checkpoint: str | os.PathLike,
) -> tuple[ModelConfig, dict]:
  """Loads a checkpoint directory's config and parameters as NumPy arrays.

  Raises:
    CheckpointError: if there is no such checkpoint or it is not complete.
  """
  directory = pathlib.Path(checkpoint).absolute()
  if not directory.is_dir():
    raise CheckpointError(
      f"there is no checkpoint {str(checkpoint)!r}: give a directory that "
      f"convert_torch_weights.py wrote, or {UNTRAINED}PRESET with a preset of "
      f"{sorted(PRESETS)}"
    )
  config, _ = _read_config(directory)
  params = _restore(directory / _PARAMS)
  check_params(config, params)
  return config, params


def load_checkpoint(
  checkpoint: str | os.PathLike,
  *,
  precision: str | Precision | None = None,
  scan_layers: bool = False,
) -> tuple[ModelConfig, dict]:
  """Loads a model.

  Args:
    checkpoint: a directory that `save_checkpoint` or convert_torch_weights.py
      wrote; or "untrained:PRESET" for fresh random weights of a preset's size.
    precision: cast to this policy's types before the weights go to the device
      (halves device memory under bfloat16); None keeps the stored types.
    scan_layers: load for a model whose encoder layers are scanned.

  Returns:
    The config, and parameters on the default device.

  Raises:
    CheckpointError: if there is no such checkpoint or it is not complete.
  """
  name = str(checkpoint)
  if name.startswith(UNTRAINED):
    try:
      config = preset(name.removeprefix(UNTRAINED))
    except ValueError as error:
      raise CheckpointError(str(error)) from error
    params = init_params(config)
  else:
    config, params = load_params_to_host(checkpoint)
  if precision is not None:
    params = cast_params(params, precision)
  if scan_layers:
    config = config.replace(scan_layers=True)
    params = stack_layers(params)
  return config, jax.device_put(params)
