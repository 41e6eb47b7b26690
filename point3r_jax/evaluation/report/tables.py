"""The table of an evaluation: the paper's columns, its numbers beside ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from point3r_jax.evaluation.report import published
from point3r_jax.evaluation.results import Evaluation

OURS = "point3r-jax, this run"
THEIRS = "Point3R, published"
MISSING = "-"
ALIGNMENTS = {
  "median": "median",
  "scale": "scale",
  "scale_shift": "scale & shift",
  "lad": "scale & shift, true LAD",
  "least_squares": "scale & shift, least squares",
  "metric": "none (metric)",
}


# Of videos, as far as papers have tables of them.
_PUBLISHED_ALIGNMENTS = ("scale", "scale_shift", "metric")


class Column(NamedTuple):
  """A metric in a table.

  Attributes:
    metric: its name in results.
    title: with an arrow to the better side.
    percent: whether the fraction is printed as percent.
  """

  metric: str
  title: str
  percent: bool = False


class Row(NamedTuple):
  """A line of a table.

  Attributes:
    group: what the line has in common with its neighbours; may be empty.
    label: whose numbers these are.
    notes: indices of the notes that explain it.
    metrics: by the names of the columns; those that are not there are missing.
  """

  group: str
  label: str
  notes: tuple[int, ...]
  metrics: Mapping[str, float]


class Table(NamedTuple):
  """A table with its notes.

  Attributes:
    group_title: above the groups; empty: there are no groups.
    columns: from left to right.
    rows: from top to bottom.
    notes: what explains rows.
    remarks: what holds for all of it.
  """

  group_title: str
  columns: tuple[Column, ...]
  rows: list[Row]
  notes: list[str]
  remarks: list[str]


_DEPTH = (
  Column("abs_rel", "Abs Rel ↓"),
  Column("delta_1_25", "δ<1.25 (%) ↑", percent=True),
)
_RPE = (
  Column("rpe_trans", "RPE trans ↓"),
  Column("rpe_rot_deg", "RPE rot (°) ↓"),
)
_COLUMNS = {
  "mv_recon": (
    Column("accuracy", "Acc mean ↓"),
    Column("accuracy_median", "Acc med ↓"),
    Column("completeness", "Comp mean ↓"),
    Column("completeness_median", "Comp med ↓"),
    Column("normal_consistency", "NC mean ↑"),
    Column("normal_consistency_median", "NC med ↑"),
  ),
  "monodepth": _DEPTH,
  "video_depth": _DEPTH,
  "relpose": (Column("ate", "ATE ↓"), *_RPE),
  "synthetic": (
    *_DEPTH,
    Column("abs_rel_metric", "Abs Rel metric ↓"),
    Column("ate_over_path", "ATE / path ↓"),
    *_RPE,
    Column("accuracy_over_scene", "Acc / scene ↓"),
    Column("completeness_over_scene", "Comp / scene ↓"),
  ),
}
_AVERAGES = {
  "pixels": "Averages are weighted by valid pixels.",
  "samples": "Averages weigh all images or videos alike.",
}
_ALIGNED_BY = {
  "medians": "median shift along the view, median scale",
  "sim3": "a similarity alignment (Umeyama)",
  "se3": "a rigid alignment (Umeyama)",
  "none": "no alignment",
}
_REMARKS = {
  "mv_recon": "Acc and Comp in metres, after {align} and rigid ICP; mean over "
  "sequences.",
  "monodepth": "Each image has an alignment of its own: the ratio of medians, "
  "unless another is named.",
  "video_depth": "One alignment for a whole video.",
  "relpose": "After {align} of the whole path; root mean squares, then the "
  "mean over sequences. ATE and RPE trans are in the unit of the true path "
  "(metres, but for Sintel).",
  "synthetic": "Synthetic scenes; nothing is published. ATE is divided by the "
  "length of the path, Acc and Comp by the size of the scene. The trivial "
  "baselines show the score without any skill.",
}


def report_title(evaluation: Evaluation) -> str:
  """Returns what the report is called."""
  if evaluation.task == "synthetic":  # The name of its only dataset, too.
    return "Synthetic scenes"
  return f"{evaluation.task} on {evaluation.dataset}"


def headline(evaluation: Evaluation) -> str | None:
  """Returns the metric that sequences are ranked by; None without results."""
  names = {name for s in evaluation.sequences for name in s.metrics}
  names |= set(evaluation.metrics)
  metric = _COLUMNS[evaluation.task][0].metric
  candidates = [metric] + [f"{alignment}/{metric}" for alignment in ALIGNMENTS]
  return next((name for name in candidates if name in names), None)


def find_column(metric: str) -> Column:
  """Returns how a metric is printed, whatever its prefix."""
  name = metric.rpartition("/")[2]
  columns = [c for columns in _COLUMNS.values() for c in columns]
  return next((c for c in columns if c.metric == name), Column(name, name))


def metric_title(metric: str) -> str:
  """Returns how a metric is called in reports, with its prefix if any."""
  prefix, title = metric.rpartition("/")[0], find_column(metric).title
  return f"{ALIGNMENTS.get(prefix, prefix)}: {title}" if prefix else title


def coverage(evaluation: Evaluation) -> str:
  """Returns how much of the dataset is in the averages; empty: all of it."""
  counted = sum(s.excluded is None for s in evaluation.sequences)
  total = len(evaluation.sequences) + len(evaluation.left_out)
  if evaluation.partial:
    return f"partial: {counted} of {total} sequences"
  return f"{counted} of {total} sequences" if counted < total else ""


def warning(evaluation: Evaluation) -> str:
  """Returns the sentence on what is not in the averages; empty: nothing."""
  covered = coverage(evaluation)
  if not covered:
    return ""
  text = f"{covered[0].upper()}{covered[1:]}; the averages are over these alone"
  if evaluation.partial:
    text += " and do not compare with published ones"
  return f"{text}."


def gaps(evaluation: Evaluation) -> dict[str, list[tuple[str, str]]]:
  """Returns (name, reason) of sequences outside the averages, by kind."""
  excluded = [
    (s.name, s.excluded) for s in evaluation.sequences if s.excluded is not None
  ]
  return {
    "Left out (no usable data)": [tuple(x) for x in evaluation.left_out],
    "Excluded from the averages": excluded,
  }


def format_value(value: float | None, percent: bool = False) -> str:
  """Returns a number as papers print it."""
  if value is None:
    return MISSING
  return f"{100 * value:.1f}" if percent else f"{value:.3f}"


def _groups(evaluation: Evaluation) -> dict[str, dict[str, float]]:
  """Splits what the table has by what precedes its name; "" if nothing."""
  columns = {column.metric for column in _COLUMNS[evaluation.task]}
  groups: dict[str, dict[str, float]] = {}
  for key, value in evaluation.metrics.items():
    prefix, _, name = key.rpartition("/")
    if name in columns:
      groups.setdefault(prefix, {})[name] = value
  return groups


class _Notes(list[str]):
  """Notes in the order in which they are first referred to."""

  def number(self, text: str) -> int:
    """Returns the index of a note, which is new if need be."""
    if text not in self:
      self.append(text)
    return self.index(text)


def _ours(evaluation: Evaluation, label: str = OURS) -> str:
  covered = coverage(evaluation)
  return f"{label} ({covered})" if covered else label


def _video_rows(evaluation: Evaluation, notes: _Notes) -> list[Row]:
  groups = _groups(evaluation) or {name: {} for name in _PUBLISHED_ALIGNMENTS}
  rows = []
  for name in sorted(groups, key=[*ALIGNMENTS, *groups].index):
    title = ALIGNMENTS.get(name, name)
    rows.append(Row(title, _ours(evaluation), (), groups[name]))
    ambiguous = name in published.PER_SEQUENCE_ALIGNMENTS
    setting = "per-sequence" if ambiguous else name
    theirs = published.published("video_depth", evaluation.dataset, setting)
    if theirs is not None:
      numbers = [notes.number(published.SOURCE)]
      if ambiguous:
        numbers.append(notes.number(published.AMBIGUOUS_ALIGNMENT))
      rows.append(Row(title, THEIRS, tuple(numbers), theirs))
  return rows


def _rows(evaluation: Evaluation, notes: _Notes) -> list[Row]:
  """Returns the rows of all tasks but video depth."""
  task, groups = evaluation.task, _groups(evaluation)
  plain, setting = groups.pop("", {}), ""
  rows = [Row("", _ours(evaluation), (), plain)] if plain or not groups else []
  if task == "monodepth":
    for name, metrics in groups.items():
      label = f"{OURS}, aligned by {ALIGNMENTS.get(name, name)}"
      rows.append(Row("", _ours(evaluation, label), (), metrics))
  if task == "mv_recon":
    setting = evaluation.run.get("setting", "sparse")
  theirs = published.published(task, evaluation.dataset, setting)
  if theirs is not None:
    numbers = [notes.number(published.SOURCE)]
    if setting == "long":
      numbers.append(notes.number(published.LONG_MEANS_ONLY))
    rows.append(Row("", THEIRS, tuple(numbers), theirs))
  if task == "synthetic":
    for name, metrics in groups.items():
      label = _ours(evaluation, f"trivial: {name.replace('_', ' ')}")
      rows.append(Row("", label, (), metrics))
  return rows


def build_table(evaluation: Evaluation) -> Table:
  """Returns the table of an evaluation in the paper's format."""
  notes, video = _Notes(), evaluation.task == "video_depth"
  rows = (_video_rows if video else _rows)(evaluation, notes)
  protocol = evaluation.run.get("protocol", {})
  usual = "medians" if evaluation.task == "mv_recon" else "sim3"
  align = _ALIGNED_BY[protocol.get("align", usual)]
  remarks = [_REMARKS[evaluation.task].format(align=align)]
  average = protocol.get("average")
  if average in _AVERAGES:
    remarks[0] += f" {_AVERAGES[average]}"
  deviations = evaluation.run.get("deviations")
  if deviations:
    what = "Not the published protocol, so not comparable"
    if evaluation.task == "synthetic":
      what = "Not the default protocol, so not comparable"
    remarks.append(f"{what}: {'; '.join(deviations)}")
  broken = [k for k, v in evaluation.metrics.items() if not np.isfinite(v)]
  if broken:
    remarks.append(f"Not finite: {', '.join(broken)}.")
  return Table(
    "Alignment" if video else "",
    _COLUMNS[evaluation.task],
    rows,
    list(notes),
    remarks,
  )


