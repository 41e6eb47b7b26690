"""The training loop: batches in; parameters, logs and checkpoints out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.data.mixture import Mixture
from point3r_jax.differences import differences
from point3r_jax.errors import InputError
from point3r_jax.folder_lock import lock_folder
from point3r_jax.training.checkpointing import (
  Checkpoints,
  check_agreement,
  check_resume,
)
from point3r_jax.training.experiment import (
  Experiment,
  dataset_options,
  make_mixture,
)
from point3r_jax.training.feed import Batch, open_feed
from point3r_jax.training.initialization import initial_params
from point3r_jax.training.logs import (
  Meter,
  MetricLog,
  device_memory_gib,
  format_line,
)
from point3r_jax.training.panels import training_panel
from point3r_jax.training.profile import Profile
from point3r_jax.training.programs import (
  Programs,
  Shape,
  abstract_state,
  make_predict,
)
from point3r_jax.training.signals import stop_on_signals
from point3r_jax.training.state import TrainState
from point3r_jax.training.watch import Pending, Watch

# What of a config may differ between processes: where data are, how they are
# read.
_OWN_TO_A_PROCESS = ("data_root", "loader")

_log = logging.getLogger(__name__)


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
    # Of a run that ended among skipped steps and now is to be longer.
    return state.replace(
      streak=jnp.zeros_like(state.streak, device=state.streak.sharding)
    )
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


@dataclasses.dataclass(frozen=True)
class _Run:
  """A run under way.

  Attributes:
    experiment: what is trained.
    meta: what is saved with each checkpoint.
    last: the step to stop after.
    checkpoints, feed, log, programs, profile, meter, watch: its parts.
    stop: set when the run is to end early.
  """

  experiment: Experiment
  meta: dict[str, Any]
  last: int
  checkpoints: Checkpoints
  feed: Iterator[Batch]
  log: MetricLog
  programs: Programs
  profile: Profile
  meter: Meter
  watch: Watch
  stop: threading.Event

  def go(self, state: TrainState) -> TrainState:
    """Trains on from a state; returns the last one, which is saved."""
    step, config = int(state.step), self.experiment.config
    predict = make_predict(self.experiment)
    stopping = due = False
    while step < self.last and not stopping:
      batch, samples = self._next_batch(state)
      if not self._compiled(batch):
        stopping = True
        break
      step += 1
      self.profile.before(step)
      with jax.transfer_guard("disallow"):
        state, metrics = self.programs.step(state, batch)
      self.watch.add(Pending(step, samples, metrics))
      self.meter.step(config.batch_size * batch["depth"].shape[1])
      self.profile.after(step)

      if step % config.log.every == 0 or step == self.last:
        self._report(step)
      if config.log.panel_every and step % config.log.panel_every == 0:
        self.watch.drain()
        with self.meter.paused():
          panel = _panel(state.params, predict, batch)
          if panel is not None:
            self.log.write_image(step, "train", panel)
      stopping = self.checkpoints.reached_preemption(step) or self.stop.is_set()
      # What is due at a skipped step is saved after the next good one.
      due = due or self._is_due(step)
      if due:
        due = not self._save(state)
    self._save(state)
    if stopping:
      _log.info("stopped at step %d of %d", step, self.experiment.total_steps)
    self.checkpoints.wait()
    return state

  def _next_batch(self, state: TrainState) -> Batch:
    """Returns the next batch; if there is none to be had, saves the state.

    Several processes would have to agree to save: they do not, for the others
    are in the next step already.
    """
    try:
      with self.meter.waiting():
        return next(self.feed)
    except Exception:
      if jax.process_count() == 1:
        self._save(state)
      raise

  def _compiled(self, batch: dict[str, jax.Array]) -> bool:
    """Waits for the batch's program; False if the run is to stop before.

    Compilation takes longer than there may be time.
    """
    shape = batch["depth"].shape[1:]
    if self.programs.is_ready(shape):
      return True
    self.watch.drain()
    with self.meter.paused():
      self.programs.wait_unless(self.stop, shape)
    return not self.stop.is_set()

  def _report(self, step: int) -> None:
    """Logs the metrics since it was last called."""
    values = self.watch.read() | self.meter.read()
    values["epoch"] = step / self.experiment.step.steps_per_epoch
    memory = device_memory_gib()
    if memory is not None:
      values["memory_gib"] = memory
    self.log.write(step, values)
    _log.info(format_line(step, self.experiment.total_steps, values))

  def _is_due(self, step: int) -> bool:
    """Returns whether the config asks for a checkpoint of this step."""
    checkpoint = self.experiment.config.checkpoint
    epochs = (checkpoint.every_epochs, checkpoint.keep_every_epochs)
    steps = map(self.experiment.steps_of, epochs)
    return any(step % n == 0 for n in steps if n)

  def _save(self, state: TrainState) -> bool:
    """Saves a state that is not saved yet, unless its last step was skipped.

    Of a run that diverges it would take the place of one that is of use; and
    skipped steps change nothing but counts, so a run stopped among them can
    repeat them. A complete run is saved in any case: it is not repeated.

    Returns:
      Whether the state is saved.
    """
    self.watch.drain()
    step = int(state.step)
    if step == (self.checkpoints.latest_step or 0):
      return True
    if self.watch.streak and step < self.experiment.total_steps:
      _log.warning(
        "no checkpoint of step %d: it is the last of %d skipped ones",
        step,
        self.watch.streak,
      )
      return False
    with self.meter.paused():
      self.checkpoints.save(state, self.meta)
    return True


def _own_samples(
  experiment: Experiment, dataset: grain.MapDataset, fingerprint: Any
) -> dict[str, Any]:
  """Returns what identifies a caller's dataset.

  Raises:
    InputError: it does not suit the run.
  """
  config = experiment.config
  if fingerprint is None:
    raise InputError(
      "a dataset needs a fingerprint: JSON-friendly facts that change when its "
      "samples or their order do"
    )
  wanted = experiment.total_steps * config.batch_size
  if len(dataset) < wanted:
    raise InputError(
      f"the dataset has {len(dataset)} samples, but the config's epochs take "
      f"{wanted}; use its repeat(), or lower config.epochs"
    )
  return {"fingerprint": fingerprint, "batch_size": config.batch_size}


def _facts(experiment: Experiment, data: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what is saved with each checkpoint.

  Args:
    experiment: the run.
    data: what identifies its samples.
  """
  config = experiment.config
  return {
    "config": json.loads(config.to_json_best_effort()),
    "data": {**data, "accumulate": config.optimizer.accumulate},
  }


