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

from point3r_jax.data.frames import prefetch
from point3r_jax.evaluation.pose import procrustes
from point3r_jax.evaluation.predictions import (
  PredictionStore,
  PredictionWriter,
)
from point3r_jax.evaluation.reconstruction import (
  ReconstructionOptions,
  used_pixels,
)
from point3r_jax.evaluation.sequences import Sequence
from point3r_jax.geometry import matrix_to_pose
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
    points: (H', W', 3) float32, the points in the global frame: the pixels that
      are used under these options; None: none.
    confidence: (H', W') float32, of the points.
  """

  depth: bool = False
  pose: bool = False
  solve_pose: bool = False
  points: ReconstructionOptions | None = None
  confidence: bool = False

  @property
  def heads(self) -> str:
    """Which heads the model has to compute; see `StepOptions`."""
    camera = self.depth or self.solve_pose
    world = self.points is not None or self.solve_pose
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
  sequences: list[Sequence], plan: list[list[Run]]
) -> Iterator[tuple[list[_Slot | None], np.ndarray]]:
  """Yields steps with their (B, H, W, 3) images; idle lanes see black."""
  image_size = sequences[0].image_size
  with concurrent.futures.ThreadPoolExecutor(
    min(8, os.cpu_count() or 1), "images"
  ) as pool:

    def load(slot):
      if slot is None:
        return np.zeros((*image_size, 3), np.uint8)
      return sequences[slot.sequence].load_image(slot.index)

    for slots in _steps(plan):
      yield slots, np.stack(list(pool.map(load, slots)))


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
  if keep.points is not None:
    points = prediction.points_world
    used = (slice(None), *used_pixels(points.shape[1:3], keep.points))
    selected["points"] = points[used]
    if keep.confidence:
      selected["confidence"] = prediction.confidence_world[used]
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
  return frame | {"pose": np.asarray(matrix_to_pose(matrix), np.float32)}


class _Sink:
  """Writes results in a thread, in order; at most a few wait."""

  def __init__(
    self,
    sequences: list[Sequence],
    store: PredictionStore,
    keep: Keep,
    report: Callable[[int], None],
  ):
    self._sequences = sequences
    self._store = store
    self._keep = keep
    self._report = report
    self._writers: dict[int, PredictionWriter] = {}
    self._last = 0.0
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "predictions")
    self._pending = collections.deque()

  def put(self, slots: list[_Slot | None], selected: dict) -> None:
    """Hands over a step; raises what writing an earlier one raised."""
    for array in selected.values():
      array.copy_to_host_async()
    dispatched = time.perf_counter()
    self._pending.append(
      self._pool.submit(self._write, slots, selected, dispatched)
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

  def _write(self, slots, selected, dispatched: float) -> None:
    jax.block_until_ready(selected)
    ready = time.perf_counter()
    # Of the device alone: frames under way wait for the one before them.
    seconds = ready - max(dispatched, self._last)
    self._last = ready
    host = {name: np.asarray(array) for name, array in selected.items()}
    pointers, overflow = host.pop("pointer_count"), host.pop("overflow")
    active = sum(slot is not None for slot in slots)
    for lane, slot in enumerate(slots):
      if slot is None:
        continue
      frame = {name: array[lane] for name, array in host.items()}
      if self._keep.solve_pose:
        frame = _solve_pose(frame)
      writer = self._writers.get(slot.sequence)
      if writer is None:
        writer = self._store.writer(self._sequences[slot.sequence])
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

  Raises:
    InputError: if a frame cannot be read.
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
    stream = make_stream(image_size, lanes)
    plan = plan_lanes(lengths, apart, lanes)
    sink = _Sink(group, store, keep, report)
    with (
      contextlib.closing(sink),
      contextlib.closing(prefetch(_load_steps(group, plan))) as steps,
    ):
      for slots, images in steps:
        if stop is not None and stop.is_set():
          return
        anew = np.array([slot is None or slot.first for slot in slots])
        if stream.frames and anew.any():
          stream.reset(anew)
        sink.put(slots, _select(stream(images), keep))
