"""Every protocol on a miniature of its dataset, with errors that are known.

Predictions are written, not made by a model: the truth, changed in a way whose
metrics follow from the change alone.
"""

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from point3r_jax.errors import InputError
from point3r_jax.evaluation import tasks
from point3r_jax.evaluation.predictions import PredictionStore
from point3r_jax.evaluation.requests import (
  Request,
  open_evaluation,
  prediction_inputs,
)
from point3r_jax.evaluation.runner import PREDICTIONS, evaluate
from tests.evaluation import trees

MANIFEST = {
  "made_by": {
    "checkpoint_sha256": "0" * 64,
    "model": {},
    "stream": {
      "precision": "float32",
      "fusion": True,
      "fusion_divisor": 20.0,
      "max_capacity": None,
    },
  },
  "checkpoint": "written by a test",
  "ema": False,
  "device": "none",
  "batch_size": 1,
  "versions": {},
}


def open_store(request):
  """Starts a store as an evaluation with a model would."""
  benchmark, task = open_evaluation(request)
  store = PredictionStore(pathlib.Path(request.output) / PREDICTIONS)
  inputs = prediction_inputs(request, benchmark, task)
  store.start(MANIFEST | {"made_by": {**inputs, **MANIFEST["made_by"]}})
  return benchmark, store


def write_predictions(request, predict):
  """Saves `predict(sequence) → {name: (T, …)}` for all sequences."""
  benchmark, store = open_store(request)
  for sequence in benchmark.sequences:
    arrays, writer = predict(sequence), store.writer(sequence)
    for index in range(len(sequence)):
      frame = {name: array[index] for name, array in arrays.items()}
      writer.write(index, frame, 10 * (index + 1), 0, 0.01)


def run(tmp_path, task, dataset, tree, predict, **options):
  """Scores predictions; returns what metrics.json says."""
  output = tmp_path / "output"
  request = Request(
    task, dataset, str(output), data=str(tree.root), options=options
  )
  write_predictions(request, predict)
  return score(request)


def score(request, **changes):
  """Scores what is saved; returns what metrics.json says."""
  evaluate(dataclasses.replace(request, **changes))
  path = pathlib.Path(request.output) / "metrics.json"
  return json.loads(path.read_text())


def scaled_depths(factors):
  """Predicts the truth times a factor; the maps are of the truth's size."""

  def predict(sequence):
    maps = [sequence.load_depth(i) for i in range(len(sequence))]
    depth = np.stack(maps) * factors[sequence.name]
    return {"depth": np.where(depth > 0, depth, 1).astype(np.float32)}

  return predict


def write_holes(path, tree, steps):
  """Takes away the truth of all but the first two rows of a map."""
  depth = next(iter(tree.depths.values()))[0].copy()
  depth[2:] = 0
  trees.write_image(path, np.round(np.maximum(depth, 0) * steps).astype("<u2"))


VIDEOS = {
  "bonn": (trees.write_bonn, ["balloon2", "crowd2", "crowd3"]),
  "kitti": (trees.write_kitti, ["a_02", "b_02", "c_02"]),
  "sintel": (trees.write_sintel, ["alley_1", "cave_2", "temple_2"]),
}


@pytest.mark.parametrize("dataset", VIDEOS)
def test_video_depth(tmp_path, dataset):
  """A scale is found; without one the error is the factor's."""
  write, names = VIDEOS[dataset]
  tree = write(tmp_path / "data", names)
  factors = dict(zip(names, (1.1, 0.8, 2.0), strict=True))
  found = run(
    tmp_path,
    "video_depth",
    dataset,
    tree,
    scaled_depths(factors),
    size=64,
    **({} if dataset == "kitti" else {"sequences": ",".join(names)}),
  )
  for alignment in ("scale", "scale_shift", "lad"):
    assert found[f"{alignment}/abs_rel"] < 1e-4
    assert found[f"{alignment}/delta_1_25"] == 1
  # All sequences have as many pixels; 0.8 is just a ratio of 1.25.
  assert found["metric/abs_rel"] == pytest.approx((0.1 + 0.2 + 1) / 3, abs=1e-4)
  assert 1 / 3 <= found["metric/delta_1_25"] < 0.7
  assert found["metric/delta_1_25_3"] == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize("average", ["pixels", "samples"])
