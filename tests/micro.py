"""A model of a few thousand parameters: compiles fast, does everything."""

import functools
import math

import jax
import numpy as np

import point3r_jax as p3r
from point3r_jax.params import param_shapes, stack_layers

CONFIG = p3r.ModelConfig(
  image_size=64,
  encoder_width=32,
  encoder_depth=1,
  encoder_heads=2,
  decoder_width=48,
  decoder_depth=4,
  decoder_heads=2,
  pointer_heads=4,
  value_depth=1,
  pose_slots=4,
  dpt_widths=(8, 8, 8, 8),
  dpt_features=8,
  dpt_head_width=8,
)
# The same model with its layers as a scan's: that compiles a quarter faster.
SCANNED = CONFIG.replace(scan_layers=True)
IMAGE_SIZE = (32, 48)
TOKENS = 6


@functools.cache
def params(seed: int = 1) -> dict:
  """Returns random parameters whose world points spread over a metre or so."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    if len(x.shape) == 1:
      return (path[-1].key == "scale") + 0.1 * noise
    return 0.8 * noise / math.prod(x.shape[:-1]) ** 0.5

  shapes = param_shapes(CONFIG)
  return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


@functools.cache
def scanned_params(seed: int = 1) -> dict:
  """Returns the same parameters for `SCANNED`."""
  return stack_layers(params(seed))


def images(frames: int, batch: int, seed: int = 0) -> np.ndarray:
  """Returns (T, B, H, W, 3) uint8 images: noise on smooth gradients."""
  rng = np.random.default_rng(seed)
  shape = (frames, batch, *IMAGE_SIZE, 3)
  smooth = np.linspace(0, 128, IMAGE_SIZE[1])[:, None]
  level = rng.uniform(0, 64, (frames, batch, 1, 1, 3))
  return (rng.uniform(0, 64, shape) + smooth + level).astype(np.uint8)
