"""An evaluation from start to end: predict, score, report."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from point3r_jax.checkpoints import UNTRAINED, load_checkpoint, load_metadata
from point3r_jax.config import ModelConfig
from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks import (
  Benchmark,
)
from point3r_jax.evaluation.options import options_dict
from point3r_jax.evaluation.predict import predict
from point3r_jax.evaluation.predictions import PredictionStore
from point3r_jax.evaluation.report import write_reports
from point3r_jax.evaluation.report.figures import (
  Figures,
  choose,
  require_matplotlib,
)
from point3r_jax.evaluation.requests import (
  PUBLISHED_STREAM,
  Request,
  deviations,
  open_evaluation,
  prediction_inputs,
)
from point3r_jax.evaluation.results import Evaluation, SequenceResult
from point3r_jax.evaluation.sequences import LeftOut, Sequence
from point3r_jax.evaluation.tasks import (
  Task,
)
from point3r_jax.folder_lock import lock_folder
from point3r_jax.stream import Stream
from point3r_jax.versions import installed_versions

PREDICTIONS = "predictions"

_PACKAGES = (
  *("point3r-jax", "jax", "jaxlib", "flax", "numpy", "scipy"),
  *("pillow", "opencv-python-headless"),
)

_log = logging.getLogger(__name__)


class Progress(NamedTuple):
  """How an evaluation tells how far it is.

  Attributes:
    begin: (what is done, how many of which unit).
    advance: so many more are done; may be called from any thread.
  """

  begin: Callable[[str, int, str], None] = lambda what, total, unit: None
  advance: Callable[[int], None] = lambda count: None


_SILENT = Progress()


def params_digest(params: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of all parameters: names, types, shapes, values."""
  digest = hashlib.sha256()
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  for name in sorted(flat):
    value = np.ascontiguousarray(flat[name])
    digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
    digest.update(value.view(np.uint8).data)
  return digest.hexdigest()


