"""Reconstructs a scene from a video or images."""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
import tqdm

from point3r_jax import pretrained
from point3r_jax.checkpoints import UNTRAINED, load_checkpoint, load_metadata
from point3r_jax.cli.common import (
  INTERRUPTED,
  add_model_flags,
  model_options,
  run,
  stop_on_interrupt,
)
from point3r_jax.config import ModelConfig
from point3r_jax.data.errors import InputError
from point3r_jax.data.frames import FrameSource, open_frames
from point3r_jax.export.scene import (
  OUTPUTS,
  SUMMARY,
  SceneOptions,
  prepare_folder,
  write_summary,
)
from point3r_jax.export.scene_process import SceneProcess
from point3r_jax.pipeline import Progress, reconstruct
from point3r_jax.precision import get_precision
from point3r_jax.stream import Stream
from point3r_jax.versions import installed_versions

_PACKAGES = ("point3r-jax", "jax", "jaxlib", "flax", "numpy")
# Frames whose times are left out of statistics: compilation, first transfers.
_WARM_UP = 3


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description="Reconstructs a scene from a video or images: a colored point "
    "cloud, camera poses and intrinsics, and depth maps.",
  )
  add = parser.add_argument
  add(
    "--input",
    nargs="+",
    required=True,
    help="a video, a folder of images, a glob or several images",
  )
  add(
    "--checkpoint",
    required=True,
    help="a directory that convert_torch_weights.py wrote; one that comes "
    f"along ({', '.join(pretrained.names()) or 'there is none'}); or "
    f"{UNTRAINED}PRESET for random weights",
  )
  add("--output", required=True, help="the folder to write")
  add("--overwrite", action="store_true", help="replace earlier results")
  add(
    "--write",
    nargs="+",
    choices=list(OUTPUTS),
    default=["scene", "trajectory", "cameras", "depth"],
    metavar="WHAT",
    help=f"any of {', '.join(OUTPUTS)} (default: all but the last two)",
  )

  frames = parser.add_argument_group("frames")
  add = frames.add_argument
  add(
    "--size",
    type=int,
    help="of images: their long side, a multiple of 16; 224 is a central "
    "square (default: the checkpoint's)",
  )
  add(
    "--stride",
    type=int,
    default=1,
    help="take every how many frames one (default: %(default)s)",
  )
  add("--start", type=int, default=0, help="first frame (default: %(default)s)")
  add("--end", type=int, help="frame after the last")
  add("--max_frames", type=int, help="take at most so many")
  add("--shuffle", action="store_true", help="take images in random order")
  add(
    "--seed",
    type=int,
    default=0,
    help="of the random order (default: %(default)s)",
  )

  add = add_model_flags(
    parser, precision="float32 on a CPU, bfloat16 on accelerators"
  )
  add(
    "--look_ahead",
    type=int,
    help="images to encode at once (default: 8, but 1 on a CPU)",
  )

  scene = parser.add_argument_group("scene")
  add = scene.add_argument
  add(
    "--confidence",
    type=float,
    default=20.0,
    metavar="PERCENTILE",
    help="share of each frame's pixels, the least confident, to leave out of "
    "the cloud (default: %(default)s)",
  )
  add(
    "--voxel_size",
    type=float,
    help="edge of the cloud's voxels, in the "
    "model's unit; default: a 500th of the first frame's extent",
  )
  add(
    "--max_points",
    type=int,
    default=10_000_000,
    help="points beyond which voxels double in size (default: %(default)s)",
  )
  add(
    "--depth_scale",
    type=float,
    default=1000.0,
    help="steps of the 16-bit depth maps per unit (default: %(default)s)",
  )
  return parser


def _heads(write: Sequence[str]) -> str:
  """Returns the heads that the outputs need."""
  camera = {"cameras", "depth", "depth_npz", "confidence"} & set(write)
  if camera and "scene" in write:
    return "both"
  return "camera" if camera else "world"


def _notice(checkpoint: str) -> str | None:
  """Returns what to know of a checkpoint before looking at its scenes."""
  if checkpoint.startswith(UNTRAINED):
    return "These weights are random: the scene will have no meaning."
  return load_metadata(checkpoint).get("notice")


def _statistics(seconds: Sequence[float]) -> dict[str, float] | None:
  """Returns what a frame took after warm-up; None if there were too few."""
  seconds = sorted(seconds[_WARM_UP:])
  if not seconds:
    return None
  return {
    "median": statistics.median(seconds),
    "mean": statistics.fmean(seconds),
    "p95": seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
    "frames_left_out": _WARM_UP,
  }


