"""What a training step would cost on a mesh that need not exist.

The step is traced and compiled for shapes: there are no data, no parameters and
no accelerators, only as many make-believe devices as the mesh has.

  experiment = open_experiment(config, topology_devices("h200:2x8"))
  print(format_plan(plan(experiment, (224, 224))))

See `training.devices` for what can be planned for.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from point3r_jax.models.gpus import HOPPER
from point3r_jax.params import merge, param_shapes
from point3r_jax.training.collectives import Collectives, count_collectives
from point3r_jax.training.experiment import Experiment
from point3r_jax.training.flops import count_flops
from point3r_jax.training.optimizer import split_frozen
from point3r_jax.training.programs import (
  abstract_state,
  batch_shapes,
  compiler_options,
  lower_step,
)
from point3r_jax.training.step import StepConfig, sequence_loss

_log = logging.getLogger(__name__)

# The program for CPUs never runs: its code need not be fast.
_CPU_OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """The cost of a training step; bytes are those of one device.

  Attributes:
    device: kind of the devices that it was compiled for.
    mesh: devices along each axis.
    image_size: (H, W).
    batch_size: B, of all devices together.
    views: T.
    parameters: how many the model has.
    trained: how many of them are trained.
    param_bytes: of the parameters.
    optimizer_bytes: of the optimiser's state, and of the moving average.
    batch_bytes: of the batch.
    temp_bytes: of what the compiled step needs beside what goes in:
      activations, gradients, parameters as gathered or rounded. They use the
      same memory in turn, so that there is no number for each.
    total_bytes: of all that goes in, as the compiler lays it out (perhaps with
      padding), and `temp_bytes`.
    flops: operations of all devices together, see `step_flops`.
    collectives: what is sent between devices.
    compile_seconds: to compile the step.
  """

  device: str
  mesh: dict[str, int]
  image_size: tuple[int, int]
  batch_size: int
  views: int
  parameters: int
  trained: int
  param_bytes: int
  optimizer_bytes: int
  batch_bytes: int
  temp_bytes: int
  total_bytes: int
  flops: int
  collectives: Collectives
  compile_seconds: float

  @property
  def devices(self) -> int:
    """How many devices the mesh has."""
    return math.prod(self.mesh.values())


def step_flops(config: StepConfig, params: Any, batch: Any) -> int:
  """Counts the operations of the loss and its gradient.

  Those of matrix products and convolutions, at the memory's static sizes,
  without what is computed again to save memory and without what fills up blocks
  in 16 bits.

  Args:
    config: what to compute.
    params: the parameters or their shapes.
    batch: what a step reads, or its shapes.
  """
  step = dataclasses.replace(
    config.rollout.step, attention="xla", remat="none", precision="float32"
  )
  rollout = dataclasses.replace(config.rollout, step=step, remat_frames=False)
  config = dataclasses.replace(config, rollout=rollout, unroll_layers=False)
  trained, frozen = split_frozen(params, config.optimizer.freeze)

  def gradient(trained, frozen, batch):
    return jax.grad(
      lambda t: sequence_loss(config, merge(t, frozen), batch)[0]
    )(trained)

  return count_flops(gradient, trained, frozen, batch)


def for_devices(experiment: Experiment) -> Experiment:
  """Names the kernel that "auto" is there, for this machine may have others."""
  device = experiment.mesh.devices.flat[0]
  if device.platform == "cpu" or experiment.config.rollout.attention != "auto":
    return experiment
  half = jnp.finfo(experiment.step.rollout.step.precision.dtype).bits == 16
  hopper = getattr(device, "compute_capability", "") == HOPPER
  gpu = ("hopper" if hopper else "cudnn") if half else "xla"
  config = experiment.config.copy_and_resolve_references()
  config.rollout.attention = "tpu" if device.platform == "tpu" else gpu
  return dataclasses.replace(experiment, config=config)


def _count(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _device_bytes(tree: Any) -> int:
  """Returns the bytes that a device holds of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def plan(experiment: Experiment, image_size: tuple[int, int]) -> Plan:
  """Compiles a training step for the experiment's mesh; says what it costs.

  Allocates nothing of the model's size.

  Args:
    experiment: on real, fake or a topology's devices.
    image_size: (H, W), multiples of the patch size.
  """
  experiment = for_devices(experiment)
  config, mesh = experiment.step, experiment.mesh
  views = experiment.config.views
  views = views if isinstance(views, int) else max(views)
  shape = (views, *image_size)
  device = mesh.devices.flat[0]
  options = compiler_options(
    experiment.config.cuda_graphs, mesh.size, device.platform
  )
  if device.platform == "cpu":
    options = _CPU_OPTIONS

  _log.info(
    "compiling the step for %d views of %dx%d, which takes minutes if the "
    "model is large",
    *shape,
  )
  lowered = lower_step(experiment, shape)
  started = time.perf_counter()
  compiled = lowered.compile(options)
  seconds = time.perf_counter() - started

  params = param_shapes(config.model)
  trained, _ = split_frozen(params, config.optimizer.freeze)
  state, batch = abstract_state(experiment), batch_shapes(experiment, shape)
  memory = compiled.memory_analysis()
  # Donated arguments become outputs; of others there are but few.
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  temporary = memory.temp_size_in_bytes + outputs
  return Plan(
    device=device.device_kind,
    mesh=dict(mesh.shape),
    image_size=tuple(image_size),
    batch_size=experiment.config.batch_size,
    views=views,
    parameters=_count(params),
    trained=_count(trained),
    param_bytes=_device_bytes(state.params),
    optimizer_bytes=_device_bytes((state.opt_state, state.ema)),
    batch_bytes=_device_bytes(batch),
    temp_bytes=temporary,
    total_bytes=memory.argument_size_in_bytes + temporary,
    flops=step_flops(config, params, batch),
    collectives=count_collectives(compiled.as_text()),
    compile_seconds=seconds,
  )


