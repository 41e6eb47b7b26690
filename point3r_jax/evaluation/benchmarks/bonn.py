"""Bonn RGB-D Dynamic, for depth.

  ROOT/rgbd_bonn_SEQUENCE/rgb_110/*.png
  ROOT/rgbd_bonn_SEQUENCE/depth_110/*.png   16-bit, 5000 a metre

The `_110` folders are copies of frames 30 to 139 of `rgb` and `depth` in the
order of their names. Images and depth are paired by position: their names are
timestamps that differ.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from point3r_jax.evaluation.benchmarks.base import Layout
from point3r_jax.evaluation.benchmarks.builders import (
  DepthOptions,
  depth_sequence,
)
from point3r_jax.evaluation.benchmarks.files import (
  png16_size,
  read_depth_png,
)
from point3r_jax.evaluation.benchmarks.folders import (
  files_in,
  find_root,
  images_in,
)
from point3r_jax.evaluation.sequences import Sequence

SEQUENCES = (
  *("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous"),
)


@dataclasses.dataclass(frozen=True)
class BonnOptions(DepthOptions):
  """Options of Bonn.

  Attributes:
    sequences: names without `rgbd_bonn_`; published are these five.
  """

  sequences: tuple[str, ...] = SEQUENCES


def layout(
  root: Path | None, options: BonnOptions, independent: bool
) -> Layout:
  """Lists the sequences."""
  root = find_root(root, "rgbd_bonn_*/rgb_110", "rgbd_bonn_dataset")
  builders = {
    name: functools.partial(_sequence, root, name, options, independent)
    for name in options.sequences
  }
  return Layout(builders, root, len(SEQUENCES), expected_frames=550)


def _sequence(
  root: Path, name: str, options: BonnOptions, independent: bool
) -> Sequence:
  folder = root / f"rgbd_bonn_{name}"
  return depth_sequence(
    name,
    images_in(folder / "rgb_110"),
    files_in(folder / "depth_110", [".png"]),
    png16_size,
    functools.partial(read_depth_png, steps_per_metre=5000),
    options,
    independent,
  )
