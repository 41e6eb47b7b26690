"""NYUv2, for depth of single images.

  ROOT/nyu_images/*.png   the 654 official test frames
  ROOT/nyu_depths/*.npy   metres

Paired by position in the lists of names.
"""

from __future__ import annotations

import functools
from pathlib import Path

from point3r_jax.evaluation.benchmarks.base import Layout
from point3r_jax.evaluation.benchmarks.builders import (
  DepthOptions,
  depth_sequence,
)
from point3r_jax.evaluation.benchmarks.files import npy_size, read_npy
from point3r_jax.evaluation.benchmarks.folders import (
  files_in,
  find_root,
  images_in,
)
from point3r_jax.evaluation.sequences import Sequence


def layout(root: Path | None, options: DepthOptions) -> Layout:
  """The one sequence that there is: of independent images."""
  root = find_root(root, "nyu_images", "nyu_v2/val")
  builders = {"nyu": functools.partial(_images, root, options)}
  return Layout(builders, root, expected_sequences=1, expected_frames=654)


def _images(root: Path, options: DepthOptions) -> Sequence:
  return depth_sequence(
    "nyu",
    images_in(root / "nyu_images"),
    files_in(root / "nyu_depths", [".npy"]),
    npy_size,
    read_npy,
    options,
    independent=True,
  )
