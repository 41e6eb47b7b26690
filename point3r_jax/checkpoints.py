"""Checkpoints: a directory with the model's config and Orbax parameters.

Whatever reads a checkpoint takes any of these directories, or the name of one
that comes with the package:

| directory | `config.json` | parameters |
| --- | --- | --- |
| DIR, written by `save_checkpoint` | `DIR` | `DIR/params` |
| WORKDIR, of a training run | `WORKDIR` | those of the latest step |
| WORKDIR/checkpoints/STEP | `WORKDIR` | `WORKDIR/checkpoints/STEP/params` |
| DIR of the package, see `pretrained` | `DIR` | `DIR/params.safetensors` |

A name always stands for the checkpoint of the package; a directory of the same
name is `./NAME`. `config.json` holds the model's config, and where the weights
came from. With `scan_layers` in the config, layers are stacked on disk; what is
loaded never is, unless asked for.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from point3r_jax import pretrained
from point3r_jax.array_files import (
  CheckpointError,
  array_writer,
  read_arrays,
)
from point3r_jax.config import PRESETS, ModelConfig, preset
from point3r_jax.files import atomic_file
from point3r_jax.params import (
  check_params,
  init_params,
  merge,
  prepare_params,
  stack_layers,
  unstack_layers,
)
from point3r_jax.precision import Precision

_CONFIG = "config.json"
# Orbax items: in a checkpoint directory the first, in a step all of them.
PARAMS = "params"
EMA = "ema"
META = "meta"
# The directory of a training run's steps.
STEPS = "checkpoints"
# Prefix of names that stand for a preset with random weights.
UNTRAINED = "untrained:"


def _check(config: ModelConfig, params: Mapping[str, Any]) -> None:
  """Raises CheckpointError unless the tree is just what the config needs."""
  try:
    check_params(config, params, prepared=False)
  except ValueError as error:
    raise CheckpointError(str(error)) from error


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
    params: nested dictionary of arrays, in the config's layout.
    metadata: JSON-friendly facts to keep beside the config, such as the source.
    overwrite: replace an existing checkpoint.

  Raises:
    CheckpointError: if the directory exists, or the parameters do not fit.
  """
  _check(config, params)
  directory = pathlib.Path(directory).absolute()
  if directory.exists() and not overwrite:
    raise CheckpointError(f"{directory} exists; choose another or overwrite it")
  if directory.exists() and (
    not (directory / _CONFIG).is_file() or (directory / STEPS).exists()
  ):
    raise CheckpointError(
      f"{directory} is not a checkpoint of just a model, so it is not "
      "overwritten"
    )
  part = directory.with_name(f".{directory.name}.part")
  old = directory.with_name(f".{directory.name}.old")
  for leftover in (part, old):
    shutil.rmtree(leftover, ignore_errors=True)
  try:
    part.mkdir(parents=True)
    write_config(part, config, metadata or {})
    with ocp.Checkpointer(array_writer()) as checkpointer:
      checkpointer.save(part / PARAMS, ocp.args.PyTreeSave(params))
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
  if directory.exists():
    directory.rename(old)
  part.rename(directory)
  shutil.rmtree(old, ignore_errors=True)


def write_config(
  directory: pathlib.Path, config: ModelConfig, metadata: Mapping[str, Any]
) -> None:
  """Writes `config.json`: complete or not at all."""
  contents = {"model": config.to_dict(), "metadata": dict(metadata)}
  with atomic_file(directory / _CONFIG) as file:
    file.write((json.dumps(contents, indent=2) + "\n").encode())


def read_config(
  directory: pathlib.Path,
) -> tuple[ModelConfig, dict[str, Any]]:
  """Returns the config and metadata in `config.json`.

  Raises:
    CheckpointError: if there is none or it is damaged.
  """
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


def config_differences(
  there: ModelConfig, here: ModelConfig, ignore: Sequence[str] = ()
) -> str:
  """Names the fields in which two configs differ; empty if there are none."""
  there, here = there.to_dict(), here.to_dict()
  return ", ".join(
    f"{name} is {there[name]} there and {here[name]} here"
    for name in here
    if name not in ignore and there[name] != here[name]
  )


def steps_in(workdir: pathlib.Path) -> list[int]:
  """Returns the complete steps of a training run, in order."""
  # Orbax gives a step its name when it is complete.
  names = [path.name for path in (workdir / STEPS).glob("*")]
  return sorted(int(name) for name in names if name.isdecimal())


