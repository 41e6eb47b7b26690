"""Checkpoints of a training run: written while it goes on, resumed exactly.

  WORKDIR/config.json                   the model, as in every checkpoint
  WORKDIR/checkpoints/STEP/params/      parameters, in the model's layout
  WORKDIR/checkpoints/STEP/ema/         their moving average, if there is one
  WORKDIR/checkpoints/STEP/state/       the rest of the state
  WORKDIR/checkpoints/STEP/meta/        what the run noted down, as JSON

`checkpoints.load_checkpoint` reads parameters or moving average of WORKDIR, or
of one of its steps. All processes of a run share WORKDIR and call everything
here together.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from point3r_jax.array_files import (
  array_types,
  array_writer,
  read_arrays,
  stored_types,
)
from point3r_jax.checkpoints import (
  EMA,
  META,
  PARAMS,
  STEPS,
  CheckpointError,
  config_differences,
  read_config,
  read_meta,
  steps_in,
  write_config,
)
from point3r_jax.config import ModelConfig
from point3r_jax.differences import differences
from point3r_jax.errors import InputError
from point3r_jax.training.state import TrainState
from point3r_jax.versions import installed_versions

_STATE = "state"
# Names to show of each kind of problem; an optimiser has thousands.
_SHOWN = 3
_START_ANEW = "start a run in a new workdir with init_from set to this one"
_CAUSES = {
  PARAMS: "The model",
  _STATE: "The optimiser, what it accumulates or what is frozen",
  EMA: "What is frozen",
}
_PACKAGES = ("point3r-jax", "jax", "flax", "optax", "orbax-checkpoint")


class Checkpoints:
  """The checkpoints of a training run.

  Use it in a `with` statement: at its end what is being written is finished.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    model: ModelConfig,
    *,
    metadata: Mapping[str, Any] | None = None,
    keep_last: int = 3,
    keep_every: int = 0,
  ):
    """Opens a run's directory, or makes it.

    What an interrupted process left half written is removed.

    Args:
      workdir: of the run, and of no other.
      model: the model's sizes and the layout of its parameters.
      metadata: JSON-friendly facts to keep beside the model's config; of a run
        that is resumed, those of its start stay.
      keep_last: how many of the last checkpoints to keep.
      keep_every: also keep those of steps that this divides; 0: no others.

    Raises:
      CheckpointError: if the directory is of another model or of no run.
      ValueError: if no checkpoint would be kept.
    """
    if keep_last < 1 or keep_every < 0:
      raise ValueError(
        "keep_last must be 1 or more and keep_every 0 or more, got "
        f"{keep_last} and {keep_every}"
      )
    workdir = pathlib.Path(workdir).absolute()
    _check_workdir(workdir, model)
    if jax.process_index() == 0 and not steps_in(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
      write_config(workdir, model, metadata or {})
    self._directory = workdir / STEPS
    keep = [policies.LatestN(keep_last)]
    if keep_every:
      keep.append(policies.EveryNSteps(keep_every))
    # It lets the processes wait for each other: from here on all see the same.
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        preservation_policy=policies.AnyPreservationPolicy(keep),
      ),
      item_handlers={
        **{name: array_writer() for name in (PARAMS, EMA, _STATE)},
        META: ocp.JsonCheckpointHandler(),
      },
    )

  @property
  def latest_step(self) -> int | None:
    """The last step that was saved, or is being saved; None if there is none.

    Steps are counted in batches seen.
    """
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    """All steps that are saved, or being saved, in order."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, meta: Mapping[str, Any]) -> bool:
    """Starts to write a checkpoint; the state may be donated afterwards.

    Args:
      state: to save, under its step.
      meta: JSON-friendly facts to restore with it, such as the data's
        fingerprint for `check_resume`. Step, processes, mesh and versions are
        added.

    Returns:
      Whether it is written: not if this step is there already.

    Raises:
      CheckpointError: if this or the previous checkpoint cannot be written.
    """
    items = {
      name: ocp.args.PyTreeSave(tree) for name, tree in _split(state).items()
    }
    step = int(state.step)
    meta = ocp.args.JsonSave(dict(meta) | _facts(state, step))
    with self._named_errors():
      return self._manager.save(
        step, args=ocp.args.Composite(**items, **{META: meta})
      )

  def restore(
    self, abstract: TrainState
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the last checkpoint, whatever mesh it was written from.

    Args:
      abstract: shapes with the shardings to restore to, of
        `StateMaker.abstract`.

    Returns:
      The state, and the `meta` of `save`; None if there is no checkpoint.

    Raises:
      CheckpointError: if the checkpoint does not fit or cannot be read.
    """
    self.wait()
    if self.latest_step is None:
      return None
    directory = self._directory / str(self.latest_step)
    wanted = _split(abstract)
    _check_fit(directory, wanted)
    items = {
      name: read_arrays(directory / name, like) for name, like in wanted.items()
    }
    return _join(abstract, items), read_meta(directory)

  def reached_preemption(self, step: int) -> bool:
    """Returns whether to save now, because a machine is about to be taken away.

    All processes agree on the step, so all have to ask at every step. Without
    `jax.distributed` it is always False.
    """
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Waits until what is being written is complete.

    Raises:
      CheckpointError: if it cannot be written.
    """
    with self._named_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits like `wait`, and lets go of the directory."""
    with self._named_errors():
      self._manager.close()

  def __enter__(self) -> Checkpoints:
    """Returns the checkpoints themselves."""
    return self

  def __exit__(self, *exception: object) -> None:
    """Closes them."""
    self.close()

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError) as error:
      raise CheckpointError(
        f"a checkpoint cannot be written to {self._directory}; see that there "
        f"is room, and start again to go on from the last one ({error})"
      ) from error


