"""The report of an evaluation as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from point3r_jax.evaluation.report import pictures, plots, tables
from point3r_jax.evaluation.report.figures import (
  MAX_SHOWN,
  DepthFigure,
  Figures,
)
from point3r_jax.evaluation.report.style import CSS
from point3r_jax.evaluation.report.tables import Table
from point3r_jax.evaluation.results import Evaluation, SequenceResult

_TITLES = {
  "mv_recon": "Multi-view reconstruction",
  "monodepth": "Single-frame depth",
  "video_depth": "Video depth",
  "relpose": "Camera pose",
}


def _text(value: object) -> str:
  return html.escape(str(value))


def _section(title: str, parts: Iterable[str]) -> Iterator[str]:
  """Yields a section; nothing if it has no content."""
  body = list(parts)
  if body:
    yield f"<section>\n<h2>{_text(title)}</h2>"
    yield from body
    yield "</section>"


def _note(text: str) -> str:
  return f'<p class="note">{_text(text)}</p>'


def _how_many(items: Collection[Any], what: str) -> Iterator[str]:
  if len(items) > MAX_SHOWN:
    yield _note(f"The first {MAX_SHOWN} of {len(items)} {what}.")


def _table(
  heads: Sequence[str],
  rows: Iterable[tuple[str, Sequence[str], Sequence[str]]],
  css: str = "wide",
) -> Iterator[str]:
  """Yields a table of text, then numbers.

  Args:
    heads: titles of the columns.
    rows: (class, cells of text, cells of numbers).
    css: class of the box around it.
  """
  rows = list(rows)
  texts = len(rows[0][1]) if rows else 1
  yield f'<div class="{css}"><table><thead><tr>'
  for i, head in enumerate(heads):
    yield f'<th class="{"text" if i < texts else "number"}">{_text(head)}</th>'
  yield "</tr></thead><tbody>"
  for kind, words, numbers in rows:
    cells = [f'<td class="text">{_text(word)}</td>' for word in words]
    cells += [f"<td>{_text(number)}</td>" for number in numbers]
    yield f'<tr class="{kind}">{"".join(cells)}</tr>'
  yield "</tbody></table></div>"


def _warning(evaluation: Evaluation) -> Iterator[str]:
  text = tables.warning(evaluation)
  if text:
    yield f'<p class="warning">{_text(text)}</p>'


def _results(evaluation: Evaluation, table: Table) -> Iterator[str]:
  """Yields the table of averages with its notes."""
  skip = 0 if table.group_title else 1
  heads = [table.group_title, "", *(c.title for c in table.columns)]
  rows = []
  for row in table.rows:
    marks = "".join(f" [{n + 1}]" for n in row.notes)
    numbers = [
      tables.format_value(row.metrics.get(c.metric), c.percent)
      for c in table.columns
    ]
    kind = "ours" if row.label.startswith(tables.OURS) else "theirs"
    rows.append((kind, [row.group, row.label + marks][skip:], numbers))
  yield from _table(heads[skip:], rows)
  yield from _warning(evaluation)
  yield from (_note(f"[{n}] {text}") for n, text in enumerate(table.notes, 1))
  yield from map(_note, table.remarks)


def _sequences(evaluation: Evaluation) -> Iterator[str]:
  """Yields the table of sequences, the worst first, excluded ones last."""
  if not evaluation.sequences:
    yield "<p>No sequence was evaluated.</p>"
    return
  metric = tables.headline(evaluation)

  def rank(result: SequenceResult) -> tuple[bool, float]:
    error = result.metrics.get(metric, np.nan)
    error = error if np.isfinite(error) else np.inf
    return result.excluded is not None, -error

  columns = tables.sequence_columns(evaluation)
  titles = [tables.metric_title(c.metric) for c in columns]
  rows = [
    (
      "in" if result.excluded is None else "out",
      [result.name],
      [
        str(result.frames),
        *(
          tables.format_value(result.metrics.get(c.metric), c.percent)
          for c in columns
        ),
      ],
    )
    for result in sorted(evaluation.sequences, key=rank)
  ]
  if metric:
    yield _note(f"Sorted by {tables.metric_title(metric)}: worst first.")
  css = "wide long" if len(rows) > 24 else "wide"
  yield from _table(["Sequence", "Frames", *titles], rows, css)


def _curves(
  lines: Sequence[Sequence[float]], title: str, quartiles: bool
) -> str:
  figure = plots.draw_curves(lines, title, quartiles)
  return f"<figure>{plots.to_svg(figure, _text(title))}</figure>"


def _counted(evaluation: Evaluation) -> list[SequenceResult]:
  return [s for s in evaluation.sequences if s.excluded is None]


def _about_lines(lines: Sequence[Sequence[float]]) -> str:
  """Says what a plot shows of its lines and what it leaves out."""
  if len(lines) == 1:
    text = "One sequence."
  else:
    shown = min(len(lines), plots.MAX_LINES)
    text = (
      "A median or quartile is over the sequences that reach that frame; thin "
      f"lines: {shown} of {len(lines)} sequences."
    )
  if max(map(len, lines)) > plots.MAX_STEPS:
    text += f" Lines go through {plots.MAX_STEPS} of the frames."
  return text


def _error_plots(evaluation: Evaluation) -> Iterator[str]:
  """Yields plots of errors against the frame."""
  results = _counted(evaluation)
  names = dict.fromkeys(name for s in results for name in s.per_frame)
  yield from _how_many(names, "metrics")
  drawn, longest = [], []
  for name in list(names)[:MAX_SHOWN]:
    column = tables.find_column(name)
    factor = 100 if column.percent else 1
    lines = [
      factor * np.asarray(s.per_frame[name], np.float64)
      for s in results
      if len(s.per_frame.get(name, ()))
    ]
    if lines:
      title = tables.metric_title(name)
      drawn.append(_curves(lines, title, quartiles=True))
      longest = max(longest, lines, key=len)
  if drawn:
    yield _note(_about_lines(longest))
    yield from ('<div class="plots">', *drawn, "</div>")


def _cost_plots(evaluation: Evaluation) -> Iterator[str]:
  """Yields plots of pointers and of time against the frame."""
  results = _counted(evaluation)
  pointers = [s.pointers for s in results if len(s.pointers)]
  times = [1e3 * np.asarray(s.seconds) for s in results if len(s.seconds)]
  drawn = [
    _curves(lines, title, quartiles=False)
    for lines, title in (
      (pointers, "pointers in memory"),
      (times, "time a frame (ms)"),
    )
    if lines
  ]
  if drawn:
    yield _note(
      _about_lines(pointers or times)
      + " Time is shared among the streams of a batch, without compilation."
    )
    yield from ('<div class="plots">', *drawn, "</div>")


def _drawn(items: Sequence[Any], draw, css: str) -> Iterator[str]:
  """Yields trajectories or clouds with their captions."""
  if items:
    yield f'<div class="{css}">'
    for item in items[:MAX_SHOWN]:
      caption = _text(f"{item.name}: {item.error}" if item.error else item.name)
      svg = plots.to_svg(draw(item), caption)
      yield f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
    yield "</div>"


def _image(png: bytes, css: str, alt: str) -> str:
  data = base64.b64encode(png).decode()
  return (
    f'<img class="{css}" alt="{_text(alt)}" src="data:image/png;base64,{data}">'
  )


def _depth_panel(content: DepthFigure) -> Iterator[str]:
  """Yields the pictures of a frame, side by side."""
  title = f"{content.name}, frame {content.frame}: {content.error}"
  yield f'<h3>{_text(title)}</h3>\n<div class="pictures">'
  for picture in pictures.depth_pictures(content):
    yield f"<figure>{_image(picture.png, 'map', picture.title)}"
    if picture.bar is not None:
      low, high = map(_text, picture.ends)
      yield _image(picture.bar, "bar", "scale of colours")
      yield f'<div class="scale"><span>{low}</span><span>{high}</span></div>'
    yield f"<figcaption>{_text(picture.title)}</figcaption></figure>"
  yield "</div>"


def _depths(items: Sequence[DepthFigure]) -> Iterator[str]:
  if items:
    yield _note(
      "Depth after alignment, on a logarithmic scale; near is red. Grey: no "
      "truth. Magenta: a prediction that is not positive and finite."
    )
    for item in items[:MAX_SHOWN]:
      yield from _depth_panel(item)


def _gaps(evaluation: Evaluation) -> Iterator[str]:
  for title, items in tables.gaps(evaluation).items():
    if items:
      yield f"<h3>{_text(title)}: {len(items)}</h3>\n<ul>"
      for name, reason in items:
        yield f"<li><b>{_text(name)}</b>: {_text(reason)}</li>"
      yield "</ul>"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple]:
  """Yields (dotted name, value as text) of nested facts."""
  for name, value in facts.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    elif isinstance(value, str):
      yield f"{prefix}{name}", value
    else:
      yield (
        f"{prefix}{name}",
        json.dumps(value, default=str, ensure_ascii=False),
      )


def _definitions(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
  yield '<table class="facts"><tbody>'
  for name, value in facts:
    yield f'<tr><th>{_text(name)}</th><td class="fact">{_text(value)}</td></tr>'
  yield "</tbody></table>"


def _facts(run: Mapping[str, Any]) -> Iterator[str]:
  """Yields the run's facts; those that are many can be folded."""
  simple = {k: v for k, v in run.items() if not isinstance(v, Mapping)}
  if simple:
    yield from _definitions(_flat(simple))
  for name, value in run.items():
    if isinstance(value, Mapping):
      yield f"<details><summary>{_text(name)} ({len(value)})</summary>"
      yield from _definitions(_flat(value))
      yield "</details>"


