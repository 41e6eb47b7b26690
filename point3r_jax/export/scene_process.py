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
import os
import pathlib
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from point3r_jax.data.frames import Frame
from point3r_jax.export.scene import (
  FrameResult,
  OutputError,
  SceneOptions,
  SceneWriter,
)

# Frames that are handed over and not written yet: enough that the device has
# work while many frames at once are sorted into the cloud.
_SLOTS = 16
# Frames whose maps are compressed side by side.
_PREPARING = min(8, os.cpu_count() or 1)

# Kinds of answers: to a frame, None or what went wrong; to the end, facts or
# what went wrong.
_FRAME, _END = "frame", "end"


def _slot(image_size: tuple[int, int]) -> np.dtype:
  """Returns the type of a frame in shared memory: its pixels, its maps."""
  height, width = image_size
  return np.dtype(
    [
      ("image", np.uint8, (height, width, 3)),
      ("points_world", np.float32, (height, width, 3)),
      ("confidence_world", np.float32, (height, width)),
      ("depth", np.float32, (height, width)),
      ("confidence_camera", np.float32, (height, width)),
    ]
  )


class SceneProcess:
  """A `SceneWriter` in another process; frames go there by shared memory.

  It is to be closed, come what may. A script that makes one must guard what it
  does by `if __name__ == "__main__"`, as always with `multiprocessing`.

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
      writer: makes the writer, in the process.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context(
      "forkserver" if "forkserver" in methods else "spawn"
    )
    self.maps = options.maps
    dtype = _slot(image_size)
    shared = context.RawArray(ctypes.c_uint8, _SLOTS * dtype.itemsize)
    self._slots = np.frombuffer(shared, dtype)
    self._connection, theirs = context.Pipe()
    self._process = context.Process(
      target=_serve,
      args=(theirs, shared, dtype, writer, directory, options),
      name="scene",
      daemon=True,
    )
    with _interrupts_blocked():
      self._process.start()
    theirs.close()  # So that the end of the process ends the connection.
    self._written: collections.deque[Callable[[], None]] = collections.deque()
    # What follows is shared with the thread that takes answers.
    self._changed = threading.Condition()
    self._put = self._answered = 0
    self._error: Exception | None = None
    self._facts: dict[str, Any] | None = None
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
      OutputError: if an earlier frame could not be written; or what else went
        wrong with one, or was raised by `written`.
    """
    self._wait(_SLOTS - 1)
    maps = {name: getattr(result, name) for name in self.maps}
    for name, values in {"image": frame.image, **maps}.items():
      self._slots[name][self._put % _SLOTS] = values
    message = (
      self._put,
      dataclasses.replace(frame, image=None),
      dataclasses.replace(result, **dict.fromkeys(maps)),
    )
    self._written.append(written)
    with self._changed:
      self._put += 1
    with contextlib.suppress(OSError):  # The next one to wait will be told.
      self._connection.send(message)

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
      OutputError: if the process ended before.
      OSError: if files could not be written.
    """
    with contextlib.suppress(OSError):
      self._connection.send(complete)
    self._thread.join()
    self._process.join()
    self._connection.close()
    if self._facts is None:
      raise self._error
    return self._facts

  def _wait(self, under_way: int) -> None:
    """Waits until no more frames are under way; raises what went wrong."""
    with self._changed:
      self._changed.wait_for(
        lambda: self._error or self._put - self._answered <= under_way
      )
      if self._error:
        raise self._error

  def _take_answers(self) -> None:
    kind = _FRAME
    while kind == _FRAME:
      try:
        kind, answer = self._connection.recv()
      except (EOFError, OSError):
        kind, answer = _END, self._death()
      if answer is None:
        try:
          self._written.popleft()()
        except Exception as error:
          answer = error
      with self._changed:
        if isinstance(answer, Exception):
          self._error = self._error or answer
        elif kind == _END:
          self._facts = answer
        self._answered += kind == _FRAME
        self._changed.notify_all()

  def _death(self) -> OutputError:
    self._process.join()
    return OutputError(
      "the process that writes the results ended by itself, with exit code "
      f"{self._process.exitcode}; is there enough memory?"
    )


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
  """Keeps Ctrl-C from processes that are started within; it waits for us."""
  if not hasattr(signal, "pthread_sigmask"):
    yield
    return
  previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _portable(error: Exception) -> Exception:
  """Returns the error, or one that says the same, to be sent elsewhere."""
  error.add_note("".join(traceback.format_exception(error)))
  try:
    pickle.loads(pickle.dumps(error))
  except Exception:
    return OutputError(f"{type(error).__name__}: {error}")
  return error


def _serve(
  connection: Connection,
  shared: ctypes.Array,
  dtype: np.dtype,
  writer: Callable[[pathlib.Path, SceneOptions], SceneWriter],
  directory: pathlib.Path,
  options: SceneOptions,
) -> None:
  """Writes the frames that come, until one says that there are no more.

  If the other process ends instead, what came is written nevertheless.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The other process will tell.

  def answer(kind: str, content: Any) -> None:
    with contextlib.suppress(OSError):
      connection.send((kind, content))

  try:
    scene = writer(directory, options)
  except Exception as error:
    answer(_END, _portable(error))
    return
  slots = np.frombuffer(shared, dtype)

  def prepare(number, frame, result):
    def there(name):
      return slots[name][number % _SLOTS]

    return scene.prepare(
      number,
      dataclasses.replace(frame, image=there("image")),
      dataclasses.replace(result, **{x: there(x) for x in options.maps}),
    )

  prepared = queue.SimpleQueue()

  def commit() -> None:
    """Adds frames in order; none of those after one that went wrong."""
    first_error = None
    while work := prepared.get():
      try:
        if first_error:
          scene.discard(work.result())
        else:
          scene.commit(work.result())
      except Exception as error:
        first_error = first_error or _portable(error)
      answer(_FRAME, first_error)

  committing = threading.Thread(target=commit, name="commit")
  committing.start()
  complete = False
  with concurrent.futures.ThreadPoolExecutor(_PREPARING, "prepare") as pool:
    with contextlib.suppress(EOFError, OSError):
      while not isinstance(message := connection.recv(), bool):
        prepared.put(pool.submit(prepare, *message))
      complete = message
    prepared.put(None)
    committing.join()
  try:
    facts = scene.close(complete)
  except Exception as error:
    facts = _portable(error)
  answer(_END, facts)
