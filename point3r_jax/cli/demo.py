"""Reconstructs a synthetic walk that no training has seen, and scores it.

python -m point3r_jax.cli.demo --output output/demo

The walk is the first sequence of the synthetic benchmark of a seed, a static
room. It is rendered on the spot, so nothing is downloaded and all is known:
depth, cameras and surfaces. OUTPUT then holds

  frames/000000.png   the input
  scene/              what reconstruct.py makes of it: it is run as it is
  metrics.json        how far that is from the truth
  demo.png            a picture of it all

Scored are the files in scene/, by the task that `evaluate.py --dataset
synthetic` scores with: relative errors of depth (after one scale for the
sequence, and as it is, in metres), ATE and RPE (after a similarity), and
distances between predicted and true points. Two things differ, in the points
alone: they are those of the written depth and cameras (see
`evaluation.written`), and every fourth row and column of them, not every
second, for the time that neighbours take.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from point3r_jax.checkpoints import UNTRAINED
from point3r_jax.cli import demo_sheet, reconstruct
from point3r_jax.cli.common import end, run
from point3r_jax.errors import InputError
from point3r_jax.export.overview import Cameras, Path, draw_overview
from point3r_jax.export.read_scene import WrittenScene, read_scene
from point3r_jax.export.scene import SUMMARY
from point3r_jax.files import atomic_file

if TYPE_CHECKING:
  from point3r_jax.evaluation import sequences
  from point3r_jax.evaluation.results import SequenceResult

_SIZE = (96, 128)
# A room with several things in it; chosen before any model had seen it.
_SEED = 33
_PIXEL_STRIDE = 4  # Of scored points.
_NOTICE = "Untrained, random weights: the geometry means nothing."
_WRITE = ("scene", "trajectory", "cameras", "depth", "depth_npz")


class _Score(NamedTuple):
  """How a metric is shown.

  Attributes:
    metric: its name in `metrics.json`.
    guess: the trivial guess that it stands beside, if there is one.
    name: in words.
    unit: with a space before it, where there must be one.
    factor: from the metric to that unit.
    digits: after the point.
  """

  metric: str
  guess: str | None
  name: str
  unit: str = " %"
  factor: float = 100
  digits: int = 1

  def said(self, metrics: Mapping[str, float], prefix: str = "") -> str:
    """Returns the value with its unit; "-" if there is none."""
    value = metrics.get(prefix + self.metric)
    if value is None:
      return "-"
    return f"{self.factor * value:.{self.digits}f}{self.unit}"


_FLAT, _STILL = "constant_depth", "constant_pose"
_SCORES = (
  _Score("abs_rel", _FLAT, "depth error"),
  _Score("delta_1_25", _FLAT, "depth within 25 %"),
  _Score("abs_rel_metric", None, "depth error, unscaled"),
  _Score("accuracy_over_scene", _FLAT, "accuracy / scene size", digits=2),
  _Score("ate_over_path", _STILL, "ATE / path length"),
  _Score("rpe_trans", _STILL, "RPE translation", " cm"),
  _Score("rpe_rot_deg", _STILL, "RPE rotation", "°", 1, 2),
  _Score(
    "completeness_over_scene", _FLAT, "completeness / scene size", digits=2
  ),
)
_EXPLANATION = """\
Depth errors are means of |predicted - true| / true, after one scale for the
walk unless unscaled. ATE is the error of the path, RPE that from frame to
frame, both after a similarity. Accuracy and completeness are mean distances to
the nearest point. Trivial guesses: one depth everywhere; a camera at rest."""


def open_walk(seed: int, frames: int) -> sequences.Sequence:
  """Returns a walk through a static room; it is rendered when first read.

  Args:
    seed: of the room and the path.
    frames: how many views.

  Raises:
    InputError: if there is no such walk.
  """
  from point3r_jax.evaluation.benchmarks import open_benchmark

  options = {
    "sequences": 1,
    "frames": frames,
    "height": _SIZE[0],
    "width": _SIZE[1],
    "seed": seed,
    "indoor": 1.0,
    "moving": 0.0,
    "paths": ("walk",),
  }
  return open_benchmark("synthetic", "synthetic", None, options).sequences[0]


def write_frames(folder: pathlib.Path, walk: sequences.Sequence) -> None:
  """Writes a walk's images, losslessly; replaces those of an earlier one."""
  folder.mkdir(parents=True, exist_ok=True)
  for file in folder.iterdir():
    if re.fullmatch(r"\d{6}\.png", file.name):
      file.unlink()
  for index in range(len(walk)):
    image = Image.fromarray(walk.load_image(index))
    image.save(folder / f"{index:06d}.png")


