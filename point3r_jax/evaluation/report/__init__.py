"""Writes what an evaluation found: CSV, JSON, Markdown and HTML."""

from __future__ import annotations

import csv
import io
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from point3r_jax.evaluation.report import tables
from point3r_jax.evaluation.report.figures import Figures
from point3r_jax.evaluation.report.page import page
from point3r_jax.evaluation.results import Evaluation
from point3r_jax.files import atomic_file


def sequences_csv(evaluation: Evaluation) -> str:
  """Returns one row a sequence, with all of its metrics."""
  names = list(
    dict.fromkeys(name for s in evaluation.sequences for name in s.metrics)
  )
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["name", "frames", "weight", "overflow", "excluded", *names])
  for s in evaluation.sequences:
    values = [s.metrics.get(name, "") for name in names]
    writer.writerow(
      [s.name, s.frames, s.weight, s.overflow, s.excluded or "", *values]
    )
  return text.getvalue()


def _plain(value: Any, path: str, broken: list[str]) -> Any:
  """Returns a value as JSON can have it.

  Args:
    value: mappings, lists and scalars, of NumPy too; others become text.
    path: its dotted name.
    broken: the paths of numbers that are not finite are added here; they
      become None.
  """
  if isinstance(value, Mapping):
    return {
      str(key): _plain(item, f"{path}.{key}" if path else str(key), broken)
      for key, item in value.items()
    }
  if isinstance(value, (list, tuple)):
    return [_plain(v, f"{path}.{i}", broken) for i, v in enumerate(value)]
  if value is None or isinstance(value, (bool, str)):
    return value
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real):
    if math.isfinite(value):
      return float(value)
    broken.append(path)
    return None
  return str(value)


def metrics_json(evaluation: Evaluation) -> str:
  """Returns the averages by name, and under "run" all facts about them."""
  gaps = tables.gaps(evaluation)
  left_out, excluded = (
    [{"name": name, "reason": reason} for name, reason in items]
    for items in gaps.values()
  )
  facts = {
    **evaluation.run,
    "task": evaluation.task,
    "dataset": evaluation.dataset,
    "partial": evaluation.partial,
    "sequences": len(evaluation.sequences),
    "sequences_averaged": len(evaluation.sequences) - len(excluded),
    "left_out": left_out,
    "excluded": excluded,
  }
  broken: list[str] = []
  content = _plain(evaluation.metrics, "", broken)
  content["run"] = _plain(facts, "run", broken)
  content["run"]["not_finite"] = broken
  return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> None:
  with atomic_file(path) as file:
    file.write(text.encode())


def write_reports(
  directory: str | os.PathLike[str],
  evaluation: Evaluation,
  figures: Figures | None = None,
) -> None:
  """Writes sequences.csv, metrics.json, table.md and report.html.

  Each file replaces an older one at once, when it is complete.

  Args:
    directory: is made if it does not exist.
    evaluation: what was measured. Two entries of its `run` change the table:
      "setting" ("sparse" or "long", for mv_recon) says which published numbers
      to print, "deviations" (a list of texts) what differs from the published
      protocol.
    figures: what the HTML shows of chosen sequences.

  Raises:
    InputError: matplotlib is missing; all but the HTML is written.
  """
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  _write(directory / "sequences.csv", sequences_csv(evaluation))
  _write(directory / "metrics.json", metrics_json(evaluation) + "\n")
  _write(directory / "table.md", tables.markdown(evaluation))
  _write(directory / "report.html", page(evaluation, figures))