def sequence_columns(evaluation: Evaluation) -> list[Column]:
  """Returns the columns of the table that has a row a sequence."""
  names = {name for s in evaluation.sequences for name in s.metrics}
  prefixes = [""]
  if evaluation.task in ("monodepth", "video_depth"):
    prefixes += [f"{alignment}/" for alignment in ALIGNMENTS]
  return [
    column._replace(metric=prefix + column.metric)
    for prefix in prefixes
    for column in _COLUMNS[evaluation.task]
    if prefix + column.metric in names
  ]


def _plain(text: str) -> str:
  """Returns text that Markdown shows as it is, on one line, in a cell."""
  text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
  text = re.sub(r"&(?=[#\w])", "&amp;", text)
  return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)


def _line(cells: list[str]) -> str:
  return f"| {' | '.join(cells)} |"


def markdown(evaluation: Evaluation) -> str:
  """Returns the table with title, notes and gaps as Markdown."""
  table = build_table(evaluation)
  skip = 0 if table.group_title else 1  # The column of groups, if useless.
  heads = [table.group_title, "", *(c.title for c in table.columns)]
  rules = [":--", ":--", *("--:" for _ in table.columns)]
  lines = [
    f"# {_plain(report_title(evaluation))}",
    "",
    _line([_plain(head) for head in heads][skip:]),
    _line(rules[skip:]),
  ]
  for row in table.rows:
    marks = "".join(f" [{n + 1}]" for n in row.notes)
    cells = [
      format_value(row.metrics.get(c.metric), c.percent) for c in table.columns
    ]
    label = _plain(row.label) + marks
    lines.append(_line([_plain(row.group), label, *cells][skip:]))
  lines.append("")
  if warning(evaluation):
    lines += [f"> **{_plain(warning(evaluation))}**", ""]
  lines += [f"[{n}] {_plain(t)}\n" for n, t in enumerate(table.notes, 1)]
  lines += [f"{_plain(remark)}\n" for remark in table.remarks]
  if "checkpoint" in evaluation.run:
    lines.append(f"Checkpoint: {_plain(str(evaluation.run['checkpoint']))}\n")
  for title, items in gaps(evaluation).items():
    if items:
      lines += [f"{title}:\n"]
      lines += [f"- {_plain(name)}: {_plain(why)}" for name, why in items]
      lines.append("")
  return "\n".join(lines).rstrip() + "\n"
