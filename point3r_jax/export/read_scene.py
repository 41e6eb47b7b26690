"""Reads back what `scene.SceneWriter` wrote, for pictures and scores."""

from __future__ import annotations

import json
import os
import pathlib
from typing import NamedTuple

import numpy as np

from point3r_jax.export.scene import OUTPUTS

_VERTEX = np.dtype([("position", "<f4", 3), ("color", "u1", 3)])


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


def read_ply(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
  """Reads a cloud that `ply.write_ply` wrote.

  Args:
    path: Name of the file.

  Returns:
    (N, 3) float32 positions and (N, 3) uint8 colours.

  Raises:
    ValueError: If it is not such a file.
  """
  header, mark, body = (
    pathlib.Path(path).read_bytes().partition(b"end_header\n")
  )
  lines = header.decode("ascii", "replace").splitlines()
  names = [line.split()[-1] for line in lines if line.startswith("property")]
  usual = ["x", "y", "z", "red", "green", "blue"]
  counts = [line for line in lines if line.startswith("element vertex ")]
  if not mark or names != usual or len(counts) != 1:
    raise ValueError(f"{path} is no cloud that write_ply wrote.")
  vertices = np.frombuffer(body, _VERTEX)
  if len(vertices) != int(counts[0].split()[-1]):
    raise ValueError(f"{path} has {len(vertices)} points, but {counts[0]!r}.")
  return vertices["position"], vertices["color"]


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
