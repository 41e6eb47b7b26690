"""A scene's files, written by a process of their own.

Compressing maps and sorting points keep a dozen threads busy. In the process
that feeds the device they would contend for the interpreter's lock with the
thread that does so, and the device would wait.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import multiprocessing
import multiprocessing.resource_tracker
import os
import pathlib
import pickle
import queue
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Collection, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from point3r_jax.data.frames import Frame
from point3r_jax.export.scene import (
  FrameResult,
  OutputError,
  PreparedFrame,
  SceneOptions,
  SceneWriter,
)

# Frames that are handed over and not written yet: enough that the device has
# work while many frames at once are sorted into the cloud.
_SLOTS = 16
# Frames whose maps are compressed side by side.
_PREPARING = min(8, os.cpu_count() or 1)
_START_METHOD = "spawn"

# What says that there are no more frames; the second, that those were all.
_LAST = (b"incomplete", b"complete")
# Kinds of answers: to a frame, None or what went wrong; to the end, facts or
# what went wrong.
_FRAME, _END = "frame", "end"


def _slot(image_size: tuple[int, int], maps: Collection[str]) -> np.dtype:
  """Returns the type of a frame in shared memory: maps, pixels for a cloud."""
  height, width = image_size
  fields = [
    (name, np.float32, (height, width, *((3,) if "points" in name else ())))
    for name in sorted(maps)
  ]
  if "points_world" in maps:
    fields.append(("image", np.uint8, (height, width, 3)))
  return np.dtype(fields)


class SceneProcess:
  """A `SceneWriter` in another process; frames go there by shared memory.

  It is to be closed, come what may: that is when the cloud is written.

  Attributes:
    maps: the fields of a `FrameResult` as large as the image that it reads.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    options: SceneOptions,
    image_size: tuple[int, int],
    writer: Callable[[pathlib.Path, SceneOptions], SceneWriter] = SceneWriter,
  ):
    """Starts the process.

    Args:
      directory: that `prepare_folder` made.
      options: what to write and how.
      image_size: (H, W) of all frames.
      writer: makes the writer, in the process; not of the main module, which is
        not imported there.
    """
    self.maps = options.maps
    context = multiprocessing.get_context(_START_METHOD)
    dtype = _slot(image_size, self.maps)
    shared = context.RawArray(ctypes.c_uint8, _SLOTS * dtype.itemsize)
    self._slots = np.ndarray(_SLOTS, dtype, shared)
    self._connection, theirs = context.Pipe()
    self._process = context.Process(
      target=_serve,
      args=(theirs, shared, dtype, writer, directory, options),
      name="scene",
      daemon=True,
    )
    with _interrupts_blocked(), _main_module_hidden():
      self._process.start()
    theirs.close()  # So that the end of the process ends the connection.
    self._written: collections.deque[Callable[[], None]] = collections.deque()
    # What follows is shared with the thread that takes answers.
    self._changed = threading.Condition()
    self._put = self._answered = 0
    self._closed = self._told = False
    self._error: Exception | None = None  # Of a frame, the first one.
    self._end: dict[str, Any] | Exception | None = None
    self._thread = threading.Thread(
      target=self._take_answers, name="answers", daemon=True
    )
    self._thread.start()

  def put(
    self,
    frame: Frame,
    result: FrameResult,
    written: Callable[[], None] = lambda: None,
  ) -> None:
    """Hands over the next frame; waits for room.

    Args:
      frame: the network's image and where it came from.
      result: what the model made of it.
      written: called in another thread once the frame is in the files.

    Raises:
      OutputError: if an earlier frame could not be written, or what else went
        wrong with one or was raised by `written`; if this is closed.
      ValueError: if a map is missing or of another size.
    """
    self._wait(_SLOTS - 1)
    for name in self._slots.dtype.names:
      values = frame.image if name == "image" else getattr(result, name)
      place = self._slots[name][self._put % _SLOTS]
      if np.shape(values) != place.shape:
        raise ValueError(
          f"{name} of {place.shape} is needed for what is written, got "
          f"{np.shape(values) if values is not None else None}"
        )
      place[...] = values
    frame = dataclasses.replace(frame, image=None)
    result = dataclasses.replace(result, **dict.fromkeys(self.maps))
    message = pickle.dumps((self._put, frame, result))
    with self._changed:
      self._check()
      self._written.append(written)
      self._put += 1
      with contextlib.suppress(OSError):  # Answers end, which says why.
        self._connection.send_bytes(message)

  def drain(self) -> None:
    """Waits until all frames are in the files; raises as `put` does."""
    self._wait(0)

  def close(self, complete: bool) -> dict[str, Any]:
    """Writes what is left and ends the process.

    Args:
      complete: whether all frames of the input were handed over.

    Returns:
      What `SceneWriter.close` does.

    Raises:
      OutputError: if the process ended before; or what went wrong with a frame
        that no call has raised yet.
      OSError: if files could not be written.
    """
    with self._changed:
      if not self._closed:
        self._closed = True
        with contextlib.suppress(OSError):
          self._connection.send_bytes(_LAST[complete])
    self._thread.join()
    self._process.join()
    self._connection.close()
    self._slots = None
    if isinstance(self._end, Exception):
      raise self._end from self._error
    if self._error and not self._told:
      raise self._error
    return self._end

  def _check(self) -> None:
    """Raises what went wrong so far, if anything."""
    if self._error:
      self._told = True
      raise self._error
    if isinstance(self._end, Exception):
      raise self._end
    if self._closed:
      raise OutputError("the scene is closed already")

  def _wait(self, under_way: int) -> None:
    """Waits until no more frames are under way; raises what went wrong."""
    with self._changed:
      self._changed.wait_for(
        lambda: (
          self._error
          or self._end is not None
          or self._put - self._answered <= under_way
        )
      )
      self._check()

  def _take_answers(self) -> None:
    kind = _FRAME
    while kind == _FRAME:
      try:
        kind, answer = self._connection.recv()
      except Exception as error:  # EOFError or OSError, as far as is known.
        kind, answer = _END, self._death(error)
      if answer is None:
        try:
          self._written.popleft()()
        except Exception as error:
          answer = error
      with self._changed:
        if kind == _END:
          self._end = answer
        else:
          self._error = self._error or answer
          self._answered += 1
        self._changed.notify_all()

  def _death(self, error: Exception) -> OutputError:
    """Returns what to say of a connection that ended before its time."""
    self._connection.close()
    self._process.join()
    code = self._process.exitcode
    hint = "; is there enough memory?" if code == -signal.SIGKILL else ""
    death = OutputError(
      "the process that writes the results ended by itself, with exit code "
      f"{code}{hint}"
    )
    death.__cause__ = error
    return death


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
  """Keeps Ctrl-C from a process that is started within; it waits for us.

  The process inherits that, until it can ignore it.
  """
  if not hasattr(signal, "pthread_sigmask"):
    yield
    return
  # Starting a process starts this one first, which lets interrupts in again.
  multiprocessing.resource_tracker.ensure_running()
  previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
  """Keeps a process that is started within from importing the main module.

  It has no need to: scripts are not run twice, and require no guard.
  """
  main = sys.modules["__main__"]
  sys.modules["__main__"] = types.ModuleType("__main__")
  try:
    yield
  finally:
    sys.modules["__main__"] = main


