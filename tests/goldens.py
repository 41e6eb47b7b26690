"""Reference numbers of the published model, and the weights behind them.

The weights need no file: every tensor follows from its name, its shape and a
salt (`tests/golden/README.md`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from point3r_jax import geometry
from point3r_jax.config import ModelConfig
from point3r_jax.convert.names import config_from_shapes, weight_table
from point3r_jax.losses import Targets

FOLDER = pathlib.Path(__file__).parent / "golden"

_TRANSPOSED = (".act_postprocess.0.1.", ".act_postprocess.1.1.")
_TABLES = ("pose_token", "pose_retriever.mem", "pose_retriever.masked_token")


def seeded_tensor(
  name: str, shape: tuple[int, ...], salt: int = 0
) -> np.ndarray:
  """Returns the float32 tensor `name` of a seeded PyTorch state dict."""
  for k in range(1, 5):  # The DPT lists these four tensors under two names.
    name = name.replace(f"scratch.layer{k}_rn.", f"scratch.layer_rn.{k - 1}.")
  seed = [zlib.crc32(name.encode()), salt]
  noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(
    shape, dtype=np.float32
  )
  if len(shape) == 1:
    return 1 + 0.1 * noise if name.endswith(".weight") else 0.1 * noise
  if name in _TABLES:
    return 0.5 * noise
  transposed = any(part in name for part in _TRANSPOSED)
  fan_in = shape[0] if transposed else math.prod(shape[1:])
  if name.endswith(".head.4.weight"):
    noise = 0.2 * noise  # Keeps the point maps in a room-sized range.
  return (noise / math.sqrt(fan_in)).astype(np.float32)


def manifest(size: str) -> dict[str, tuple[int, ...]]:
  """Returns name → shape of the published state dict, "small" or "full"."""
  with open(FOLDER / f"manifest_{size}.json", encoding="utf-8") as file:
    return {name: tuple(shape) for name, shape in json.load(file).items()}


def seeded_state_dict(
  size: str, salt: int = 0
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the names and tensors of the published state dict."""
  for name, shape in manifest(size).items():
    yield name, seeded_tensor(name, shape, salt)


@functools.lru_cache(maxsize=4)
def seeded_params(size: str, salt: int = 0) -> tuple[ModelConfig, dict]:
  """Returns a config and the seeded weights as our parameters."""
  shapes = manifest(size)
  config = config_from_shapes(shapes)
  params = {}
  for weight in weight_table(config):
    tree = params
    for key in weight.path[:-1]:
      tree = tree.setdefault(key, {})
    tensor = seeded_tensor(weight.name, shapes[weight.name], salt)
    tree[weight.path[-1]] = weight.import_(tensor)
  return config, params


@dataclasses.dataclass(frozen=True)
class Golden:
  """One file of reference outputs.

  Attributes:
    arrays: its contents by key.
    images: (T, B, H, W, 3) uint8.
    salt: of the weights.
    stride: every how many pixels maps were kept.
    size: "small" or "full".
  """

  arrays: dict[str, np.ndarray]
  images: np.ndarray
  salt: int
  stride: int
  size: str

  def maps(self, dense: np.ndarray) -> np.ndarray:
    """Returns the pixels of maps (B, H, W, …) that the file holds."""
    pick = slice(self.stride // 2, None, self.stride)
    return dense[:, pick, pick]


@functools.lru_cache(maxsize=4)
def load_golden(name: str) -> Golden:
  """Loads `tests/golden/NAME.npz`."""
  with np.load(FOLDER / f"{name}.npz") as file:
    arrays = dict(file)
  meta = json.loads(str(arrays.pop("meta")))
  return Golden(
    images=arrays.pop("images").transpose(0, 1, 3, 4, 2),
    arrays=arrays,
    salt=meta["salt"],
    stride=meta["stride"],
    size=meta["kind"],
  )


@jax.jit
def _seen_from_cameras(points, poses):
  """Returns points in each camera and the first one's, and poses in that."""
  world_to_camera = geometry.invert_pose(poses)
  to_first = jnp.einsum(
    "bij,tbjk->tbik", world_to_camera[0], poses, precision="highest"
  )
  return {
    "points_camera": geometry.transform_points(world_to_camera, points),
    "points_world": geometry.transform_points(world_to_camera[:1], points),
    "pose": geometry.matrix_to_pose(to_first),
  }


def loss_targets(golden: dict[str, np.ndarray], frames: int) -> Targets:
  """Returns the targets in a loss or gradient file."""

  def stack(key, default=None):
    return np.stack(
      [golden.get(f"gt{t}/{key}", default) for t in range(frames)]
    )

  valid = stack("valid_mask")
  absent = np.zeros(valid.shape[1], bool)
  flags = ("is_metric", "camera_only", "depth_only", "single_view")
  return Targets(
    **_seen_from_cameras(stack("pts3d"), stack("camera_pose")),
    valid=valid,
    sky=stack("sky_mask", np.zeros(valid.shape[1:], bool)),
    **{flag: golden.get(f"gt0/{flag}", absent) for flag in flags},
  )
