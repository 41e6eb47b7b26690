"""The training loop: batches in; parameters, logs and checkpoints out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from point3r_jax.data.mixture import Mixture
from point3r_jax.differences import differences
from point3r_jax.folder_lock import lock_folder
from point3r_jax.training.checkpointing import Checkpoints, check_resume
from point3r_jax.training.experiment import (
  Experiment,
  dataset_options,
  make_mixture,
)
from point3r_jax.training.feed import open_feed
from point3r_jax.training.initialization import initial_params
from point3r_jax.training.logs import (
  Meter,
  MetricLog,
  device_memory_gib,
  format_line,
)
from point3r_jax.training.panels import training_panel
from point3r_jax.training.programs import (
  Programs,
  Shape,
  abstract_state,
  make_predict,
)
from point3r_jax.training.state import TrainState

# Steps that may be on their way before their metrics are looked at.
_IN_FLIGHT = 2
# Beginnings of the names of metrics that are averaged over a log interval.
_AVERAGED = ("loss", "error", "grad_norm", "pointers")

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
  """A run that cannot go on."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """What is asked of a run besides its config.

  Attributes:
    workdir: for checkpoints and logs; a run found there is resumed.
    max_steps: stop after this step, as if interrupted; None: at the end.
    profile: (first, last) step to profile, counted from 1, into
      WORKDIR/profile; None: none.
  """

  workdir: str
  max_steps: int | None = None
  profile: tuple[int, int] | None = None


class _Pending(NamedTuple):
  """A step whose metrics were not looked at yet."""

  step: int
  samples: str
  metrics: dict[str, jax.Array]


class _Watch:
  """Reads metrics some steps late, and stops a run that is not finite."""

  def __init__(self, max_streak: int):
    self._max_streak = max_streak
    self._pending = collections.deque()
    self._skipped = collections.deque(maxlen=max_streak)
    self._interval = []  # Metrics of the steps since `read`.

  def add(self, pending: _Pending) -> None:
    """Takes a step; looks at the one some steps before."""
    self._pending.append(pending)
    if len(self._pending) > _IN_FLIGHT:
      self._look()

  def drain(self) -> None:
    """Waits for all steps."""
    while self._pending:
      self._look()

  def read(self) -> dict[str, float]:
    """Waits for all steps; returns their metrics since it was last called.

    Losses, errors and gradients are means over the steps that were not skipped,
    the overflow is their sum; the rest is the last step's.
    """
    self.drain()
    steps, self._interval = self._interval, []
    good = [metrics for metrics in steps if not metrics["streak"]] or steps[-1:]
    means = {
      name: sum(metrics[name] for metrics in good) / len(good)
      for name in steps[-1]
      if name.startswith(_AVERAGED)
    }
    overflow = sum(metrics["overflow"] for metrics in good)
    return steps[-1] | means | {"overflow": overflow}

  def _look(self) -> None:
    pending = self._pending.popleft()
    metrics = {
      name: float(value)
      for name, value in jax.device_get(pending.metrics).items()
    }
    self._interval.append(metrics)
    if not metrics["streak"]:
      return
    self._skipped.append(f"step {pending.step}: {pending.samples}")
    _log.warning(
      "step %d skipped: its loss is %g, its gradient's norm %g; samples: %s",
      pending.step,
      metrics["loss"],
      metrics["grad_norm"],
      pending.samples,
    )
    if metrics["streak"] >= self._max_streak:
      raise TrainingError(
        f"the loss or its gradient was not finite {self._max_streak} times in "
        f"a row; the last batches were: {'; '.join(self._skipped)}. Look at "
        "these samples, or lower the learning rate"
      )


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
  """Turns SIGTERM and Ctrl-C into an event: the step is finished and saved.

  A second one ends the process at once, for a compilation cannot be stopped.
  Processes that train together have to stop together: there `jax.distributed`
  hears of SIGTERM, see `Checkpoints.reached_preemption`.
  """
  stop = threading.Event()
  main = threading.current_thread() is threading.main_thread()
  if not main or jax.process_count() > 1:
    yield stop
    return

  def handle(number, _):
    name = signal.Signals(number).name
    if stop.is_set():
      _log.warning("%s again: ending without a checkpoint", name)
      os._exit(128 + number)
    _log.warning("%s: stopping after a checkpoint", name)
    stop.set()

  signals = (signal.SIGTERM, signal.SIGINT)
  previous = [signal.signal(number, handle) for number in signals]
  try:
    yield stop
  finally:
    for number, handler in zip(signals, previous, strict=True):
      signal.signal(number, handler)


class _Profile:
  """A trace of some steps, into WORKDIR/profile; ends with the run at last."""

  def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
    self._directory = workdir / "profile"
    self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
    self._active = False

  def before(self, step: int, watch: _Watch) -> None:
    """Starts the trace before its first step."""
    if step in self._steps and not self._active:
      watch.drain()
      jax.profiler.start_trace(self._directory)
      self._active = True

  def after(self, step: int, watch: _Watch) -> None:
    """Ends the trace after its last step."""
    if self._active and step + 1 not in self._steps:
      watch.drain()
      self.close()

  def close(self) -> None:
    """Ends the trace if it is on."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      _log.info("profile written to %s", self._directory)