def _summary(
  flags: argparse.Namespace,
  stream: Stream,
  frames: FrameSource,
  progress: Progress,
  facts: dict[str, Any],
) -> dict[str, Any]:
  lost = frames.lost
  device = jax.devices()[0]
  return {
    "frames": len(progress.pointers),
    "interrupted": progress.interrupted,
    "frames_lost": lost.frames,
    "frames_lost_reason": lost.error,
    "frames_of_other_shape": frames.mixed_sizes,
    "resolution": {
      "height": stream.image_size[0],
      "width": stream.image_size[1],
    },
    "pointers": progress.pointers,
    "capacity": stream.capacity,
    "overflow": progress.overflow,
    "seconds_per_frame": _statistics(progress.seconds),
    "seconds_of_frames": [round(x, 6) for x in progress.seconds],
    "compile_seconds": {
      str(capacity): round(seconds, 3)
      for capacity, seconds in dict(stream.compile_seconds).items()
    },
    "checkpoint": flags.checkpoint,
    "precision": stream.options.precision.name,
    "device": f"{device.platform}: {device.device_kind}",
    "versions": installed_versions(*_PACKAGES),
    "options": vars(flags),
    **facts,
  }


def _open_stream(
  flags: argparse.Namespace,
  config: ModelConfig,
  params: dict,
  frames: FrameSource,
) -> Stream:
  try:
    return Stream(
      config,
      params,
      frames.image_size,
      look_ahead=flags.look_ahead,
      heads=_heads(flags.write),
      **model_options(flags),
    )
  except ValueError as error:
    raise InputError(str(error)) from error


def _run(flags: argparse.Namespace) -> int:
  options = SceneOptions(
    write=flags.write,
    percentile=flags.confidence,
    voxel_size=flags.voxel_size,
    max_points=flags.max_points,
    depth_scale=flags.depth_scale,
  )
  config, params = load_checkpoint(
    flags.checkpoint, precision=get_precision(flags.precision)
  )
  frames = open_frames(
    flags.input,
    size=config.image_size if flags.size is None else flags.size,
    stride=flags.stride,
    start=flags.start,
    end=flags.end,
    max_frames=flags.max_frames,
    shuffle_seed=flags.seed if flags.shuffle else None,
  )
  stream = _open_stream(flags, config, params, frames)
  notice = _notice(flags.checkpoint)
  if notice:
    print(notice)
  with stop_on_interrupt() as stop:
    directory = prepare_folder(flags.output, flags.overwrite)
    write_summary(directory, {"complete": False})
    summary = _write_scene(flags, options, stream, frames, directory, stop)
  return _conclude(directory, summary, frames)


def _write_scene(
  flags: argparse.Namespace,
  options: SceneOptions,
  stream: Stream,
  frames: FrameSource,
  directory: pathlib.Path,
  stop: threading.Event,
) -> dict[str, Any]:
  """Writes all files; whatever happens, what is done is a valid scene."""
  progress = Progress()
  scene = SceneProcess(directory, options, stream.image_size)
  facts, finished = {}, False
  bar = tqdm.tqdm(total=frames.expected_frames, unit="frame", disable=None)

  def report(progress: Progress) -> None:
    bar.set_postfix(pointers=progress.pointers[-1], refresh=False)
    bar.update()

  try:
    with bar:
      reconstruct(frames, stream, scene, progress, report, stop)
    finished = not progress.interrupted
  finally:
    try:
      facts = scene.close(complete=finished)
    finally:
      summary = _summary(flags, stream, frames, progress, facts)
      summary["complete"] = finished and not frames.lost.frames
      write_summary(directory, summary)
  return summary


def _conclude(
  directory: pathlib.Path, summary: dict[str, Any], frames: FrameSource
) -> int:
  """Says what came out; returns the exit code."""
  times, pointers = summary["seconds_per_frame"], summary["pointers"]
  # The mean: frames that were encoded together are written close together.
  speed = f", {times['mean'] * 1e3:.1f} ms a frame" if times else ""
  print(
    f"{directory}: {summary['frames']} frames, "
    f"{pointers[-1] if pointers else 0} pointers{speed}; see {SUMMARY}"
  )
  warnings = []
  if frames.lost.frames:
    warnings.append(str(frames.lost))
  if summary["overflow"]:
    warnings.append(
      f"{summary['overflow']} pointers found no room and were merged; raise "
      "--max_capacity to keep them"
    )
  if summary.get("depth_png", {}).get("saturated"):
    warnings.append(
      f"{summary['depth_png']['saturated']} depths are beyond the 16-bit range "
      "and count as missing; lower --depth_scale or write depth_npz"
    )
  if summary.get("cloud", {}).get("non_finite"):
    warnings.append(
      f"{summary['cloud']['non_finite']} points are not finite and left out"
    )
  for warning in warnings:
    print(f"warning: {warning}", file=sys.stderr)
  if summary["interrupted"]:
    print("interrupted: the files hold the frames done so far", file=sys.stderr)
    return INTERRUPTED
  return 0


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  flags = _parser().parse_args(arguments)
  return run(lambda: _run(flags))
