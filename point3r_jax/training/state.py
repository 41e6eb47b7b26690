"""What training changes: one pytree, made on the devices it lives on."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from point3r_jax.training.optimizer import OptimizerOptions, split_frozen
from point3r_jax.training.sharding import (
  RULES,
  Rules,
  optimizer_shardings,
  param_shardings,
  replicated,
)


@flax.struct.dataclass
class TrainState:
  """The state of a run.

  Attributes:
    step: () int32, batches seen.
    params: nested dictionary of float32.
    opt_state: the optimiser's, of the trained parameters only.
    ema: moving average of the trained parameters, or None.
    skipped: () int32, batches whose loss or gradient was not finite.
    streak: () int32, how many of the last batches were so.
  """

  step: jax.Array
  params: dict
  opt_state: Any
  ema: dict | None
  skipped: jax.Array
  streak: jax.Array


@dataclasses.dataclass(frozen=True)
class StateMaker:
  """Makes states of one kind, and says where their parts live.

  Attributes:
    optimizer: the gradient transformation.
    options: its options.
    mesh: see `training.sharding`.
    rules: from parameter paths to axes.
  """

  optimizer: optax.GradientTransformation
  options: OptimizerOptions
  mesh: Mesh
  rules: Rules = RULES

  def _init(self, params: dict) -> TrainState:
    trained, _ = split_frozen(params, self.options.freeze)
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, trained) if self.options.ema_decay else None
    return TrainState(
      step=zero,
      params=params,
      opt_state=self.optimizer.init(trained),
      ema=ema,
      skipped=zero,
      streak=zero,
    )

  def init(self, params: dict) -> TrainState:
    """Returns the state at step 0; parameters may still be on the host."""
    params = jax.tree.map(
      lambda x, sharding: jax.make_array_from_callback(
        x.shape, sharding, lambda index: x[index]
      ),
      params,
      param_shardings(self.mesh, params, self.rules),
    )
    return jax.jit(self._init, out_shardings=self.shardings(params))(params)

  def shardings(self, params: Any) -> TrainState:
    """Returns a state of shardings, for parameters or their shapes."""
    everywhere = replicated(self.mesh)
    trained, _ = split_frozen(params, self.options.freeze)
    shards = param_shardings(self.mesh, trained, self.rules)
    return TrainState(
      step=everywhere,
      params=param_shardings(self.mesh, params, self.rules),
      opt_state=optimizer_shardings(
        self.mesh, self.optimizer, trained, self.rules
      ),
      ema=shards if self.options.ema_decay else None,
      skipped=everywhere,
      streak=everywhere,
    )

  def abstract(self, params: Any) -> TrainState:
    """Returns the state's shapes with shardings, to restore or compile for."""
    shapes = jax.eval_shape(
      self._init,
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params
      ),
    )
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding
      ),
      shapes,
      self.shardings(params),
    )
