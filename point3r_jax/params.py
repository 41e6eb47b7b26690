"""Parameters as trees: made, cast to a policy's types, laid out for scans."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax.config import ModelConfig
from point3r_jax.models.compute import Compute
from point3r_jax.models.point3r import Context, Point3R
from point3r_jax.precision import Precision, get_precision

# Modules whose parameters stay float32 under every policy, and those that run
# in the dense heads' type.
_FLOAT32 = {"patch_embed", "pose_head", "head_2"}
_DENSE = {"camera_dense", "dense"}
# Endings of the names of linear maps that give float32, and modules where these
# do not, since they are added to a rounded residual.
_SUMMED = ("projection", "output", "modulation")
_ROUNDED_RESIDUAL = {"encoder", "value_encoder", "pointer_block"}
# Module, prefix of a layer's name, name of the stacked layers, and how many of
# the last layers stay by themselves: the decoder's last one is unlike the rest.
_STACKS = (
  ("encoder", "block_", "blocks", 0),
  ("value_encoder", "block_", "blocks", 0),
  ("decoder", "layer_", "layers", 1),
)

# A block's norms, and the linear maps that read them.
_BEHIND = {
  "attention_norm": (("attention", "qkv"),),
  "self_norm": (("self_attention", "qkv"),),
  "cross_norm": (("cross_attention", "query"),),
  "context_norm": (("cross_attention", "key"), ("cross_attention", "value")),
  "mlp_norm": (("mlp", "hidden"),),
}

Shape = tuple[int, ...]


@functools.cache
def param_shapes(config: ModelConfig) -> dict:
  """Returns the parameter tree of a model of this size, as shapes only."""
  model = Point3R(config, Compute(get_precision("float32"), "xla"))
  grid = (2, 2)  # Parameters do not depend on the image's size.
  side = grid[0] * config.patch_size
  width, tokens = config.decoder_width, grid[0] * grid[1]

  def init():
    context = Context(
      position=jnp.zeros((1, tokens, 3)),
      feature=jnp.zeros((1, tokens, width)),
      count=jnp.zeros((1,), jnp.int32),
      pose_slots=jnp.zeros((1, config.pose_slots, 2 * width)),
      image_position=jnp.zeros((1, tokens, 3)),
      first=jnp.ones((1,), bool),
    )
    image = jnp.zeros((1, side, side, 3))
    return model.init(
      jax.random.key(0),
      method=lambda model: model(model.encode(image), context, grid),
    )

  return jax.eval_shape(init)["params"]


def _draw(path: str, shapes: Mapping[str, Shape], seed: int) -> np.ndarray:
  """Returns one fresh parameter, as the published training starts it.

  | parameters | start |
  | --- | --- |
  | image encoder, image decoder, `image_projection` | Xavier, bias 0 |
  | LayerNorms | scale 1, bias 0 |
  | pose_token | N(0, 0.02²) |
  | pose memory's slots and masked token | N(0, 0.2²) |
  | everything else | U(-1/√fan_in, 1/√fan_in), kernel and bias |
  """
  shape, (*parent, leaf) = shapes[path], path.split("/")
  # A parameter depends on its name and the seed, not on what else there is.
  rng = np.random.default_rng([zlib.crc32(path.encode()), seed])
  if leaf == "scale":
    return np.ones(shape, np.float32)
  if leaf not in ("kernel", "bias"):
    noise = rng.standard_normal(shape, np.float32)
    return np.float32(0.02 if path == "pose_token" else 0.2) * noise
  xavier = path.startswith(("encoder", "image_projection")) or (
    path.startswith("decoder") and "image_block" in parent
  )
  if leaf == "bias" and (xavier or parent[-1].endswith("norm")):
    return np.zeros(shape, np.float32)
  kernel = shapes["/".join([*parent, "kernel"])]
  fan_in, fan_out = math.prod(kernel[:-1]), kernel[-1]
  bound = math.sqrt(6 / (fan_in + fan_out)) if xavier else fan_in**-0.5
  return np.float32(bound) * (2 * rng.random(shape, np.float32) - 1)


def init_params(config: ModelConfig, seed: int = 0) -> dict:
  """Returns freshly initialised parameters, as the published training starts.

  Args:
    config: the model's sizes.
    seed: of the random numbers.

  Returns:
    A nested dictionary of float32 NumPy arrays.
  """
  unstacked = config.replace(scan_layers=False)
  shapes = flat_shapes(param_shapes(unstacked))
  flat = {tuple(p.split("/")): _draw(p, shapes, seed) for p in shapes}
  params = flax.traverse_util.unflatten_dict(flat)
  return stack_layers(params) if config.scan_layers else params


def flat_shapes(params: Mapping[str, Any]) -> dict[str, Shape]:
  """Returns path → shape of a parameter tree, paths joined by slashes."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def list_problems(problems: Mapping[str, Sequence[str]]) -> str:
  """Says how many names of each kind there are, and which; none is left out."""
  return "; ".join(
    f"{len(names)} {kind}: {', '.join(names)}"
    for kind, names in problems.items()
    if names
  )


