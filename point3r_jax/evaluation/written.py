"""What reconstruct.py wrote, as a prediction that tasks can score.

The files have no point a pixel in the global frame. So points are the written
depth, lifted by the written intrinsics and moved by the written pose: what
someone gets who uses these files. The world head's points, which an evaluation
of a checkpoint scores, are only in scene.ply, where voxels have averaged them.
"""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np

from point3r_jax.errors import InputError
from point3r_jax.evaluation.predictions import SavedPrediction
from point3r_jax.evaluation.reconstruction import used_pixels
from point3r_jax.evaluation.sequences import Sequence
from point3r_jax.export.read_scene import WrittenScene
from point3r_jax.export.scene import SUMMARY
from point3r_jax.geometry import matrix_to_pose, transform_points, unproject


def _intrinsics(scene: WrittenScene) -> np.ndarray:
  """Returns (T, 3, 3) float32, for frames without a focal length the usual."""
  intrinsics = np.array(scene.intrinsics, np.float32)
  focal = intrinsics[:, 0, 0]
  fitted = focal > 0
  if not fitted.any():
    raise InputError("no focal length could be fitted to any frame")
  usual = np.median(focal[fitted])
  intrinsics[~fitted, 0, 0] = intrinsics[~fitted, 1, 1] = usual
  return intrinsics


def written_prediction(
  directory: str | os.PathLike[str],
  scene: WrittenScene,
  sequence: Sequence,
  pixel_stride: int = 1,
) -> SavedPrediction:
  """Returns what a folder holds as a task expects it.

  Args:
    directory: what reconstruct.py wrote.
    scene: the same, read.
    sequence: whose frames were its input, at the network's size.
    pixel_stride: of the points; see `ReconstructionOptions`, without a crop.

  Returns:
    depth (T, H, W), pose (T, 7) and points (T, H', W', 3), float32.

  Raises:
    InputError: if frames are missing or of another size than the sequence's, or
      no frame has a focal length.
    OSError: if there is no summary.
  """
  size = (len(sequence), *sequence.image_size)
  if scene.depth.shape != size:
    raise InputError(
      f"{directory} has depth of {scene.depth.shape} and the sequence {size}"
    )
  summary = json.loads((pathlib.Path(directory) / SUMMARY).read_text())
  poses = np.asarray(scene.camera_to_world, np.float32)
  points = unproject(scene.depth, _intrinsics(scene))
  rows, columns = used_pixels(sequence.image_size, None, pixel_stride)
  points = transform_points(poses, points[:, rows, columns])
  arrays = {
    "depth": scene.depth,
    "pose": np.asarray(matrix_to_pose(poses)),
    "points": np.asarray(points),
  }
  return SavedPrediction(
    arrays,
    pointers=summary["pointers"],
    seconds=summary["seconds_of_frames"],
    overflow=summary["overflow"],
  )
