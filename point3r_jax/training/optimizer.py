"""The optimiser: AdamW or Muon with warm-up and cosine, by fractional epoch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from point3r_jax.training.sharding import RULES, Rules, global_norm

OPTIMIZERS = ("adamw", "muon")

# Muon's updates are as large as AdamW's usually are: one learning rate suits
# both (arXiv 2502.16982, section 2.2).
_UPDATE_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
  """The published training's optimiser; the defaults are stage 1's.

  Attributes:
    name: "adamw", the published one, or "muon" (arXiv 2502.16982), which makes
      the updates of linear layers' kernels orthogonal; all else is AdamW's.
    lr: highest learning rate.
    min_lr: the learning rate at the end; skipped steps do not count, so after
      many it is a little higher.
    epochs: length of the run, in epochs.
    warmup_epochs: over which the learning rate rises from 0, linearly.
    weight_decay: of all parameters but biases and norms.
    b1: decay of the gradient's mean.
    b2: decay of its square's mean.
    eps: added to the root of the latter.
    clip_norm: gradients with a larger global norm are scaled down to it.
    accumulate: batches whose gradients are averaged before an update.
    freeze: regular expressions; parameters whose path starts with one of them
      are not trained: no gradients and no optimiser state for them.
    ema_decay: of an exponential moving average of the parameters; 0: none.
  """

  name: str = "adamw"
  lr: float = 5e-5
  min_lr: float = 1e-6
  epochs: float = 100.0
  warmup_epochs: float = 5.0
  weight_decay: float = 0.05
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  clip_norm: float = 1.0
  accumulate: int = 1
  freeze: tuple[str, ...] = ()
  ema_decay: float = 0.0

  def __post_init__(self):
    """Refuses what has no meaning."""
    if self.name not in OPTIMIZERS:
      raise ValueError(
        f"unknown optimizer {self.name!r}; there are {list(OPTIMIZERS)}"
      )
    for name, fits, wanted in (
      ("lr", 0 < self.lr < math.inf, "above 0"),
      ("min_lr", 0 <= self.min_lr <= self.lr, f"in [0, lr = {self.lr}]"),
      (
        "warmup_epochs",
        0 <= self.warmup_epochs <= self.epochs,
        f"in [0, epochs = {self.epochs}]",
      ),
      ("weight_decay", self.weight_decay >= 0, "at least 0"),
      ("b1", 0 <= self.b1 < 1, "in [0, 1)"),
      ("b2", 0 <= self.b2 < 1, "in [0, 1)"),
      ("eps", self.eps > 0, "above 0"),
      ("clip_norm", self.clip_norm > 0, "above 0"),
      ("accumulate", self.accumulate >= 1, "at least 1"),
      ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
    ):
      if not fits:
        raise ValueError(
          f"optimizer.{name} is {getattr(self, name)}; it must be {wanted}"
        )


def learning_rate(
  options: OptimizerOptions, steps_per_epoch: int
) -> Callable[[jax.Array], jax.Array]:
  """Returns the learning rate as a function of the update's number, from 0."""

  def schedule(count):
    epoch = count * options.accumulate / steps_per_epoch
    warmup, span = options.warmup_epochs, options.epochs - options.warmup_epochs
    done = (epoch - warmup) / max(span, 1e-9)
    cosine = (1 + jnp.cos(math.pi * jnp.clip(done, 0, 1))) / 2
    decayed = options.min_lr + (options.lr - options.min_lr) * cosine
    return jnp.where(
      epoch < warmup, options.lr * epoch / max(warmup, 1e-9), decayed
    )

  return schedule


def decay_mask(params: dict) -> dict:
  """Returns which parameters decay: all but biases and the scales of norms."""
  flat = flax.traverse_util.flatten_dict(params)
  mask = {path: path[-1] not in ("bias", "scale") for path in flat}
  return flax.traverse_util.unflatten_dict(mask)


def _kinds(params: dict) -> dict:
  """Labels kernels of linear layers "matrix", and all else "other".

  Those of layers that are scanned over are stacked: they have three axes.
  """
  flat = flax.traverse_util.flatten_dict(params)
  labels = {
    path: "matrix" if path[-1] == "kernel" and leaf.ndim < 4 else "other"
    for path, leaf in flat.items()
  }
  return flax.traverse_util.unflatten_dict(labels)


def _descent(
  options: OptimizerOptions, steps_per_epoch: int
) -> optax.GradientTransformation:
  """Returns the optimiser of the options' name."""
  rate = learning_rate(options, steps_per_epoch)
  adamw = optax.adamw(
    rate,
    b1=options.b1,
    b2=options.b2,
    eps=options.eps,
    weight_decay=options.weight_decay,
    mask=decay_mask,
  )
  if options.name == "adamw":
    return adamw
  muon = optax.contrib.muon(
    rate,
    weight_decay=options.weight_decay,
    muon_weight_dimension_numbers=lambda params: jax.tree.map(
      lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params
    ),
    consistent_rms=_UPDATE_RMS,
  )
  return optax.partition({"matrix": muon, "other": adamw}, _kinds)


def _clip(largest: float, rules: Rules) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` with a norm that crosses devices as one."""

  def update(updates, params):
    del params
    scale = largest / jnp.maximum(global_norm(updates, rules), largest)
    return jax.tree.map(lambda x: scale * x, updates)

  return optax.stateless(update)


def make_optimizer(
  options: OptimizerOptions, steps_per_epoch: int, rules: Rules = RULES
) -> optax.GradientTransformation:
  """Returns it behind a clip of the global norm, accumulating if asked.

  Args:
    options: its numbers.
    steps_per_epoch: batches in an epoch.
    rules: where parameters live on a mesh.
  """
  optimizer = optax.chain(
    _clip(options.clip_norm, rules),
    _descent(options, steps_per_epoch),
  )
  if options.accumulate > 1:
    multi = optax.MultiSteps(optimizer, options.accumulate)
    return multi.gradient_transformation()
  return optimizer


def split_frozen(params: dict, freeze: Sequence[str]) -> tuple[dict, dict]:
  """Splits parameters into those that are trained and those that are not.

  Args:
    params: nested dictionary.
    freeze: see `OptimizerOptions`.

  Returns:
    Two nested dictionaries that `params.merge` joins again.

  Raises:
    ValueError: for an expression that no parameter matches.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  for pattern in freeze:
    if not any(re.match(pattern, path) for path in flat):
      raise ValueError(f"freeze: no parameter's path starts with {pattern!r}")
  frozen = {
    path: leaf
    for path, leaf in flat.items()
    if any(re.match(pattern, path) for pattern in freeze)
  }
  trained = {path: x for path, x in flat.items() if path not in frozen}
  return tuple(
    flax.traverse_util.unflatten_dict(part, sep="/")
    for part in (trained, frozen)
  )
