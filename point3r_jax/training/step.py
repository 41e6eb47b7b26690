"""One step of training: loss, gradient, update; pure functions."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from point3r_jax.config import ModelConfig
from point3r_jax.losses import LossOptions, make_targets, point3r_loss
from point3r_jax.models.layouts import row_major
from point3r_jax.params import (
  cast_params,
  fold_norms,
  join_products,
  merge,
  unstack_layers,
)
from point3r_jax.streaming import Prediction
from point3r_jax.training.optimizer import (
  OptimizerOptions,
  learning_rate,
  split_frozen,
)
from point3r_jax.training.rollout import RolloutOptions, rollout
from point3r_jax.training.sharding import (
  RULES,
  Rules,
  global_norm,
  on_each_part,
)
from point3r_jax.training.state import TrainState

# The (B,) flags of a batch that decide how its samples count in the loss.
FLAGS = ("is_metric", "camera_only", "depth_only", "single_view")


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """All that fixes the function of a training step.

  Attributes:
    model: the model's sizes, and the layout of its parameters: `scan_layers`
      stacks those of like layers.
    rollout: how sequences are run.
    loss: which loss.
    optimizer: the optimiser's numbers.
    steps_per_epoch: batches in an epoch.
    rules: where parameters live on a mesh.
    unroll_layers: whether layers that are stacked in the state are written out
      one after the other: no copies into stacks, half as much time again to
      compile.
  """

  model: ModelConfig
  rollout: RolloutOptions
  loss: LossOptions
  optimizer: OptimizerOptions
  steps_per_epoch: int
  rules: Rules = RULES
  unroll_layers: bool = False


# The scalars that a step returns beside the state.
_MEASURES = (
  "loss",
  "loss_camera",
  "loss_world",
  "loss_pose",
  "error_camera",
  "error_world",
  "grad_norm",
  "lr",
  "pointers",
)
_COUNTS = ("overflow", "skipped", "streak")


def empty_metrics() -> dict[str, jax.Array]:
  """Returns buffers for what `train_step` returns beside the state."""
  types = dict.fromkeys(_MEASURES, jnp.float32)
  types |= dict.fromkeys(_COUNTS, jnp.int32)
  return {name: jnp.zeros((), dtype) for name, dtype in types.items()}


def sequence_loss(
  config: StepConfig, params: dict, batch: dict[str, jax.Array]
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Prediction]]:
  """Returns the loss of a batch, and its parts and predictions.

  Args:
    config: what to compute.
    params: float32, in the model's layout.
    batch: arrays with leading axes B, T (see `data.record`).
  """

  options = config.rollout
  precision, remat = options.step.precision, options.step.remat
  folded = precision.dtype != jnp.float32 and remat is not None
  if folded:
    params = fold_norms(params)

  def run(params, images):
    model = config.model
    if model.scan_layers and config.unroll_layers:
      model, params = model.replace(scan_layers=False), unstack_layers(params)
    # Here, where parameters are whole: on a mesh each is divided in its own
    # way. Blocks of which only inputs are kept are to have small ones.
    if folded and remat != "blocks":
      params = join_products(params)
    return rollout(model, options, params, images)

  # Cast once, like autocast: gradients of frames are added up in the policy's
  # type, become float32, and are then summed over devices.
  cast = functools.partial(cast_params, precision=precision)
  run = on_each_part(run, cast, config.rules)
  memory, prediction = run(params, batch["image"])
  depth, intrinsics, poses = (
    batch[name].swapaxes(0, 1)
    for name in ("depth", "intrinsics", "camera_to_world")
  )
  targets = make_targets(
    depth, intrinsics, poses, **{flag: batch[flag] for flag in FLAGS}
  )
  loss, parts = point3r_loss(prediction, targets, config.loss)
  parts["pointers"] = jnp.mean(memory.count.astype(jnp.float32))
  parts["overflow"] = jnp.sum(memory.overflow)
  return loss, (parts, prediction)


def train_step(
  config: StepConfig,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Takes one batch.

  A batch whose loss or gradient is not finite changes nothing but the counts.

  Args:
    config: what to compute.
    optimizer: of `config.optimizer`.
    state: before the step.
    batch: arrays with leading axes B, T (see `data.record`).

  Returns:
    The state after the step, and scalars by name.
  """
  options = config.optimizer
  trained, frozen = split_frozen(state.params, options.freeze)

  def loss_fn(trained):
    return sequence_loss(config, merge(trained, frozen), batch)

  (loss, (parts, _)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
    trained
  )
  # As convolutions give theirs, XLA would turn around the optimiser's state of
  # their kernels, and back.
  gradient = jax.tree.map(row_major, gradient)
  norm = global_norm(gradient, config.rules)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
  updated = optax.apply_updates(trained, updates)
  ema = state.ema
  # Batches that went into updates before this one; skipped ones did not.
  before = state.step - state.skipped
  if ema is not None:
    # Only the last of the batches that are accumulated changes parameters.
    new = (before + 1) % options.accumulate == 0
    rate = jnp.where(new, 1 - options.ema_decay, 0.0)
    ema = optax.incremental_update(updated, ema, rate)

  def keep(new, old):
    return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

  updated = keep(updated, trained)
  skip = (~finite).astype(jnp.int32)
  state = TrainState(
    step=state.step + 1,
    params=merge(updated, frozen),
    opt_state=keep(opt_state, state.opt_state),
    ema=keep(ema, state.ema),
    skipped=state.skipped + skip,
    streak=(state.streak + skip) * skip,
  )
  metrics = {
    "loss": loss,
    "loss_camera": jnp.mean(parts["camera_confidence"]),
    "loss_world": jnp.mean(parts["world_confidence"]),
    "loss_pose": parts["pose"],
    "error_camera": jnp.mean(parts["camera"]),
    "error_world": jnp.mean(parts["world"]),
    "grad_norm": norm,
    "lr": learning_rate(options, config.steps_per_epoch)(
      before // options.accumulate
    ),
    "pointers": parts["pointers"],
    "overflow": parts["overflow"],
    "skipped": state.skipped,
    "streak": state.streak,
  }
  return state, metrics