def check_params(
  config: ModelConfig, params: Mapping[str, Any], prepared: bool = True
) -> None:
  """Raises ValueError unless the tree is just what the config needs.

  Args:
    config: the model's sizes.
    params: nested dictionary of arrays.
    prepared: whether it may also be what `prepare_params` makes of that.
  """
  want = flat_shapes(param_shapes(config))
  have = flat_shapes(params)
  if want == have:
    return
  if have == _prepared_shapes(config):
    if prepared:
      return
    raise ValueError(
      "the parameters were prepared to run under a policy, as load_checkpoint "
      "does where it is given a precision; load them without"
    )
  other = config.replace(scan_layers=not config.scan_layers)
  if have in (flat_shapes(param_shapes(other)), _prepared_shapes(other)):
    raise ValueError(
      f"the layers of the parameters are {'' if other.scan_layers else 'not '}"
      f"stacked, but the model config has scan_layers={config.scan_layers}; "
      f"make that {other.scan_layers}"
    )
  problems = {
    "missing": sorted(set(want) - set(have)),
    "unexpected": sorted(set(have) - set(want)),
    "of another shape": [
      f"{name} {have[name]} instead of {want[name]}"
      for name in sorted(set(want) & set(have))
      if want[name] != have[name]
    ],
  }
  raise ValueError(
    f"parameters do not fit the model config: {list_problems(problems)}"
  )


def merge(params: Mapping[str, Any], others: Mapping[str, Any]) -> dict:
  """Joins two parameter trees; where both have a leaf, that of `others`."""
  flatten = flax.traverse_util.flatten_dict
  return flax.traverse_util.unflatten_dict(flatten(params) | flatten(others))


def _dtype_under(precision: Precision, keys: Sequence[str]) -> jnp.dtype | None:
  """Returns the type that a policy has for a parameter; None: as it is."""
  linear = keys[-1] in ("kernel", "bias") and not keys[-2].endswith("norm")
  if not linear or _FLOAT32 & set(keys):
    return None
  if _DENSE & set(keys):
    return precision.dense_dtype
  summed = keys[-1] == "bias" and keys[-2].endswith(_SUMMED)
  kept = summed and not _ROUNDED_RESIDUAL & set(keys)
  return None if kept else precision.dtype


def check_rounding(
  params: Mapping[str, Any], precision: str | Precision
) -> None:
  """Raises ValueError if parameters were rounded to more than a policy does.

  Args:
    params: nested dictionary of arrays.
    precision: the policy they are to run under, or its name.
  """
  precision = get_precision(precision)
  for path, x in flax.traverse_util.flatten_dict(params).items():
    dtype = _dtype_under(precision, path)
    if dtype is not None and x.dtype.itemsize < np.dtype(dtype).itemsize:
      raise ValueError(
        f"the parameters ({'/'.join(path)} and maybe others) are rounded to "
        f"{x.dtype}, but are to run under the precision {precision.name!r}, "
        f"which has {np.dtype(dtype)} there; run them under the precision that "
        "they were loaded with, or load them without one"
      )


