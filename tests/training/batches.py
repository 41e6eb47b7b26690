"""Batches and step configs for the micro model."""

import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.losses import LossOptions
from point3r_jax.streaming import StepOptions
from point3r_jax.training.optimizer import OptimizerOptions
from point3r_jax.training.rollout import RolloutOptions
from point3r_jax.training.sharding import on_each_part
from point3r_jax.training.step import FLAGS, StepConfig
from tests import micro

# What a step reports of a loss.
_PARTS = ["camera", "world", "camera_confidence", "world_confidence", "pose"]
_PARTS += ["pointers"]


def step_config(step=None, **rollout) -> StepConfig:
  return StepConfig(
    model=micro.SCANNED,
    rollout=RolloutOptions(
      StepOptions(**({"precision": "float32"} | (step or {}))),
      sizes=1,
      **rollout,
    ),
    loss=LossOptions(),
    optimizer=OptimizerOptions(epochs=2.0, warmup_epochs=0.0, lr=1e-3),
    steps_per_epoch=10,
  )


def batch(size: int, views: int, seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  height, width = micro.IMAGE_SIZE
  poses = np.tile(np.eye(4, dtype=np.float32), (size, views, 1, 1))
  poses[..., :3, 3] = rng.normal(0, 0.3, (size, views, 3))
  camera = np.float32([[40, 0, width / 2], [0, 40, height / 2], [0, 0, 1]])
  depth = rng.uniform(-0.2, 3, (size, views, height, width))
  return {
    "image": micro.images(size, views, seed),
    "depth": depth.astype(np.float32),
    "intrinsics": np.tile(camera, (size, views, 1, 1)),
    "camera_to_world": poses,
    **{flag: np.zeros(size, bool) for flag in FLAGS},
    "is_metric": np.arange(size) % 2 == 0,
  }


def short_loss(config, params, batch):
  """Uses all parameters and samples, and compiles at once."""

  def run(params, depth):
    square = sum(jnp.vdot(x, x) for x in jax.tree.leaves(params))
    return square * jnp.mean(depth, axis=(1, 2, 3)), depth.swapaxes(0, 1)

  loss = jnp.mean(on_each_part(run)(params, batch["depth"])[0])
  parts = dict.fromkeys(_PARTS, loss) | {"overflow": jnp.int32(0)}
  return loss, (parts, None)
