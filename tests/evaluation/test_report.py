"""Reports: files that parse, say what is missing, and need no other file."""

import csv
import dataclasses
import html.parser
import io
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from point3r_jax.errors import InputError
from point3r_jax.evaluation.report import (
  pictures,
  plots,
  tables,
  write_reports,
)
from point3r_jax.evaluation.report.figures import (
  MAX_SHOWN,
  CloudFigure,
  DepthFigure,
  Figures,
  TrajectoryFigure,
  choose,
)
from point3r_jax.evaluation.report.published import published
from point3r_jax.evaluation.results import Evaluation, SequenceResult
from point3r_jax.evaluation.sequences import LeftOut

pytestmark = pytest.mark.filterwarnings("error")

HOSTILE = "<script>alert('x')</script>|`$a$_[b](c)&amp;\n\"\\"
VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
  """Checks that elements are nested, and collects text and attributes."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.texts = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.handle_startendtag(tag, attrs)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  @property
  def text(self):
    return " ".join(self.texts)


def result(name, metrics, frames=5, **others):
  return SequenceResult(name, frames, metrics, **others)


def evaluation(task="monodepth", dataset="bonn", metrics=None, **others):
  metrics = metrics or {"abs_rel": 0.0612, "delta_1_25": 0.945}
  others.setdefault("sequences", [result("a", metrics), result("b", metrics)])
  return Evaluation(task, dataset, metrics, **others)


def write(path, content, figures=None):
  """Writes reports; returns (rows of the CSV, JSON, Markdown, HTML)."""
  write_reports(path, content, figures)
  names = ["metrics.json", "report.html", "sequences.csv", "table.md"]
  assert sorted(file.name for file in path.iterdir()) == names
  facts, page, rows, table = ((path / n).read_text() for n in names)

  def refuse(constant):
    raise AssertionError(constant)

  facts = json.loads(facts, parse_constant=refuse)
  return list(csv.DictReader(io.StringIO(rows))), facts, table, page


def table_rows(markdown):
  """Returns the cells of a Markdown table's lines, without the rule."""
  lines = [x for x in markdown.splitlines() if x.startswith("|")]
  cells = [[c.strip() for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in lines]
  assert len({len(c) for c in cells}) == 1
  return cells[:1] + cells[2:]


def check_page(text):
  """Checks that nothing outside the file is needed, and returns the page."""
  page = Page(text)
  assert "http://" not in text and "https://" not in text
  assert not {"script", "link", "iframe", "object"} & set(page.tags)
  for name, value in page.attributes:
    assert not name.startswith("on")
    if name in ("src", "href", "xlink:href"):
      assert value.startswith(("data:image/png;base64,", "#"))
  assert not re.search(r"url\((?!#)", text) and "@import" not in text
  names = [value for name, value in page.attributes if name == "id"]
  for name, value in page.attributes:
    if name == "xlink:href" and value.startswith("#"):
      assert value[1:] in names
  return page


def test_files_of_a_plain_evaluation(tmp_path):
  run = {"checkpoint": "ckpt", "config": {"depth": 12}, "seed": np.int64(3)}
  content = evaluation(run=run)
  content.sequences[1] = result("b/2", {"abs_rel": 0.2}, 7, weight=10.5)
  rows, facts, table, page = write(tmp_path / "new" / "folder", content)
  assert [row["name"] for row in rows] == ["a", "b/2"]
  assert rows[0]["delta_1_25"] == "0.945" and rows[1]["delta_1_25"] == ""
  assert rows[1]["frames"] == "7" and float(rows[1]["weight"]) == 10.5
  assert facts["abs_rel"] == 0.0612 and facts["delta_1_25"] == 0.945
  assert facts["run"]["config"] == {"depth": 12} and facts["run"]["seed"] == 3
  assert facts["run"]["task"] == "monodepth"
  assert facts["run"]["sequences"] == facts["run"]["sequences_averaged"] == 2
  assert facts["run"]["partial"] is False and not facts["run"]["not_finite"]
  heads, ours, theirs = table_rows(table)
  assert heads == ["", "Abs Rel ↓", "δ<1.25 (%) ↑"]
  assert ours == [tables.OURS, "0.061", "94.5"]
  assert theirs == [f"{tables.THEIRS} [1]", "0.061", "94.5"]
  assert "[1] Second-hand" in table and "partial" not in table.lower()
  text = check_page(page).text
  for words in ("Second-hand", "94.5", "b/2", "ckpt", "config (1)", "12"):
    assert words in text
  assert "partial" not in text.lower()


def test_older_reports_are_replaced(tmp_path):
  write(tmp_path, evaluation())
  rows, *_ = write(tmp_path, evaluation(sequences=[result("c", {})]))
  assert [row["name"] for row in rows] == ["c"]


def test_partial_evaluations_say_so(tmp_path):
  left_out = [LeftOut("c", "x/0.png is broken"), LeftOut("d", "no truth")]
  content = evaluation(left_out=left_out)
  excluded = result("e", {}, excluded="degenerate path")
  content.sequences.append(excluded)
  rows, facts, table, page = write(tmp_path, content)
  mark = "partial: 2 of 5 sequences"
  assert mark in table_rows(table)[1][0]
  assert mark not in table_rows(table)[2][0]
  assert f"> **{mark.capitalize()}" in table
  for words in ("c: x/0.png is broken", "d: no truth", "e: degenerate path"):
    assert f"- {words}" in table
  text = check_page(page).text
  assert text.count(mark.capitalize()) == 2 and mark in text
  assert "x/0.png is broken" in text and "degenerate path" in text
  run = facts["run"]
  assert run["partial"] is True and run["sequences_averaged"] == 2
  assert run["left_out"][0] == {"name": "c", "reason": "x/0.png is broken"}
  assert run["excluded"] == [{"name": "e", "reason": "degenerate path"}]
  assert rows[2]["excluded"] == "degenerate path" and not rows[0]["excluded"]


def test_excluded_sequences_alone_are_counted_but_not_partial(tmp_path):
  content = evaluation()
  content.sequences.append(result("e", {}, excluded="degenerate path"))
  _, facts, table, _ = write(tmp_path, content)
  assert "(2 of 3 sequences)" in table and "artial" not in table
  assert facts["run"]["partial"] is False


def test_video_depth_has_published_numbers_beside_both_alignments(tmp_path):
  metrics = {
    f"{name}/{metric}": value
    for name in ("metric", "lad", "scale_shift", "scale")
    for metric, value in (("abs_rel", 0.5), ("delta_1_25", 0.25), ("rmse", 9.0))
  }
  content = evaluation("video_depth", "Sintel", metrics)
  _, _, table, page = write(tmp_path, content)
  ours, theirs = tables.OURS, f"{tables.THEIRS} [1]"
  assert table_rows(table) == [
    ["Alignment", "", "Abs Rel ↓", "δ<1.25 (%) ↑"],
    ["scale", ours, "0.500", "25.0"],
    ["scale", f"{theirs} [2]", "0.481", "44.8"],
    ["scale & shift", ours, "0.500", "25.0"],
    ["scale & shift", f"{theirs} [2]", "0.481", "44.8"],
    ["scale & shift, true LAD", ours, "0.500", "25.0"],
    ["none (metric)", ours, "0.500", "25.0"],
    ["none (metric)", theirs, "1.208", "13.8"],
  ]
  assert re.search(r"^\[2\] .*ambiguous", table, re.M)
  assert tables.headline(content) == "scale/abs_rel"
  assert "scale & shift: Abs Rel" in check_page(page).text


def test_trivial_predictors_stand_below_synthetic_results(tmp_path):
  metrics = {
    "abs_rel": 0.1,
    "ate_over_path": 0.02,
    "constant_depth/abs_rel": 0.4,
    "constant_pose/ate_over_path": 0.3,
    "constant_pose/other": 1.0,
    "elsewhere/other": 1.0,
  }
  content = evaluation("synthetic", "synthetic", metrics)
  _, facts, table, page = write(tmp_path, content)
  assert table.startswith("# Synthetic scenes\n")
  assert page.count(">Synthetic scenes</") == 2  # Title and heading.
  heads, *rows = table_rows(table)
  ate = heads.index("ATE / path ↓")
  assert [(r[0], r[1], r[ate]) for r in rows] == [
    (tables.OURS, "0.100", "0.020"),
    ("trivial: constant depth", "0.400", tables.MISSING),
    ("trivial: constant pose", tables.MISSING, "0.300"),
  ]
  assert "Second-hand" not in table
  assert facts["constant_depth/abs_rel"] == 0.4


def test_reconstruction_of_long_sequences(tmp_path):
  metrics = published("mv_recon", "7scenes", "sparse")
  assert len(metrics) == 6
  content = evaluation("mv_recon", "7-Scenes", metrics)
  _, sparse, theirs = table_rows(write(tmp_path, content)[2])
  assert sparse[1:] == theirs[1:]
  content = dataclasses.replace(content, run={"setting": "long"})
  table = write(tmp_path, content)[2]
  none = tables.MISSING
  long = ["0.071", none, "0.031", none, "0.558", none]
  assert table_rows(table)[2][1:] == long
  assert "[2] Of long sequences" in table


@pytest.mark.parametrize(
  ("task", "dataset", "setting", "metric", "value"),
  [
    ("monodepth", "NYU", "", "delta_1_25", 0.923),
    ("relpose", "TUM-dynamics", "", "rpe_rot_deg", 0.758),
    ("video_depth", "kitti", "metric", "abs_rel", 0.169),
    ("mv_recon", "NRGBD", "long", "normal_consistency", 0.641),
  ],
)
def test_published_numbers(task, dataset, setting, metric, value):
  assert published(task, dataset, setting)[metric] == value


def test_nothing_is_published_of_other_data():
  assert published("relpose", "kitti") is None
  assert published("video_depth", "sintel", "lad") is None


def test_deviations_are_told(tmp_path):
  content = evaluation(run={"deviations": ["crop=True", "clip=80"]})
  _, _, table, page = write(tmp_path, content)
  for text in (table, check_page(page).text):
    assert "Not the published protocol" in text and "crop=True; clip=80" in text


def test_values_that_are_not_finite(tmp_path):
  metrics = {"abs_rel": float("nan"), "delta_1_25": np.float32("inf")}
  per_frame = {"abs_rel": [np.nan, 0.1, np.inf], "delta_1_25": [np.nan] * 3}
  content = evaluation(
    metrics=metrics,
    sequences=[result("a", metrics, 3, per_frame=per_frame)] * 2,
    run={"options": {"limit": [1.0, float("inf")]}},
  )
  rows, facts, table, page = write(tmp_path, content)
  assert facts["abs_rel"] is None and facts["delta_1_25"] is None
  assert facts["run"]["options"]["limit"] == [1.0, None]
  assert facts["run"]["not_finite"] == [
    "abs_rel",
    "delta_1_25",
    "run.options.limit.1",
  ]
  assert rows[0]["abs_rel"] == "nan"
  assert table_rows(table)[1][1:] == ["nan", "inf"]
  assert "Not finite: abs_rel, delta_1_25." in table
  check_page(page)


@pytest.mark.parametrize("task", list(tables._COLUMNS))
def test_no_sequences_at_all(tmp_path, task):
  content = Evaluation(task, "bonn", {}, [], [LeftOut("a", "gone")])
  rows, facts, table, page = write(tmp_path, content)
  assert rows == [] and facts["run"]["sequences"] == 0
  assert "partial: 0 of 1 sequences" in table
  page = check_page(page)
  assert "No sequence was evaluated." in page.text and "svg" not in page.tags


def test_names_are_escaped(tmp_path):
  content = Evaluation(
    "relpose",
    HOSTILE,
    {HOSTILE: 1.0},
    [
      result(HOSTILE, {"ate": 1.0}, per_frame={HOSTILE: [1.0, 2.0]}),
      result(HOSTILE, {}, excluded=HOSTILE),
    ],
    [LeftOut(HOSTILE, HOSTILE)],
    {HOSTILE: {HOSTILE: HOSTILE}, "checkpoint": HOSTILE},
  )
  figures = Figures(
    [TrajectoryFigure(HOSTILE, np.eye(3), np.eye(3), HOSTILE, HOSTILE)],
    [depth_figure(name=HOSTILE, error=HOSTILE)],
    [CloudFigure(HOSTILE, np.eye(3), np.eye(3), None, HOSTILE)],
  )
  rows, facts, table, page = write(tmp_path, content, figures)
  assert rows[0]["name"] == HOSTILE and HOSTILE in facts
  assert "<script" not in table and len(table_rows(table)) == 2
  page = check_page(page)
  assert "<script>alert('x')</script>" in page.text
  labels = [value for name, value in page.attributes if name == "aria-label"]
  assert f"{HOSTILE}: {HOSTILE}" in labels


def depth_figure(shape=(40, 60), **others):
  slope = np.tile(np.linspace(1, 4, shape[1]), (shape[0], 1))
  content = {
    "name": "a",
    "frame": 3,
    "image": np.full((*shape, 3), 100, np.uint8),
    "prediction": slope,
    "truth": slope,
    "error": "0.1",
  }
  return DepthFigure(**(content | others))


def test_plots_and_pictures_are_in_the_page(tmp_path):
  line = list(np.linspace(0.1, 0.2, 5))
  content = evaluation("synthetic", "x")
  content.sequences[:] = [
    result(
      name,
      {"abs_rel": 0.1},
      per_frame={"abs_rel": line[:n], "ate": line[:n], "none": []},
      pointers=[10, 20, 30][:n],
      seconds=line[:n],
    )
    for name, n in (("a", 5), ("b", 1), ("c", 3))
  ]
  points = np.random.default_rng(0).normal(size=(50, 3))
  paths = [
    TrajectoryFigure(f"path{i}", points, points, "1 m") for i in range(8)
  ]
  colors = np.zeros((50, 3), np.uint8)
  clouds = [CloudFigure("cloud", points, points, colors, "2 m")]
  figures = Figures(paths, [depth_figure()], clouds)
  page = check_page(write(tmp_path, content, figures)[3])
  # Two errors, pointers, time; trajectories; a cloud.
  assert page.tags.count("svg") == 4 + MAX_SHOWN + 1
  assert page.tags.count("img") == 4 + 3  # And scales of colours.
  for words in ("path5", "6 of 8", "cloud", "a, frame 3: 0.1", "time a frame"):
    assert words in page.text
  assert "path6" not in page.text
  assert page.text.count("3 of 3 sequences") == 2


def test_sequences_are_sorted_from_the_worst(tmp_path):
  errors = {"good": 0.1, "bad": 0.3, "broken": np.nan, "fair": 0.2}
  results = [result(name, {"abs_rel": e}) for name, e in errors.items()]
  results.insert(0, result("out", {"abs_rel": 9.0}, excluded="why"))
  page = check_page(write(tmp_path, evaluation(sequences=results))[3])
  texts = [text for text in page.texts if text in {*errors, "out"}]
  assert texts[-5:] == ["broken", "bad", "fair", "good", "out"]


def test_the_page_stays_small(tmp_path):
  rng = np.random.default_rng(0)
  content = evaluation("synthetic", "x", run={"seed": 0})
  line = rng.random(1000).tolist()
  content.sequences[:] = [
    result(
      str(i),
      {"abs_rel": 1.0},
      per_frame={"abs_rel": line, "ate": line},
      pointers=list(range(1000)),
      seconds=line,
    )
    for i in range(30)
  ]
  points = rng.normal(size=(100_000, 3))
  image = rng.integers(0, 256, (480, 640, 3), np.uint8)
  depth = depth_figure(
    (480, 640), image=image, prediction=rng.random((480, 640))
  )
  path = TrajectoryFigure("a", points[:1000], points[:1000], "")
  figures = Figures([path], [depth], [CloudFigure("a", points, points)])
  page = write(tmp_path, content, figures)[3]
  check_page(page)
  start, end = (page.index(f"<h2>{x}</h2>") for x in ("Trajectories", "Run"))
  assert len(page) + (MAX_SHOWN - 1) * (end - start) < 4e6


@pytest.mark.parametrize("points", [0, 1, 4])
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_degenerate_figures_can_be_drawn(points, value):
  same = np.full((points, 3), value)
  with plots.style():
    for figure in (
      plots.draw_trajectory(TrajectoryFigure("a", same, same, "")),
      plots.draw_cloud(CloudFigure("a", same, same)),
    ):
      assert plots.to_svg(figure, "a").startswith("<svg role=")


def test_plots_follow_the_theme_and_leave_settings_alone():
  import matplotlib

  before = dict(matplotlib.rcParams)
  with plots.style():
    figure = plots.draw_curves([[1, 2], [2, 3, 4]], "y")
    svg = plots.to_svg(figure, "a")
    again = plots.to_svg(figure, "a")
  assert dict(matplotlib.rcParams) == before
  assert svg == again and "<text" in svg
  colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
  assert colors <= {"none", "var(--ink)", "var(--faint)", "var(--accent)"}


def decode(png):
  return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_colours_of_depth_pictures():
  truth = np.tile(np.linspace(1, 4, 60), (40, 1))
  prediction = truth.copy()
  truth[:5], prediction[20:30, :10] = 0, np.nan
  prediction[35:] *= 2
  content = depth_figure(truth=truth, prediction=prediction)
  image, predicted, true, error = map(
    decode, (p.png for p in pictures.depth_pictures(content))
  )
  grey, magenta = pictures.NO_TRUTH, pictures.BROKEN
  assert image.shape == (40, 60, 3) and (image == 100).all()
  assert (true[:5] == grey).all() and (error[:5] == grey).all()
  assert (predicted[20:30, :10] == magenta).all()
  assert (error[20:30, :10] == magenta).all()
  assert np.array_equal(predicted[5:20], true[5:20])
  assert len(np.unique(error[5:20].reshape(-1, 3), axis=0)) == 1
  assert true[30, 0, 0] > true[30, 0, 2] and true[30, -1, 2] > true[30, -1, 0]
  assert (error[35:] != error[34]).any()


def test_sparse_truth_survives_shrinking():
  truth = np.zeros((90, 1200))
  truth[1::4, 2::4] = 2.0
  content = depth_figure((90, 1200), truth=truth, prediction=truth + 2.0)
  _, _, true, error = pictures.depth_pictures(content)
  assert decode(true.png).shape == (22, 300, 3)
  for png in (true.png, error.png):
    assert (decode(png) != pictures.NO_TRUTH).any(-1).all()


@pytest.mark.parametrize("value", [0.0, np.nan, 3.0])
def test_depth_without_contrast(value):
  flat = np.full((40, 60), value)
  content = depth_figure(truth=flat, prediction=flat)
  assert len(pictures.depth_pictures(content)) == 4


def test_choice_runs_from_the_best_to_the_worst():
  assert choose([3, 1, np.nan, 2]) == [1, 3, 0, 2]
  errors = np.random.default_rng(0).permutation(101)
  assert errors[choose(errors)].tolist() == [0, 20, 40, 60, 80, 100]
  assert choose([]) == []


def test_all_but_the_page_is_written_without_matplotlib(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(InputError, match=r"pip install point3r-jax\[eval\]"):
    write_reports(tmp_path, evaluation())
  names = {file.name for file in tmp_path.iterdir()}
  assert names == {"sequences.csv", "metrics.json", "table.md"}
