"""What a run looks at of its steps: metrics, and losses that are not finite."""

from __future__ import annotations

import collections
import logging
from typing import NamedTuple

import jax

from point3r_jax.training.checkpointing import Checkpoints

# Steps that may be on their way before their metrics are looked at.
_IN_FLIGHT = 2
# Beginnings of the names of metrics that are averaged over a log interval.
_AVERAGED = ("loss", "error", "grad_norm", "pointers")

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
  """A run that cannot go on."""


class Pending(NamedTuple):
  """A step whose metrics were not looked at yet."""

  step: int
  samples: str
  metrics: dict[str, jax.Array]


class Watch:
  """Reads metrics some steps late, and stops a run that is not finite.

  Attributes:
    streak: how many of the last steps looked at were skipped.
  """

  streak: int

  def __init__(self, max_streak: int, checkpoints: Checkpoints):
    """Watches from the first step on.

    Args:
      max_streak: the run ends after so many skipped steps in a row.
      checkpoints: of the run, to say where it can go on.
    """
    self._max_streak = max_streak
    self._checkpoints = checkpoints
    self.streak = 0
    self._pending = collections.deque()
    self._skipped = collections.deque(maxlen=max_streak)
    self._interval = []  # Metrics of the steps since `read`.

  def add(self, pending: Pending) -> None:
    """Takes a step; looks at the one some steps before."""
    self._pending.append(pending)
    if len(self._pending) > _IN_FLIGHT:
      self._look()

  def drain(self) -> None:
    """Waits for all steps."""
    while self._pending:
      self._look()

  def read(self) -> dict[str, float]:
    """Waits for all steps; returns their metrics since it was last called.

    Losses, errors and gradients are means over the steps that were not skipped,
    the overflow is their sum; the rest is the last step's.
    """
    self.drain()
    steps, self._interval = self._interval, []
    good = [metrics for metrics in steps if not metrics["streak"]] or steps[-1:]
    means = {
      name: sum(metrics[name] for metrics in good) / len(good)
      for name in steps[-1]
      if name.startswith(_AVERAGED)
    }
    overflow = sum(metrics["overflow"] for metrics in good)
    return steps[-1] | means | {"overflow": overflow}

  def _look(self) -> None:
    """Reads the metrics of the first step that was not looked at yet."""
    pending = self._pending.popleft()
    metrics = {
      name: float(value)
      for name, value in jax.device_get(pending.metrics).items()
    }
    self._interval.append(metrics)
    self.streak = int(metrics["streak"])
    if not self.streak:
      return
    self._skipped.append(f"step {pending.step}: {pending.samples}")
    _log.warning(
      "step %d skipped: its loss is %g, its gradient's norm %g; samples: %s",
      pending.step,
      metrics["loss"],
      metrics["grad_norm"],
      pending.samples,
    )
    if self.streak >= self._max_streak:
      raise TrainingError(
        f"the loss or its gradient was not finite {self._max_streak} times in "
        f"a row; the last batches were: {'; '.join(self._skipped)}. Look at "
        f"these samples, or lower the learning rate; {self._last_good()}"
      )

  def _last_good(self) -> str:
    """Says which checkpoints are from before the streak."""
    *before, last = self._checkpoints.steps or [None]
    if last is None:
      return "there is no checkpoint yet"
    words = f"the last checkpoint, of step {last}, is from before them"
    if before:  # The update before it may be what broke the parameters.
      words += (
        f"; should it fail in the same way, delete it to go on from step "
        f"{before[-1]}"
      )
    return words