def _ignore_interrupts() -> None:
  """Leaves Ctrl-C to the other process, which will say what to do."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _portable(error: Exception) -> Exception:
  """Returns the error, or one that says the same, to be sent elsewhere."""
  where = "".join(traceback.format_exception(error))
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:
    error = OutputError(f"{type(error).__name__}: {error}")
  error.add_note(where)
  return error


def _serve(
  connection: Connection,
  shared: ctypes.Array,
  dtype: np.dtype,
  writer: Callable[[pathlib.Path, SceneOptions], SceneWriter],
  directory: pathlib.Path,
  options: SceneOptions,
) -> None:
  """Runs in the process, from its start to its end."""
  _ignore_interrupts()
  try:
    scene = writer(directory, options)
    slots = np.ndarray(_SLOTS, dtype, shared)
    end = _Server(connection, scene, slots).serve()
  except Exception as error:
    end = _portable(error)
  with contextlib.suppress(OSError):
    connection.send((_END, end))


class _Server:
  """Writes the frames that come, and answers each."""

  def __init__(
    self, connection: Connection, scene: SceneWriter, slots: np.ndarray
  ):
    self._connection = connection
    self._scene = scene
    self._slots = slots
    self._prepared: queue.SimpleQueue[
      concurrent.futures.Future[PreparedFrame] | None
    ] = queue.SimpleQueue()
    self._error = None

  def serve(self) -> dict[str, Any]:
    """Writes until there are no more frames; returns the scene's facts.

    If the other process is killed, what came is written nevertheless.
    """
    committing = threading.Thread(target=self._commit_all, name="commit")
    committing.start()
    complete = False
    try:
      with concurrent.futures.ThreadPoolExecutor(_PREPARING, "prepare") as pool:
        while (message := self._connection.recv_bytes()) not in _LAST:
          self._prepared.put(pool.submit(self._prepare, message))
        complete = message == _LAST[True]
    except (EOFError, OSError):
      pass  # The other process is gone.
    finally:
      self._prepared.put(None)
      committing.join()
    return self._scene.close(complete and not self._error)

  def _prepare(self, message: bytes) -> PreparedFrame:
    number, frame, result = pickle.loads(message)
    names = self._slots.dtype.names
    maps = {name: self._slots[name][number % _SLOTS] for name in names}
    frame = dataclasses.replace(frame, image=maps.pop("image", None))
    return self._scene.prepare(
      number, frame, dataclasses.replace(result, **maps)
    )

  def _commit_all(self) -> None:
    """Adds frames in order; none of those after one that went wrong."""
    while work := self._prepared.get():
      try:
        if self._error:
          self._scene.discard(work.result())
        else:
          self._scene.commit(work.result())
      except Exception as error:
        self._error = self._error or _portable(error)
      with contextlib.suppress(OSError):
        self._connection.send((_FRAME, self._error))
