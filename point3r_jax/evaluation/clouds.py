"""Point clouds: rigid alignment by closest points, and surface normals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from point3r_jax.evaluation.pose import fit_similarity

_CHUNK = 1 << 16  # Points whose neighbourhoods are in memory at once.


class Icp(NamedTuple):
  """What iterated closest points found.

  Attributes:
    transformation: (4, 4) float64, rigid, from source to target.
    fitness: share of source points with a target point in reach.
    inlier_rmse: root mean square distance of those.
  """

  transformation: np.ndarray
  fitness: float
  inlier_rmse: float


def transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
  """Applies (4, 4) to (..., 3) points."""
  return points @ matrix[:3, :3].T + matrix[:3, 3]


def icp(
  source: np.ndarray,
  target: cKDTree,
  max_distance: float,
  iterations: int = 30,
  tolerance: float = 1e-6,
) -> Icp:
  """Moves points onto others, point to point, without scale.

  It takes the steps of Open3D's `registration_icp`: pair each source point
  with the nearest target point in reach, move by the best rigid motion, pair
  again, and stop if that changed little.

  Args:
    source: (N, 3) points.
    target: tree of (M, 3) points.
    max_distance: from which points are no pair.
    iterations: at most.
    tolerance: on changes of fitness and of root mean square distance; both
      must be less to stop.
  """
  moved = np.asarray(source, np.float64)
  matrix = np.eye(4)

  def pair() -> tuple[np.ndarray, np.ndarray, float, float]:
    distance, index = target.query(
      moved, distance_upper_bound=max_distance, workers=-1
    )
    paired = np.isfinite(distance)
    inliers = distance[paired]
    rmse = float(np.sqrt(np.mean(inliers**2))) if inliers.size else 0.0
    return paired, index[paired], inliers.size / len(moved), rmse

  paired, index, fitness, rmse = pair()
  for _ in range(iterations):
    if not index.size:
      break
    step = fit_similarity(moved[paired], target.data[index], with_scale=False)
    matrix = step.matrix() @ matrix
    moved = transform(step.matrix(), moved)
    before = fitness, rmse
    paired, index, fitness, rmse = pair()
    change = max(abs(before[0] - fitness), abs(before[1] - rmse))
    if change < tolerance:
      break
  return Icp(matrix, fitness, rmse)


def estimate_normals(tree: cKDTree, neighbors: int = 30) -> np.ndarray:
  """Estimates surface normals from nearest neighbours.

  A normal is the direction in which a point and its neighbours vary least. Its
  sign is arbitrary. Where they all coincide, it is (0, 0, 1).

  Args:
    tree: of (N, 3) points.
    neighbors: points to take a normal from, the point itself among them; all
      if there are fewer.

  Returns:
    (N, 3) float64 unit vectors.
  """
  points = tree.data
  normals = np.empty_like(points)
  nearest = np.arange(1, min(neighbors, len(points)) + 1)
  for start in range(0, len(points), _CHUNK):
    rows = slice(start, start + _CHUNK)
    _, index = tree.query(points[rows], nearest, workers=-1)
    around = points[index]
    around -= around[:, :1]  # So that equal points differ by exactly nothing.
    around -= around.mean(axis=1, keepdims=True)
    covariance = np.swapaxes(around, 1, 2) @ around
    normals[rows] = np.linalg.eigh(covariance)[1][:, :, 0]
    normals[rows][~covariance.any(axis=(1, 2))] = (0, 0, 1)
  return normals