def read_meta(step: pathlib.Path) -> dict[str, Any]:
  """Returns what a training run noted down with a step.

  Raises:
    CheckpointError: if it is damaged.
  """
  path = step / META / "metadata"
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _locate(
  checkpoint: str | os.PathLike,
) -> tuple[pathlib.Path, pathlib.Path]:
  """Finds the directories that hold a checkpoint's config and its arrays.

  Raises:
    CheckpointError: if there is no such checkpoint.
  """
  named = pretrained.find(checkpoint)
  directory = named or pathlib.Path(checkpoint).absolute()
  if directory.is_file():
    raise CheckpointError(
      f"{directory} is a file; make a checkpoint of weights with "
      f"convert_torch_weights.py --input {directory.name} --output DIRECTORY"
    )
  if str(checkpoint).startswith(UNTRAINED):
    raise CheckpointError(
      f"{checkpoint} stands for random weights, which no one keeps; name a "
      "checkpoint"
    )
  if not directory.is_dir():
    raise CheckpointError(
      f"there is no checkpoint {str(checkpoint)!r}: give a directory that "
      "convert_torch_weights.py or a training run wrote, one of the package "
      f"({', '.join(pretrained.names()) or 'it has none'}), or "
      f"{UNTRAINED}PRESET with a preset of {sorted(PRESETS)}"
    )
  has_config = (directory / _CONFIG).is_file()
  if has_config and (directory / STEPS).is_dir():
    steps = steps_in(directory)
    if not steps:
      raise CheckpointError(
        f"{directory} is of a training run that has not written a checkpoint"
      )
    return directory, directory / STEPS / str(steps[-1])
  step = directory.parent.name == STEPS and directory.name.isdecimal()
  if step and not has_config:
    return directory.parents[1], directory
  return directory, directory


def load_config(checkpoint: str | os.PathLike) -> ModelConfig:
  """Returns what `load_checkpoint` does, less the parameters.

  Raises:
    CheckpointError: if there is no such checkpoint or its config is damaged.
  """
  if str(checkpoint).startswith(UNTRAINED):
    try:
      return preset(str(checkpoint).removeprefix(UNTRAINED))
    except ValueError as error:
      raise CheckpointError(str(error)) from error
  config, _ = read_config(_locate(checkpoint)[0])
  return config.replace(scan_layers=False)


def load_metadata(checkpoint: str | os.PathLike) -> dict[str, Any]:
  """Returns what `save_checkpoint` was given as metadata.

  For a training run also, under "training", what it noted down with the step.

  Raises:
    CheckpointError: if there is no such checkpoint or it is damaged.
  """
  directory, arrays = _locate(checkpoint)
  _, metadata = read_config(directory)
  if arrays != directory:
    metadata = metadata | {"training": read_meta(arrays)}
  return metadata


def load_params_to_host(
  checkpoint: str | os.PathLike, *, ema: bool = False
) -> tuple[ModelConfig, dict]:
  """Loads a checkpoint's config and parameters as NumPy arrays.

  Args:
    checkpoint: any of the module's directories, or a name of the package's.
    ema: load the moving average that a training run kept.

  Returns:
    The config with `scan_layers` off, and parameters of that layout.

  Raises:
    CheckpointError: if there is no such checkpoint or it is not complete, or
      has no moving average.
  """
  directory, arrays = _locate(checkpoint)
  if ema and not (arrays / EMA).is_dir():
    raise CheckpointError(
      f"{arrays} has no moving average of the parameters: only a training run "
      "with ema_decay writes one. Load the parameters themselves"
    )
  config, _ = read_config(directory)
  packed = arrays / pretrained.PARAMS_FILE
  if packed.is_file():
    params = pretrained.read_params(packed)
  else:
    params = read_arrays(arrays / PARAMS)
  if ema:  # Of the trained parameters only; the others did not change.
    params = merge(params, read_arrays(arrays / EMA))
  _check(config, params)
  if config.scan_layers:
    config, params = config.replace(scan_layers=False), unstack_layers(params)
  return config, params


def load_checkpoint(
  checkpoint: str | os.PathLike,
  *,
  precision: str | Precision | None = None,
  scan_layers: bool = False,
  ema: bool = False,
) -> tuple[ModelConfig, dict]:
  """Loads a model.

  Args:
    checkpoint: a directory that `save_checkpoint`, convert_torch_weights.py or
      a training run wrote (its latest step), or one of the latter's steps; the
      name of one that comes with the package; or "untrained:PRESET" for fresh
      random weights of a preset's size.
    precision: prepare for this policy before the weights go to the device
      (halves device memory under bfloat16), see `prepare_params`, and to be run
      under it: a finer one refuses what is rounded. None keeps what is stored.
    scan_layers: load for a model whose layers are scanned.
    ema: load the moving average that a training run kept.

  Returns:
    The config, and parameters on the default device.

  Raises:
    CheckpointError: if there is no such checkpoint or it is not complete, or
      has no moving average.
  """
  name = str(checkpoint)
  if name.startswith(UNTRAINED):
    if ema:
      raise CheckpointError(f"{name} has no moving average; ask for none")
    config = load_config(name)
    params = init_params(config)
  else:
    config, params = load_params_to_host(checkpoint, ema=ema)
  if precision is not None:
    params = prepare_params(params, precision)
  if scan_layers:
    config = config.replace(scan_layers=True)
    params = stack_layers(params)
  return config, jax.device_put(params)
