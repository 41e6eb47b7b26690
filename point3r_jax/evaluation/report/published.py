"""The published numbers of Point3R, to be printed beside a run's.

In the units of this package's results: shares are fractions (papers print
percent), lengths are metres, angles degrees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SOURCE = (
  "Second-hand: taken from later papers that quote the second arXiv version of"
  " the Point3R paper (arXiv 2507.02863v2); not verified against it."
)
# The alignments of this package that "per-sequence" in the papers may mean.
PER_SEQUENCE_ALIGNMENTS = ("scale", "scale_shift")
AMBIGUOUS_ALIGNMENT = (
  'The papers call these numbers "per-sequence"; which alignment that was is'
  " ambiguous: the published run script aligns scale and shift, its"
  " documentation speaks of scale alone. They are printed beside both."
)
LONG_MEANS_ONLY = "Of long sequences only means are quoted, no medians."

_ALIASES = {"neuralrgbd": "nrgbd", "nyu": "nyuv2", "tumdynamics": "tum"}


def _points(accuracy, completeness, consistency) -> dict[str, float]:
  """Names (mean, median) pairs as in the results of mv_recon."""
  pairs = {
    "accuracy": accuracy,
    "completeness": completeness,
    "normal_consistency": consistency,
  }
  return {
    name + suffix: value
    for name, pair in pairs.items()
    for suffix, value in zip(("", "_median"), pair, strict=True)
  }


def _means(*values: float) -> dict[str, float]:
  names = ("accuracy", "completeness", "normal_consistency")
  return dict(zip(names, values, strict=True))


def _depth(abs_rel: float, delta: float) -> dict[str, float]:
  return {"abs_rel": abs_rel, "delta_1_25": delta}


def _pose(ate: float, trans: float, rot: float) -> dict[str, float]:
  return {"ate": ate, "rpe_trans": trans, "rpe_rot_deg": rot}


# By task, dataset and setting ("" where there is only one).
_PUBLISHED: Mapping[tuple[str, str, str], Mapping[str, float]] = {
  ("mv_recon", "7scenes", "sparse"): _points(
    (0.085, 0.046), (0.087, 0.030), (0.739, 0.854)
  ),
  ("mv_recon", "nrgbd", "sparse"): _points(
    (0.077, 0.030), (0.069, 0.027), (0.835, 0.971)
  ),
  ("mv_recon", "7scenes", "long"): _means(0.071, 0.031, 0.558),
  ("mv_recon", "nrgbd", "long"): _means(0.110, 0.025, 0.641),
  ("monodepth", "nyuv2", ""): _depth(0.078, 0.923),
  ("monodepth", "sintel", ""): _depth(0.395, 0.550),
  ("monodepth", "bonn", ""): _depth(0.061, 0.945),
  ("monodepth", "kitti", ""): _depth(0.083, 0.946),
  ("video_depth", "sintel", "per-sequence"): _depth(0.481, 0.448),
  ("video_depth", "bonn", "per-sequence"): _depth(0.066, 0.958),
  ("video_depth", "kitti", "per-sequence"): _depth(0.093, 0.935),
  ("video_depth", "sintel", "metric"): _depth(1.208, 0.138),
  ("video_depth", "bonn", "metric"): _depth(0.081, 0.958),
  ("video_depth", "kitti", "metric"): _depth(0.169, 0.805),
  ("relpose", "scannet", ""): _pose(0.097, 0.035, 2.791),
  ("relpose", "sintel", ""): _pose(0.442, 0.154, 1.897),
  ("relpose", "tum", ""): _pose(0.058, 0.031, 0.758),
}


def published(
  task: str, dataset: str, setting: str = ""
) -> Mapping[str, float] | None:
  """Returns the published averages by metric; None where there are none.

  Args:
    task: as in `Evaluation`.
    dataset: its name; case and punctuation do not matter.
    setting: "sparse" or "long" for mv_recon; "per-sequence" or "metric" for
      video_depth (metrics have no alignment in their names); else "".
  """
  name = re.sub(r"[^a-z0-9]", "", dataset.lower())
  return _PUBLISHED.get((task, _ALIASES.get(name, name), setting))