def _check_processes(meta: dict[str, Any], options: RunOptions) -> None:
  """Raises InputError unless all processes train the same, and as far."""
  config = {
    name: value
    for name, value in meta["config"].items()
    if name not in _OWN_TO_A_PROCESS
  }
  check_agreement(
    {"config": config, "data": meta["data"], "max_steps": options.max_steps}
  )


def train(
  experiment: Experiment,
  options: RunOptions,
  dataset: grain.MapDataset | None = None,
  fingerprint: Any = None,
) -> TrainState:
  """Trains to the end of the config's epochs, or until it is interrupted.

  A run that was interrupted, in whatever way, and is started again with the
  same workdir goes on from its last checkpoint as if nothing had been, on any
  number of devices, processes and loader workers.

  Args:
    experiment: what to train.
    options: where, and how far.
    dataset: records (see `data.record`) in the order of the run, each a
      function of its position alone; those of a batch must have one shape. Of
      the config's `datasets`, only the number of samples counts then: it says
      how long an epoch is. None: a mixture of the config's datasets.
    fingerprint: of `dataset`: JSON-friendly facts that change when its samples
      or their order do. A run is resumed only with an equal one.

  Returns:
    The last state.

  Raises:
    InputError: datasets that are missing, a record that cannot be read (what
      was done is saved then), or values that do not go together.
    CheckpointError: a workdir of another run.
    TrainingError: the loss was not finite too many times in a row.
  """
  config = experiment.config
  if dataset is None:
    samples = make_mixture(config)
    data = samples.fingerprint() | {"options": dataset_options(config)}
  else:
    samples = dataset
    data = _own_samples(experiment, dataset, fingerprint)
  meta = _facts(experiment, data)
  _check_processes(meta, options)
  total = experiment.total_steps
  last = min(total, options.max_steps or total)
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
        keep_every=experiment.steps_of(config.checkpoint.keep_every_epochs),
      )
    )
    state = _start(experiment, checkpoints, meta)
    step = int(state.step)
    if step >= last:
      _log.info("nothing to do: step %d of %d is done already", step, last)
      return state
    stop = stack.enter_context(stop_on_signals())
    feed = stack.enter_context(open_feed(experiment, samples, step))
    log = stack.enter_context(
      MetricLog(workdir, start_step=step, active=jax.process_index() == 0)
    )
    ahead = _shapes_ahead(samples, step, total) if dataset is None else []
    programs = stack.enter_context(Programs(experiment, ahead))
    stack.enter_context(jax.set_mesh(experiment.mesh))
    meter, watch = Meter(), Watch(config.max_streak, checkpoints)
    profile = stack.enter_context(
      contextlib.closing(Profile(workdir, options.profile, watch, meter))
    )
    run = _Run(
      experiment=experiment,
      meta=meta,
      last=last,
      checkpoints=checkpoints,
      feed=feed,
      log=log,
      programs=programs,
      profile=profile,
      meter=meter,
      watch=watch,
      stop=stop,
    )
    return run.go(state)
