"""Line plots and point clouds of a report, as SVG for its HTML.

Colours are CSS variables of the page, so that plots follow its light or dark
theme.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from point3r_jax.evaluation.report.figures import (
  CloudFigure,
  TrajectoryFigure,
  require_matplotlib,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MAX_LINES = 24  # Thin lines in a plot.
MAX_STEPS = 240  # Points of a line.
_MAX_POINTS = 20_000  # Of a cloud.

_INK, _FAINT, _ACCENT = "#222222", "#8c8c8c", "#b4361c"
_CSS_VARIABLES = {
  _INK: "var(--ink)",
  _FAINT: "var(--faint)",
  _ACCENT: "var(--accent)",
}
# To be seen on light and on dark.
_CLOUD_TRUTH, _CLOUD_PREDICTION = (125, 138, 153), (217, 96, 59)
_STYLE = {
  "axes.edgecolor": _FAINT,
  "axes.labelcolor": _INK,
  "axes.labelsize": 10,
  "axes.linewidth": 0.6,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlecolor": _INK,
  "axes.titlelocation": "left",
  "axes.titlesize": 11,
  "font.sans-serif": ["DejaVu Sans", "sans-serif"],
  "font.size": 10,
  "legend.fontsize": 10,
  "legend.frameon": False,
  "legend.labelcolor": _INK,
  "svg.fonttype": "none",
  "svg.hashsalt": "point3r",
  "text.color": _INK,
  "text.parse_math": False,
  "xtick.color": _FAINT,
  "xtick.labelcolor": _INK,
  "xtick.major.width": 0.6,
  "ytick.color": _FAINT,
  "ytick.labelcolor": _INK,
  "ytick.major.width": 0.6,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
  """Within it matplotlib draws as reports look, not as the user likes it."""
  require_matplotlib()
  import matplotlib

  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    yield


def _figure(width: float, height: float) -> Figure:
  from matplotlib.figure import Figure

  return Figure((width, height), dpi=120, layout="constrained")


def to_svg(figure: Figure, label: str) -> str:
  """Returns an `<svg>` element for HTML, without a size of its own.

  Args:
    figure: drawn within `style`, in which this must be called too.
    label: for those who do not see it, HTML-escaped.
  """
  file = io.StringIO()
  nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  figure.savefig(file, format="svg", metadata=nothing, transparent=True)
  svg = file.getvalue()
  svg = svg[svg.index("<svg") :]
  # HTML needs no namespaces; a style in a page would hold for all of it.
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
  svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
  # Most names are never referred to and the same in every plot.
  used = set(re.findall(r"#([\w-]+)", svg))
  svg = re.sub(
    r' id="([^"]*)"', lambda match: match[0] * (match[1] in used), svg
  )
  for color, variable in _CSS_VARIABLES.items():
    svg = svg.replace(color, variable)
  head = f'<svg role="img" aria-label="{label}"'
  return re.sub(r'^<svg width="\S+" height="\S+"', lambda _: head, svg)


def _legend(axes: Axes, **options) -> None:
  """Puts the legend beside the title."""
  axes.legend(
    loc="lower right",
    bbox_to_anchor=(1, 1),
    ncols=3,
    borderpad=0,
    borderaxespad=0.3,
    columnspacing=1.2,
    handlelength=1.4,
    **options,
  )


def _steps(length: int) -> np.ndarray:
  """Returns at most `MAX_STEPS` indices, evenly and with both ends."""
  return np.unique(
    np.linspace(0, length - 1, min(length, MAX_STEPS)).round()
  ).astype(int)


def _stack(lines: Sequence[Sequence[float]]) -> np.ndarray:
  """Returns lines as (S, T); NaN after their ends and where not finite."""
  table = np.full((len(lines), max(map(len, lines))), np.nan)
  for row, line in zip(table, lines, strict=True):
    row[: len(line)] = line
  return np.where(np.isfinite(table), table, np.nan)


def _quartiles(table: np.ndarray) -> np.ndarray:
  """Returns the (3, T) quartiles of (S, T) values over S; NaN of none."""
  result = np.full((3, table.shape[1]), np.nan)
  known = np.isfinite(table).any(axis=0)
  result[:, known] = np.nanpercentile(table[:, known], [25, 50, 75], axis=0)
  return result


def _limit_above(axes: Axes, table: np.ndarray) -> None:
  """Ends the axis where single wild values would press down all others."""
  values = table[np.isfinite(table)]
  if not values.size:
    return
  low, high, usual = values.min(), values.max(), np.percentile(values, 98)
  axes.set_ylim(bottom=min(0, 1.05 * low))
  if high > 4 * usual > 0:
    axes.set_ylim(top=1.5 * usual)
    beyond = f"{(values > 1.5 * usual).sum()} of {values.size} values above"
    axes.text(1, 0.97, beyond, ha="right", va="top", transform=axes.transAxes)
  elif high <= 0:
    axes.set_ylim(top=1)


def draw_curves(
  lines: Sequence[Sequence[float]], title: str, quartiles: bool = True
) -> Figure:
  """Draws values against frames: thin lines, their median and quartiles.

  Args:
    lines: the values of at least one frame for each of at least one sequence.
    title: what they are, with the unit.
    quartiles: whether to draw these too.
  """
  from matplotlib.ticker import MaxNLocator

  figure = _figure(6.2, 2.7)
  axes = figure.add_subplot(title=title, xlabel="frame")
  table = _stack(lines)
  x = _steps(table.shape[1])
  marker = "." if len(x) < 2 else None
  shown = np.linspace(0, len(lines) - 1, min(len(lines), MAX_LINES))
  one = len(lines) == 1
  for row in table[np.rint(shown).astype(int)]:
    thin = {"linewidth": 0.6, "color": _FAINT, "alpha": 0.5}
    bold = {"linewidth": 1.4, "color": _ACCENT}
    line = axes.plot(x, row[x], marker=marker, **(bold if one else thin))[0]
  if not one:
    line.set_label("sequences")
    low, median, high = _quartiles(table)[:, x]
    if quartiles:
      axes.fill_between(
        x, low, high, color=_ACCENT, alpha=0.18, linewidth=0, label="quartiles"
      )
    axes.plot(
      x, median, color=_ACCENT, linewidth=1.6, marker=marker, label="median"
    )
    _legend(axes)
  _limit_above(axes, table)
  axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
  axes.margins(x=0.01)
  return figure


def _finite(points: np.ndarray) -> np.ndarray:
  return np.where(np.isfinite(points), points, np.nan).astype(np.float64)


def draw_trajectory(content: TrajectoryFigure) -> Figure:
  """Draws both paths from above and from the side."""
  figure = _figure(6.2, 2.9)
  truth, prediction = _finite(content.truth), _finite(content.prediction)
  views = ((0, 2, "above"), (2, 1, "side"))
  for place, (across, up, title) in enumerate(views, 1):
    axes = figure.add_subplot(1, 2, place, title=title)
    for path, color, name, width in (
      (truth, _INK, "truth", 1.1),
      (prediction, _ACCENT, "prediction", 1.4),
    ):
      path = path[_steps(len(path)) if len(path) else []]
      axes.plot(
        path[:, across], path[:, up], color=color, linewidth=width, label=name
      )
      axes.plot(*path[:1, [across, up]].T, "o", color=color, markersize=4)
    axes.set_aspect("equal", adjustable="datalim")
    _name_axes(axes, across, up, content.unit)
  _legend(axes)
  return figure


def _name_axes(axes: Axes, across: int, up: int, unit: str) -> None:
  """Labels the axes of a view; y points down."""
  names = ("x, right", "y, down", "z, forward")
  axes.set(xlabel=f"{names[across]} ({unit})", ylabel=f"{names[up]} ({unit})")
  if up == 1:
    axes.invert_yaxis()


def _thin_out(
  points: np.ndarray, colors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns at most `_MAX_POINTS` finite points, by chance, and their colours.

  Args:
    points: (N, 3).
    colors: (N, 3) from 0 to 255.
  """
  keep = np.flatnonzero(np.isfinite(points).all(axis=1))
  keep = np.random.default_rng(0).permutation(keep)[:_MAX_POINTS]
  return points[keep], colors[keep] / 255