@pytest.mark.parametrize("task", ["video_depth", "monodepth"])
def test_averages_weigh_pixels_unless_told_otherwise(tmp_path, task, average):
  names = ["crowd2", "crowd3"]
  tree = trees.write_bonn(tmp_path / "data", names, frames=1)
  path = tree.root / "rgbd_bonn_crowd2/depth_110/15481.00007.png"
  write_holes(path, tree, 5000)
  factors = {"crowd2": 1.5, "crowd3": 1.1}
  found = run(
    tmp_path,
    task,
    "bonn",
    tree,
    scaled_depths(factors),
    size=64,
    sequences=",".join(names),
    alignments="metric",
    average=average,
  )
  few, many = 2 * 64 - 2, 48 * 64 - 2
  weights = (few, many) if average == "pixels" else (1, 1)
  expected = np.average([0.5, 0.1], weights=weights)
  assert found["metric/abs_rel"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dataset", ["nyu", "bonn", "kitti", "sintel"])
def test_monodepth(tmp_path, dataset):
  """Each image has a scale of its own: those of a video may differ."""
  write, names = VIDEOS.get(dataset, (trees.write_nyu, None))
  arguments = () if names is None else (names,)
  tree = write(tmp_path / "data", *arguments)

  def predict(sequence):
    maps = [sequence.load_depth(i) for i in range(len(sequence))]
    depth = np.stack([depth * (1 + i) for i, depth in enumerate(maps)])
    # In a quarter of the columns it is a third too far away.
    depth[:, :, ::4] *= 4 / 3
    return {"depth": np.where(depth > 0, depth, 1).astype(np.float32)}

  options = {"size": 64}
  if dataset in ("bonn", "sintel"):
    options["sequences"] = ",".join(names)
  found = run(tmp_path, "monodepth", dataset, tree, predict, **options)
  rows = list(csv.DictReader((tmp_path / "output/sequences.csv").open()))
  errors = []
  for name, depth in tree.depths.items():
    for frame in depth:
      valid = frame > 0
      predicted = frame.copy()
      predicted[:, ::4] *= 4 / 3
      ratio = predicted[valid] / frame[valid]
      middle = (valid.sum() - 1) // 2
      scale = np.sort(frame[valid])[middle] / np.sort(predicted[valid])[middle]
      errors.append(np.abs(scale * ratio - 1).mean())
    assert any(row["name"] in (name, f"rgbd_bonn_{name}") for row in rows)
  assert found["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-3)


def pose_rows(poses):
  quaternions = Rotation.from_matrix(poses[:, :3, :3]).as_quat(
    scalar_first=True
  )
  return np.concatenate([poses[:, :3, 3], quaternions], 1).astype(np.float32)


@pytest.mark.parametrize(
  ("dataset", "write"),
  [
    ("tum", trees.write_tum),
    ("scannet", trees.write_scannet),
    ("sintel", trees.write_sintel),
  ],
)
def test_relpose(tmp_path, dataset, write):
  """Seen from the first camera in another unit, the path has no error."""
  names = ["alley_2", "cave_2"]
  tree = write(tmp_path / "data", names, frames=12)

  def predict(sequence):
    poses = (
      np.linalg.inv(tree.poses[sequence.name][0]) @ (tree.poses[sequence.name])
    )
    poses[:, :3, 3] *= 3
    if sequence.name == "cave_2":  # Every camera is turned by 2 degrees.
      turn = Rotation.from_euler("z", 2, degrees=True).as_matrix()
      poses[1::2, :3, :3] = poses[1::2, :3, :3] @ turn
    return {"pose": pose_rows(poses)}

  options = {"sequences": ",".join(names)}
  found = run(tmp_path, "relpose", dataset, tree, predict, size=64, **options)
  rows = list(csv.DictReader((tmp_path / "output/sequences.csv").open()))
  assert [row["name"] for row in rows] == names
  for row in rows:
    assert float(row["ate"]) < 1e-5
  assert float(rows[0]["rpe_rot_deg"]) < 1e-3
  assert float(rows[1]["rpe_rot_deg"]) == pytest.approx(2, abs=1e-3)
  assert found["rpe_rot_deg"] == pytest.approx(1, abs=1e-3)


def test_a_path_without_an_alignment_is_excluded(tmp_path):
  names = ["alley_2", "cave_2"]
  tree = trees.write_sintel(tmp_path / "data", names, frames=5)

  def predict(sequence):
    poses = tree.poses[sequence.name].copy()
    if sequence.name == "cave_2":
      poses[:, :3, 3] = 1
    return {"pose": pose_rows(poses)}

  found = run(
    tmp_path,
    "relpose",
    "sintel",
    tree,
    predict,
    size=64,
    sequences=",".join(names),
  )
  assert found["ate"] < 1e-5 and found["run"]["sequences_averaged"] == 1
  assert found["run"]["excluded"][0]["name"] == "cave_2"
  assert "(1 of 2 sequences)" in (tmp_path / "output/table.md").read_text()


def test_without_a_score_there_is_no_report(tmp_path):
  tree = trees.write_sintel(tmp_path / "data", ["cave_2"], frames=5)
  still = {"pose": np.tile(np.float32([0, 0, 0, 1, 0, 0, 0]), (5, 1))}
  with pytest.raises(InputError, match=r"no sequence has a score: cave_2: "):
    run(
      tmp_path,
      "relpose",
      "sintel",
      tree,
      lambda sequence: still,
      size=64,
      sequences="cave_2",
    )


@pytest.mark.parametrize(
  "dataset", ["7scenes", pytest.param("nrgbd", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
  "setting", ["sparse", pytest.param("long", marks=pytest.mark.slow)]
)
def test_mv_recon(tmp_path, dataset, setting):
  """Seen from the first camera in another unit, the cloud has no error."""
  options = {**trees.rgbd_options(), "scenes": "none", "setting": setting}
  write = {"7scenes": trees.write_seven_scenes, "nrgbd": trees.write_nrgbd}
  tree = write[dataset](tmp_path / "data")

  def predict(sequence):
    views = [sequence.load_points(i) for i in range(len(sequence))]
    to_first = np.linalg.inv(views[0].camera_to_world)
    maps = [
      (view.points @ to_first[:3, :3].T + to_first[:3, 3]) / 4 for view in views
    ]
    points = np.stack(maps).astype(np.float32)
    return {"points": points[:, ::stride, ::stride]}

  stride = 8 if setting == "long" else 1  # By default.
  found = run(tmp_path, "mv_recon", dataset, tree, predict, **options)
  for name in ("accuracy", "completeness"):
    assert found[name] < 1e-4 and found[f"{name}_median"] < 1e-4
  assert found["normal_consistency"] > 0.999
  assert found["run"]["setting"] == setting
  assert not [x for x in found["run"]["deviations"] if "setting" in x]


def test_alignments_are_named_once():
  with pytest.raises(InputError, match="scale, scale: name each of them once"):
    tasks.DepthTaskOptions(alignments=("scale", "scale"))


def test_alignments_of_images_beside_the_published_one(tmp_path):
  tree = trees.write_nyu(tmp_path / "data")
  predict = scaled_depths({"nyu": 1.25})
  found = run(
    tmp_path,
    "monodepth",
    "nyu",
    tree,
    predict,
    size=64,
    alignments="median,metric",
  )
  assert found["abs_rel"] < 1e-4
  assert found["metric/abs_rel"] == pytest.approx(0.25, abs=1e-4)
  table = (tmp_path / "output/table.md").read_text()
  assert "aligned by none (metric) | 0.250 |" in table
  assert "alignments=" in table


@pytest.fixture
def videos(tmp_path):
  """A request to score two videos, and where their truth is."""
  tree = trees.write_bonn(tmp_path / "data", ["crowd2", "crowd3"], frames=2)
  request = Request(
    "video_depth",
    "bonn",
    str(tmp_path / "output"),
    data=str(tree.root),
    options={"size": "64", "sequences": "crowd2,crowd3"},
  )
  return request, tree


def test_missing_predictions_are_named(videos):
  request, _ = videos
  benchmark, store = open_store(request)
  predict = scaled_depths({"crowd2": 1.1})
  writer, sequence = (
    store.writer(benchmark.sequences[0]),
    benchmark.sequences[0],
  )
  for index, depth in enumerate(predict(sequence)["depth"]):
    writer.write(index, {"depth": depth}, 1, 0, 0.1)
  with pytest.raises(InputError, match=r"crowd3: .*no complete prediction"):
    evaluate(request)
  found = score(request, allow_missing=True)
  assert found["metric/abs_rel"] == pytest.approx(0.1, abs=1e-5)
  assert found["run"]["left_out"][0]["name"] == "crowd3"


@pytest.mark.parametrize("damage", ["truth", "prediction"])
def test_what_cannot_be_scored_is_named_or_left_out(videos, damage):
  request, tree = videos
  predict = scaled_depths({"crowd2": 1.1, "crowd3": 1.2})

  def spoilt(sequence):
    arrays = predict(sequence)
    if damage == "prediction" and sequence.name == "crowd3":
      arrays["depth"][1, 7, 7] = np.nan
    return arrays

  write_predictions(request, spoilt)
  if damage == "truth":
    path = tree.root / "rgbd_bonn_crowd3/depth_110/15481.00017.png"
    path.write_bytes(path.read_bytes()[:2000])
  with pytest.raises(InputError, match=r"^crowd3: "):
    evaluate(request)
  found = score(request, allow_missing=True)
  assert found["metric/abs_rel"] == pytest.approx(0.1, abs=1e-5)
  assert found["run"]["partial"]


def test_only_scores_may_be_asked_for_anew(videos):
  """What was predicted stays what it is; subsets and metrics are free."""
  request, _ = videos
  write_predictions(request, scaled_depths({"crowd2": 1.1, "crowd3": 1.2}))
  for change in (
    {"task": "monodepth"},
    {"options": {**request.options, "preparation": "crop"}},
    {"options": {**request.options, "size": "128"}},
  ):
    with pytest.raises(InputError, match="made otherwise"):
      evaluate(dataclasses.replace(request, **change))
  with pytest.raises(InputError, match="need a checkpoint"):
    evaluate(dataclasses.replace(request, overwrite=True))
  options = {**request.options, "sequences": "crowd3", "alignments": "metric"}
  found = score(request, options=options)
  assert found["metric/abs_rel"] == pytest.approx(0.2, abs=1e-5)
  assert "sequences: 1 of 5" in found["run"]["deviations"]
  assert "frames: 2 of 550" in found["run"]["deviations"]


def test_poses_that_are_not_known_may_be_dropped(tmp_path):
  tree = trees.write_scannet(tmp_path / "data", ["a"], frames=12)
  path = tree.root / "a/pose_90.txt"
  lines = path.read_text().splitlines()
  lines[4] = " ".join(["-inf"] * len(lines[4].split()))
  path.write_text("\n".join(lines))
  request = Request(
    "relpose",
    "scannet",
    str(tmp_path / "out"),
    str(tree.root),
    options={"size": 64},
  )
  write_predictions(
    request, lambda sequence: {"pose": pose_rows(tree.poses["a"])}
  )
  with pytest.raises(InputError, match=r"a: 1 of 12 true poses .*frame 4"):
    evaluate(request)
  options = {"size": 64, "non_finite_truth": "drop"}
  assert score(request, options=options)["ate"] < 1e-5


@pytest.mark.parametrize("broken", [np.nan, 0])
def test_predicted_poses_that_are_none(tmp_path, broken):
  tree = trees.write_tum(tmp_path / "data", ["a"], frames=12)

  def predict(sequence):
    poses = pose_rows(tree.poses["a"])
    poses[3] = broken
    return {"pose": poses}

  with pytest.raises(InputError, match=r"a: 1 of 12 predicted poses .*frame 3"):
    run(tmp_path, "relpose", "tum", tree, predict, size=64)


def test_no_room_for_pointers_is_in_all_reports(videos, tmp_path):
  request, _ = videos
  benchmark, store = open_store(request)
  predict = scaled_depths({"crowd2": 1.1, "crowd3": 1.2})
  for sequence in benchmark.sequences:
    writer = store.writer(sequence)
    for index, depth in enumerate(predict(sequence)["depth"]):
      writer.write(index, {"depth": depth}, 1, 17 * index, 0.1)
  found = score(request)
  assert "34 pointers merged for lack of room" in found["run"]["deviations"]
  assert "34 pointers merged" in (tmp_path / "output/table.md").read_text()
  rows = csv.DictReader((tmp_path / "output/sequences.csv").open())
  assert [row["overflow"] for row in rows] == ["17", "17"]


@pytest.mark.slow
def test_reconstruction_from_the_camera_head_or_aligned_otherwise(tmp_path):
  """A cloud that is turned is no error for a similarity."""
  options = {**trees.rgbd_options(), "scenes": "none"}
  tree = trees.write_nrgbd(tmp_path / "data", ["a"])

  def predict(sequence):
    turn = Rotation.from_euler("y", 40, degrees=True).as_matrix()
    views = [sequence.load_points(i) for i in range(len(sequence))]
    return {"points": np.stack([3 * view.points @ turn.T for view in views])}

  request = Request(
    "mv_recon",
    "nrgbd",
    str(tmp_path / "output"),
    str(tree.root),
    options=options,
  )
  write_predictions(request, predict)
  assert score(request)["accuracy"] > 0.05
  found = score(request, options={**options, "align": "sim3"})
  assert found["accuracy"] < 1e-3
  assert "align=sim3" in found["run"]["deviations"]
  with pytest.raises(InputError, match=r"keep\.from_camera was False"):
    evaluate(
      dataclasses.replace(request, options={**options, "source": "camera"})
    )