def _manifest(
  request: Request,
  config: ModelConfig,
  params: dict,
  stream: Mapping[str, Any],
  inputs: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns what the predictions are made by, and facts about it."""
  device = jax.devices()[0]
  metadata = {}
  if not request.checkpoint.startswith(UNTRAINED):
    metadata = load_metadata(request.checkpoint)
  return {
    "made_by": {
      **inputs,
      "checkpoint_sha256": params_digest(params),
      "model": config.to_dict(),
      # More room at the start (capacity) changes nothing.
      "stream": {name: stream[name] for name in PUBLISHED_STREAM},
    },
    "checkpoint": request.checkpoint,
    "ema": request.ema,
    "checkpoint_metadata": metadata,
    "device": f"{device.platform}: {device.device_kind}",
    "devices": jax.local_device_count(),
    "batch_size": request.batch_size,
    "versions": installed_versions(*_PACKAGES),
  }


def _predict(
  request: Request,
  benchmark: Benchmark,
  task: Task,
  store: PredictionStore,
  progress: Progress,
  stop: threading.Event,
) -> dict[str, str]:
  """Predicts what is not there yet.

  Returns:
    Sequences that cannot be read, with the reason, if they may be left out.
  """
  config, params = load_checkpoint(request.checkpoint, ema=request.ema)
  options = PUBLISHED_STREAM | dict(request.stream)
  inputs = prediction_inputs(request, benchmark, task)
  manifest = _manifest(request, config, params, options, inputs)
  try:
    store.start(manifest)
  except InputError:
    if not request.overwrite:
      raise
    store.clear()
    store.start(manifest)
  progress.begin("verifying", len(benchmark.sequences), "sequence")
  todo, broken = [], {}
  for sequence in benchmark.sequences:
    if stop.is_set():
      return broken
    if store.load(sequence) is None:
      todo.append(sequence)
    progress.advance(1)
  done = len(benchmark.sequences) - len(todo)
  if done:
    _log.info("%d sequences are predicted already", done)
  if not todo:
    return broken
  devices = jax.local_devices()

  def make_stream(image_size: tuple[int, int], lanes: int) -> Stream:
    try:
      return Stream(
        config,
        params,
        image_size,
        batch_size=lanes,
        devices=devices if len(devices) > 1 else None,
        heads=task.keep.heads,
        **options,
      )
    except ValueError as error:
      raise InputError(str(error)) from error

  progress.begin("predicting", sum(map(len, todo)), "frame")
  predict(
    make_stream,
    todo,
    store,
    task.keep,
    batch_size=request.batch_size,
    devices=len(devices),
    report=progress.advance,
    stop=stop,
    broken=broken if request.allow_missing else None,
  )
  return broken


def _score(
  task: Task,
  sequences: list[Sequence],
  store: PredictionStore,
  progress: Progress,
  allow_missing: bool,
  stop: threading.Event,
) -> list[SequenceResult | LeftOut | None]:
  """Scores all sequences, a few at a time; None for those after a stop."""
  progress.begin("scoring", len(sequences), "sequence")

  def score(sequence: Sequence) -> SequenceResult | LeftOut | None:
    if stop.is_set():
      return None
    try:
      prediction = store.load(sequence)
      if prediction is None:
        raise InputError(
          f"{store.directory} has no complete prediction of it; make it with "
          "--checkpoint"
        )
      result = task.score(sequence, prediction)
    except InputError as error:
      if allow_missing:
        return LeftOut(sequence.name, str(error))
      raise InputError(f"{sequence.name}: {error}") from error
    progress.advance(1)
    return result

  with _pool(task.workers) as pool:
    return list(pool.map(score, sequences))


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
  """Yields threads; an error ends what has not begun."""
  workers = min(workers, os.cpu_count() or 1)
  pool = concurrent.futures.ThreadPoolExecutor(workers, "scores")
  try:
    yield pool
  finally:
    pool.shutdown(cancel_futures=True)


def _figures(
  task: Task,
  sequences: list[Sequence],
  results: list[SequenceResult],
  store: PredictionStore,
) -> Figures:
  """Draws some of the sequences, from the best to the worst."""
  counted = [
    (sequence, result)
    for sequence, result in zip(sequences, results, strict=True)
    if not result.excluded
  ]
  errors = [result.metrics[task.headline] for _, result in counted]
  chosen = [counted[i] for i in choose(errors)]
  return task.figures(
    [(sequence, store.load(sequence), result) for sequence, result in chosen]
  )


def evaluate(
  request: Request,
  progress: Progress = _SILENT,
  stop: threading.Event | None = None,
) -> Evaluation | None:
  """Evaluates a model on a dataset and writes the reports.

  Predictions that are complete are kept and verified; so an evaluation that was
  ended in any way goes on where it was.

  Args:
    request: what to evaluate.
    progress: is told how far it is.
    stop: once set, ends it before the next step or sequence.

  Returns:
    What was measured, as in the reports; None if it was stopped.

  Raises:
    InputError: data, options or predictions that cannot be used.
    CheckpointError: no such checkpoint.
  """
  require_matplotlib()
  if request.batch_size < 1:
    raise InputError(
      f"batch_size is {request.batch_size}, but must be 1 or more"
    )
  if request.checkpoint is None and (
    request.ema or request.overwrite or request.stream
  ):
    raise InputError(
      "options of the model (ema, overwrite, "
      f"{', '.join([*PUBLISHED_STREAM, 'capacity'])}) need a checkpoint: "
      "predictions that are scored again stay as they are"
    )
  stop = stop or threading.Event()
  benchmark, task = open_evaluation(request)
  output = pathlib.Path(request.output)
  store = PredictionStore(output / PREDICTIONS)
  with lock_folder(output):
    broken = {}
    if request.checkpoint is None:
      store.check(prediction_inputs(request, benchmark, task))
    else:
      broken = _predict(request, benchmark, task, store, progress, stop)
    if stop.is_set():
      return None
    benchmark = _leave_out(benchmark, broken)
    scored = _score(
      task, benchmark.sequences, store, progress, request.allow_missing, stop
    )
    if stop.is_set():
      return None
    benchmark = _leave_out(
      benchmark, dict(x for x in scored if isinstance(x, LeftOut))
    )
    results = [x for x in scored if isinstance(x, SequenceResult)]
    evaluation = _conclude(request, benchmark, task, results, store.manifest())
    figures = _figures(task, benchmark.sequences, results, store)
    write_reports(output, evaluation, figures)
  return evaluation


def _leave_out(benchmark: Benchmark, broken: Mapping[str, str]) -> Benchmark:
  """Moves sequences to those that are left out."""
  return dataclasses.replace(
    benchmark,
    sequences=[x for x in benchmark.sequences if x.name not in broken],
    left_out=[*benchmark.left_out, *map(LeftOut._make, broken.items())],
  )


def _conclude(
  request: Request,
  benchmark: Benchmark,
  task: Task,
  results: list[SequenceResult],
  manifest: Mapping[str, Any],
) -> Evaluation:
  """Averages, and collects the facts.

  Raises:
    InputError: if no sequence has a score.
  """
  counted = [result for result in results if not result.excluded]
  if not counted:
    raise InputError(
      "no sequence has a score: "
      + "; ".join(
        f"{name}: {reason}"
        for name, reason in (
          *benchmark.left_out,
          *((result.name, result.excluded) for result in results),
        )
      )
    )
  made_by = manifest["made_by"]
  protocol = options_dict(benchmark.options) | options_dict(task.options)
  return Evaluation(
    task=request.task,
    dataset=request.dataset,
    metrics=task.average(counted),
    sequences=results,
    left_out=benchmark.left_out,
    run={
      "checkpoint": manifest["checkpoint"],
      "checkpoint_sha256": made_by["checkpoint_sha256"],
      "ema": manifest["ema"],
      "config": made_by["model"],
      "stream": made_by["stream"],
      "protocol": protocol,
      "setting": protocol.get("setting", ""),
      "deviations": deviations(
        benchmark,
        protocol | made_by["stream"],
        sum(result.overflow for result in results),
      ),
      "data": str(benchmark.root) if benchmark.root else None,
      "expected_sequences": benchmark.expected_sequences,
      "expected_frames": benchmark.expected_frames,
      "device": manifest["device"],
      "batch_size": manifest["batch_size"],
      "versions": manifest["versions"],
      "scored_with": installed_versions(*_PACKAGES),
    },
  )
