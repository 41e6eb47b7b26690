"""Model sizes: one frozen dataclass and the presets people ask for by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that fixes the shapes and the function of a Point3R model.

  The defaults are the published model (828 M parameters). Hashable, so that it
  can be a static argument of jitted functions.

  Attributes:
    image_size: side in pixels the weights were trained for: that of a square if
      it is 224, otherwise the long one (512; 128). A default for tools; the
      model takes any size that is a multiple of `patch_size`.
    patch_size: side of a token's patch, in pixels: 16.
    encoder_width: E, channels of an encoder token.
    encoder_depth: blocks of the image encoder.
    encoder_heads: attention heads of the image and the value encoder.
    decoder_width: D, channels of a decoder token and of a pointer's feature.
    decoder_depth: L, layers of the interleaved decoders; a multiple of 4, for
      the dense heads read the layers L/2, 3L/4 and L.
    decoder_heads: heads of the image decoder, the pose memory and the world
      head's modulated blocks.
    pointer_heads: heads of the pointer decoder.
    value_depth: blocks of the value encoder.
    pose_slots: S, slots of the pose memory.
    dpt_widths: channels of the four projected maps in a dense head, from fine
      to coarse.
    dpt_features: channels of the dense heads' fusion path.
    dpt_head_width: channels before a dense head's last layer.
    mlp_ratio: hidden over outer width of every MLP.
    rotary_bases: bases of the hierarchical 3D rotary embedding.
    scan_layers: run the layers of encoders and decoders as one scanned layer
      with stacked parameters: compiles faster, runs a little slower. See
      `params.stack_layers` for the parameters' two layouts.
  """

  image_size: int = 512
  patch_size: int = 16
  encoder_width: int = 1024
  encoder_depth: int = 24
  encoder_heads: int = 16
  decoder_width: int = 768
  decoder_depth: int = 12
  decoder_heads: int = 12
  pointer_heads: int = 16
  value_depth: int = 6
  pose_slots: int = 256
  dpt_widths: tuple[int, int, int, int] = (96, 192, 384, 768)
  dpt_features: int = 256
  dpt_head_width: int = 128
  mlp_ratio: int = 4
  rotary_bases: tuple[float, ...] = (10.0, 100.0, 1000.0, 10000.0)
  scan_layers: bool = False

  def __post_init__(self):
    """Checks that widths divide into heads and layers into taps."""
    widths = {
      "encoder": (self.encoder_width, self.encoder_heads, 4),
      "decoder": (self.decoder_width, self.decoder_heads, 4),
      "pointer decoder": (self.decoder_width, self.pointer_heads, 1),
    }
    for name, (width, heads, multiple) in widths.items():
      if width % (heads * multiple):
        raise ValueError(
          f"{name}: width {width} does not divide into {heads} heads of a "
          f"multiple of {multiple} channels"
        )
    if self.decoder_depth % 4 or self.decoder_depth < 4:
      raise ValueError(
        f"decoder_depth must be a multiple of 4, got {self.decoder_depth}"
      )
    if not self.rotary_bases:
      raise ValueError("rotary_bases must hold a base or more")
    if self.patch_size != 16:
      raise ValueError(
        "patch_size must be 16, for the dense heads make maps 16 times as "
        f"large as the token grid; got {self.patch_size}"
      )

  def replace(self, **changes) -> ModelConfig:
    """Returns a config with some fields changed."""
    return dataclasses.replace(self, **changes)

  def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the token grid (h, w) of images of `image_size` (H, W)."""
    height, width = image_size
    if min(height, width) < self.patch_size or (
      height % self.patch_size or width % self.patch_size
    ):
      raise ValueError(
        f"image size {height}x{width} (height x width) must be a positive "
        f"multiple of the patch size {self.patch_size}; resize or crop first"
      )
    return height // self.patch_size, width // self.patch_size

  def to_dict(self) -> dict[str, Any]:
    """Returns a JSON-friendly dictionary; `from_dict` reads it back."""
    return {
      key: list(value) if isinstance(value, tuple) else value
      for key, value in dataclasses.asdict(self).items()
    }

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
    """Builds a config from `to_dict`'s result; unknown keys are an error."""
    unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(f"unknown model config fields: {sorted(unknown)}")
    return cls(
      **{
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
      }
    )


PRESETS: dict[str, ModelConfig] = {
  "point3r_512": ModelConfig(),
  "point3r_224": ModelConfig(image_size=224),
  # Trained on synthetic scenes, see point3r_jax.pretrained.
  "tiny": ModelConfig(
    image_size=128,
    encoder_width=160,
    encoder_depth=7,
    encoder_heads=5,
    decoder_width=96,
    decoder_depth=4,
    decoder_heads=3,
    pointer_heads=3,
    value_depth=1,
    pose_slots=16,
    dpt_widths=(24, 32, 48, 64),
    dpt_features=48,
    dpt_head_width=32,
  ),
  # Small enough for tests; the reference numbers in tests/golden are of it.
  "small": ModelConfig(
    image_size=128,
    encoder_width=128,
    encoder_depth=2,
    encoder_heads=2,
    decoder_width=192,
    decoder_depth=4,
    decoder_heads=3,
    value_depth=2,
    pose_slots=16,
    dpt_widths=(24, 32, 48, 64),
    dpt_features=64,
    dpt_head_width=32,
  ),
}


def preset(name: str) -> ModelConfig:
  """Returns a preset by name; an unknown name is an error that lists them."""
  if name not in PRESETS:
    raise ValueError(f"unknown preset {name!r}; there are {sorted(PRESETS)}")
  return PRESETS[name]
