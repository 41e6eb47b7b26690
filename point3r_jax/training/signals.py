"""SIGTERM and Ctrl-C in a run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import jax

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
  """Turns SIGTERM and Ctrl-C into an event: the step is finished and saved.

  A second one ends the process at once, for a compilation cannot be stopped.
  Processes that train together have to stop together: there `jax.distributed`
  hears of SIGTERM, see `Checkpoints.reached_preemption`.
  """
  stop = threading.Event()
  main = threading.current_thread() is threading.main_thread()
  if not main or jax.process_count() > 1:
    yield stop
    return

  def handle(number, _):
    name = signal.Signals(number).name
    if stop.is_set():
      _log.warning("%s again: ending without a checkpoint", name)
      os._exit(128 + number)
    _log.warning("%s: stopping after a checkpoint", name)
    stop.set()

  signals = (signal.SIGTERM, signal.SIGINT)
  previous = [signal.signal(number, handle) for number in signals]
  try:
    yield stop
  finally:
    for number, handler in zip(signals, previous, strict=True):
      signal.signal(number, handler)
