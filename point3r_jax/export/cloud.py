"""One averaged coloured point a voxel, in bounded memory."""

import collections
import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

# A key packs three cell indices of 21 bits, each shifted to be non-negative.
_BITS = 21
_HALF = 1 << (_BITS - 1)  # Cells run from -_HALF to _HALF - 1 on each axis.
_ONES = 1 | 1 << _BITS | 1 << 2 * _BITS  # The lowest bit of each index.
_PARENT_BITS = _ONES * (_HALF - 1)  # All but the highest bit of each index.
_PARENT_SHIFT = _ONES * (_HALF // 2)

_AUTOMATIC_CELLS = 500

# Voxels averaged at once. Arrays larger than caches come from the operating
# system anew each time, which takes longer than to compute with them.
_BLOCK = 1 << 15

_logger = logging.getLogger(__name__)


def confidence_mask(confidence: np.ndarray, percentile: float) -> np.ndarray:
  """Picks a frame's confident pixels.

  Args:
    confidence: (H, W) confidence of one frame.
    percentile: Share of the frame's pixels to leave out, in percent: 0 keeps
      all, 50 the better half.

  Returns:
    (H, W) bool, true where the confidence reaches the percentile. Equal
    confidences are kept or left out together; NaN is kept only at 0.
  """
  if not 0 <= percentile <= 100:
    raise ValueError(f"percentile must be in [0, 100], not {percentile}.")
  if percentile == 0:
    return np.ones(confidence.shape, bool)
  numbers = confidence[~np.isnan(confidence)]
  if not numbers.size:
    return np.zeros(confidence.shape, bool)
  # "higher" is a pixel's own value: no interpolation, so infinity is safe.
  return confidence >= np.percentile(numbers, percentile, method="higher")


def automatic_voxel_size(points: np.ndarray) -> float:
  """Chooses a voxel size for a scene from one frame.

  It is a 500th of the diagonal of the box between the 5th and 95th percentiles
  of each coordinate. Where all points coincide, the largest coordinate takes
  the diagonal's place; where they are all zero, 1 does.

  Args:
    points: (N, 3) finite points, N > 0.

  Returns:
    Edge length in the points' unit, > 0.
  """
  low, high = np.percentile(points.astype(np.float64), [5, 95], axis=0)
  extent = np.linalg.norm(high - low) or np.abs(points).max() or 1.0
  return float(extent) / _AUTOMATIC_CELLS


class _Voxels(NamedTuple):
  """Occupied voxels, by ascending key."""

  key: np.ndarray  # (N,) int64, unique.
  count: np.ndarray  # (N,) int64 points averaged.
  means: list[np.ndarray]  # 6 of (N,) float32: x, y, z, red, green, blue.


def _average(
  key: np.ndarray,
  channels: Sequence[np.ndarray],
  count: np.ndarray | None = None,
) -> _Voxels:
  """Averages entries with equal keys, weighted by their counts.

  Args:
    key: (N,) int64 keys in any order, N > 0.
    channels: 6 arrays (N,): position and colour.
    count: (N,) points that each entry stands for; None for one each.

  Returns:
    A voxel for each distinct key.
  """
  # The stable kind profits from the ascending runs of keys along an image row.
  order = np.argsort(key, kind="stable")
  key = key.take(order)
  changed = key[1:] != key[:-1]
  first = np.concatenate([[0], np.flatnonzero(changed) + 1])
  ends = np.append(first[1:], len(key))
  total = np.empty(len(first), np.int64)
  means = [np.empty(len(first), np.float32) for _ in channels]
  for start in range(0, len(first), _BLOCK):
    block = slice(start, start + _BLOCK)
    begin, stop = first[start], ends[block][-1]
    rows = order[begin:stop]
    voxel = np.cumsum(np.concatenate([[0], changed[begin : stop - 1]]))
    weight = None if count is None else count.take(rows)
    # In float64. `np.add.reduceat` would keep other threads from running.
    total[block] = np.bincount(voxel, weight)
    for mean, channel in zip(means, channels, strict=True):
      values = channel.take(rows)
      values = values if weight is None else values * weight
      mean[block] = np.bincount(voxel, values) / total[block]
  return _Voxels(key[first], total, means)


def _fold(
  held: _Voxels, new: _Voxels, parts: int, run: Callable[..., Iterable]
) -> _Voxels:
  """Joins two sets of voxels; updates those of `held` in place.

  Args:
    held: Voxels, at least one.
    new: More of them.
    parts: Ranges of keys, at most, that are worked on side by side.
    run: Does what `map` does, in threads.
  """
  parts = min(parts, len(held.key))
  old_bounds = np.linspace(0, len(held.key), parts + 1).astype(int)
  cuts = np.searchsorted(new.key, held.key[old_bounds[1:-1]])
  new_bounds = [0, *cuts, len(new.key)]
  olds = list(map(slice, old_bounds[:-1], old_bounds[1:]))

  def update(old: slice, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """Takes in what is held already; returns what is not, and its place."""
    key, wanted = held.key[old], new.key[start:stop]
    place = np.searchsorted(key, wanted)
    met = key[np.minimum(place, len(key) - 1)] == wanted
    here, there = old.start + place[met], start + np.flatnonzero(met)
    total = held.count[here] + new.count[there]
    share = new.count[there] / total
    held.count[here] = total
    for mean, other in zip(held.means, new.means, strict=True):
      before = mean[here]
      mean[here] = before + share * (other[there] - before)
    missed = np.flatnonzero(~met)
    return start + missed, place[missed]

  missed = list(run(update, olds, new_bounds[:-1], new_bounds[1:]))
  sizes = [
    old.stop - old.start + len(rows)
    for old, (rows, _) in zip(olds, missed, strict=True)
  ]
  if sum(sizes) == len(held.key):
    return held
  ends = np.cumsum(sizes)
  sources = [(held.key, new.key), (held.count, new.count)]
  sources += zip(held.means, new.means, strict=True)
  joined = [np.empty(ends[-1], old.dtype) for old, _ in sources]

  def insert(old: slice, missing: tuple, size: int, end: int) -> None:
    rows, place = missing
    target = place + np.arange(len(rows))
    # Indices, since NumPy assigns through them twice as fast as through a mask.
    kept = np.delete(np.arange(size), target)
    for array, (before, other) in zip(joined, sources, strict=True):
      part = array[end - size : end]
      part[kept] = before[old]
      part[target] = other[rows]

  list(run(insert, olds, missed, sizes, ends))
  key, count, *means = joined
  return _Voxels(key, count, means)


def _pack(cells: np.ndarray) -> np.ndarray:
  """Keys (N,) of voxels with integer cell indices (3, N)."""
  x, y, z = cells + _HALF
  return x << 2 * _BITS | y << _BITS | z


def _parent_keys(key: np.ndarray) -> np.ndarray:
  """Keys of the voxels twice as large: each cell index halved, rounded down."""
  return ((key >> 1) & _PARENT_BITS) + _PARENT_SHIFT


class _Averaged(NamedTuple):
  """A buffer's voxels, and what has none."""

  voxels: _Voxels | None
  non_finite: int
  out_of_range: int


def _average_frames(
  frames: Sequence[tuple[np.ndarray, np.ndarray]], voxel_size: float
) -> _Averaged:
  """Averages the points and colours (N, 3) of frames."""
  size = sum(len(points) for points, _ in frames)
  key = np.empty(size, np.int64)
  positions = np.empty((3, size), np.float32)
  hues = np.empty((3, size), np.uint8)
  end = non_finite = 0
  for points, colors in frames:  # One at a time, see `_BLOCK`.
    points, colors = (np.ascontiguousarray(x.T) for x in (points, colors))
    cells = np.floor(points.astype(np.float64) / voxel_size)
    inside = ((cells >= -_HALF) & (cells < _HALF)).all(axis=0)
    start, end = end, end + np.count_nonzero(inside)
    if end - start < len(inside):
      non_finite += np.count_nonzero(~np.isfinite(points).all(axis=0))
      cells, points, colors = (x[:, inside] for x in (cells, points, colors))
    key[start:end] = _pack(cells.astype(np.int64))
    positions[:, start:end], hues[:, start:end] = points, colors
  channels = [*positions[:, :end], *hues[:, :end]]
  return _Averaged(
    _average(key[:end], channels) if end else None,
    int(non_finite),
    int(size - end - non_finite),
  )


@dataclasses.dataclass(frozen=True)
class CloudSummary:
  """What a cloud holds and what it left out.

  Attributes:
    points: Occupied voxels, the points of the cloud.
    voxel_size: Edge length now, in the cloud's unit; None before any point.
    doublings: How often the voxel size was doubled to stay within bounds.
    added: Points offered, including those left out.
    non_finite: Points left out since a coordinate was not finite.
    out_of_range: Points left out since they were further than 2^20 voxels from
      the origin along an axis.
  """

  points: int
  voxel_size: float | None
  doublings: int
  added: int
  non_finite: int
  out_of_range: int


class _Scale(NamedTuple):
  """How large voxels are, and how often that was doubled."""

  voxel_size: float
  doublings: int


class _Held:
  """The voxels of all buffers so far; one thread at a time works on them.

  Attributes:
    voxels: None before the first.
    non_finite: see `CloudSummary`.
    out_of_range: likewise.
  """

  def __init__(self, max_points: int, threads: int):
    """Holds none; see `VoxelCloud`."""
    self.voxels: _Voxels | None = None
    self.non_finite = self.out_of_range = 0
    self._max_points = max_points
    self._threads = threads
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, "fold")
    self._scale: _Scale | None = None

  def take_in(
    self, averaged: concurrent.futures.Future[_Averaged], scale: _Scale
  ) -> _Scale:
    """Takes in a buffer once it is averaged, in voxels of a scale.

    Returns:
      The scale of all that is held now.
    """
    self._scale = self._scale or scale
    new, non_finite, out_of_range = averaged.result()
    self.non_finite += non_finite
    self.out_of_range += out_of_range
    if new is not None:
      for _ in range(self._scale.doublings - scale.doublings):
        new = _average(_parent_keys(new.key), new.means, new.count)
      if self.voxels:
        new = _fold(self.voxels, new, self._threads, self._pool.map)
      self.voxels = new
      self._keep_bound()
    return self._scale

  def _keep_bound(self) -> None:
    """Doubles the voxels until there are few enough."""
    while len(self.voxels.key) > self._max_points:
      key, count, means = self.voxels
      self.voxels = _average(_parent_keys(key), means, count)
      size, doublings = self._scale
      self._scale = _Scale(2 * size, doublings + 1)
      _logger.warning(
        "Point cloud over its bound of %d points: voxel size doubled to %.4g, "
        "%d points became %d.",
        self._max_points,
        self._scale.voxel_size,
        len(key),
        len(self.voxels.key),
      )


class VoxelCloud:
  """Gathers coloured points of many frames, one averaged point a voxel.

  Position and colour of a voxel are the plain means over all points that fell
  into it. Points wait in a buffer, so that several frames share the cost of
  sorting them into a large cloud; that is done in the background. When more
  than `max_points` voxels are occupied, the voxels double in size (the cells
  nest, so means remain means of all their points) until no more than that are.

  The result does not depend on the order of frames, except through an automatic
  voxel size and through points beyond the range of the voxels of the moment,
  whose size is known the later, the more threads there are.
  """

  def __init__(
    self,
    voxel_size: float | None = None,
    max_points: int = 10_000_000,
    buffer_points: int = 1 << 21,
    threads: int | None = None,
  ):
    """Makes an empty cloud.

    Args:
      voxel_size: Edge length in the unit of the points. None or 0 chooses it
        from the first frame with a finite point: see `automatic_voxel_size`.
      max_points: Bound on the number of points, at least 8 (the cells around
        the origin never merge). Each takes 40 bytes, up to 150 for the moment
        in which the voxels double.
      buffer_points: Points buffered before they are sorted into the cloud.
        Each takes 15 bytes, and up to 100 more while it is sorted.
      threads: How many buffers are sorted side by side, and in how many parts
        one is taken into the cloud: NumPy does both without holding the
        interpreter. None: half the processors, at least 2 and at most 8.
    """
    voxel_size = voxel_size or None
    if voxel_size is not None and not 0 < voxel_size < np.inf:
      raise ValueError(f"voxel_size must be positive, not {voxel_size}.")
    if max_points < 8:
      raise ValueError(f"max_points must be at least 8, not {max_points}.")
    self._buffer_points = buffer_points
    self._buffer: list[tuple[np.ndarray, np.ndarray]] = []
    self._buffered = self._added = self._without_size = 0
    self._threads = threads or min(8, max(2, (os.cpu_count() or 1) // 2))
    pool = concurrent.futures.ThreadPoolExecutor
    self._averagers = pool(self._threads, "average")
    self._keeper = pool(1, "keep")
    self._held = _Held(max_points, self._threads)
    # After the buffers that were waited for, and of those that were not yet.
    self._scale = None if voxel_size is None else _Scale(voxel_size, 0)
    self._under_way: collections.deque[concurrent.futures.Future[_Scale]] = (
      collections.deque()
    )

  def add(self, points: np.ndarray, colors: np.ndarray) -> None:
    """Adds the points of a frame.

    Args:
      points: (..., 3) float positions, all frames in one coordinate frame.
        Points that are not finite are counted and left out.
      colors: (..., 3) uint8 RGB of the same points.
    """
    if points.shape != colors.shape or points.shape[-1:] != (3,):
      raise ValueError(
        f"Need points and colours (..., 3): {points.shape}, {colors.shape}."
      )
    if colors.dtype != np.uint8:
      raise ValueError(f"Colours must be uint8, not {colors.dtype}.")
    points = points.reshape(-1, 3).astype(np.float32)
    self._added += len(points)
    if self._scale is None:
      finite = points[np.isfinite(points).all(axis=1)]
      if not len(finite):
        self._without_size += len(points)
        return
      self._scale = _Scale(automatic_voxel_size(finite), 0)
      _logger.info("Automatic voxel size: %.4g.", self._scale.voxel_size)
    self._buffer.append((points, colors.reshape(-1, 3).copy()))
    self._buffered += len(points)
    if self._buffered >= self._buffer_points:
      self._hand_over()

  def _hand_over(self) -> None:
    """Has the buffer averaged and taken into the cloud, in the background.

    Waits for earlier ones where too many are under way. The scale is that after
    the last one that was waited for, whatever has been done since: so the
    result does not depend on time.
    """
    if self._buffered:
      self._wait(self._threads - 1)
      averaged = self._averagers.submit(
        _average_frames, self._buffer, self._scale.voxel_size
      )
      self._under_way.append(
        self._keeper.submit(self._held.take_in, averaged, self._scale)
      )
      self._buffer, self._buffered = [], 0

  def _wait(self, under_way: int) -> None:
    """Waits until no more than so many buffers are under way."""
    while len(self._under_way) > under_way:
      self._scale = self._under_way.popleft().result()

  def _complete(self) -> _Held:
    """Takes all points into the cloud."""
    self._hand_over()
    self._wait(0)
    return self._held

  def arrays(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cloud so far.

    Returns:
      (N, 3) float32 mean positions and (N, 3) uint8 mean colours, RGB, rounded;
      in a fixed order given by their voxels.
    """
    voxels = self._complete().voxels
    if not voxels:
      return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)
    points = np.stack(voxels.means[:3], axis=1)
    colors = np.stack(voxels.means[3:], axis=1)
    return points, np.rint(colors).astype(np.uint8)

  def summary(self) -> CloudSummary:
    """Returns what the cloud holds and what it left out so far."""
    held = self._complete()
    return CloudSummary(
      points=len(held.voxels.key) if held.voxels else 0,
      voxel_size=self._scale.voxel_size if self._scale else None,
      doublings=self._scale.doublings if self._scale else 0,
      added=self._added,
      non_finite=self._without_size + held.non_finite,
      out_of_range=held.out_of_range,
    )
