"""Frames in, files out: decoding, the device and writing work side by side."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from point3r_jax.data.frames import Frame
from point3r_jax.data.prefetch import prefetch
from point3r_jax.export.scene import FrameResult
from point3r_jax.export.scene_process import SceneProcess
from point3r_jax.geometry import (
  estimate_focal,
  intrinsics_matrix,
  pose_to_matrix,
)
from point3r_jax.quick_turns import quick_turns
from point3r_jax.stream import Stream
from point3r_jax.streaming import Prediction

# Frames between the device and the process that writes them.
_IN_FLIGHT = 16


@dataclasses.dataclass
class Progress:
  """What has been done so far; grows as frames are written.

  Attributes:
    pointers: pointers in memory after each written frame.
    overflow: pointers that found no room, up to the last written frame.
    seconds: time from one written frame to the next; the first is from the
      start, so it holds the compilation.
    interrupted: whether the run was asked to stop before its end.
  """

  pointers: list[int] = dataclasses.field(default_factory=list)
  overflow: int = 0
  seconds: list[float] = dataclasses.field(default_factory=list)
  interrupted: bool = False


@functools.partial(jax.jit, static_argnames="maps")
def _summarise(
  prediction: Prediction, maps: frozenset[str]
) -> dict[str, jax.Array | None]:
  """Reduces a prediction of batch 1 to what is written, on the device."""
  prediction = jax.tree.map(lambda x: x[0], prediction)
  depth = intrinsics = None
  if prediction.points_camera is not None:
    depth = prediction.points_camera[..., 2]
    focal = estimate_focal(prediction.points_camera)
    intrinsics = intrinsics_matrix(focal, depth.shape)
  images = {
    "points_world": prediction.points_world,
    "confidence_world": prediction.confidence_world,
    "depth": depth,
    "confidence_camera": prediction.confidence_camera,
  }
  return {
    "pose": prediction.pose,
    "pointer_count": prediction.pointer_count,
    "overflow": prediction.overflow,
    "camera_to_world": pose_to_matrix(prediction.pose),
    "intrinsics": intrinsics,
    **{name: x if name in maps else None for name, x in images.items()},
  }


class _Writer:
  """A thread that waits for results and hands them on, in order."""

  def __init__(
    self,
    scene: SceneProcess,
    progress: Progress,
    report: Callable[[Progress], None],
  ):
    self._scene = scene
    self._progress = progress
    self._report = report
    self._error = None
    self._work = queue.Queue(_IN_FLIGHT)
    self._last = time.perf_counter()
    self._thread = threading.Thread(target=self._run, name="writer")
    self._thread.start()

  def put(self, frame: Frame, result: dict) -> None:
    """Takes a frame; waits for room. Raises what writing raised."""
    if self._error:
      raise self._error
    for array in jax.tree.leaves(result):
      array.copy_to_host_async()
    self._work.put((frame, result))

  def close(self) -> None:
    """Waits until all is written; raises what writing raised."""
    self._work.put(None)
    self._thread.join()
    try:
      self._scene.drain()
    except Exception as error:
      self._error = self._error or error
    if self._error:
      raise self._error

  def _run(self) -> None:
    while item := self._work.get():
      if self._error:  # Keep taking, so that `put` never waits for ever.
        continue
      try:
        self._hand_on(*item)
      except Exception as error:  # It is raised in the main thread.
        self._error = error

  def _hand_on(self, frame: Frame, result: dict) -> None:
    host = jax.tree.map(np.asarray, result)
    counts = int(host.pop("pointer_count")), int(host.pop("overflow"))
    note = functools.partial(self._note, *counts)
    self._scene.put(frame, FrameResult(**host), note)

  def _note(self, pointers: int, overflow: int) -> None:
    """Notes that a frame is written."""
    now = time.perf_counter()
    self._progress.pointers.append(pointers)
    self._progress.overflow = overflow
    self._progress.seconds.append(now - self._last)
    self._last = now
    self._report(self._progress)


def reconstruct(
  frames: Iterable[Frame],
  stream: Stream,
  scene: SceneProcess,
  progress: Progress,
  report: Callable[[Progress], None] = lambda _: None,
  stop: threading.Event | None = None,
) -> None:
  """Streams frames through a model and writes what comes out.

  Host memory does not grow with the number of frames.

  Args:
    frames: of the stream's image size.
    stream: a fresh or reset stream.
    scene: takes the results; to be closed by the caller, also after an error.
    progress: is told what has been done, also up to an error.
    report: called after each written frame, from another thread.
    stop: once set, ends the run after the frames under way are written.

  Raises:
    InputError: if a frame cannot be read.
    OutputError: if a result cannot be written.
  """
  writer = _Writer(scene, progress, report)
  read = collections.deque()

  def stopped() -> bool:
    progress.interrupted |= stop is not None and stop.is_set()
    return progress.interrupted

  def images(frames: Iterable[Frame]) -> Iterator[np.ndarray]:
    for frame in frames:
      if stopped():
        return
      read.append(frame)
      yield frame.image

  with (
    quick_turns,
    contextlib.closing(writer),
    contextlib.closing(prefetch(frames, 2 * stream.look_ahead)) as ready,
  ):
    for prediction in stream.extend(images(ready)):
      writer.put(read.popleft(), _summarise(prediction, scene.maps))
      if read and stopped():
        break
