"""Makes a checkpoint of the package out of training runs; see `pretrained`.

python -m point3r_jax.cli.embed --stages runs/pairs runs/views runs/long \
  --output point3r_jax/pretrained/tiny
python evaluate.py --dataset synthetic --checkpoint tiny --output output/tiny

and the first command again with `--metrics output/tiny/metrics.json`: so the
metrics are those of the rounded weights.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from point3r_jax.checkpoints import (
  CheckpointError,
  load_metadata,
  load_params_to_host,
  write_config,
)
from point3r_jax.cli.common import run
from point3r_jax.pretrained import PARAMS_FILE, pack_params

# A package is downloaded by all, also by those who have other weights.
_MOST_BYTES = 16_000_000
# Rows of the curve, of each stage.
_ROWS = 100
_COLUMNS = (
  *("step", "epoch", "loss", "loss_camera", "loss_world", "loss_pose"),
  *("error_camera", "error_world", "grad_norm", "lr"),
  *("pointers", "overflow", "skipped"),
)
_CONFIG, _METRICS = "config.json", "metrics.json"
_FILES = (_CONFIG, PARAMS_FILE, "training.json", "curve.csv", _METRICS)
# What reconstruct.py says to those who take the checkpoint.
_NOTICE = (
  "This checkpoint knows only synthetic scenes at {sizes}; on photographs its "
  "geometry means little.\nFor those, convert the authors' weights with "
  "convert_torch_weights.py (see README.md)."
)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m point3r_jax.cli.embed",
    description="Makes a checkpoint of the package out of training runs.",
  )
  add = parser.add_argument
  add(
    "--stages",
    nargs="+",
    required=True,
    metavar="WORKDIR",
    help="the runs, in order; the last one's parameters are taken",
  )
  add("--output", required=True, help="such as point3r_jax/pretrained/tiny")
  add("--metrics", help="a metrics.json that evaluate.py wrote")
  add(
    "--ema",
    action="store_true",
    help="take the moving average that training kept of the parameters",
  )
  return parser


def _stage(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a run noted down; with its last checkpoint, if there is one.

  Raises:
    CheckpointError: if it is not a training run.
  """
  metadata = load_metadata(workdir)
  facts = metadata.get("training", metadata)
  if "config" not in facts:
    raise CheckpointError(
      f"{workdir} is not of a training run; give what train.py got as --workdir"
    )
  return {"name": workdir.resolve().name, **facts}


def _curve(workdir: pathlib.Path, last: float) -> list[dict[str, Any]]:
  """Returns rows of a run's metrics, evenly thinned, up to a step.

  Raises:
    CheckpointError: if there are none or they cannot be read.
  """
  path = workdir / "metrics.jsonl"
  try:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["step"] <= last]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(
      f"{path} cannot be read: {error!r}; the curve is made of what the run "
      "logged there"
    ) from error
  if not rows:
    raise CheckpointError(f"{path} has no row up to step {last}")
  chosen = np.linspace(0, len(rows) - 1, min(len(rows), _ROWS))
  return [rows[round(index)] for index in chosen]


def _csv(curves: Sequence[list[dict[str, Any]]]) -> bytes:
  """Returns the curves of all stages, counted from 1, as one table."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["stage", *_COLUMNS])
  for stage, rows in enumerate(curves, start=1):
    for row in rows:
      # Values that are not finite are strings there.
      values = [f"{float(row[n]):.8g}" if n in row else "" for n in _COLUMNS]
      writer.writerow([stage, *values])
  return text.getvalue().encode()


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2) + "\n").encode()


def _metrics(path: pathlib.Path) -> bytes:
  """Returns what evaluate.py wrote.

  Raises:
    CheckpointError: if it is not that.
  """
  try:
    metrics = json.loads(path.read_text())
    metrics["run"]["checkpoint_sha256"]  # What tells of which weights it is.
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(
      f"{path} is not a metrics.json of evaluate.py: {error!r}"
    ) from error
  return _json(metrics)


def _run(flags: argparse.Namespace) -> None:
  workdirs = [pathlib.Path(stage) for stage in flags.stages]
  output = pathlib.Path(flags.output)
  others = {path.name for path in output.glob("*")} - set(_FILES)
  if others:
    raise CheckpointError(
      f"{output} holds other files ({', '.join(sorted(others))}); name a "
      "folder of its own"
    )
  stages = [_stage(workdir) for workdir in workdirs]
  curves = [
    _curve(workdir, stage.get("step", math.inf))
    for workdir, stage in zip(workdirs, stages, strict=True)
  ]
  config, params = load_params_to_host(workdirs[-1], ema=flags.ema)
  packed = pack_params(params)
  if len(packed) > _MOST_BYTES:
    raise CheckpointError(
      f"the parameters take {len(packed) / 1e6:.1f} MB in bfloat16, but a "
      f"checkpoint in the package may take {_MOST_BYTES / 1e6:.0f} MB; train a "
      "smaller model"
    )
  files = {
    PARAMS_FILE: packed,
    "training.json": _json(stages),
    "curve.csv": _csv(curves),
  }
  if flags.metrics:
    files[_METRICS] = _metrics(pathlib.Path(flags.metrics))
  sizes = [f"{w}x{h}" for h, w in stages[-1]["config"]["image_sizes"]]
  metadata = {
    "notice": _NOTICE.format(sizes=", ".join(sizes)),
    "stages": [stage["name"] for stage in stages],
    "ema": flags.ema,
  }
  output.mkdir(parents=True, exist_ok=True)
  # Without a config it is no checkpoint, so it is the first file to go and the
  # last one to come.
  for name in _FILES:
    (output / name).unlink(missing_ok=True)
  for name, content in files.items():
    (output / name).write_bytes(content)
  write_config(output, config, metadata)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f"{output}: {count:,} parameters, {len(packed) / 1e6:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  flags = _parser().parse_args(arguments)
  return run(lambda: _run(flags))


if __name__ == "__main__":
  sys.exit(main())