def _flat(color: Sequence[int], points: np.ndarray) -> np.ndarray:
  return np.broadcast_to(np.array(color), points.shape)


def _draw_points(
  axes: Axes, points: np.ndarray, colors: np.ndarray, up: int
) -> None:
  """Draws points as pixels; later ones hide earlier ones."""
  axes.scatter(
    points[:, 0],
    points[:, up],
    s=1,
    c=colors,
    linewidths=0,
    rasterized=True,
    antialiaseds=False,
  )


def draw_cloud(content: CloudFigure) -> Figure:
  """Draws both clouds from the front, and mixed from above."""
  colors = content.colors
  if colors is None:
    colors = _flat(_CLOUD_PREDICTION, content.prediction)
  flat_truth = _flat(_CLOUD_TRUTH, content.truth)
  truth = _thin_out(content.truth, flat_truth)
  prediction = _thin_out(content.prediction, colors)
  both = _thin_out(
    np.concatenate([content.truth, content.prediction]),
    np.concatenate([flat_truth, _flat(_CLOUD_PREDICTION, content.prediction)]),
  )
  low, high = np.zeros(3), np.ones(3)
  if len(truth[0]):
    low, high = np.percentile(truth[0], [1, 99], axis=0)
  middle, reach = (low + high) / 2, 0.6 * ((high - low).max() or 1.0)
  figure = _figure(12, 4.1)
  views = (
    (1, "truth, front", truth),
    (1, "prediction, front", prediction),
    (2, "above", both),
  )
  for place, (up, title, (points, shades)) in enumerate(views, 1):
    axes = figure.add_subplot(1, 3, place, title=title, aspect="equal")
    axes.set_xlim(middle[0] - reach, middle[0] + reach)
    axes.set_ylim(middle[up] - reach, middle[up] + reach)
    # From the front, what is near hides what is far.
    order = np.argsort(-points[:, 2]) if up == 1 else slice(None)
    _draw_points(axes, points[order], shades[order], up)
    _name_axes(axes, 0, up, "m")
  for name, color in (
    ("truth", _CLOUD_TRUTH),
    ("prediction", _CLOUD_PREDICTION),
  ):
    axes.scatter([], [], s=18, color=np.array(color) / 255, label=name)
  _legend(axes, handletextpad=0.1)
  return figure
