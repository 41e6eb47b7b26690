"""Threads that read ahead: one that keeps items ready, a few that map them."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from point3r_jax.errors import InputError

S = TypeVar("S")
T = TypeVar("T")

_MAX_WORKERS = 8


def ordered_map(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
  """Maps in a few threads, no further ahead than there are threads.

  Scaling images takes longer than decoding, and lets other threads run.
  """
  workers = min(_MAX_WORKERS, os.cpu_count() or 1)
  pool = concurrent.futures.ThreadPoolExecutor(workers, "frames")
  pending = collections.deque()
  ended = None
  iterator = iter(items)
  try:
    while not ended or pending:
      while not ended and len(pending) < workers:
        try:
          pending.append(pool.submit(function, next(iterator)))
        except (StopIteration, InputError) as error:
          ended = error  # In its turn: after the items before it.
      if pending:
        yield pending.popleft().result()
    if isinstance(ended, InputError):
      raise ended
  finally:
    pool.shutdown(cancel_futures=True)


def prefetch(iterable: Iterable[T], depth: int = 4) -> Iterator[T]:
  """Runs an iterable in a thread that keeps up to `depth` items ready.

  What the iterable raises is raised here, in its turn. Closing the iterator,
  or leaving a loop that holds the only reference to it, ends the thread after
  the item at hand.
  """
  if depth < 1:
    raise ValueError(f"depth is {depth}: it must be 1 or more")
  return _prefetch(iterable, depth)


def _prefetch(iterable: Iterable[T], depth: int) -> Iterator[T]:
  items: queue.SimpleQueue = queue.SimpleQueue()
  free = threading.Semaphore(depth)
  stop = threading.Event()

  def work():
    iterator = iter(())
    try:
      iterator = iter(iterable)
      while True:
        free.acquire()
        if stop.is_set():
          break
        items.put((next(iterator), None))
    except BaseException as error:  # StopIteration too: it ends the items.
      items.put((None, error))
    finally:
      # A generator is closed in the thread that ran it.
      getattr(iterator, "close", lambda: None)()

  thread = threading.Thread(target=work, name="prefetch", daemon=True)
  thread.start()
  try:
    while True:
      item, error = items.get()
      if isinstance(error, StopIteration):
        return
      if error is not None:
        raise error
      free.release()
      yield item
  finally:
    stop.set()
    free.release()
    thread.join()
