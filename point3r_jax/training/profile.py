"""A trace of some of a run's steps."""

from __future__ import annotations

import logging
import pathlib

import jax

from point3r_jax.training.logs import Meter
from point3r_jax.training.watch import Watch

_log = logging.getLogger(__name__)


class Profile:
  """A trace of some steps, into WORKDIR/profile; ends with the run at last."""

  def __init__(
    self,
    workdir: pathlib.Path,
    steps: tuple[int, int] | None,
    watch: Watch,
    meter: Meter,
  ):
    """Starts nothing yet.

    Args:
      workdir: of the run.
      steps: the first and the last, counted from 1; None: none.
      watch: waits for the steps under way before a trace starts or ends.
      meter: does not count how long that takes.
    """
    self._directory = workdir / "profile"
    self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
    self._watch = watch
    self._meter = meter
    self._active = False

  def before(self, step: int) -> None:
    """Starts the trace before its first step."""
    if step in self._steps and not self._active:
      self._watch.drain()
      with self._meter.paused():
        jax.profiler.start_trace(self._directory)
      self._active = True

  def after(self, step: int) -> None:
    """Ends the trace after its last step."""
    if self._active and step + 1 not in self._steps:
      self._watch.drain()
      with self._meter.paused():
        self.close()

  def close(self) -> None:
    """Ends the trace if it is on."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      _log.info("profile written to %s", self._directory)
