"""Streams many sequences through a model, several side by side.

Each of B lanes takes one sequence after the other; a lane's memory is emptied
where a sequence begins. Frames are read ahead, results written behind, and
nothing grows with the length of a sequence but the pointer memory.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from scipy.spatial.transform import Rotation

from point3r_jax.data.prefetch import prefetch
from point3r_jax.errors import InputError
from point3r_jax.evaluation.pose import procrustes
from point3r_jax.evaluation.predictions import (
  PredictionStore,
  PredictionWriter,
)
from point3r_jax.evaluation.reconstruction import used_pixels
from point3r_jax.evaluation.sequences import Sequence
from point3r_jax.geometry import pose_to_matrix, transform_points
from point3r_jax.stream import Stream
from point3r_jax.streaming import Prediction

# Steps between the device and the disk: enough to keep both busy.
_IN_FLIGHT = 4


@dataclasses.dataclass(frozen=True)
class Keep:
  """What of a prediction a task needs.

  Attributes:
    depth: (H, W) float32, the z of the points in the camera's frame.
    pose: (7,) float32, camera-to-world.
    solve_pose: find the pose from the two point maps instead of taking the pose
      head's (see `pose.procrustes`).
    points: (H', W', 3) float32, the points in the global frame.
    from_camera: take for these the points in the camera's frame, moved by the
      pose, instead of the world head's.
    crop: decides with `pixel_stride` which pixels have points; see
      `reconstruction.used_pixels`.
    pixel_stride: likewise.
    confidence: (H', W') float32, of the points.
  """

  depth: bool = False
  pose: bool = False
  solve_pose: bool = False
  points: bool = False
  from_camera: bool = False
  crop: int | None = None
  pixel_stride: int = 1
  confidence: bool = False

  @property
  def heads(self) -> str:
    """Which heads the model has to compute; see `StepOptions`."""
    from_camera = self.points and self.from_camera
    camera = self.depth or self.solve_pose or from_camera
    world = self.solve_pose or (self.points and not self.from_camera)
    if camera and world:
      return "both"
    return "camera" if camera else "world"


class Run(NamedTuple):
  """Frames of a sequence that go through a lane in a row.

  Attributes:
    sequence: index of the sequence.
    frames: of it.
  """

  sequence: int
  frames: range


def plan_lanes(
  lengths: list[int], independent: list[bool], lanes: int
) -> list[list[Run]]:
  """Divides sequences among lanes so that these are about equally long.

  Frames of a sequence stay together and in order; those that are independent of
  each other go anywhere.

  Args:
    lengths: frames of each sequence.
    independent: whether the frames of a sequence are.
    lanes: how many there are.

  Returns:
    What each lane does, one run after the other.
  """
  runs = []
  for sequence, (length, apart) in enumerate(
    zip(lengths, independent, strict=True)
  ):
    step = 1 if apart else max(length, 1)
    runs += [
      Run(sequence, range(start, min(start + step, length)))
      for start in range(0, length, step)
    ]
  plan, loads = [[] for _ in range(lanes)], [0] * lanes
  for run in sorted(runs, key=lambda run: -len(run.frames)):  # Stable.
    lane = loads.index(min(loads))
    plan[lane].append(run)
    loads[lane] += len(run.frames)
  return plan


class _Slot(NamedTuple):
  """A frame in a lane; `first` says that its memory begins here."""

  sequence: int
  index: int
  first: bool


def _steps(plan: list[list[Run]]) -> Iterator[list[_Slot | None]]:
  """Yields what each lane takes in each step; None where it has ended."""
  lanes = [
    [
      _Slot(run.sequence, index, index == run.frames.start)
      for run in lane
      for index in run.frames
    ]
    for lane in plan
  ]
  for step in range(max(map(len, lanes), default=0)):
    yield [lane[step] if step < len(lane) else None for lane in lanes]


def _load_steps(
  sequences: list[Sequence],
  plan: list[list[Run]],
  broken: dict[str, str] | None,
) -> Iterator[tuple[list[_Slot | None], np.ndarray]]:
  """Yields steps with their (B, H, W, 3) images; idle lanes see black."""
  black = np.zeros((*sequences[0].image_size, 3), np.uint8)
  with concurrent.futures.ThreadPoolExecutor(
    min(8, os.cpu_count() or 1), "images"
  ) as pool:

    def load(slot: _Slot | None) -> tuple[_Slot | None, np.ndarray]:
      if slot is None:
        return None, black
      sequence = sequences[slot.sequence]
      if broken is not None and sequence.name in broken:
        return None, black
      try:
        return slot, sequence.load_image(slot.index)
      except InputError as error:
        if broken is None:
          raise InputError(f"{sequence.name}: {error}") from error
        broken[sequence.name] = str(error)
        return None, black

    for slots in _steps(plan):
      slots, images = zip(*pool.map(load, slots), strict=True)
      yield list(slots), np.stack(images)


@functools.partial(jax.jit, static_argnums=1)
def _select(prediction: Prediction, keep: Keep) -> dict[str, jax.Array]:
  """Reduces a prediction to what goes to the host."""
  selected = {
    "pointer_count": prediction.pointer_count,
    "overflow": prediction.overflow,
  }
  if keep.pose:
    selected["pose"] = prediction.pose
  if keep.depth:
    selected["depth"] = prediction.points_camera[..., 2]
  if keep.points:
    points, confidence = prediction.points_world, prediction.confidence_world
    if keep.from_camera:
      points, confidence = (
        transform_points(
          pose_to_matrix(prediction.pose), prediction.points_camera
        ),
        prediction.confidence_camera,
      )
    size = points.shape[1:3]
    used = (slice(None), *used_pixels(size, keep.crop, keep.pixel_stride))
    selected["points"] = points[used]
    if keep.confidence:
      selected["confidence"] = confidence[used]
  if keep.solve_pose:
    selected |= {
      "points_camera": prediction.points_camera,
      "points_world": prediction.points_world,
      "weights": jax.numpy.log(prediction.confidence_camera)
      * jax.numpy.log(prediction.confidence_world),
    }
  return selected


def _solve_pose(frame: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Replaces a frame's point maps and its pose by the pose that fits them."""
  matrix = procrustes(
    frame.pop("points_camera").reshape(-1, 3),
    frame.pop("points_world").reshape(-1, 3),
    frame.pop("weights").ravel(),
  )
  quaternion = Rotation.from_matrix(matrix[:3, :3]).as_quat(scalar_first=True)
  pose = np.concatenate([matrix[:3, 3], quaternion])
  return frame | {"pose": pose.astype(np.float32)}


