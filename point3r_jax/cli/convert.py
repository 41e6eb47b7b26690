"""Converts PyTorch weights to a checkpoint directory, and back."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from point3r_jax.checkpoints import (
  CheckpointError,
  load_params_to_host,
  save_checkpoint,
)
from point3r_jax.cli.common import run
from point3r_jax.convert.torch_file import open_tensors
from point3r_jax.convert.torch_weights import (
  export_metadata,
  export_weights,
  import_weights,
)
from point3r_jax.data.images import check_size
from point3r_jax.files import atomic_file

_DTYPES = {
  "float32": jnp.float32,
  "bfloat16": jnp.bfloat16,
  "float16": jnp.float16,
}


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description="Converts Point3R or DUSt3R weights from PyTorch to a "
    "checkpoint directory; with --to_torch, back to safetensors. Needs no "
    "PyTorch and runs no code that a file may contain.",
  )
  parser.add_argument(
    "--input",
    required=True,
    help="a .pth or .safetensors file; with --to_torch a checkpoint",
  )
  parser.add_argument(
    "--output",
    required=True,
    help="the directory to make; with --to_torch a .safetensors file",
  )
  parser.add_argument(
    "--dtype",
    choices=sorted(_DTYPES),
    help="type to store (default: as in the input)",
  )
  parser.add_argument(
    "--image_size",
    type=int,
    help="side of the images that the weights were trained for, a multiple of "
    "16 (default: what the file says, as after --to_torch; otherwise 512)",
  )
  parser.add_argument(
    "--seed",
    type=int,
    help="seed of the parts that DUSt3R lacks (default: 0)",
  )
  parser.add_argument(
    "--to_torch", action="store_true", help="convert back to published names"
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace an existing output"
  )
  return parser


def _check_output(path: pathlib.Path, overwrite: bool) -> None:
  if path.exists() and not overwrite:
    raise CheckpointError(f"{path} exists; choose another or use --overwrite")


def _from_torch(flags: argparse.Namespace) -> None:
  output = pathlib.Path(flags.output)
  _check_output(output, flags.overwrite)
  if flags.image_size is not None:
    check_size(flags.image_size)
  dtype = _DTYPES.get(flags.dtype)
  with open_tensors(flags.input) as tensors:
    result = import_weights(
      tensors, image_size=flags.image_size, dtype=dtype, seed=flags.seed or 0
    )
  metadata = {
    "source": pathlib.Path(flags.input).name,
    "kind": result.kind,
    "initialised": list(result.initialised),
    "ignored": list(result.ignored),
  }
  save_checkpoint(
    output,
    result.config,
    result.params,
    metadata=metadata,
    overwrite=flags.overwrite,
  )
  leaves = jax.tree.leaves(result.params)
  types = sorted({str(leaf.dtype) for leaf in leaves})
  print(
    f"{output}: {sum(leaf.size for leaf in leaves):,} parameters in "
    f"{len(leaves)} tensors of {', '.join(types)}, from a {result.kind} file"
  )
  for what in ("initialised", "ignored"):
    if metadata[what]:
      print(f"{what}: {', '.join(metadata[what])}")


def _to_torch(flags: argparse.Namespace) -> None:
  output = pathlib.Path(flags.output)
  _check_output(output, flags.overwrite)
  if output.is_dir() or output.suffix != ".safetensors":
    raise CheckpointError(f"{output} must be named as a .safetensors file")
  if flags.image_size is not None or flags.seed is not None:
    raise CheckpointError(
      "--image_size and --seed are for converting from PyTorch; leave them out "
      "with --to_torch"
    )
  config, params = load_params_to_host(flags.input)
  if flags.dtype:
    params = jax.tree.map(lambda x: x.astype(_DTYPES[flags.dtype]), params)
  tensors = dict(export_weights(config, params))
  del params
  output.parent.mkdir(parents=True, exist_ok=True)
  with atomic_file(output) as file:
    mode = os.fstat(file.fileno()).st_mode
    save_file(tensors, file.name, export_metadata(config))
    os.chmod(file.name, mode)  # It puts another file there, for its owner only.
  print(f"{output}: {len(tensors)} tensors under their published names")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  flags = _parser().parse_args(arguments)
  return run(lambda: (_to_torch if flags.to_torch else _from_torch)(flags))