def cast_params(params: dict, precision: str | Precision) -> dict:
  """Casts parameters to the types that a policy multiplies and adds in.

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
    dtype = _dtype_under(precision, [entry.key for entry in path])
    return x if dtype is None else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def fold_norms(params: dict) -> dict:
  """Makes the affine maps of blocks' norms part of the linear maps behind them.

  (x·γ + β)·W + b = x·(γ·W) + (β·W + b): so a block only has to normalise, what
  several blocks read is normalised once, and gradients of γ and β are made of
  those of W and b, not summed over tokens.

  Args:
    params: nested dictionary of arrays, with any layout of layers.

  Returns:
    The same without these norms, in the same types; see `models.blocks`.
  """
  if not isinstance(params, Mapping):
    return params
  folded = {name: fold_norms(leaf) for name, leaf in params.items()}
  for norm, linears in _BEHIND.items():
    if "scale" not in folded.get(norm, ()):
      continue
    affine = folded.pop(norm)
    for part, name in linears:
      linear = _fold(affine, folded[part][name])
      folded[part] = folded[part] | {name: linear}
  return folded


def _fold(affine: dict, linear: dict) -> dict:
  """Returns the linear map of what an affine map gives."""
  kernel = linear["kernel"].astype(np.float32)
  exact = functools.partial(jnp.einsum, precision="highest")
  einsum = np.einsum if _on_host(kernel) else exact
  folded = {
    "kernel": affine["scale"][..., None] * kernel,
    "bias": linear["bias"] + einsum("...i,...io->...o", affine["bias"], kernel),
  }
  return {name: x.astype(linear[name].dtype) for name, x in folded.items()}


def _drop_unused(params: dict) -> dict:
  """Leaves out what checkpoints hold but no frame runs."""
  decoder = dict(params["decoder"])
  decoder.pop("pointer_norm", None)
  layers = [name for name in decoder if name.startswith("layer_")]
  last = max(layers, key=lambda name: int(name.removeprefix("layer_")))
  decoder[last] = dict(decoder[last])
  decoder[last].pop("pointer_block", None)
  return {**params, "decoder": decoder}


def _join_linear(*linears: dict) -> dict:
  """Makes one linear map of several that read the same."""
  join = np.concatenate if _on_host(linears) else jnp.concatenate
  return jax.tree.map(lambda *leaves: join(leaves, axis=-1), *linears)


def join_products(params: dict) -> dict:
  """Joins the linear maps of what is alike once `fold_norms` is through.

  That is the keys and values of a cross-attention, and all that the two blocks
  of a decoder layer read of a stream: see `models.decoder`.

  Args:
    params: of the whole model, nested, with any layout of layers.

  Returns:
    The same function in fewer products, without what is not used.
  """
  return _join_products(_drop_unused(params))


def _join_products(params: dict) -> dict:
  """Does so for a part of the model."""
  if not isinstance(params, Mapping):
    return params
  joined = {name: _join_products(leaf) for name, leaf in params.items()}
  if "key" in joined:
    pair = joined.pop("key"), joined.pop("value")
    joined["key_value"] = _join_linear(*pair)
  if "pointer_block" in joined and "image_products" not in joined:
    for own, other in (("image", "pointer"), ("pointer", "image")):
      joined[f"{own}_products"] = _join_linear(
        joined[f"{own}_block"]["self_attention"].pop("qkv"),
        joined[f"{other}_block"]["cross_attention"].pop("key_value"),
      )
  return joined


def prepare_params(params: dict, precision: str | Precision) -> dict:
  """Prepares parameters for frames that have no backward pass.

  Casts them; in 16 bits also folds norms, joins linear maps that read the same
  and leaves out what is not used: the same function but for its rounding. What
  is prepared stays as it is.

  Args:
    params: nested dictionary of arrays, with any layout of layers.
    precision: a policy or its name.

  Returns:
    A nested dictionary that runs under this policy; NumPy arrays stay on the
    host.

  Raises:
    ValueError: if they were rounded to more than the policy does.
  """
  precision = get_precision(precision)
  check_rounding(params, precision)
  if precision.dtype != jnp.float32:
    params = join_products(fold_norms(params))
  return cast_params(params, precision)


@functools.cache
def _prepared_shapes(config: ModelConfig) -> dict[str, Shape]:
  """Returns path → shape of what `prepare_params` makes in 16 bits."""
  prepare = functools.partial(prepare_params, precision="bfloat16")
  return flat_shapes(jax.eval_shape(prepare, param_shapes(config)))


def _on_host(tree: Any) -> bool:
  """Says whether the arrays of a tree, all alike, are NumPy's."""
  return isinstance(jax.tree.leaves(tree)[0], np.ndarray)


