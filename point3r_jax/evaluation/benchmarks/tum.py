"""TUM RGB-D, the dynamic sequences, for camera poses.

  ROOT/SEQUENCE/rgb_90/*.png
  ROOT/SEQUENCE/groundtruth_90.txt   timestamp tx ty tz qx qy qz qw

Both hold the first 90 of every third pair of an image and a pose that are at
most 0.02 s apart. They are paired by position.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

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
from point3r_jax.evaluation.benchmarks.pose_files import read_tum
from point3r_jax.evaluation.sequences import Sequence


@dataclasses.dataclass(frozen=True)
class TumOptions(PoseOptions):
  """Options of TUM-dynamics.

  Attributes:
    sequences: names; None: every folder, as published.
  """

  sequences: tuple[str, ...] | None = None


def layout(root: Path | None, options: TumOptions) -> Layout:
  """Lists the sequences."""
  root = find_root(root, "*/rgb_90", "tum_dynamics")
  names = subfolders(root) if options.sequences is None else options.sequences
  return Layout(
    {n: functools.partial(_sequence, root / n, options) for n in names}, root
  )


def _sequence(folder: Path, options: TumOptions) -> Sequence:
  read = functools.partial(read_tum, folder / "groundtruth_90.txt")
  return pose_sequence(folder.name, images_in(folder / "rgb_90"), read, options)
