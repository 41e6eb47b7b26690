"""Reconstructs a scene from a video or images."""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import tqdm

from point3r_jax import pretrained
from point3r_jax.checkpoints import (
  UNTRAINED,
  load_checkpoint,
  load_config,
  load_metadata,
)
from point3r_jax.cli.common import (
  INTERRUPTED,
  add_model_flags,
  end,
  model_options,
  run,
  stop_on_interrupt,
)
from point3r_jax.config import ModelConfig
from point3r_jax.data.frames import FrameSource, open_frames
from point3r_jax.errors import InputError
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
# First frames whose times are left out of statistics: not only do they wait for
# compilation.
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
    help="a directory that convert_torch_weights.py or train.py wrote; the "
    "name of a bundled checkpoint "
    f"({', '.join(pretrained.names()) or 'there is none'}); or "
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
    help="long side that images are scaled to, a multiple of 16; 224 takes "
    "the central square (default: the checkpoint's)",
  )
  add(
    "--stride",
    type=int,
    default=1,
    metavar="N",
    help="take every N-th frame (default: %(default)s)",
  )
  add(
    "--start",
    type=int,
    default=0,
    metavar="N",
    help="the first frame to take, counted from 0 (default: %(default)s)",
  )
  add("--end", type=int, metavar="N", help="stop before frame N")
  add("--max_frames", type=int, metavar="N", help="stop after N frames")
  add("--shuffle", action="store_true", help="take images in random order")
  add(
    "--seed",
    type=int,
    default=0,
    help="seed of the random order (default: %(default)s)",
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
    help="percent of each frame's pixels, the least confident, to leave out of "
    "the cloud (default: %(default)s)",
  )
  add(
    "--voxel_size",
    type=float,
    help="edge of the cloud's voxels, in the model's unit (default: a 500th "
    "of the first frame's extent)",
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


def _statistics(
  seconds: Sequence[float], compiled: Sequence[int], together: int
) -> dict[str, float] | None:
  """Returns what frames took that waited for no compilation.

  Args:
    seconds: from each written frame to the next.
    compiled: how many programs were, when each frame was written.
    together: frames that are encoded at once. They are written close together,
      so all of them are left out if a program was finished meanwhile.

  Returns:
    The statistics; None if no frame is left.
  """
  kept, before = [], 0
  for first in range(0, len(seconds), together):
    group = slice(first, first + together)
    now = compiled[group][-1]
    if now == before:
      kept += seconds[max(first, _WARM_UP) : group.stop]
    before = now
  if not kept:
    return None
  kept.sort()
  return {
    "median": statistics.median(kept),
    "mean": statistics.fmean(kept),
    "p95": kept[min(len(kept) - 1, int(0.95 * len(kept)))],
    "frames_left_out": len(seconds) - len(kept),
  }


def _summary(
  flags: argparse.Namespace,
  stream: Stream,
  frames: FrameSource,
  progress: Progress,
  compiled: Sequence[int],
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
    "seconds_per_frame": _statistics(
      progress.seconds, compiled, stream.look_ahead
    ),
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


def _check_folder(flags: argparse.Namespace) -> None:
  """Raises OutputError for a folder that is in the way; changes nothing."""
  path = pathlib.Path(flags.output)
  if path.exists() and not (flags.overwrite and path.is_dir()):
    prepare_folder(path, overwrite=False)


def _run(flags: argparse.Namespace) -> int:
  options = SceneOptions(
    write=flags.write,
    percentile=flags.confidence,
    voxel_size=flags.voxel_size,
    max_points=flags.max_points,
    depth_scale=flags.depth_scale,
  )
  # All that may be wrong with the flags, before gigabytes are read.
  _check_folder(flags)
  size = load_config(flags.checkpoint).image_size
  frames = open_frames(
    flags.input,
    size=size if flags.size is None else flags.size,
    stride=flags.stride,
    start=flags.start,
    end=flags.end,
    max_frames=flags.max_frames,
    shuffle_seed=flags.seed if flags.shuffle else None,
    on_device=True,
  )
  config, params = load_checkpoint(
    flags.checkpoint, precision=get_precision(flags.precision)
  )
  stream = _open_stream(flags, config, params, frames)
  notice = _notice(flags.checkpoint)
  if notice:
    print(notice, flush=True)
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
  progress, compiled = Progress(), []
  scene = SceneProcess(directory, options, stream.image_size)
  facts, finished = {}, False
  bar = tqdm.tqdm(total=frames.expected_frames, unit="frame", disable=None)

  def report(progress: Progress) -> None:
    compiled.append(len(stream.compile_seconds))
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
      summary = _summary(flags, stream, frames, progress, compiled, facts)
      summary["complete"] = finished and not frames.lost.frames
      write_summary(directory, summary)
  return summary


def _outcome(summary: dict[str, Any]) -> str:
  """Says how much was done and how long it took."""
  seconds, pointers = summary["seconds_of_frames"], summary["pointers"]
  if not seconds:
    return "no frames"
  pace = f"the first after {seconds[0]:.1f} s"
  if times := summary["seconds_per_frame"]:
    # The mean: frames that are encoded together are written close together.
    pace += f", {times['mean'] * 1e3:.1f} ms each without compilation"
  return (
    f"{len(seconds)} frames in {sum(seconds):.1f} s ({pace}), {pointers[-1]} "
    "pointers"
  )


def _conclude(
  directory: pathlib.Path, summary: dict[str, Any], frames: FrameSource
) -> int:
  """Says what came out; returns the exit code."""
  print(f"{directory}: {_outcome(summary)}; see {SUMMARY}")
  warnings = []
  if frames.lost.frames:
    warnings.append(str(frames.lost))
  if summary["overflow"]:
    warnings.append(
      f"{summary['overflow']} pointers found no room and were merged; raise "
      "--max_capacity to keep them"
    )
  depths, cloud = summary.get("depth_png", {}), summary.get("cloud", {})
  if depths.get("saturated"):
    warnings.append(
      f"{depths['saturated']} depths are beyond the 16-bit range and count as "
      "missing; lower --depth_scale or write depth_npz"
    )
  if depths.get("vanished"):
    warnings.append(
      f"{depths['vanished']} depths round to 0 and count as missing; raise "
      "--depth_scale or write depth_npz"
    )
  if cloud.get("non_finite"):
    warnings.append(f"{cloud['non_finite']} points are not finite and left out")
  if cloud.get("out_of_range"):
    warnings.append(
      f"{cloud['out_of_range']} points are too many voxels away and left out; "
      "raise --voxel_size"
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


def script() -> NoReturn:
  """Runs the program with the process's arguments, and ends the process."""
  end(main())