def stack_layers(params: dict) -> dict:
  """Lays layers out for `scan_layers`: one stacked tree a stack of layers."""

  def stack(tree, layer, stacked, keep):
    rest = dict(tree)
    depth = sum(key.startswith(layer) for key in tree) - keep
    layers = [rest.pop(f"{layer}{i}") for i in range(depth)]
    join = np.stack if _on_host(layers) else jnp.stack
    return {**rest, stacked: jax.tree.map(lambda *x: join(x), *layers)}

  return {**params, **{n: stack(params[n], *rest) for n, *rest in _STACKS}}


def unstack_layers(params: dict) -> dict:
  """Undoes `stack_layers`: one tree a layer, as checkpoints hold them."""

  def split(x):
    if isinstance(x, np.ndarray):
      return list(x)
    # The gradient is one concatenation, where that of slices is many sums.
    return [y.squeeze(0) for y in jax.lax.split(x, [1] * x.shape[0])]

  def unstack(tree, layer, stacked, _):
    rest = dict(tree)
    leaves, structure = jax.tree.flatten(rest.pop(stacked))
    layers = zip(*map(split, leaves), strict=True)
    return rest | {
      f"{layer}{i}": structure.unflatten(leaves)
      for i, leaves in enumerate(layers)
    }

  return {**params, **{n: unstack(params[n], *rest) for n, *rest in _STACKS}}


@flax.struct.dataclass
class JoinedParams:
  """Parameters in few arrays, all on one level: so programs are called faster.

  Attributes:
    arrays: each a parameter, or n biases (n, …) float32 of one shape.
    paths: of each array, where it belongs, or where its n biases do.
    dtypes: of each array, the type that its biases have there; None: it is a
      parameter.
  """

  arrays: tuple[jax.Array, ...]
  paths: tuple[tuple[tuple[str, ...], ...], ...] = flax.struct.field(
    pytree_node=False
  )
  dtypes: tuple[np.dtype | None, ...] = flax.struct.field(pytree_node=False)

  def split(self) -> dict:
    """Returns the nested dictionary of all; for use where one traces."""
    flat = {}
    for array, paths, dtype in zip(
      self.arrays, self.paths, self.dtypes, strict=True
    ):
      leaves = [array] if dtype is None else (-array).astype(dtype)
      flat |= zip(paths, leaves, strict=True)
    return flax.traverse_util.unflatten_dict(flat)


def join_params(params: Mapping[str, Any], biases: bool) -> JoinedParams:
  """Lays parameters out on one level, on the host.

  Args:
    params: nested dictionary of arrays.
    biases: whether to join those of one shape. A GPU's matrix product wants its
      bias apart; they are kept with the other sign and in float32, so that
      XLA's kernels, which change that, write many at once, where copies would
      be made one by one. On a CPU that only takes longer to compile.
  """
  flat = flax.traverse_util.flatten_dict(params)
  groups = {}
  for path, leaf in flat.items():
    dtype = leaf.dtype if biases and path[-1] == "bias" else None
    key = leaf.shape if dtype else path
    groups.setdefault((key, dtype), []).append(path)
  arrays = [
    flat[paths[0]]
    if dtype is None
    else -np.stack([np.asarray(flat[path], np.float32) for path in paths])
    for (_, dtype), paths in groups.items()
  ]
  return JoinedParams(
    arrays=tuple(arrays),
    paths=tuple(map(tuple, groups.values())),
    dtypes=tuple(dtype for _, dtype in groups),
  )
