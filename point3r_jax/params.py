"""Parameters as trees: made, cast to a policy's types, laid out for scans."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.config import ModelConfig
from point3r_jax.models.layers import Compute
from point3r_jax.models.point3r import Context, Point3R
from point3r_jax.precision import Precision, get_precision

# Modules whose parameters stay float32 under every policy, and those that run
# in the dense heads' type.
_FLOAT32 = {"patch_embed", "pose_head", "head_2"}
_DENSE = {"camera_dense", "dense"}
_ENCODERS = ("encoder", "value_encoder")


def init_params(config: ModelConfig, seed: int = 0) -> dict:
  """Returns freshly initialised parameters, as the published training starts.

  Args:
    config: the model's sizes.
    seed: of the random numbers.

  Returns:
    A nested dictionary of float32 arrays.
  """
  model = Point3R(config, Compute(get_precision("float32"), "xla"))
  grid = (2, 2)  # Parameters do not depend on the image's size.
  side = grid[0] * config.patch_size
  width, tokens = config.decoder_width, grid[0] * grid[1]

  def run(model, image):
    context = Context(
      position=jnp.zeros((1, tokens, 3)),
      feature=jnp.zeros((1, tokens, width)),
      count=jnp.zeros((1,), jnp.int32),
      pose_slots=jnp.zeros((1, config.pose_slots, 2 * width)),
      image_position=jnp.zeros((1, tokens, 3)),
      first=jnp.ones((1,), bool),
    )
    return model(model.encode(image), context, grid)

  @jax.jit
  def init(rng):
    image = jnp.zeros((1, side, side, 3))
    return model.init(rng, image, method=run)["params"]

  return init(jax.random.key(seed))


def cast_params(params: dict, precision: str | Precision) -> dict:
  """Casts parameters to the types that a policy multiplies in.

  A step gives the same result as with the uncast parameters, but does not have
  to cast them again every frame.

  Args:
    params: nested dictionary of arrays.
    precision: a policy or its name.

  Returns:
    The same tree; NumPy arrays stay on the host.
  """
  precision = get_precision(precision)

  def cast(path, x):
    keys = [entry.key for entry in path]
    linear = keys[-1] in ("kernel", "bias") and not keys[-2].endswith("norm")
    if not linear or _FLOAT32 & set(keys):
      return x
    dense = _DENSE & set(keys)
    return x.astype(precision.dense_dtype if dense else precision.dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def stack_layers(params: dict) -> dict:
  """Lays the encoders' blocks out for `scan_layers`: one stacked tree."""

  def stack(encoder):
    rest = dict(encoder)
    depth = sum(key.startswith("block_") for key in encoder)
    blocks = [rest.pop(f"block_{i}") for i in range(depth)]
    numpy = isinstance(jax.tree.leaves(blocks)[0], np.ndarray)
    join = np.stack if numpy else jnp.stack
    return {**rest, "blocks": jax.tree.map(lambda *x: join(x), *blocks)}

  return {**params, **{name: stack(params[name]) for name in _ENCODERS}}


def unstack_layers(params: dict) -> dict:
  """Undoes `stack_layers`: one tree a block, as checkpoints hold them."""

  def unstack(encoder):
    rest = dict(encoder)
    blocks = rest.pop("blocks")
    depth = jax.tree.leaves(blocks)[0].shape[0]
    return rest | {
      f"block_{i}": jax.tree.map(lambda x, i=i: x[i], blocks)
      for i in range(depth)
    }

  return {**params, **{name: unstack(params[name]) for name in _ENCODERS}}
