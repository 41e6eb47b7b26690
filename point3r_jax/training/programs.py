"""Compiled training steps, one for each shape of batch, made ahead of need."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from point3r_jax.errors import one_line
from point3r_jax.gpu_options import (
  GPU_OPTIONS,
  GRAPH_COMMANDS,
  GRAPHS,
  kernels_load_at_the_start,
  leave_out_convolutions,
  load_convolutions,
  suit_devices,
)
from point3r_jax.lowered_programs import lower_once
from point3r_jax.params import param_shapes
from point3r_jax.streaming import Prediction
from point3r_jax.training.experiment import CUDA_GRAPHS, Experiment
from point3r_jax.training.sharding import AXES, batch_sharding, replicated
from point3r_jax.training.state import TrainState
from point3r_jax.training.step import (
  FLAGS,
  empty_metrics,
  sequence_loss,
  train_step,
)

# (T, H, W) of a batch's sequences.
Shape = tuple[int, int, int]

# Seconds after which a signal is noticed while a program is compiled.
_POLL = 0.5

# XLA's commands that CUDA graphs may hold, by a config's `cuda_graphs`.
_COMMANDS = dict(
  zip(
    CUDA_GRAPHS,
    ("", GRAPH_COMMANDS, f"{GRAPH_COMMANDS},CONDITIONAL,WHILE"),
    strict=True,
  )
)

_log = logging.getLogger(__name__)


def compiler_options(
  cuda_graphs: str = "none", devices: int = 1, platform: str | None = None
) -> dict[str, bool | int | str] | None:
  """Returns XLA's options for training steps.

  Args:
    cuda_graphs: what of a step GPUs launch as CUDA graphs, of `CUDA_GRAPHS`.
    devices: how many run a step together, those of all processes.
    platform: what they run on; None: as the default device.
  """
  if (platform or jax.default_backend()) != "gpu":
    return None
  options = {
    **GPU_OPTIONS,
    GRAPHS: _COMMANDS[cuda_graphs],
    # Slices are kernels like any other. Otherwise the host computes where they
    # are, so that no graph can hold them; it prepares each for 0.25 ms before a
    # step's first kernel; and products that are kept in a loop's stack are
    # computed twice.
    "xla_disable_hlo_passes": "dynamic-slice-annotator",
    "xla_gpu_enable_dynamic_slice_fusion": False,
  }
  if not kernels_load_at_the_start():
    options = leave_out_convolutions(options)
  return suit_devices(options, devices)


def batch_shapes(
  experiment: Experiment, shape: Shape
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns a batch as a step takes it, as shapes with shardings."""
  views, height, width = shape
  batch = experiment.config.batch_size
  sharding = batch_sharding(experiment.mesh)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding)

  return {
    "image": array((views, height, width, 3), "uint8"),
    "depth": array((views, height, width), "float32"),
    "intrinsics": array((views, 3, 3), "float32"),
    "camera_to_world": array((views, 4, 4), "float32"),
    **{flag: array((), "bool") for flag in FLAGS},
  }


def abstract_state(experiment: Experiment) -> TrainState:
  """Returns the state as shapes with shardings."""
  return experiment.maker.abstract(param_shapes(experiment.step.model))


def _abstract_metrics(experiment: Experiment) -> dict[str, Any]:
  """Returns a step's metrics as shapes with shardings."""
  sharding = replicated(experiment.mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(empty_metrics),
  )


def lower_step(
  experiment: Experiment, shape: Shape, keep: bool = False
) -> jax.stages.Lowered:
  """Lowers the training step for sequences of one shape.

  It takes a state, a batch and the last metrics, and gives the next state and
  metrics in the place of these; see `Metrics`.

  Args:
    experiment: the run.
    shape: of the sequences.
    keep: whether the next process may find it lowered, see `lower_once`. What
      several processes run together is not kept.
  """
  state, metrics = abstract_state(experiment), _abstract_metrics(experiment)
  shardings = jax.tree.map(lambda x: x.sharding, (state, metrics))

  def step(state, batch, last):
    del last  # Its buffers are for the new ones.
    return train_step(experiment.step, experiment.optimizer, state, batch)

  kept = keep and jax.process_count() == 1
  with jax.set_mesh(experiment.mesh):
    return lower_once(
      step,
      (state, batch_shapes(experiment, shape), metrics),
      name=repr(experiment.step) if kept else None,
      result=(state, metrics),
      donate=(0, 2),
      out_shardings=shardings,
    )


def compile_step(
  experiment: Experiment,
  shape: Shape,
  keep: bool = False,
  options: Mapping[str, bool | int | str] | None = None,
) -> jax.stages.Compiled:
  """Compiles the training step, to be run by this process's devices.

  See `lower_step`.

  Args:
    experiment: the run.
    shape: of the sequences.
    keep: see `lower_step`.
    options: XLA's, beside or instead of `compiler_options`.
  """
  config = experiment.config
  usual = compiler_options(config.cuda_graphs, experiment.mesh.size) or {}
  lowered = lower_step(experiment, shape, keep)
  compiled = lowered.compile({**usual, **(options or {})} or None)
  load_convolutions()
  return compiled


