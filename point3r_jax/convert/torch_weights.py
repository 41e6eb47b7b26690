"""Published weights to parameters and back, complete or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from point3r_jax.config import ModelConfig
from point3r_jax.convert.names import (
  Shape,
  Weight,
  config_from_shapes,
  from_dust3r,
  weight_table,
)
from point3r_jax.convert.tensor_file import CheckpointFileError, TensorFile
from point3r_jax.params import (
  flat_shapes,
  init_params,
  list_problems,
  param_shapes,
)

# The name in a file's metadata of the config that the weights came from.
_CONFIG = "point3r_jax.config"
# Heads of other tasks that DUSt3R's files may carry along; no use for them.
_IGNORED_BY_DUST3R = ("mask_token", "prediction_head.")
# What a model gets fresh when it starts from DUSt3R.
_NOT_IN_DUST3R = (
  "pose_token",
  "pose_retriever.",
  "decoder_embed_memory.",
  "dec_norm_memory.",
  "value_encoder.",
  "value_norm.",
  "value_out.",
  "downstream_head.final_transform.",
  "downstream_head.pose_head.",
  "memory_attn_head.",
)


@dataclasses.dataclass(frozen=True)
class Import:
  """What came of a file.

  Attributes:
    config: the model's size, read off the metadata or the shapes.
    params: nested dictionary of NumPy arrays, complete.
    kind: "point3r" or "dust3r".
    initialised: published names that the file lacks and that start fresh.
    ignored: names in the file that were left out on purpose.
  """

  config: ModelConfig
  params: dict[str, Any]
  kind: str
  initialised: tuple[str, ...]
  ignored: tuple[str, ...]


def _leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  for key in path:
    tree = tree[key]
  return tree


def _check(
  tensors: TensorFile,
  sources: Mapping[str, str],
  table: tuple[Weight, ...],
  config: ModelConfig,
  fresh: tuple[str, ...],
) -> tuple[str, ...]:
  """Compares names, shapes and types; returns the names to initialise.

  Raises:
    CheckpointFileError: with all that is missing, left over, misshapen or no
      weight by its type.
  """
  known = {w.name for w in table} | {w.alias for w in table if w.alias}
  absent = [w.name for w in table if not {w.name, w.alias} & set(sources)]
  initialised = tuple(name for name in absent if name.startswith(fresh))
  shapes = flat_shapes(param_shapes(config))
  misshapen, coded = [], []
  for weight in table:
    for name in {weight.name, weight.alias} & set(sources):
      published = tensors[sources[name]].shape
      want = shapes["/".join(weight.path)]
      try:
        fits = weight.import_(np.broadcast_to(0, published)).shape == want
      except (ValueError, IndexError):  # Not even the number of axes fits.
        fits = False
      if not fits:
        misshapen.append(f"{name} {published}")
      dtype = tensors[sources[name]].dtype
      if not jnp.issubdtype(dtype, jnp.floating):
        coded.append(f"{name} {np.dtype(dtype)}")
  problems = {
    "missing": sorted(set(absent) - set(initialised)),
    "unknown": sorted(set(sources) - known),
    "of an unexpected shape": sorted(misshapen),
    "not floating-point numbers": sorted(coded),
  }
  if any(problems.values()):
    raise CheckpointFileError(
      f"{tensors.path} does not hold just the weights of a Point3R model: "
      f"{list_problems(problems)}"
    )
  return initialised


def _config(
  tensors: TensorFile, shapes: Mapping[str, Shape], image_size: int | None
) -> ModelConfig:
  """Returns the config that the file holds, or what its shapes tell."""
  said = tensors.metadata.get(_CONFIG)
  if said is None:
    return config_from_shapes(shapes, image_size or ModelConfig().image_size)
  config = ModelConfig.from_dict(dict(json.loads(said)))
  return config.replace(
    image_size=image_size or config.image_size, scan_layers=False
  )


def import_weights(
  tensors: TensorFile,
  *,
  image_size: int | None = None,
  dtype: np.dtype | None = None,
  seed: int = 0,
) -> Import:
  """Makes parameters of a file's tensors.

  Args:
    tensors: an open file with the published names of Point3R or DUSt3R. From
      the latter, the parts it lacks are initialised as training starts them.
      Sizes that shapes do not tell are as published, unless the file has the
      metadata of `export_metadata`.
    image_size: side the weights were trained for, which no shape tells; None:
      what the file says, or 512 if it says nothing.
    dtype: type to store; None keeps each tensor's own.
    seed: of the parts to initialise.

  Returns:
    The config, complete parameters, and what was not simply taken over.

  Raises:
    CheckpointFileError: unless every tensor of the model is there in the right
      shape, of a floating type, and every other name is known to be of no use;
      lists all problems.
  """
  sources, ignored, fresh, kind = {n: n for n in tensors}, (), (), "point3r"
  if any(name.startswith("downstream_head1.") for name in tensors):
    kind, fresh = "dust3r", _NOT_IN_DUST3R
    ignored = tuple(n for n in tensors if n.startswith(_IGNORED_BY_DUST3R))
    try:
      sources = from_dust3r([n for n in tensors if n not in ignored])
    except ValueError as error:
      raise CheckpointFileError(f"{tensors.path}: {error}") from error
  try:
    shapes = {new: tensors[old].shape for new, old in sources.items()}
    config = _config(tensors, shapes, image_size)
    table = weight_table(config)
  except (KeyError, ValueError, IndexError, TypeError) as error:
    raise CheckpointFileError(
      f"{tensors.path} is not a Point3R or DUSt3R checkpoint: the model's size "
      f"cannot be told from its tensors and metadata ({error})"
    ) from error
  initialised = _check(tensors, sources, table, config, fresh)

  def read(weight: Weight) -> np.ndarray:
    names = [n for n in (weight.name, weight.alias) if n in sources]
    array, *twins = (tensors.read(sources[name]) for name in names)
    if any(not np.array_equal(array, x, equal_nan=True) for x in twins):
      raise CheckpointFileError(
        f"{tensors.path}: {weight.name} and {weight.alias} are one tensor "
        "under two names, but differ; the file is damaged"
      )
    array = array if dtype is None else array.astype(dtype)
    return np.ascontiguousarray(weight.import_(array))

  started = init_params(config, seed) if initialised else None
  flat = {}
  for weight in table:
    if weight.name in initialised:
      leaf = np.asarray(_leaf(started, weight.path))
      flat[weight.path] = leaf if dtype is None else leaf.astype(dtype)
    else:
      flat[weight.path] = read(weight)
  return Import(
    config, flax.traverse_util.unflatten_dict(flat), kind, initialised, ignored
  )


def export_metadata(config: ModelConfig) -> dict[str, str]:
  """Returns what a file should say beside the tensors, for `import_weights`.

  Shapes do not tell how many heads a layer has, for one.
  """
  return {_CONFIG: json.dumps(config.to_dict())}


def export_weights(
  config: ModelConfig, params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the published names and tensors of parameters, aliases included."""
  for weight in weight_table(config):
    array = np.asarray(_leaf(params, weight.path))
    array = np.ascontiguousarray(weight.export(array))
    yield weight.name, array
    if weight.alias:
      yield weight.alias, array
