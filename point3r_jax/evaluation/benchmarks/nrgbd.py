"""Neural RGB-D (NRGBD), for multi-view reconstruction.

  ROOT/SCENE/images/img0.png
  ROOT/SCENE/depth/depth0.png   16-bit millimetres
  ROOT/SCENE/poses.txt          four lines a frame, camera-to-world with OpenGL
                                axes; `nan` where there is none

Every folder is a scene, there is no official number of them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Literal

import numpy as np

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.base import Layout
from point3r_jax.evaluation.benchmarks.folders import (
  entries,
  find_root,
  subfolders,
)
from point3r_jax.evaluation.benchmarks.pose_files import (
  check_poses,
  read_pose_blocks,
)
from point3r_jax.evaluation.benchmarks.rgbd import (
  RgbdFrame,
  RgbdOptions,
  rgbd_sequence,
)
from point3r_jax.evaluation.sequences import Sequence

# Turns the axes of a camera: y up and z backward become y down, z forward.
_OPENCV_FROM_OPENGL = np.array([1.0, -1, -1, 1])


@dataclasses.dataclass(frozen=True)
class NrgbdOptions(RgbdOptions):
  """Options of NRGBD.

  Attributes:
    focal: see `RgbdOptions`.
    scenes: to evaluate; None: every folder.
    non_finite_pose: the published code takes the "identity" for a pose that is
      NaN, and so puts the frame in a wrong place; the sparse setting hardly
      ever meets one. "drop" leaves such frames out after the choice of frames.
  """

  focal: float = 554.2562584220408
  scenes: tuple[str, ...] | None = None
  non_finite_pose: Literal["identity", "drop"] = "identity"


def layout(root: Path | None, options: NrgbdOptions) -> Layout:
  """Lists the scenes."""
  root = find_root(root, "*/poses.txt", "nrgbd")
  scenes = subfolders(root) if options.scenes is None else options.scenes
  return Layout(
    {s: functools.partial(_scene, root / s, options) for s in scenes}, root
  )


def sparse_stride(count: int) -> int:
  """From one frame to the next, so that there are two at least."""
  return max(min(500, count // 2), 1)


def _scene(folder: Path, options: NrgbdOptions) -> Sequence:
  """Opens one scene."""
  path = folder / "poses.txt"
  poses = read_pose_blocks(path)
  count = _count(folder / "images", r"img\d+\.png")
  depths = _count(folder / "depth", r"depth\d+\.png")
  if not count == depths == len(poses):
    raise InputError(
      f"{folder}: has {count} images, {depths} depth maps and {len(poses)}"
      " poses"
    )
  chosen = list(options.choose(count, sparse_stride(count)))
  # A missing pose is known by the first of its four lines.
  missing = np.isnan(poses[:, 0]).any(axis=1)
  poses[missing] = np.eye(4)
  if options.non_finite_pose == "drop":
    chosen = [i for i in chosen if not missing[i]]
  if not chosen:
    raise InputError(f"{path}: has no pose for any of the chosen frames")
  poses = poses * _OPENCV_FROM_OPENGL
  check_poses(path, poses[chosen], chosen)
  frames = [
    RgbdFrame(
      folder / "images" / f"img{i}.png",
      folder / "depth" / f"depth{i}.png",
      poses[i],
    )
    for i in chosen
  ]
  return rgbd_sequence(folder.name, frames, options)


def _count(folder: Path, pattern: str) -> int:
  """Counts the frames in a folder that must hold nothing else."""
  paths = entries(folder)
  for path in paths:
    if not re.fullmatch(pattern, path.name):
      raise InputError(f"{path}: is no frame, and would be counted as one")
  return len(paths)
