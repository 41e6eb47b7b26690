"""Everything a reconstruction leaves behind, written frame by frame."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from point3r_jax.data.frames import Frame
from point3r_jax.errors import UserError
from point3r_jax.export import depth as depth_files
from point3r_jax.export.cameras import CameraFrame, CameraWriter
from point3r_jax.export.cloud import VoxelCloud, confidence_mask
from point3r_jax.export.ply import write_ply
from point3r_jax.export.trajectory import TrajectoryWriter
from point3r_jax.files import atomic_file

# What can be written, and the file or folder that it goes to.
OUTPUTS = {
  "scene": "scene.ply",
  "trajectory": "trajectory.txt",
  "cameras": "cameras.json",
  "depth": "depth",
  "depth_npz": "depth",
  "confidence": "confidence",
}
# The maps of a `FrameResult` that go into them.
_MAPS = {
  "scene": ("points_world", "confidence_world"),
  "depth": ("depth",),
  "depth_npz": ("depth",),
  "confidence": ("confidence_camera",),
}
SUMMARY = "summary.json"
_FORMAT = "point3r-jax reconstruction"
_NO_COUNTS = depth_files.DepthPngCounts(0, 0, 0)


class OutputError(UserError):
  """An output folder that must not be written to, or results that cannot."""


@dataclasses.dataclass(frozen=True)
class FrameResult:
  """What is known of a frame; None where it was not computed or asked for.

  Attributes:
    pose: (7,) camera-to-world translation and quaternion w, x, y, z.
    camera_to_world: (4, 4) the same as a matrix.
    points_world: (H, W, 3) float32 in the global frame.
    confidence_world: (H, W) float32.
    depth: (H, W) float32 z-depth in the camera's frame.
    confidence_camera: (H, W) float32.
    intrinsics: (3, 3) of the network's image.
  """

  pose: np.ndarray
  camera_to_world: np.ndarray
  points_world: np.ndarray | None
  confidence_world: np.ndarray | None
  depth: np.ndarray | None
  confidence_camera: np.ndarray | None
  intrinsics: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class PreparedFrame:
  """A frame whose maps are written and whose place in order is still to come.

  Attributes:
    frame: the network's image and where it came from.
    result: what the model made of it.
    files: the maps that were written.
    depth_file: the depth map's name in the output folder, if there is one.
    depth_counts: what the depth map's file could not hold.
    points: (N, 3) confident points of the cloud, if one is written.
    colors: (N, 3) their colours.
  """

  frame: Frame
  result: FrameResult
  files: tuple[pathlib.Path, ...]
  depth_file: str | None
  depth_counts: depth_files.DepthPngCounts
  points: np.ndarray | None
  colors: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class SceneOptions:
  """What to write and how.

  Attributes:
    write: names of `OUTPUTS`.
    percentile: share of a frame's least confident pixels, in percent, that the
      cloud leaves out.
    voxel_size: edge of the cloud's voxels in the model's unit; None: a 500th of
      the first frame's extent.
    max_points: points beyond which the cloud's voxels double in size.
    depth_scale: steps of the depth PNGs per unit.
  """

  write: Collection[str] = ("scene", "trajectory", "cameras", "depth")
  percentile: float = 20.0
  voxel_size: float | None = None
  max_points: int = 10_000_000
  depth_scale: float = 1000.0

  def __post_init__(self):
    """Refuses names and values that make no sense."""
    unknown = sorted(set(self.write) - set(OUTPUTS))
    if unknown:
      raise OutputError(f"cannot write {unknown}; there are {list(OUTPUTS)}")
    if not 0 <= self.percentile < 100:
      raise OutputError(
        f"the confidence percentile must be in [0, 100), not {self.percentile}"
      )
    for name in ("voxel_size", "depth_scale"):
      value = getattr(self, name)
      if value is not None and not 0 < value < np.inf:
        raise OutputError(f"{name} must be positive, not {value}")
    if self.max_points < 1000:
      raise OutputError(f"max_points must be >= 1000, not {self.max_points}")

  @property
  def maps(self) -> frozenset[str]:
    """The fields of a `FrameResult` as large as the image that are written."""
    return frozenset().union(*(_MAPS.get(name, ()) for name in self.write))


def prepare_folder(
  directory: str | os.PathLike[str], overwrite: bool
) -> pathlib.Path:
  """Makes the output folder.

  Args:
    directory: to make.
    overwrite: remove an earlier reconstruction; other files stay.

  Raises:
    OutputError: if the folder is not empty and may not be overwritten, or holds
      no earlier reconstruction.
  """
  directory = pathlib.Path(directory)
  try:
    if directory.is_dir() and any(directory.iterdir()):
      if not overwrite:
        raise OutputError(
          f"{directory} is not empty; choose another folder or use --overwrite"
        )
      _remove_reconstruction(directory)
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OutputError(f"cannot write to {directory}: {error}") from error
  return directory


def _remove_reconstruction(directory: pathlib.Path) -> None:
  """Deletes what an earlier run wrote, which its summary proves."""
  try:
    written = json.loads((directory / SUMMARY).read_text())["format"] == _FORMAT
  except (OSError, ValueError, KeyError, TypeError):
    written = False
  if not written:
    raise OutputError(
      f"{directory} is not empty and no earlier reconstruction (it has no "
      f"{SUMMARY} of one), so it is not overwritten; choose another folder"
    )
  for name in {*OUTPUTS.values(), SUMMARY}:
    path = directory / name
    if not path.is_dir():
      path.unlink(missing_ok=True)
      continue
    for file in path.iterdir():
      if re.fullmatch(r"\d{6}\.(png|npz)", file.name):
        file.unlink()
    if not any(path.iterdir()):
      path.rmdir()


class SceneWriter:
  """Writes the outputs; memory does not grow with the number of frames.

  Trajectory, cameras and maps are complete after every frame, the cloud when
  the writer is closed. A frame is first prepared, which takes time and may be
  done for several frames at once, and then committed, in order.
  """

  def __init__(self, directory: pathlib.Path, options: SceneOptions):
    """Starts the files in a folder that `prepare_folder` made."""
    self._directory = directory
    self._options = options
    self._depth_counts = _NO_COUNTS
    write = options.write
    self._cloud = self._trajectory = self._cameras = None
    if "scene" in write:
      self._cloud = VoxelCloud(options.voxel_size, options.max_points)
    if "trajectory" in write:
      self._trajectory = TrajectoryWriter(directory / OUTPUTS["trajectory"])
    if "cameras" in write:
      self._cameras = CameraWriter(directory / OUTPUTS["cameras"])
    for name in {"depth", "depth_npz", "confidence"} & set(write):
      (directory / OUTPUTS[name]).mkdir(exist_ok=True)

  def prepare(
    self, number: int, frame: Frame, result: FrameResult
  ) -> PreparedFrame:
    """Writes a frame's maps and picks its points; in any thread.

    Args:
      number: of the frame, in the order in which frames will be committed.
      frame: the network's image and where it came from.
      result: what the model made of it.

    Raises:
      OutputError: if the pose or the intrinsics are not finite; nothing of the
        frame is written then.
    """
    numbers = [result.camera_to_world]
    if self._cameras:
      numbers.append(result.intrinsics)
    if not all(np.isfinite(x).all() for x in numbers):
      raise OutputError(
        f"{frame.source}, frame {frame.index}: the model gave a camera that is "
        "not finite; are the weights damaged, or is the precision too low?"
      )
    files, depth_file, counts = self._write_maps(f"{number:06d}", result)
    points = colors = None
    if self._cloud:
      mask = confidence_mask(result.confidence_world, self._options.percentile)
      # By index: NumPy takes ten times as long through a mask.
      chosen = np.flatnonzero(mask)
      points = result.points_world.reshape(-1, 3).take(chosen, axis=0)
      colors = frame.image.reshape(-1, 3).take(chosen, axis=0)
    return PreparedFrame(
      frame, result, files, depth_file, counts, points, colors
    )

  def commit(self, prepared: PreparedFrame) -> None:
    """Adds the next frame to the files that hold all of them."""
    frame, result = prepared.frame, prepared.result
    # Images have no times but an order; frames of a video all have a time.
    timestamp = frame.index if frame.timestamp is None else frame.timestamp
    self._depth_counts = depth_files.DepthPngCounts(
      *map(sum, zip(self._depth_counts, prepared.depth_counts, strict=True))
    )
    if self._cloud:
      self._cloud.add(prepared.points, prepared.colors)
    if self._trajectory:
      self._trajectory.write(timestamp, result.pose)
    if self._cameras:
      preparation = frame.preparation
      self._cameras.write(
        CameraFrame(
          camera_to_world=result.camera_to_world,
          intrinsics=result.intrinsics,
          image_size=preparation.network_size,
          original_intrinsics=preparation.intrinsics_to_source(
            result.intrinsics
          ),
          original_size=preparation.source_size,
          source_file=frame.source,
          source_index=frame.index,
          timestamp=timestamp,
          depth_file=prepared.depth_file,
        )
      )

  def discard(self, prepared: PreparedFrame) -> None:
    """Deletes the maps of a frame that will not be committed."""
    for path in prepared.files:
      path.unlink(missing_ok=True)

  def _write_maps(
    self, name: str, result: FrameResult
  ) -> tuple[tuple[pathlib.Path, ...], str | None, depth_files.DepthPngCounts]:
    """Writes depth and confidence: files, the depth map's name, its losses."""
    files, depth_file, counts = [], None, _NO_COUNTS

    def place(output: str, suffix: str) -> pathlib.Path:
      files.append(self._directory / OUTPUTS[output] / f"{name}.{suffix}")
      return files[-1]

    if "depth_npz" in self._options.write:
      depth_file = f"{OUTPUTS['depth_npz']}/{name}.npz"
      depth_files.write_depth_npz(place("depth_npz", "npz"), result.depth)
    if "depth" in self._options.write:
      depth_file = f"{OUTPUTS['depth']}/{name}.png"
      counts = depth_files.write_depth_png(
        place("depth", "png"), result.depth, self._options.depth_scale
      )
    if "confidence" in self._options.write:
      depth_files.write_confidence_npz(
        place("confidence", "npz"), result.confidence_camera
      )
    return tuple(files), depth_file, counts

  def close(self, complete: bool) -> dict[str, Any]:
    """Writes the cloud and ends the other files.

    Args:
      complete: whether all frames of the input were written.

    Returns:
      JSON-friendly facts for the summary.
    """
    facts = {}
    with contextlib.ExitStack() as stack:  # Each file is closed, come what may.
      if self._trajectory:
        stack.callback(self._trajectory.close)
      if self._cameras:
        stack.callback(self._cameras.close, complete)
      if self._cloud:
        write_ply(self._directory / OUTPUTS["scene"], *self._cloud.arrays())
    if self._cloud:
      facts["cloud"] = {
        **dataclasses.asdict(self._cloud.summary()),
        "confidence_percentile": self._options.percentile,
      }
    if "depth" in self._options.write:
      facts["depth_png"] = {
        "scale": self._options.depth_scale,
        "no_depth": "0",
        **self._depth_counts._asdict(),
      }
    return facts


def write_summary(directory: pathlib.Path, summary: dict[str, Any]) -> None:
  """Writes summary.json, which also marks the folder as a reconstruction."""
  contents = {"format": _FORMAT, **summary}
  with atomic_file(directory / SUMMARY) as file:
    file.write((json.dumps(contents, indent=2) + "\n").encode())
