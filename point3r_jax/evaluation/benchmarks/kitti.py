"""KITTI depth selection, for depth.

  ROOT/depth_selection/val_selection_cropped/image_gathered/DRIVE/*.png
  ROOT/depth_selection/val_selection_cropped/groundtruth_depth_gathered/DRIVE/
    *.png   16-bit, 256 a metre, mostly empty

In spite of the folder's name the images are whole. A drive is one of the 13 of
the depth-prediction validation split with up to 110 frames. Images and depth
are paired by position.
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
  subfolders,
)
from point3r_jax.evaluation.sequences import Sequence

_IMAGES, _TRUTHS = "image_gathered", "groundtruth_depth_gathered"


@dataclasses.dataclass(frozen=True)
class KittiOptions(DepthOptions):
  """Options of KITTI.

  Attributes:
    sequences: names of drives; None: every folder, as published.
  """

  sequences: tuple[str, ...] | None = None


def layout(
  root: Path | None, options: KittiOptions, independent: bool
) -> Layout:
  """Lists the drives, those too that lack images or truth."""
  root = find_root(root, _IMAGES, "kitti/depth_selection/val_selection_cropped")
  names = options.sequences
  if names is None:
    names = set(subfolders(root / _IMAGES))
    if (root / _TRUTHS).is_dir():
      names |= set(subfolders(root / _TRUTHS))
  builders = {
    name: functools.partial(_sequence, root, name, options, independent)
    for name in sorted(names)
  }
  return Layout(builders, root, expected_sequences=13)


def _sequence(
  root: Path, name: str, options: KittiOptions, independent: bool
) -> Sequence:
  return depth_sequence(
    name,
    images_in(root / _IMAGES / name),
    files_in(root / _TRUTHS / name, [".png"]),
    png16_size,
    functools.partial(read_depth_png, steps_per_metre=256),
    options,
    independent,
  )