def _start(
  experiment: Experiment, checkpoints: Checkpoints, meta: dict[str, Any]
) -> TrainState:
  """Resumes the workdir's run, or initialises a new one.

  Args:
    experiment: the run.
    checkpoints: of its workdir.
    meta: what is saved with each checkpoint.
  """
  restored = checkpoints.restore(abstract_state(experiment))
  if restored is not None:
    state, before = restored
    check_resume(before["data"], meta["data"])
    _log.info("resumed at step %d", int(state.step))
    for change in differences(before["config"], meta["config"]):
      _log.info("changed since that step: %s", change)
    return state
  config = experiment.config
  params, notes = initial_params(
    experiment.step.model, config.init_from, config.seed
  )
  for note in notes:
    _log.info(note)
  return experiment.maker.init(params)


def _shapes_ahead(mixture: Mixture, first: int, total: int) -> list[Shape]:
  """Returns the shapes to come, in the order they come."""
  shapes = {}
  steps = range(first, min(total, first + 20 * len(mixture.image_sizes)))
  for step in steps:
    shapes[(mixture.views_of(step), *mixture.image_size_of(step))] = True
  return list(shapes)


def _panel(params, predict, batch: dict[str, jax.Array]) -> np.ndarray | None:
  """Draws this process's first sample; None in other processes than the first.

  All processes compute the predictions together.
  """
  prediction = predict(params, batch)
  if jax.process_index():
    return None

  def local(x):
    return np.asarray(x.addressable_shards[0].data)

  return training_panel(
    local(batch["image"])[0],
    local(batch["depth"])[0],
    local(prediction.points_camera)[:, 0, ..., 2],
    local(prediction.confidence_camera)[:, 0],
    local(prediction.pointer_count)[:, 0],
  )


def train(experiment: Experiment, options: RunOptions) -> TrainState:
  """Trains to the end of the config's epochs, or until it is interrupted.

  A run that was interrupted, in whatever way, and is started again with the
  same workdir goes on from its last checkpoint as if nothing had been, on any
  number of devices, processes and loader workers.

  Args:
    experiment: what to train.
    options: where, and how far.

  Returns:
    The last state.

  Raises:
    InputError: datasets that are missing, or values that do not go together.
    CheckpointError: a workdir of another run.
    TrainingError: the loss was not finite too many times in a row.
  """
  config, mesh = experiment.config, experiment.mesh
  mixture = make_mixture(config)
  meta = {
    "config": json.loads(config.to_json_best_effort()),
    "data": mixture.fingerprint()
    | {
      "options": dataset_options(config),
      "accumulate": config.optimizer.accumulate,
    },
  }
  total = experiment.total_steps
  last = min(total, options.max_steps or total)
  every = experiment.steps_of(config.checkpoint.every_epochs)
  keep_every = experiment.steps_of(config.checkpoint.keep_every_epochs)
  workdir = pathlib.Path(options.workdir)

  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(lock_folder(workdir))
    checkpoints = stack.enter_context(
      Checkpoints(
        workdir,
        experiment.step.model,
        metadata={"config": meta["config"]},
        keep_last=config.checkpoint.keep_last,
        keep_every=keep_every,
      )
    )
    state = _start(experiment, checkpoints, meta)
    step = int(state.step)
    if step >= last:
      _log.info("nothing to do: step %d of %d is done already", step, last)
      return state
    feed = stack.enter_context(open_feed(experiment, mixture, step))
    log = stack.enter_context(
      MetricLog(workdir, start_step=step, active=jax.process_index() == 0)
    )
    programs = stack.enter_context(
      Programs(experiment, _shapes_ahead(mixture, step, total))
    )
    predict = make_predict(experiment)
    stop = stack.enter_context(_stop_on_signals())
    stack.enter_context(jax.set_mesh(mesh))
    meter, watch = Meter(), _Watch(config.max_streak)
    profile = stack.enter_context(
      contextlib.closing(_Profile(workdir, options.profile))
    )

    stopping = False
    while step < last and not stopping:
      with meter.waiting():
        batch, samples = next(feed)
      shape = batch["depth"].shape[1:]
      if not programs.is_ready(shape):
        watch.drain()
        with meter.paused():
          programs.wait_unless(stop, shape)
        stopping = stop.is_set()
        if stopping:  # Compilation takes longer than there may be time.
          break
      step += 1
      profile.before(step, watch)
      with jax.transfer_guard("disallow"):
        state, metrics = programs.step(state, batch)
      watch.add(_Pending(step, samples, metrics))
      meter.step(config.batch_size * batch["depth"].shape[1])
      profile.after(step, watch)

      if step % config.log.every == 0 or step == last:
        values = watch.read() | meter.read()
        values["epoch"] = step / experiment.step.steps_per_epoch
        memory = device_memory_gib()
        if memory is not None:
          values["memory_gib"] = memory
        log.write(step, values)
        _log.info(format_line(step, total, values))
      if config.log.panel_every and step % config.log.panel_every == 0:
        watch.drain()
        with meter.paused():
          panel = _panel(state.params, predict, batch)
          if panel is not None:
            log.write_image(step, "train", panel)
      stopping = checkpoints.reached_preemption(step) or stop.is_set()
      if any(step % n == 0 for n in (every, keep_every) if n):
        watch.drain()
        with meter.paused():
          checkpoints.save(state, meta)
    watch.drain()
    if step != (checkpoints.latest_step or 0):
      checkpoints.save(state, meta)
    if stopping:
      _log.info("stopped at step %d of %d", step, total)
    checkpoints.wait()
  return state