def _unit(value: float, step: int, units: Sequence[str]) -> str:
  """Returns a number below `step` with the unit that makes it so."""
  power = 0
  while value >= step and power < len(units) - 1:
    value, power = value / step, power + 1
  digits = 0 if power == 0 or value >= 100 else 1
  return f"{value:,.{digits}f} {units[power]}"


def _bytes(value: int) -> str:
  return _unit(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _flops(value: float) -> str:
  return _unit(value, 1000, [f"{x}FLOP" for x in ("", "k", "M", "G", "T", "P")])


def format_plan(plan: Plan) -> str:
  """Returns the plan as a table to read."""
  height, width = plan.image_size
  axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  collectives = plan.collectives.traffic
  rows = [
    ("mesh", f"{axes} = {plan.devices} x {plan.device}"),
    (
      "batch",
      f"{plan.batch_size:,} sequences of {plan.views} views, {height}x{width}",
    ),
    ("parameters", f"{plan.parameters:,}, of which {plan.trained:,} trained"),
    ("arithmetic", f"{_flops(plan.flops)} a step"),
    ("", f"{_flops(plan.flops / plan.devices)} a step and device"),
    ("memory", f"{_bytes(plan.total_bytes)} a device, of which"),
    ("  parameters", _bytes(plan.param_bytes)),
    ("  optimiser", _bytes(plan.optimizer_bytes)),
    ("  batch", _bytes(plan.batch_bytes)),
    (
      "  activations",
      f"{_bytes(plan.temp_bytes)}, with gradients and copies of parameters",
    ),
    ("collectives", "a step and device" if collectives else "none"),
    *(
      (f"  {kind}", f"{_bytes(x.bytes)} in {x.runs:,} runs")
      for kind, x in collectives.items()
    ),
    ("compiled in", f"{plan.compile_seconds:.0f} s"),
  ]
  lines = [f"{name:<20}  {value}" for name, value in rows]
  if plan.collectives.unbounded:
    lines.append(
      f"The program does not tell how often {plan.collectives.unbounded} loops "
      "with collectives run: there\nmay be more than counted."
    )
  if plan.device == "cpu":
    lines.append(
      "Compiled for CPUs, which compute bfloat16 as float32 and write out all "
      "attention\nweights: an accelerator, named with --topology, needs less "
      "for activations."
    )
  return "\n".join(lines)
