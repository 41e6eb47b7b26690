"""7-Scenes, for multi-view reconstruction.

  ROOT/SCENE/TestSplit.txt                      lines such as `sequence3`
  ROOT/SCENE/seq-03/frame-000000.color.png
  ROOT/SCENE/seq-03/frame-000000.depth.proj.png 16-bit millimetres, as seen by
                                                the colour camera
  ROOT/SCENE/seq-03/frame-000000.pose.txt       4x4 camera-to-world

The download has `.depth.png` as seen by the depth camera; the projected maps
have to be made from them.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.base import Layout
from point3r_jax.evaluation.benchmarks.files import opened
from point3r_jax.evaluation.benchmarks.folders import (
  entries,
  find_root,
  subfolders,
)
from point3r_jax.evaluation.benchmarks.pose_files import read_pose
from point3r_jax.evaluation.benchmarks.rgbd import (
  RgbdFrame,
  RgbdOptions,
  rgbd_sequence,
)
from point3r_jax.evaluation.sequences import Sequence

SCENES = (
  *("chess", "fire", "heads", "office", "pumpkin", "redkitchen", "stairs"),
)

_SPARSE_STRIDE = 200


@dataclasses.dataclass(frozen=True)
class SevenScenesOptions(RgbdOptions):
  """Options of 7-Scenes.

  Attributes:
    scenes: to evaluate; None: every folder, as the published code does, which
      does not notice when one is missing.
  """

  scenes: tuple[str, ...] | None = SCENES


def layout(root: Path | None, options: SevenScenesOptions) -> Layout:
  """Lists the test sequences of all scenes."""
  root = find_root(root, "*/TestSplit.txt", "7scenes")
  scenes = subfolders(root) if options.scenes is None else options.scenes
  builders = {}
  for scene in scenes:
    try:
      names = read_split(root / scene / "TestSplit.txt")
    except InputError as error:
      builders[scene] = functools.partial(_fail, error)
      continue
    for name in names:
      builders[f"{scene}/{name}"] = functools.partial(
        _sequence, root, f"{scene}/{name}", options
      )
  return Layout(builders, root, expected_sequences=18)


def read_split(path: Path) -> list[str]:
  """Reads which folders of a scene are for testing."""
  with opened(path) as file:
    lines = file.read().decode("utf-8", "replace").split()
  digits = ["".join(filter(str.isdecimal, line)) for line in lines]
  if not digits or not all(digits):
    raise InputError(f"{path}: lines must be such as 'sequence3'")
  return [f"seq-{number.zfill(2)}" for number in digits]


def _sequence(root: Path, name: str, options: SevenScenesOptions) -> Sequence:
  """Opens one sequence."""
  folder = root / name
  names = [path.name for path in entries(folder)]
  count = sum("color" in name for name in names)
  depths = sum(name.endswith(".depth.proj.png") for name in names)
  poses = sum(name.endswith(".pose.txt") for name in names)
  if not count == depths == poses:
    raise InputError(
      f"{folder}: has {count} color images, {depths} depth.proj maps and"
      f" {poses} poses"
    )
  if not count:
    raise InputError(f"{folder}: has no color images")
  frames = []
  for i in options.choose(count, _SPARSE_STRIDE):
    stem = folder / f"frame-{i:06d}"
    frames.append(
      RgbdFrame(
        stem.with_suffix(".color.png"),
        stem.with_suffix(".depth.proj.png"),
        read_pose(stem.with_suffix(".pose.txt")),
      )
    )
  return rgbd_sequence(name, frames, options)


def _fail(error: InputError) -> Sequence:
  raise error