class _Sink:
  """Writes results in a thread, in order; at most a few wait.

  Another thread tells when the device is done with them, so that the times do
  not hold the disk's.
  """

  def __init__(
    self,
    sequences: list[Sequence],
    store: PredictionStore,
    keep: Keep,
    report: Callable[[int], None],
    broken: dict[str, str] | None,
  ):
    self._broken = broken
    self._sequences = sequences
    self._store = store
    self._keep = keep
    self._report = report
    self._writers: dict[int, PredictionWriter] = {}
    self._last = 0.0
    self._clock = concurrent.futures.ThreadPoolExecutor(1, "clock")
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "predictions")
    self._pending = collections.deque()

  def put(
    self, slots: list[_Slot | None], selected: dict, dispatched: float
  ) -> None:
    """Hands over a step; raises what writing an earlier one raised.

    Args:
      slots: what the lanes took.
      selected: arrays (B, …) on the device.
      dispatched: when the device was given the step.
    """
    for array in selected.values():
      array.copy_to_host_async()
    seconds = self._clock.submit(self._wait, selected, dispatched)
    self._pending.append(
      self._pool.submit(self._write, slots, selected, seconds)
    )
    while len(self._pending) > _IN_FLIGHT:
      self._pending.popleft().result()

  def close(self) -> None:
    """Waits until all is written; raises what that raised."""
    try:
      while self._pending:
        self._pending.popleft().result()
    finally:
      self._pool.shutdown(cancel_futures=True)
      self._clock.shutdown()
      for writer in self._writers.values():
        writer.discard()

  def _wait(self, selected: dict, dispatched: float) -> float:
    """Returns the seconds that the device took for a step alone."""
    jax.block_until_ready(selected)
    ready = time.perf_counter()
    # A step under way waits for the one before it.
    seconds = ready - max(dispatched, self._last)
    self._last = ready
    return seconds

  def _write(
    self,
    slots: list[_Slot | None],
    selected: dict,
    seconds: concurrent.futures.Future[float],
  ) -> None:
    seconds = seconds.result()
    host = {name: np.asarray(array) for name, array in selected.items()}
    pointers, overflow = host.pop("pointer_count"), host.pop("overflow")
    active = sum(slot is not None for slot in slots)
    for lane, slot in enumerate(slots):
      if slot is None:
        continue
      sequence = self._sequences[slot.sequence]
      frame = {name: array[lane] for name, array in host.items()}
      if self._keep.solve_pose:
        try:
          frame = _solve_pose(frame)
        except InputError as error:
          reason = f"{sequence.frames[slot.index]}: {error}"
          if self._broken is None:
            raise InputError(f"{sequence.name}: {reason}") from error
          self._broken[sequence.name] = reason
      if self._broken and sequence.name in self._broken:
        continue
      writer = self._writers.get(slot.sequence)
      if writer is None:
        writer = self._store.writer(sequence)
        self._writers[slot.sequence] = writer
      done = writer.write(
        slot.index,
        frame,
        int(pointers[lane]),
        int(overflow[lane]),
        seconds / active,
      )
      if done:
        del self._writers[slot.sequence]
    self._report(active)


