"""MPI Sintel, for depth and camera poses.

ROOT/training/final/SEQUENCE/frame_0001.png
ROOT/training/depth/SEQUENCE/frame_0001.dpt
ROOT/training/camdata_left/SEQUENCE/frame_0001.cam  world-to-camera
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import numpy as np

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.base import Layout
from point3r_jax.evaluation.benchmarks.builders import (
  DepthOptions,
  PoseOptions,
  depth_sequence,
  pose_sequence,
)
from point3r_jax.evaluation.benchmarks.files import dpt_size, read_dpt
from point3r_jax.evaluation.benchmarks.folders import (
  files_in,
  find_root,
  images_in,
)
from point3r_jax.evaluation.benchmarks.pose_files import read_cam
from point3r_jax.evaluation.sequences import Sequence, Trajectory

# The sequences of the training set, and those of the published pose numbers.
ALL = (
  *("alley_1", "alley_2", "ambush_2", "ambush_4", "ambush_5", "ambush_6"),
  *("ambush_7", "bamboo_1", "bamboo_2", "bandage_1", "bandage_2", "cave_2"),
  *("cave_4", "market_2", "market_5", "market_6", "mountain_1", "shaman_2"),
  *("shaman_3", "sleeping_1", "sleeping_2", "temple_2", "temple_3"),
)
FOURTEEN = (
  *("alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4"),
  *("market_2", "market_5", "market_6", "shaman_3", "sleeping_1"),
  *("sleeping_2", "temple_2", "temple_3"),
)
_GROUPS = {"all": ALL, "14": FOURTEEN}


@dataclasses.dataclass(frozen=True)
class SintelDepthOptions(DepthOptions):
  """Options of Sintel for depth.

  Attributes:
    sequences: names; "all" are the 23 of the training set, which the published
      launcher asks for, "14" those for poses. The published evaluator scores
      the 14 when it finds too few predictions for all.
  """

  sequences: tuple[str, ...] = ("all",)


@dataclasses.dataclass(frozen=True)
class SintelPoseOptions(PoseOptions):
  """Options of Sintel for camera poses.

  Attributes:
    sequences: names; "14" are those of the published numbers, "all" the 23 of
      the training set.
  """

  sequences: tuple[str, ...] = ("14",)


def depth_layout(
  root: Path | None, options: SintelDepthOptions, independent: bool
) -> Layout:
  """Lists the sequences with depth."""
  root = find_root(root, "training/final", "sintel")
  builders = {
    name: functools.partial(_depth, root, name, options, independent)
    for name in _names(options.sequences)
  }
  return Layout(builders, root, len(ALL), expected_frames=1064)


def pose_layout(root: Path | None, options: SintelPoseOptions) -> Layout:
  """Lists the sequences with trajectories."""
  root = find_root(root, "training/final", "sintel")
  builders = {
    name: functools.partial(_poses, root, name, options)
    for name in _names(options.sequences)
  }
  return Layout(builders, root, len(FOURTEEN))


def read_trajectory(cameras: list[Path]) -> Trajectory:
  """Reads a camera's path, its mean position taken for the origin.

  Timestamps are the frame numbers in the files' names.
  """
  world_to_camera = [read_cam(path)[1] for path in cameras]
  poses = np.linalg.inv(np.stack(world_to_camera))
  poses[:, :3, 3] -= poses[:, :3, 3].mean(axis=0)
  stamps = [_number(path) for path in cameras]
  if any(b <= a for a, b in itertools.pairwise(stamps)):
    raise InputError(f"{cameras[0].parent}: frame numbers do not increase")
  return Trajectory(np.array(stamps, np.float64), poses)


def _names(sequences: tuple[str, ...]) -> list[str]:
  """The names, those of groups written out."""
  return [name for entry in sequences for name in _GROUPS.get(entry, (entry,))]


def _depth(
  root: Path, name: str, options: SintelDepthOptions, independent: bool
) -> Sequence:
  images = images_in(root / "training/final" / name)
  truths = files_in(root / "training/depth" / name, [".dpt"])
  _check_pairs(images, truths)
  return depth_sequence(
    name, images, truths, dpt_size, read_dpt, options, independent
  )


def _poses(root: Path, name: str, options: SintelPoseOptions) -> Sequence:
  images = images_in(root / "training/final" / name)
  cameras = files_in(root / "training/camdata_left" / name, [".cam"])
  _check_pairs(images, cameras)
  read = functools.partial(read_trajectory, cameras)
  return pose_sequence(name, images, read, options)


def _check_pairs(images: list[Path], truths: list[Path]) -> None:
  """Raises `InputError` unless frames are called the same in both folders.

  Paired by position, as published, one lost file would shift all that follow.
  """
  lonely = {p.stem: p for p in truths}
  for image in images:
    if lonely.pop(image.stem, None) is None:
      raise InputError(f"{image}: has no {truths[0].suffix} file of its name")
  for path in lonely.values():
    raise InputError(f"{path}: has no image of its name")


def _number(path: Path) -> int:
  """The frame number at the end of a file's name."""
  match = re.search(r"\d+$", path.stem)
  if match is None:
    raise InputError(f"{path}: has no frame number in its name")
  return int(match.group())
