"""Reads back what `scene.SceneWriter` wrote, for pictures and scores."""

from __future__ import annotations

import json
import os
import pathlib
from typing import NamedTuple

import numpy as np

from point3r_jax.export.ply import read_ply
from point3r_jax.export.scene import OUTPUTS


class WrittenScene(NamedTuple):
  """A reconstruction of T frames, in the frame of its first camera.

  Attributes:
    points: (N, 3) float32 of the cloud.
    colors: (N, 3) uint8 RGB of the same.
    camera_to_world: (T, 4, 4) float64, rigid, OpenCV axes.
    intrinsics: (T, 3, 3) float64, in pixels of the depth maps.
    depth: (T, H, W) float32 z-depth.
  """

  points: np.ndarray
  colors: np.ndarray
  camera_to_world: np.ndarray
  intrinsics: np.ndarray
  depth: np.ndarray


def read_scene(directory: str | os.PathLike[str]) -> WrittenScene:
  """Reads a reconstruction with a cloud, cameras and float32 depth.

  Args:
    directory: Where `SceneWriter` wrote "scene", "cameras" and "depth_npz".

  Raises:
    OSError: If one of these is missing.
    ValueError: If one is damaged.
  """
  directory = pathlib.Path(directory)
  points, colors = read_ply(directory / OUTPUTS["scene"])
  cameras = json.loads((directory / OUTPUTS["cameras"]).read_text())["frames"]
  depth = []
  for index in range(len(cameras)):
    with np.load(directory / OUTPUTS["depth_npz"] / f"{index:06d}.npz") as file:
      depth.append(file["depth"])
  return WrittenScene(
    points,
    colors,
    np.array([frame["camera_to_world"] for frame in cameras]),
    np.array([frame["network"]["intrinsics"] for frame in cameras]),
    np.stack(depth),
  )
