"""Camera poses as benchmarks store them, read strictly.

Every reader raises `InputError` that names the file and what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks.files import SINTEL_TAG, opened
from point3r_jax.evaluation.sequences import Trajectory

_CAM = np.dtype([("tag", "<f4"), ("K", "<f8", (3, 3)), ("M", "<f8", (3, 4))])

# Text has few digits; a transposed or scaled matrix is off by far more.
_RIGID_TOLERANCE = 1e-2


def read_cam(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads a Sintel camera.

  Returns:
    (3, 3) intrinsics and the (4, 4) world-to-camera matrix, float64.
  """
  with opened(path) as file:
    data = file.read()
  if len(data) != _CAM.itemsize:
    raise InputError(
      f"{path}: {len(data)} bytes instead of {_CAM.itemsize} of a .cam file"
    )
  camera = np.frombuffer(data, _CAM)[0]
  if camera["tag"] != SINTEL_TAG:
    raise InputError(f"{path}: is no .cam file, its tag is {camera['tag']:g}")
  if not np.isfinite(camera["K"]).all():
    raise InputError(f"{path}: has intrinsics that are not finite")
  extrinsics = _complete(camera["M"])
  check_poses(path, extrinsics[None])
  return camera["K"].astype(np.float64), extrinsics


def read_tum(path: Path) -> Trajectory:
  """Reads rows of `timestamp tx ty tz qx qy qz qw`, camera-to-world."""
  rows = _rows(path, (8,))
  if not rows:
    raise InputError(f"{path}: has no poses")
  table = np.array(rows)
  if not np.isfinite(table).all():
    row = _first(~np.isfinite(table).all(axis=1))
    raise InputError(f"{path}: pose {row} is not finite")
  stamps, position, quaternion = np.split(table, [1, 4], axis=1)
  if (np.diff(stamps[:, 0]) <= 0).any():
    row = _first(np.diff(stamps[:, 0]) <= 0) + 1
    raise InputError(f"{path}: the timestamp of pose {row} does not increase")
  length = np.linalg.norm(quaternion, axis=1)
  if (length < 1e-6).any():
    raise InputError(f"{path}: quaternion {_first(length < 1e-6)} is zero")
  poses = np.tile(np.eye(4), (len(table), 1, 1))
  poses[:, :3, :3] = _rotations(quaternion / length[:, None])
  poses[:, :3, 3] = position
  return Trajectory(stamps[:, 0], poses)


def read_pose_rows(path: Path) -> np.ndarray:
  """Reads (T, 4, 4) poses, one a line: 12 or 16 numbers, row by row.

  Poses that are not finite are returned as they are: what becomes of their
  frames is for the scores to say.
  """
  rows = _rows(path, (12, 16))
  if not rows:
    raise InputError(f"{path}: has no poses")
  poses = np.stack([_complete(np.reshape(row, (-1, 4))) for row in rows])
  finite = np.flatnonzero(np.isfinite(poses).all(axis=(1, 2)))
  check_poses(path, poses[finite], finite)
  return poses


def read_pose(path: Path) -> np.ndarray:
  """Reads one (4, 4) pose, written as four lines."""
  poses = read_pose_blocks(path)
  if len(poses) != 1:
    raise InputError(f"{path}: has {len(poses)} poses instead of one")
  check_poses(path, poses)
  return poses[0]


def read_pose_blocks(path: Path) -> np.ndarray:
  """Reads (T, 4, 4) poses of four lines each, which may hold NaN."""
  rows = _rows(path, (4,))
  if not rows or len(rows) % 4:
    raise InputError(f"{path}: has {len(rows)} lines, not four for each pose")
  return np.array(rows).reshape(-1, 4, 4)


def check_poses(
  path: Path, poses: np.ndarray, numbers: Sequence[int] | None = None
) -> None:
  """Raises `InputError` unless (T, 4, 4) poses are finite and rigid.

  Args:
    path: the file that they come from.
    poses: to check.
    numbers: what each pose is called in the message; None: 0, 1, 2, …
  """
  numbers = range(len(poses)) if numbers is None else numbers
  good = np.isfinite(poses).all(axis=(1, 2))
  if not good.all():
    raise InputError(f"{path}: pose {numbers[_first(~good)]} is not finite")
  rotation = poses[:, :3, :3]
  gram = rotation @ rotation.transpose(0, 2, 1)
  good = (abs(gram - np.eye(3)) < _RIGID_TOLERANCE).all(axis=(1, 2))
  good &= np.linalg.det(rotation) > 0
  good &= (poses[:, 3] == [0, 0, 0, 1]).all(axis=1)
  if not good.all():
    raise InputError(
      f"{path}: pose {numbers[_first(~good)]} is no rigid motion"
    )


def _rows(path: Path, lengths: tuple[int, ...]) -> list[list[float]]:
  """Reads lines of numbers; empty lines and those with # are skipped."""
  with opened(path) as file:
    lines = file.read().decode("utf-8", "replace").splitlines()
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.strip() or line.lstrip().startswith("#"):
      continue
    try:
      row = [float(part) for part in line.split()]
    except ValueError:
      raise InputError(
        f"{path}: line {number} is not made of numbers"
      ) from None
    if len(row) not in lengths:
      wanted = " or ".join(map(str, lengths))
      raise InputError(
        f"{path}: line {number} has {len(row)} numbers instead of {wanted}"
      )
    rows.append(row)
  return rows


def _complete(matrix: np.ndarray) -> np.ndarray:
  """Turns (3, 4) or (4, 4) into (4, 4)."""
  return np.vstack([matrix, [[0, 0, 0, 1]]])[:4].astype(np.float64)


def _rotations(quaternion: np.ndarray) -> np.ndarray:
  """Turns (T, 4) unit quaternions, real part last, into (T, 3, 3)."""
  v, w = quaternion[:, :3], quaternion[:, 3, None, None]
  x, y, z = v.T
  zero = np.zeros_like(x)
  cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1)
  cross = cross.reshape(-1, 3, 3)
  # Rodrigues: v v^T + w^2 + 2 w [v] + [v]^2 = 1 + 2 w [v] + 2 [v]^2.
  return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _first(flags: np.ndarray) -> int:
  """Where the first True is."""
  return int(np.argmax(flags))