def score_scene(
  scene_folder: pathlib.Path, scene: WrittenScene, walk: sequences.Sequence
) -> SequenceResult:
  """Compares what was written with the truth; see the module.

  What cannot be scored, as of random weights, is `excluded` with the reason.
  """
  from point3r_jax.evaluation.made_up import SyntheticTask, SyntheticTaskOptions
  from point3r_jax.evaluation.results import SequenceResult
  from point3r_jax.evaluation.written import written_prediction

  options = SyntheticTaskOptions(pixel_stride=_PIXEL_STRIDE)
  try:
    prediction = written_prediction(
      scene_folder, scene, walk, options.pixel_stride
    )
    return SyntheticTask(options).score(walk, prediction)
  except InputError as error:
    return SequenceResult(walk.name, len(walk), {}, excluded=str(error))


def table(metrics: Mapping[str, float]) -> str:
  """Returns the scores beside those of trivial guesses, a line each."""
  lines = [f"{'':26}{'model':>10}{'trivial guess':>16}"]
  for score in _SCORES:
    trivial = score.said(metrics, f"{score.guess}/") if score.guess else "-"
    lines.append(f"{score.name:26}{score.said(metrics):>10}{trivial:>16}")
  return "\n".join(lines)


def _aligned_path(scene: WrittenScene, true: np.ndarray) -> np.ndarray:
  """Moves the true path (T, 3) to where its alignment has the predicted one."""
  from point3r_jax.evaluation.clouds import transform
  from point3r_jax.evaluation.pose import fit_similarity

  predicted = scene.camera_to_world[:, :3, 3]
  fit = fit_similarity(predicted, true)
  return transform(np.linalg.inv(fit.matrix()), true)


def draw(
  scene: WrittenScene,
  walk: sequences.Sequence,
  result: SequenceResult,
  subtitle: str,
) -> Image.Image:
  """Draws the scene, frames of the walk, and the scores.

  The first true camera says what is up, and nothing else, in the picture of the
  scene. The true path is drawn where the alignment for ATE has it, and depth
  with the scale of its error. What was not scored has neither.
  """
  from point3r_jax.evaluation import depth
  from point3r_jax.evaluation.made_up import SyntheticTaskOptions
  from point3r_jax.evaluation.tasks import true_depths

  true_poses = walk.load_trajectory().camera_to_world
  up = true_poses[0, :3, :3].T @ np.array([0.0, -1.0, 0.0])
  cameras = Cameras(
    scene.camera_to_world,
    float(np.median(scene.intrinsics[:, 0, 0])),
    scene.depth.shape[1:],
  )
  paths = [Path(cameras.positions, demo_sheet.ESTIMATE, 5)]
  truth, predicted = true_depths(walk), scene.depth
  if result.excluded is None:
    fit = depth.align_depth(predicted, truth, SyntheticTaskOptions().alignment)
    predicted = fit.scale * predicted
    true_path = _aligned_path(scene, true_poses[:, :3, 3])
    paths.append(Path(true_path, demo_sheet.TRUTH, 2))
  overview = draw_overview(
    scene.points,
    scene.colors,
    cameras,
    up,
    demo_sheet.OVERVIEW_SIZE,
    paths,
    demo_sheet.BACKGROUND,
  )
  return demo_sheet.draw_sheet(
    demo_sheet.Sheet(
      title="A room that no training has seen, reconstructed frame by frame",
      subtitle=subtitle,
      overview=overview,
      images=np.stack([walk.load_image(i) for i in range(len(walk))]),
      predicted=predicted,
      true=truth,
      scores=[(x.said(result.metrics), x.name) for x in _SCORES],
      warning=subtitle == _NOTICE,
    )
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m point3r_jax.cli.demo",
    description="Renders a walk through a synthetic room, reconstructs it, "
    "scores that and draws it.",
  )
  add = parser.add_argument
  add("--output", default="output/demo", help="folder (default: %(default)s)")
  add(
    "--checkpoint",
    default="tiny",
    help="see reconstruct.py (default: %(default)s)",
  )
  add(
    "--frames", type=int, default=48, help="at least 3 (default: %(default)s)"
  )
  add(
    "--seed",
    type=int,
    default=_SEED,
    help="other seeds, other rooms (default: %(default)s)",
  )
  return parser


