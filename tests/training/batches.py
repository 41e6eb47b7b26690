"""Batches and step configs for the micro model."""

import numpy as np

from point3r_jax.losses import LossOptions
from point3r_jax.streaming import StepOptions
from point3r_jax.training.optimizer import OptimizerOptions
from point3r_jax.training.rollout import RolloutOptions
from point3r_jax.training.step import FLAGS, StepConfig
from tests import micro


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
