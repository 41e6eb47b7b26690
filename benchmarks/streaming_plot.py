"""Draws and sums up what `benchmarks.streaming --case growth` measured.

  python -m benchmarks.streaming_plot growth.json growth.svg

draws a plot again, or where matplotlib was missing, and prints the summary.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from point3r_jax.evaluation.report.plots import style

# Points of a line at most: an SVG of thousands would be large, and noisy.
_BINS = 200
_FAINT, _TIME, _POINTERS = "#8c8c8c", "#b4361c", "#2b5c8a"


def _without_growth(rows: Mapping[str, Any]) -> np.ndarray:
  """Returns (T,) bool: not the first frame, nor one that makes memory grow."""
  return np.append(False, np.diff(rows["capacity"]) == 0)


def steady(rows: Mapping[str, Sequence[float]]) -> np.ndarray:
  """Returns (T,) bool: frames that have nothing to do with growth.

  Not the first one, none that makes memory grow, and none beside which the next
  capacity is compiled. All, if there is no other.

  Args:
    rows: values of every frame, at least "capacity" and "compiling".
  """
  keep = _without_growth(rows) & ~np.asarray(rows["compiling"], bool)
  return keep if keep.any() else np.ones_like(keep)


def summarize(rows: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """Says what a stream's frames come to; times are those of `steady` frames.

  The trend is that at the last capacity: the median of its last quarter over
  that of its first.

  Args:
    rows: "ms", "pointers", "capacity", "compilations" and "compiling" of every
      frame.
  """
  ms, capacity = np.asarray(rows["ms"]), np.asarray(rows["capacity"])
  keep = steady(rows)

  def times(values):
    median, high = np.percentile(values, [50, 95])
    return {
      "frames": len(values),
      "ms": round(float(median), 3),
      "p95_over_median": round(float(high / median), 3),
    }

  last = ms[keep & (capacity == capacity[-1])]
  quarter = -(-len(last) // 4)
  trend = None
  if quarter:
    trend = float(np.median(last[-quarter:]) / np.median(last[:quarter]))
  grown = [int(i) for i in np.flatnonzero(np.diff(capacity)) + 1]
  beside = _beside_compiling(rows)
  overall = times(ms[keep])
  return {
    "ms": overall["ms"],
    "p95_over_median": overall["p95_over_median"],
    "trend": trend and round(trend, 3),
    "pointers_last_most": [
      int(rows["pointers"][-1]),
      int(max(rows["pointers"])),
    ],
    "by_capacity": {
      str(size): times(ms[keep & (capacity == size)])
      for size in np.unique(capacity)
      if (keep & (capacity == size)).any()
    },
    "beside_compiling": times(ms[beside]) if beside.any() else None,
    "first_frame_ms": float(ms[0]),
    "growth_ms": {str(i): float(ms[i]) for i in grown},
    "capacities": len(np.unique(capacity)),
    "compilations_after_first": int(sum(rows["compilations"][1:])),
  }


def _binned(
  frames: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns bins' middles (K,) and their 5th, 50th and 95th percentiles (3, K).

  Args:
    frames: (T,) numbers of frames, in order.
    values: (T,).
  """
  bins = min(_BINS, len(frames))
  groups = np.array_split(np.arange(len(frames)), bins)
  middle = np.array([frames[group].mean() for group in groups])
  table = [np.percentile(values[group], [5, 50, 95]) for group in groups]
  return middle, np.array(table).T


def _beside_compiling(rows: Mapping[str, Any]) -> np.ndarray:
  """Returns which frames (T,) ran beside a compilation and did not wait."""
  return _without_growth(rows) & np.asarray(rows["compiling"], bool)


def _runs(flags: np.ndarray) -> np.ndarray:
  """Returns where runs of true flags (T,) start and stop, (R, 2)."""
  edges = np.diff(flags, prepend=False, append=False)
  return np.flatnonzero(edges).reshape(-1, 2)


def draw(contents: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws time and pointers a frame; the same numbers give the same file.

  Args:
    contents: of growth.json.
    path: the SVG to write.

  Raises:
    InputError: matplotlib is missing.
  """
  with style():
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = contents["each"]
    ms, capacity = np.asarray(rows["ms"]), np.asarray(rows["capacity"])
    # Frames beside a compilation are shown, unlike those that wait for it.
    keep = np.flatnonzero(_without_growth(rows))
    keep = keep if keep.size else np.arange(len(ms))
    figure = Figure((7, 4.4), dpi=100, layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.set_title("time a frame (ms)")
    middle, (low, median, high) = _binned(keep, ms[keep])
    top.fill_between(
      middle, low, high, color=_TIME, alpha=0.2, linewidth=0, label="5 to 95 %"
    )
    top.plot(middle, median, color=_TIME, linewidth=1.4, label="median")
    top.set_ylim(0, 1.25 * np.percentile(ms[keep], 99))
    label = "while compiling"
    for start, stop in _runs(_beside_compiling(rows)):
      top.axvspan(start, stop, color=_FAINT, alpha=0.15, lw=0, label=label)
      label = None

    bottom.set_title("pointers")
    middle, (_, count, _) = _binned(
      np.arange(len(ms)), np.asarray(rows["pointers"])
    )
    changes = np.flatnonzero(np.diff(capacity)) + 1
    starts = np.concatenate([[0], changes])
    ends = np.append(starts, len(ms) - 1)
    bottom.step(
      ends,
      np.append(capacity[starts], capacity[-1]),
      where="post",
      color=_FAINT,
      linewidth=1,
      linestyle="--",
      label="room for",
    )
    bottom.plot(
      middle, count, color=_POINTERS, linewidth=1.4, label="in memory"
    )
    bottom.set_ylim(0, 1.15 * capacity.max())
    bottom.set_xlabel("frame")
    bottom.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    bottom.margins(x=0.01)
    for axes in (top, bottom):
      for frame in changes:
        axes.axvline(frame, color=_FAINT, linewidth=0.5, zorder=0)
      axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    figure.savefig(
      path, format="svg", metadata=dict.fromkeys(("Creator", "Date"))
    )


def main() -> None:
  """Draws a file of measurements again."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("json", type=pathlib.Path, help="growth.json")
  parser.add_argument("svg", type=pathlib.Path, help="to write")
  flags = parser.parse_args()
  contents = json.loads(flags.json.read_text())
  draw(contents, flags.svg)
  print(json.dumps(summarize(contents["each"])))


if __name__ == "__main__":
  main()