def _write_metrics(
  path: pathlib.Path, flags: argparse.Namespace, result: SequenceResult
) -> None:
  contents = {
    "checkpoint": flags.checkpoint,
    "seed": flags.seed,
    "frames": flags.frames,
    "pixel_stride": _PIXEL_STRIDE,
    "excluded": result.excluded,
    "metrics": dict(result.metrics),
    "per_frame": dict(result.per_frame),
  }
  with atomic_file(path) as file:
    file.write((json.dumps(contents, indent=2) + "\n").encode())


def _subtitle(flags: argparse.Namespace, scene_folder: pathlib.Path) -> str:
  """Returns what was done in one line."""
  if flags.checkpoint.startswith(UNTRAINED):
    return _NOTICE
  summary = json.loads((scene_folder / SUMMARY).read_text())
  words = [
    f"{flags.frames} frames of {_SIZE[1]} x {_SIZE[0]} pixels",
    f'checkpoint "{flags.checkpoint}"',
    f"{summary['pointers'][-1]} pointers",
  ]
  if summary["seconds_per_frame"]:
    milliseconds = 1e3 * summary["seconds_per_frame"]["median"]
    device = summary["device"].partition(": ")[2]  # Without the platform.
    device = "a CPU" if device == "cpu" else device
    words.append(f"{milliseconds:.0f} ms a frame on {device}")
  return "  ·  ".join(words)


def _run(flags: argparse.Namespace) -> int:
  output = pathlib.Path(flags.output)
  frames, scene_folder = output / "frames", output / "scene"
  try:
    walk = open_walk(flags.seed, flags.frames)
  except ImportError as error:
    raise InputError(
      f"{error}; the demo needs: pip install 'point3r-jax[eval]'"
    ) from error
  print(f"Rendering {len(walk)} frames of a synthetic room ...", flush=True)
  write_frames(frames, walk)
  command = {
    "--input": frames,
    "--checkpoint": flags.checkpoint,
    "--output": scene_folder,
    "--size": max(_SIZE),
  }
  words = [str(word) for pair in command.items() for word in pair]
  words += ["--write", *_WRITE, "--overwrite"]
  print("\n$ python reconstruct.py", *words, flush=True)
  status = reconstruct.main(words)
  if status:
    return status
  scene = read_scene(scene_folder)
  result = score_scene(scene_folder, scene, walk)
  _write_metrics(output / "metrics.json", flags, result)
  if result.excluded is None:
    print(f"\n{table(result.metrics)}\n\n{_EXPLANATION}")
  else:
    print(f"\nnot scored: {result.excluded}")
  picture = draw(scene, walk, result, _subtitle(flags, scene_folder))
  with atomic_file(output / "demo.png") as file:
    picture.save(file, "PNG", optimize=True)
  print(f"\nLook at {output / 'demo.png'}, and at {scene_folder}/scene.ply.")
  if flags.checkpoint.startswith(UNTRAINED):
    print(_NOTICE)
  return 0


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  parser = _parser()
  flags = parser.parse_args(arguments)
  if flags.frames < 3:
    parser.error("--frames must be at least 3")
  return run(lambda: _run(flags))


if __name__ == "__main__":
  end(main())
