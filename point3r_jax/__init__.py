"""Point3R in JAX: streaming 3D reconstruction with a pointer memory."""

from point3r_jax.checkpoints import (
  CheckpointError,
  load_checkpoint,
  save_checkpoint,
)
from point3r_jax.config import PRESETS, ModelConfig, preset
from point3r_jax.memory import PointerMemory, grow, init_memory, reset
from point3r_jax.params import init_params
from point3r_jax.precision import Precision
from point3r_jax.stream import Stream
from point3r_jax.streaming import Prediction, StepOptions, scan, step

__all__ = [
  "PRESETS",
  "CheckpointError",
  "ModelConfig",
  "PointerMemory",
  "Precision",
  "Prediction",
  "StepOptions",
  "Stream",
  "grow",
  "init_memory",
  "init_params",
  "load_checkpoint",
  "preset",
  "reset",
  "save_checkpoint",
  "scan",
  "step",
]
