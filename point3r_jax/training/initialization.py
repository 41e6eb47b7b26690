"""What a training run starts from."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from point3r_jax import pretrained
from point3r_jax.checkpoints import (
  CheckpointError,
  config_differences,
  load_params_to_host,
)
from point3r_jax.config import ModelConfig
from point3r_jax.convert.torch_file import open_tensors
from point3r_jax.convert.torch_weights import import_weights
from point3r_jax.params import init_params, stack_layers

# Parameters fit whatever these are.
_FREE = ("image_size", "scan_layers", "rotary_bases")


def initial_params(
  model: ModelConfig, init_from: str, seed: int
) -> tuple[dict, list[str]]:
  """Returns the parameters that a run starts with.

  Args:
    model: the model to train.
    init_from: a checkpoint directory, also of a training run (its latest step)
      or one of the latter's steps; the name of one that comes with the
      package; a .pth or .safetensors file of Point3R or DUSt3R; or empty, to
      start as the published training does.
    seed: of what is initialised.

  Returns:
    A nested dictionary of float32 NumPy arrays in the model's layout, and lines
    that say where they came from.

  Raises:
    CheckpointError: if there is no such checkpoint, it cannot be read, or it is
      of another model.
    CheckpointFileError: the same, of a file.
  """
  if not init_from:
    return init_params(model, seed), [f"parameters: initialised, seed {seed}"]
  path = pathlib.Path(init_from)
  if pretrained.find(init_from) or path.is_dir():
    config, params = load_params_to_host(init_from)
    lines = [f"parameters: from the checkpoint {init_from}"]
  elif path.exists():
    config, params, lines = _from_file(path, seed)
  else:
    raise CheckpointError(
      f"init_from: there is no {init_from}; give a checkpoint directory, one "
      f"of the package ({', '.join(pretrained.names()) or 'it has none'}), a "
      ".pth or .safetensors file, or nothing to start afresh"
    )
  differences = config_differences(config, model, ignore=_FREE)
  if differences:
    raise CheckpointError(
      f"{init_from} is of another model: {differences}; train a model of its "
      "size, or start from another checkpoint"
    )
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  return stack_layers(params) if model.scan_layers else params, lines


def _from_file(
  path: pathlib.Path, seed: int
) -> tuple[ModelConfig, dict, list[str]]:
  """Converts a file of PyTorch weights."""
  with open_tensors(path) as tensors:
    result = import_weights(tensors, dtype=np.dtype(np.float32), seed=seed)
  lines = [f"parameters: from the {result.kind} file {path}"]
  if result.initialised:
    lines.append(
      f"initialised, seed {seed}, for the file lacks them: "
      f"{', '.join(result.initialised)}"
    )
  if result.ignored:
    lines.append(f"in the file, but ignored: {', '.join(result.ignored)}")
  return result.config, result.params, lines
