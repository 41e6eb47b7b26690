"""Evaluates a checkpoint on a dataset."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import tqdm

from point3r_jax.cli.common import (
  INTERRUPTED,
  add_model_flags,
  end,
  model_options,
  run,
  stop_on_interrupt,
)
from point3r_jax.errors import InputError
from point3r_jax.gpu_options import load_kernels_at_the_start

_TASKS = ("mv_recon", "monodepth", "video_depth", "relpose", "synthetic")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description="Evaluates a checkpoint by the published protocols. Writes "
    "metrics.json, sequences.csv, table.md and report.html; see "
    "docs/evaluation.md.",
  )
  add = parser.add_argument
  add(
    "--task",
    choices=_TASKS,
    help="what to measure (default: the dataset's task, if it has just one)",
  )
  add("--dataset", required=True, help="such as bonn; see docs/evaluation.md")
  add("--data", help="the dataset's folder")
  add(
    "--checkpoint",
    help="what to predict with, as for reconstruct.py; without it, predictions "
    "that are in the output folder are scored again",
  )
  add("--output", help="folder for predictions and reports")
  add(
    "--ema",
    action="store_true",
    help="take the moving average that training kept of the parameters",
  )
  add(
    "--options",
    nargs="+",
    default=[],
    metavar="NAME=VALUE",
    help="protocol options; the defaults are the published ones",
  )
  add(
    "--list_options",
    action="store_true",
    help="print the options of the task and dataset as JSON, and end",
  )
  add(
    "--allow_missing",
    action="store_true",
    help="leave out sequences that are missing or broken",
  )
  add(
    "--overwrite",
    action="store_true",
    help="replace predictions that were made with something else",
  )

  add = add_model_flags(parser, precision="float32, as published")
  add(
    "--batch_size",
    type=int,
    default=4,
    help="sequences side by side (default: %(default)s)",
  )
  return parser


def _overrides(words: Sequence[str]) -> dict[str, str]:
  """Returns NAME=VALUE words as a dictionary."""
  overrides = {}
  for word in words:
    name, equals, value = word.partition("=")
    if not equals or name in overrides:
      raise InputError(f"--options takes each NAME=VALUE once, got {word!r}")
    overrides[name] = value
  return overrides


class _Bar:
  """A progress bar with the time that is left; one a phase."""

  def __init__(self):
    self._bar = None

  def begin(self, what: str, total: int, unit: str) -> None:
    """Starts a phase."""
    self.close()
    self._bar = tqdm.tqdm(total=total, unit=unit, desc=what, disable=None)

  def advance(self, count: int) -> None:
    """Moves on."""
    self._bar.update(count)

  def close(self) -> None:
    """Ends the phase under way."""
    if self._bar is not None:
      self._bar.close()


def _run(flags: argparse.Namespace) -> int:
  # Imported late: it needs the libraries of the extra `eval`.
  from point3r_jax.evaluation.benchmarks import default_task
  from point3r_jax.evaluation.requests import Request, known_options
  from point3r_jax.evaluation.runner import Progress, evaluate

  task = flags.task or default_task(flags.dataset)
  if flags.list_options:
    print(json.dumps(known_options(task, flags.dataset), indent=2))
    return 0
  if flags.output is None:
    raise InputError(
      "--output is missing: name a folder for predictions and reports"
    )
  request = Request(
    task=task,
    dataset=flags.dataset,
    output=flags.output,
    data=flags.data,
    checkpoint=flags.checkpoint,
    ema=flags.ema,
    options=_overrides(flags.options),
    stream=model_options(flags),
    batch_size=flags.batch_size,
    allow_missing=flags.allow_missing,
    overwrite=flags.overwrite,
  )
  bar = _Bar()
  with stop_on_interrupt() as stop:
    try:
      found = evaluate(request, Progress(bar.begin, bar.advance), stop)
    finally:
      bar.close()
  if found is None:
    print(
      "interrupted: the sequences predicted so far are kept; the same command "
      "goes on with the others",
      file=sys.stderr,
    )
    return INTERRUPTED
  output = pathlib.Path(flags.output)
  print((output / "table.md").read_text())
  print(f"Look at {output / 'report.html'}.")
  return 0


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  flags = _parser().parse_args(arguments)
  logging.basicConfig(format="%(message)s", force=True)
  logging.getLogger("point3r_jax").setLevel(logging.INFO)
  load_kernels_at_the_start()
  return run(lambda: _run(flags))


def script() -> NoReturn:
  """Runs the program with the process's arguments, and ends the process."""
  end(main())