def predict(
  make_stream: Callable[[tuple[int, int], int], Stream],
  sequences: list[Sequence],
  store: PredictionStore,
  keep: Keep,
  *,
  batch_size: int,
  devices: int = 1,
  report: Callable[[int], None] = lambda frames: None,
  stop: threading.Event | None = None,
  broken: dict[str, str] | None = None,
) -> None:
  """Predicts sequences and saves what is to be kept of them.

  Those of one image size go side by side; sizes come one after the other.

  Args:
    make_stream: (H, W) of images and streams side by side → a fresh stream.
    sequences: to predict.
    store: takes the predictions; complete ones stay, whatever happens later.
    keep: what of them.
    batch_size: streams side by side, at most; rounded up to the devices.
    devices: among which `make_stream` divides the streams.
    report: called with the number of frames of each written step, from another
      thread.
    stop: once set, ends early; sequences that are not complete are lost.
    broken: is given the sequences of which a frame cannot be read, with the
      reason, and the others go on; None: that is an error.

  Raises:
    InputError: if a frame cannot be read; names the sequence.
  """
  by_size = collections.defaultdict(list)
  for sequence in sequences:
    by_size[sequence.image_size].append(sequence)
  for image_size, group in by_size.items():
    apart = [sequence.independent for sequence in group]
    lengths = [len(sequence) for sequence in group]
    useful = sum(
      length if alone else 1
      for length, alone in zip(lengths, apart, strict=True)
    )
    lanes = -(-min(batch_size, useful) // devices) * devices
    stream = None  # The last one's memory is free before the next one needs it.
    stream = make_stream(image_size, lanes)
    plan = plan_lanes(lengths, apart, lanes)
    sink = _Sink(group, store, keep, report, broken)
    with (
      contextlib.closing(sink),
      contextlib.closing(prefetch(_load_steps(group, plan, broken))) as steps,
    ):
      for slots, images in steps:
        if stop is not None and stop.is_set():
          return
        anew = np.array([slot is None or slot.first for slot in slots])
        if stream.frames and anew.any():
          stream.reset(anew)
        prediction, dispatched = stream(images), time.perf_counter()
        sink.put(slots, _select(prediction, keep), dispatched)