def _compile_and_log(
  experiment: Experiment, shape: Shape, reason: str
) -> jax.stages.Compiled:
  views, height, width = shape
  _log.info(
    "compiling the step for %d views of %dx%d (%s)",
    views,
    height,
    width,
    reason,
  )
  started = time.monotonic()
  compiled = compile_step(experiment, shape, keep=True)
  _log.info(
    "compiled the step for %d views of %dx%d in %.0f s",
    views,
    height,
    width,
    time.monotonic() - started,
  )
  return compiled


def _log_failure(shape: Shape, program: concurrent.futures.Future) -> None:
  """Says at once what else would be known only when the program is needed."""
  if not program.cancelled() and program.exception():
    _log.error(
      "the step for %d views of %dx%d cannot be compiled: %s",
      *shape,
      one_line(program.exception()),
    )


class Metrics:
  """Where steps leave their metrics, all in the same place.

  Elsewhere each would need a CUDA graph that is written anew, milliseconds of a
  step. What a caller keeps is a copy.
  """

  def __init__(self, experiment: Experiment):
    """Makes room on the experiment's mesh."""
    place = replicated(experiment.mesh)
    self._last = jax.jit(empty_metrics, out_shardings=place)()
    self._copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))

  def step(
    self,
    program: jax.stages.Compiled,
    state: TrainState,
    batch: dict[str, jax.Array],
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one batch; see `training.step.train_step`.

    Args:
      program: see `compile_step`.
      state: before the step; donated.
      batch: on the mesh.
    """
    state, self._last = program(state, batch, self._last)
    return state, self._copy(self._last)


class Programs:
  """Training steps by the shape of their batch.

  Shapes that are known to come are compiled one after the other in the
  background, in the order they are needed: the same in all processes, which
  compile together. Close it, or use it in a `with` statement.
  """

  def __init__(self, experiment: Experiment, ahead: Iterable[Shape] = ()):
    """Starts to compile.

    Args:
      experiment: the run.
      ahead: shapes to come, the first one first.
    """
    self._experiment = experiment
    self._executor = concurrent.futures.ThreadPoolExecutor(1)
    self._programs = {}
    self._metrics = Metrics(experiment)
    for shape in ahead:
      self._submit(shape, "ahead")

  def _submit(
    self, shape: Shape, reason: str
  ) -> concurrent.futures.Future[jax.stages.Compiled]:
    if shape not in self._programs:
      self._programs[shape] = self._executor.submit(
        _compile_and_log, self._experiment, shape, reason
      )
      self._programs[shape].add_done_callback(
        functools.partial(_log_failure, shape)
      )
    return self._programs[shape]

  def wait(self, shape: Shape) -> jax.stages.Compiled:
    """Returns the program of a shape; waits until it is compiled."""
    return self._submit(shape, "first use").result()

  def wait_unless(self, stop: threading.Event, shape: Shape) -> None:
    """Waits until the program of a shape is compiled or the event is set."""
    program = self._submit(shape, "first use")
    while not stop.is_set() and not program.done():
      concurrent.futures.wait([program], timeout=_POLL)

  def step(
    self, state: TrainState, batch: dict[str, jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one batch; see `training.step.train_step`.

    Waits if its program is not compiled yet. The state is donated.
    """
    program = self.wait(batch["depth"].shape[1:])
    return self._metrics.step(program, state, batch)

  def is_ready(self, shape: Shape) -> bool:
    """Returns whether the program of a shape is compiled."""
    return shape in self._programs and self._programs[shape].done()

  def close(self) -> None:
    """Gives up what was not begun; what was goes on, and nobody waits."""
    self._executor.shutdown(wait=False, cancel_futures=True)

  def __enter__(self) -> Programs:
    """Returns itself."""
    return self

  def __exit__(self, *_) -> None:
    """Closes it."""
    self.close()


def make_predict(
  experiment: Experiment,
) -> Callable[[dict, dict[str, jax.Array]], Prediction]:
  """Returns a jitted function of parameters and a batch to predictions.

  They are (T, B, …), split over the devices along B.
  """
  # Loops compile sooner, and there are no gradients to stack.
  loops = dataclasses.replace(experiment.step.rollout, unroll=1)
  step = dataclasses.replace(
    experiment.step, rollout=loops, unroll_layers=False
  )

  def predict(params, batch):
    # Python is here only when it is compiled.
    _log.info(
      "compiling the panel's predictions for %d views of %dx%d",
      *batch["depth"].shape[1:],
    )
    _, (_, prediction) = sequence_loss(step, params, batch)
    return prediction

  split = NamedSharding(experiment.mesh, PartitionSpec(None, AXES))
  return jax.jit(
    predict, out_shardings=split, compiler_options=compiler_options()
  )
