"""ScanNet, for camera poses.

  ROOT/SCENE/color_90/frame_0000.jpg
  ROOT/SCENE/pose_90.txt   12 or 16 numbers a row, camera-to-world

Both hold every third of the first 270 frames. They are paired by position.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from point3r_jax.evaluation.benchmarks.base import Layout
from point3r_jax.evaluation.benchmarks.builders import (
  PoseOptions,
  pose_sequence,
)
from point3r_jax.evaluation.benchmarks.folders import (
  find_root,
  images_in,
  subfolders,
)
from point3r_jax.evaluation.benchmarks.pose_files import read_pose_rows
from point3r_jax.evaluation.sequences import Sequence, Trajectory


@dataclasses.dataclass(frozen=True)
class ScanNetOptions(PoseOptions):
  """Options of ScanNet.

  Attributes:
    sequences: names of scenes; None: every folder, as published.
  """

  sequences: tuple[str, ...] | None = None


def layout(root: Path | None, options: ScanNetOptions) -> Layout:
  """Lists the scenes."""
  root = find_root(root, "*/color_90", "scannet_eval")
  names = subfolders(root) if options.sequences is None else options.sequences
  return Layout(
    {n: functools.partial(_sequence, root / n, options) for n in names}, root
  )


def read_trajectory(path: Path) -> Trajectory:
  """Reads a camera's path; timestamps are 0, 1, 2, …."""
  poses = read_pose_rows(path)
  return Trajectory(np.arange(len(poses), dtype=np.float64), poses)


def _sequence(folder: Path, options: ScanNetOptions) -> Sequence:
  read = functools.partial(read_trajectory, folder / "pose_90.txt")
  return pose_sequence(
    folder.name, images_in(folder / "color_90"), read, options
  )