def check_resume(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
  """Checks that a run goes on with the data it was started with.

  Processes and workers do not matter, for the order depends on the position
  alone. Nor does the number of epochs, which may grow.

  Args:
    there: the fingerprint of the data that was saved with the run; see
      `Mixture.fingerprint`.
    here: that of the data to go on with.

  Raises:
    CheckpointError: if samples or their order are not the same; lists all
      differences.
  """
  there, here = (
    {name: value for name, value in data.items() if name != "epochs"}
    for data in (there, here)
  )
  changed = list(differences(there, here))
  if changed:
    raise CheckpointError(
      "the data are not those that this run was started with: "
      f"{'; '.join(changed)}. Go on with the former ones, or {_START_ANEW}"
    )


def check_agreement(facts: Mapping[str, Any]) -> None:
  """Checks that all processes of a run were given the same.

  Args:
    facts: JSON-friendly; all processes call this together.

  Raises:
    InputError: in all processes, with what differs.
  """
  if jax.process_count() == 1:
    return
  text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
  longest = multihost_utils.process_allgather(np.int32(len(text))).max()
  padded = np.pad(
    text, (0, longest - len(text)), constant_values=np.uint8(ord(" "))
  )
  first, *others = map(
    json.loads, map(bytes, multihost_utils.process_allgather(padded))
  )
  for process, other in enumerate(others, start=1):
    if changed := list(differences(first, other)):
      raise InputError(
        "all processes need the same config and data, but from process 0 to "
        f"process {process}, {'; '.join(changed)}"
      )


def _check_workdir(workdir: pathlib.Path, model: ModelConfig) -> None:
  """Raises CheckpointError if a run of this model cannot live here."""
  if (workdir / PARAMS).exists():
    raise CheckpointError(
      f"{workdir} is the checkpoint of a model, not of a training run; choose "
      "another workdir, with init_from set to this one"
    )
  if not steps_in(workdir):
    return
  changed = config_differences(read_config(workdir)[0], model)
  if changed:
    raise CheckpointError(
      f"{workdir} is of a run with another model: {changed}. Go on with "
      f"that model, or {_START_ANEW}"
    )


def _split(state: TrainState) -> dict[str, dict]:
  """Returns the Orbax items of a state, or of its shapes."""
  rest = jax.tree_util.tree_leaves_with_path(
    state.replace(params=None, ema=None)
  )
  # By their paths alone, so that what is on disk knows nothing of optax' types.
  named = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in rest
  }
  items = {
    PARAMS: state.params,
    _STATE: flax.traverse_util.unflatten_dict(named, sep="/"),
  }
  return items if state.ema is None else items | {EMA: state.ema}


def _join(abstract: TrainState, items: Mapping[str, dict]) -> TrainState:
  """Undoes `_split`, for a state of the same kind."""
  named = flax.traverse_util.flatten_dict(items[_STATE], sep="/")
  rest = jax.tree_util.tree_map_with_path(
    lambda path, _: named[
      jax.tree_util.keystr(path, simple=True, separator="/")
    ],
    abstract.replace(params=None, ema=None),
  )
  return rest.replace(params=items[PARAMS], ema=items.get(EMA))


def _facts(state: TrainState, step: int) -> dict[str, Any]:
  """Returns when, where and with what a checkpoint was written."""
  return {
    "step": step,
    "processes": jax.process_count(),
    "mesh": dict(state.step.sharding.mesh.shape),
    "versions": installed_versions(*_PACKAGES),
  }


def _check_fit(directory: pathlib.Path, wanted: Mapping[str, dict]) -> None:
  """Raises CheckpointError unless a step holds just these arrays."""
  words = {True: "with", False: "without"}
  there, here = (directory / EMA).is_dir(), EMA in wanted
  if there != here:
    raise CheckpointError(
      f"{directory} was written {words[there]} a moving average of the "
      f"parameters, but this run is {words[here]} one. Go on with the former "
      f"ema_decay, or {_START_ANEW}"
    )
  for item, tree in wanted.items():
    problems = _compare(stored_types(directory / item), array_types(tree))
    if problems:
      raise CheckpointError(
        f"{directory / item} does not fit this run: {problems}. "
        f"{_CAUSES[item]} changed: go on with the former options, or "
        f"{_START_ANEW}"
      )


def _compare(there: Mapping[str, str], here: Mapping[str, str]) -> str:
  """Says how what is on disk differs from what is wanted; empty if not."""
  problems = {
    "missing": sorted(set(here) - set(there)),
    "unexpected": sorted(set(there) - set(here)),
    "of another type or shape": [
      f"{name} ({there[name]}, not {here[name]})"
      for name in sorted(set(there) & set(here))
      if there[name] != here[name]
    ],
  }
  return "; ".join(
    f"{len(names)} {kind}, such as {', '.join(names[:_SHOWN])}"
    for kind, names in problems.items()
    if names
  )
