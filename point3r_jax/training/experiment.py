"""From a config to the objects of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from point3r_jax.config import ModelConfig, preset
from point3r_jax.data.datasets import open_sources
from point3r_jax.data.mixture import Mixture
from point3r_jax.errors import InputError
from point3r_jax.losses import LossOptions
from point3r_jax.params import param_shapes
from point3r_jax.streaming import StepOptions
from point3r_jax.training.optimizer import (
  OptimizerOptions,
  make_optimizer,
  split_frozen,
)
from point3r_jax.training.rollout import RolloutOptions
from point3r_jax.training.sharding import Rules, make_mesh, param_shardings
from point3r_jax.training.state import StateMaker
from point3r_jax.training.step import StepConfig


class ConfigError(InputError):
  """A config whose values do not go together."""


# Fields that have to be at least so much.
_LEAST = {
  "batch_size": 1,
  "epochs": 1,
  "max_streak": 1,
  "loader.workers": 0,
  "loader.threads": 1,
  "loader.prefetch": 1,
  "log.every": 1,
  "log.panel_every": 0,
  "checkpoint.keep_last": 1,
  "checkpoint.every_epochs": 0,
  "checkpoint.keep_every_epochs": 0,
  "rollout.capacity": 0,
}
# What of a step CUDA graphs hold: nothing, what lies between loops and in their
# bodies, or loops as a whole, too.
CUDA_GRAPHS = ("none", "bodies", "all")
# Where stacked layers are written out one after the other.
UNROLL_LAYERS = ("never", "gpu", "always")


def _check(config: ConfigDict) -> None:
  """Raises ConfigError for values without meaning."""
  for name, least in _LEAST.items():
    value = config
    for key in name.split("."):
      value = value[key]
    if not value >= least:  # Nor NaN.
      raise ConfigError(f"config.{name} is {value}; it must be {least} or more")
  for name, choices in (
    ("cuda_graphs", CUDA_GRAPHS),
    ("unroll_layers", UNROLL_LAYERS),
  ):
    if config[name] not in choices:
      raise ConfigError(
        f"config.{name} is {config[name]!r}; it must be one of "
        f"{', '.join(choices)}"
      )
  views = config.views
  if not views or min((views,) if isinstance(views, int) else views) < 1:
    raise ConfigError(f"config.views is {views}; it must be 1 or more")
  sizes = config.image_sizes
  if not sizes or not all(map(_is_size, sizes)):
    raise ConfigError(
      f"config.image_sizes is {sizes}; it must hold pairs of height and width, "
      "whole numbers, such as ((384, 512),)"
    )


def _is_size(size: Any) -> bool:
  """Returns whether it is a pair of whole numbers."""
  return (
    isinstance(size, list | tuple)
    and len(size) == 2
    and all(isinstance(side, int) for side in size)
  )


def _check_capacity(config: ConfigDict, model: ModelConfig) -> None:
  """Raises ConfigError if a frame leaves more pointers than there is room."""
  capacity = config.rollout.capacity
  for size in config.image_sizes:
    tokens = math.prod(model.grid(tuple(size)))
    if 0 < capacity < tokens:
      raise ConfigError(
        f"rollout.capacity is {capacity}; one frame of "
        f"{size[0]}x{size[1]} leaves {tokens} pointers (0: room for all)"
      )


def _steps_per_epoch(config: ConfigDict) -> int:
  """Batches in an epoch, by the config alone."""
  for name, dataset in config.datasets.items():
    count = dataset.get("samples")
    if not isinstance(count, int) or count < 1:
      raise ConfigError(
        f"datasets.{name}.samples is {count}; it must say how many "
        "samples of it an epoch takes"
      )
  samples = sum(dataset.samples for dataset in config.datasets.values())
  if samples < config.batch_size:
    raise ConfigError(
      f"an epoch of {samples} samples has no full batch of "
      f"{config.batch_size}; lower batch_size or raise the datasets' samples"
    )
  return samples // config.batch_size


def make_step_config(config: ConfigDict) -> StepConfig:
  """Returns what fixes the function of a training step.

  Args:
    config: with the fields of configs/base.py.

  Raises:
    ConfigError: for values without meaning.
  """
  rollout = config.rollout.to_dict()
  own = {
    name: rollout.pop(name)
    for name in ("remat_frames", "truncate", "sizes", "unroll")
  }
  capacity = rollout.pop("capacity") or None
  try:
    model = preset(config.model.preset).replace(
      scan_layers=config.model.scan_layers,
      rotary_bases=tuple(config.model.rotary_bases),
    )
    _check_capacity(config, model)
    optimizer = dict(config.optimizer.to_dict(), epochs=float(config.epochs))
    optimizer["freeze"] = tuple(optimizer["freeze"])
    return StepConfig(
      model=model,
      rollout=RolloutOptions(
        step=StepOptions(**rollout), capacity=capacity, **own
      ),
      loss=LossOptions(**config.loss.to_dict()),
      optimizer=OptimizerOptions(**optimizer),
      steps_per_epoch=_steps_per_epoch(config),
    )
  except (TypeError, ValueError) as error:
    raise ConfigError(f"config: {error}") from error


def dataset_options(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """Returns the datasets' options, as far as they decide what the data are."""
  return {
    name: {
      option: value
      for option, value in json.loads(dataset.to_json()).items()
      if option not in ("folder", "samples")
    }
    for name, dataset in config.datasets.items()
  }


