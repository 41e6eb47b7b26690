"""Point3R in JAX: streaming 3D reconstruction with a pointer memory."""

from point3r_jax.config import PRESETS, ModelConfig, preset
from point3r_jax.memory import PointerMemory, grow, init_memory, reset
from point3r_jax.models.point3r import init_params
from point3r_jax.precision import Precision
from point3r_jax.streaming import Prediction, StepOptions, scan, step

__all__ = [
  "PRESETS",
  "ModelConfig",
  "PointerMemory",
  "Precision",
  "Prediction",
  "StepOptions",
  "grow",
  "init_memory",
  "init_params",
  "preset",
  "reset",
  "scan",
  "step",
]
