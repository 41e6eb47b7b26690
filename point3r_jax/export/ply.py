"""Coloured point clouds as binary PLY."""

import os
import pathlib

import numpy as np

from point3r_jax import files

_VERTEX = np.dtype([("position", "<f4", 3), ("color", "u1", 3)])
_CHUNK = 1 << 18  # Vertices converted at a time: 4 MB.


def write_ply(
  path: str | os.PathLike[str], points: np.ndarray, colors: np.ndarray
) -> None:
  """Writes a point cloud, binary little endian; all of it or nothing.

  Args:
    path: Name of the file; an existing one is replaced.
    points: (N, 3) float32 positions, any frame and unit.
    colors: (N, 3) uint8 RGB.

  Raises:
    ValueError: If the shapes do not fit, or colours are not uint8.
  """
  if points.ndim != 2 or points.shape[1] != 3 or points.shape != colors.shape:
    raise ValueError(
      f"Need points and colours (N, 3): {points.shape}, {colors.shape}."
    )
  if colors.dtype != np.uint8:
    raise ValueError(f"Colours must be uint8, not {colors.dtype}.")
  axes = [f"property float {axis}" for axis in "xyz"]
  channels = [f"property uchar {name}" for name in ("red", "green", "blue")]
  header = [
    "ply",
    "format binary_little_endian 1.0",
    f"element vertex {len(points)}",
    *axes,
    *channels,
    "end_header",
  ]
  with files.atomic_file(path) as file:
    file.write(("\n".join(header) + "\n").encode("ascii"))
    for start in range(0, len(points), _CHUNK):
      part = slice(start, start + _CHUNK)
      vertices = np.empty(len(points[part]), _VERTEX)
      vertices["position"] = points[part]
      vertices["color"] = colors[part]
      file.write(vertices.tobytes())


def read_ply(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
  """Reads a cloud that `write_ply` wrote.

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