def make_mixture(config: ConfigDict) -> Mixture:
  """Opens the datasets.

  Raises:
    InputError: listing all datasets that are missing.
  """
  specs = []
  for name, dataset in config.datasets.items():
    options = dataset.to_dict()
    samples = options.pop("samples")
    if "folder" in options:
      options["root"] = os.path.join(config.data_root, options.pop("folder"))
    specs.append((name, samples, options))
  views = config.views
  return Mixture(
    parts=open_sources(specs),
    image_sizes=tuple(tuple(size) for size in config.image_sizes),
    views=views if isinstance(views, int) else tuple(views),
    batch_size=config.batch_size,
    epochs=config.epochs,
    seed=config.seed,
    replace_unreadable=config.replace_unreadable,
  )


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a run needs besides data.

  Attributes:
    config: as given.
    mesh: see `training.sharding`.
  """

  config: ConfigDict
  mesh: Mesh

  def __post_init__(self):
    """Checks the config, as far as it can be without data.

    Raises:
      ConfigError: for values that make no sense or do not go together.
    """
    _check(self.config)
    shapes = param_shapes(self.step.model)
    try:
      trained, _ = split_frozen(shapes, self.step.optimizer.freeze)
      param_shardings(self.mesh, shapes, self.rules)
    except (ValueError, re.error) as error:
      raise ConfigError(f"config: {error}") from error
    if not trained:
      raise ConfigError("config.optimizer.freeze leaves nothing to train")
    batch, devices = self.config.batch_size, self.mesh.size
    below = batch - batch % devices
    if below != batch:
      near = f"{below} or {below + devices}" if below else devices
      raise ConfigError(
        f"batch_size {batch} does not divide over {devices} devices; "
        f"{near} would"
      )

  @functools.cached_property
  def step(self) -> StepConfig:
    """What fixes the function of a step."""
    unroll = self.config.unroll_layers
    platform = self.mesh.devices.flat[0].platform
    return dataclasses.replace(
      make_step_config(self.config),
      rules=self.rules,
      unroll_layers=unroll in ("always", platform),
    )

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """The gradient transformation."""
    return make_optimizer(
      self.step.optimizer, self.step.steps_per_epoch, self.rules
    )

  @property
  def rules(self) -> Rules:
    """From parameter paths to mesh axes."""
    return tuple(tuple(rule) for rule in self.config.mesh.rules)

  @functools.cached_property
  def maker(self) -> StateMaker:
    """Makes and describes states."""
    return StateMaker(
      self.optimizer, self.step.optimizer, self.mesh, self.rules
    )

  @property
  def total_steps(self) -> int:
    """Steps in the whole run."""
    return self.config.epochs * self.step.steps_per_epoch

  def steps_of(self, epochs: float) -> int:
    """Returns epochs as a number of steps, at least one; 0 stays 0."""
    if not epochs:
      return 0
    return max(1, math.floor(epochs * self.step.steps_per_epoch))


def open_experiment(config: ConfigDict, devices: Any = None) -> Experiment:
  """Returns the run of a config on all devices, or on those given.

  Raises:
    ConfigError: for values that do not go together or with the devices.
  """
  try:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  except ValueError as error:
    raise ConfigError(f"config.mesh: {error}") from error
  return Experiment(config, mesh)