def _body(evaluation: Evaluation, figures: Figures) -> Iterator[str]:
  title = tables.report_title(evaluation)
  if evaluation.task in _TITLES:
    title = f"{_TITLES[evaluation.task]}: {evaluation.dataset}"
  yield f"<h1>{_text(title)}</h1>"
  checkpoint = evaluation.run.get("checkpoint", "not recorded")
  yield f"<p>{_text(evaluation.task)}; checkpoint: {_text(checkpoint)}</p>"
  yield from _warning(evaluation)
  table = tables.build_table(evaluation)
  yield from _section("Averages", _results(evaluation, table))
  yield from _section("Not in the averages", _gaps(evaluation))
  yield from _section("Sequences", _sequences(evaluation))
  yield from _section("Error against frame", _error_plots(evaluation))
  yield from _section("Memory and time", _cost_plots(evaluation))
  for title, items, parts in (
    (
      "Trajectories",
      figures.trajectories,
      _drawn(figures.trajectories, plots.draw_trajectory, "plots"),
    ),
    ("Depth", figures.depths, _depths(figures.depths)),
    (
      "Point clouds",
      figures.clouds,
      _drawn(figures.clouds, plots.draw_cloud, "clouds"),
    ),
  ):
    yield from _section(title, (*_how_many(items, title.lower()), *parts))
  yield from _section("Run", _facts(evaluation.run))


def page(evaluation: Evaluation, figures: Figures | None = None) -> str:
  """Returns the report.

  Args:
    evaluation: what was measured.
    figures: what to show of chosen sequences.

  Raises:
    InputError: matplotlib is missing.
  """
  title = tables.report_title(evaluation)
  with plots.style():
    body = "\n".join(_body(evaluation, figures or Figures()))
  return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>
{CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
