"""Published tensor names, our parameter paths and how one becomes the other.

`weight_table(config)` enumerates every tensor once, so that nothing is mapped
by accident: a file's names either all stand in the table or are an error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from point3r_jax.config import ModelConfig

Shape = tuple[int, ...]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Weight:
  """One tensor in both worlds.

  Attributes:
    name: in the published state dict.
    path: in our parameter dictionary.
    import_: makes our array of the published one.
    export: makes the published array of ours.
    alias: a second published name of the same tensor, or None.
  """

  name: str
  path: Path
  import_: Callable[[np.ndarray], np.ndarray]
  export: Callable[[np.ndarray], np.ndarray]
  alias: str | None = None


def _transposer(*axes: int):
  """Returns a permutation of axes and its inverse."""
  inverse = np.argsort(axes)
  return lambda x: x.transpose(axes), lambda x: x.transpose(inverse)


_SAME = (lambda x: x, lambda x: x)
_LINEAR = _transposer(1, 0)  # (out, in) ↔ (in, out)
_CONV = _transposer(2, 3, 1, 0)  # (out, in, y, x) ↔ (y, x, in, out)
_TRANSPOSED = _transposer(0, 2, 3, 1)  # (in, out, y, x) ↔ (in, y, x, out)
_POINTWISE = (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])


def _patch(patch_size: int):
  """(out, 3, p, p) ↔ (p·p·3, out)."""

  def import_(x):
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])

  def export(x):
    x = x.reshape(patch_size, patch_size, 3, -1)
    return x.transpose(3, 2, 0, 1)

  return import_, export


def _unsqueezed(leading: int):
  """Leading axes of size 1 ↔ none."""
  index = (0,) * leading
  return lambda x: x[index], lambda x: x[(None,) * leading]


def _affine(name: str, path: str, kernel=_LINEAR, bias: bool = True):
  """A linear or convolutional layer: kernel and bias."""
  parts = tuple(path.split("/"))
  yield Weight(f"{name}.weight", (*parts, "kernel"), *kernel)
  if bias:
    yield Weight(f"{name}.bias", (*parts, "bias"), *_SAME)


def _norm(name: str, path: str):
  """A LayerNorm: scale and bias."""
  parts = tuple(path.split("/"))
  yield Weight(f"{name}.weight", (*parts, "scale"), *_SAME)
  yield Weight(f"{name}.bias", (*parts, "bias"), *_SAME)


def _attention(name: str, path: str):
  yield from _affine(f"{name}.qkv", f"{path}/qkv")
  yield from _affine(f"{name}.proj", f"{path}/projection")


def _mlp(name: str, path: str):
  yield from _affine(f"{name}.fc1", f"{path}/hidden")
  yield from _affine(f"{name}.fc2", f"{path}/output")


def _encoder_block(name: str, path: str):
  yield from _norm(f"{name}.norm1", f"{path}/attention_norm")
  yield from _attention(f"{name}.attn", f"{path}/attention")
  yield from _norm(f"{name}.norm2", f"{path}/mlp_norm")
  yield from _mlp(f"{name}.mlp", f"{path}/mlp")


def _decoder_block(name: str, path: str):
  yield from _norm(f"{name}.norm1", f"{path}/self_norm")
  yield from _attention(f"{name}.attn", f"{path}/self_attention")
  yield from _norm(f"{name}.norm2", f"{path}/cross_norm")
  yield from _norm(f"{name}.norm_y", f"{path}/context_norm")
  for old, new in (("q", "query"), ("k", "key"), ("v", "value")):
    yield from _affine(
      f"{name}.cross_attn.proj{old}", f"{path}/cross_attention/{new}"
    )
  yield from _affine(
    f"{name}.cross_attn.proj", f"{path}/cross_attention/projection"
  )
  yield from _norm(f"{name}.norm3", f"{path}/mlp_norm")
  yield from _mlp(f"{name}.mlp", f"{path}/mlp")


def _modulated_block(name: str, path: str):
  for old, new in (("norm1", "attention_norm"), ("norm2", "mlp_norm")):
    yield from _norm(f"{name}.{old}.norm", f"{path}/{new}/norm")
    yield from _affine(f"{name}.{old}.mlp.1", f"{path}/{new}/modulation")
  yield from _attention(f"{name}.attn", f"{path}/attention")
  yield from _mlp(f"{name}.mlp", f"{path}/mlp")


def _dense_head(name: str, path: str):
  """A DPT: `act_postprocess` and `scratch` in the published names."""
  resize = {0: _TRANSPOSED, 1: _TRANSPOSED, 3: _CONV}
  for k in range(4):
    old = f"{name}.act_postprocess.{k}"
    yield from _affine(f"{old}.0", f"{path}/project_{k}", _POINTWISE)
    if k in resize:
      yield from _affine(f"{old}.1", f"{path}/resize_{k}", resize[k])
    (layer,) = _affine(
      f"{name}.scratch.layer{k + 1}_rn", f"{path}/layer_{k}", _CONV, bias=False
    )
    alias = f"{name}.scratch.layer_rn.{k}.weight"
    yield dataclasses.replace(layer, alias=alias)
    old, new = f"{name}.scratch.refinenet{k + 1}", f"{path}/refine_{k}"
    yield from _affine(f"{old}.out_conv", f"{new}/output", _POINTWISE)
    for unit, part in (("skip_unit", 1), ("unit", 2)):
      for conv in (0, 1):
        yield from _affine(
          f"{old}.resConfUnit{part}.conv{conv + 1}",
          f"{new}/{unit}/conv_{conv}",
          _CONV,
        )
  yield from _affine(f"{name}.head.0", f"{path}/head_0", _CONV)
  yield from _affine(f"{name}.head.2", f"{path}/head_1", _CONV)
  yield from _affine(f"{name}.head.4", f"{path}/head_2", _POINTWISE)


def _weights(config: ModelConfig) -> Iterator[Weight]:
  patch = _patch(config.patch_size)
  yield Weight("pose_token", ("pose_token",), *_unsqueezed(2))
  yield from _affine("patch_embed.proj", "encoder/patch_embed", patch)
  for i in range(config.encoder_depth):
    yield from _encoder_block(f"enc_blocks.{i}", f"encoder/block_{i}")
  yield from _norm("enc_norm", "encoder/norm")
  yield from _affine("decoder_embed", "image_projection")
  yield from _affine("decoder_embed_memory", "pointer_projection")
  for i in range(config.decoder_depth):
    layer = f"decoder/layer_{i}"
    yield from _decoder_block(f"dec_blocks.{i}", f"{layer}/image_block")
    yield from _decoder_block(
      f"dec_blocks_memory.{i}", f"{layer}/pointer_block"
    )
  yield from _norm("dec_norm", "decoder/norm")
  yield from _norm("dec_norm_memory", "decoder/pointer_norm")

  old, new = "pose_retriever", "pose_memory"
  yield Weight(f"{old}.masked_token", (new, "masked_token"), *_unsqueezed(2))
  yield Weight(f"{old}.mem", (new, "slots"), *_unsqueezed(1))
  yield from _affine(f"{old}.proj_q", f"{new}/projection")
  for i in range(2):
    for kind in ("read_blocks", "write_blocks"):
      yield from _decoder_block(f"{old}.{kind}.{i}", f"{new}/{kind}_{i}")

  yield from _affine("pts_patch_embed.proj", "value_encoder/patch_embed", patch)
  for i in range(config.value_depth):
    yield from _encoder_block(f"value_encoder.{i}", f"value_encoder/block_{i}")
  yield from _norm("value_norm", "value_encoder/norm")
  yield from _affine("value_out", "value_projection")
  yield from _affine("memory_attn_head.0", "key_head/hidden")
  yield from _affine("memory_attn_head.2", "key_head/output")

  head = "downstream_head"
  yield from _dense_head(f"{head}.dpt_self", "camera_dense")
  for i in range(2):
    yield from _modulated_block(
      f"{head}.final_transform.{i}", f"world_head/block_{i}"
    )
  yield from _dense_head(f"{head}.dpt_cross", "world_head/dense")
  yield from _mlp(f"{head}.pose_head.mlp", "pose_head")


@functools.cache
def weight_table(config: ModelConfig) -> tuple[Weight, ...]:
  """Returns every tensor of a model of this size, once."""
  return tuple(_weights(config))


def config_from_shapes(
  shapes: Mapping[str, Shape], image_size: int = 512
) -> ModelConfig:
  """Reads the model's size off the shapes of its tensors.

  Encoder and image decoder have heads of 64 channels, pointer blocks always 16
  heads. Parts that DUSt3R's files lack take the published sizes.

  Args:
    shapes: of the published names.
    image_size: side the weights were trained for; no shape tells it.

  Raises:
    KeyError: if a tensor that tells a size is missing.
  """

  def depth(prefix: str) -> int:
    names = (name.split(".") for name in shapes if name.startswith(prefix))
    return 1 + max((int(parts[1]) for parts in names), default=-1)

  def rows(name: str) -> int:
    return shapes[f"{name}.weight"][0]

  dpt = "downstream_head.dpt_self"
  encoder_width, _, patch_size, _ = shapes["patch_embed.proj.weight"]
  decoder_width = rows("decoder_embed")
  default = ModelConfig()
  slots = shapes.get("pose_retriever.mem", (1, default.pose_slots, 0))[1]
  return ModelConfig(
    image_size=image_size,
    patch_size=patch_size,
    encoder_width=encoder_width,
    encoder_depth=depth("enc_blocks."),
    encoder_heads=encoder_width // 64,
    decoder_width=decoder_width,
    decoder_depth=depth("dec_blocks."),
    decoder_heads=decoder_width // 64,
    pointer_heads=16,
    value_depth=depth("value_encoder.") or default.value_depth,
    pose_slots=slots,
    dpt_widths=tuple(rows(f"{dpt}.act_postprocess.{k}.0") for k in range(4)),
    dpt_features=rows(f"{dpt}.scratch.layer1_rn"),
    dpt_head_width=rows(f"{dpt}.head.2"),
    mlp_ratio=rows("enc_blocks.0.mlp.fc1") // encoder_width,
  )


def from_dust3r(names: Mapping[str, object]) -> dict[str, str]:
  """Maps our published names to DUSt3R's, for the start of stage 1.

  Args:
    names: of a DUSt3R checkpoint.

  Returns:
    New name → name in the file, for every tensor that is taken over; leftovers
    of DUSt3R do not appear.

  Raises:
    ValueError: if two tensors would take the same name.
  """
  prefixes = {
    "dec_blocks2.": "dec_blocks_memory.",
    "downstream_head1.dpt.": "downstream_head.dpt_self.",
    "downstream_head2.dpt.": "downstream_head.dpt_cross.",
  }
  result = {}

  def take(name: str, new: str) -> None:
    if new in result:
      raise ValueError(f"{result[new]} and {name} would both be {new}")
    result[new] = name

  for name in names:
    for old, new in prefixes.items():
      if name.startswith(old):
        take(name, new + name.removeprefix(old))
        break
    else:
      take(name, name)
    if name.startswith("patch_embed."):
      take(name, f"pts_{name}")
  if not any(name.startswith("dec_blocks2.") for name in names):
    for name in names:
      if name.startswith("dec_blocks."):
        take(name, name.replace("dec_blocks.", "dec_blocks_memory.", 1))
  return result
