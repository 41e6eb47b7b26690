"""Where the time of a compiled step on a GPU goes, by part and by kernel."""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# The first expression that is found in an operation's scope names its part.
_PARTS = (
  ("value encoder", r"value_encoder"),
  ("image encoder", r"\bencoder\b"),
  ("pointer blocks", r"pointer_block"),
  ("image blocks", r"image_block"),
  ("pose memory", r"pose_memory"),
  ("dense heads", r"camera_dense|/dense"),
  ("modulated blocks", r"world_head"),
  ("key head", r"key_head"),
)
_STEPS = 2
_KERNELS = 40
# What XLA's host does before it launches the first of a step's kernels.
_PREPARATION = "Thunks::Initialize"


def part(scope: str) -> str:
  """Names the part of the model and the direction of a scope."""
  direction = "backward" if "transpose(" in scope else "forward"
  if "rematted_computation" in scope:
    direction = "again"
  for name, pattern in _PARTS:
    if re.search(pattern, scope):
      return f"{name}, {direction}"
  return f"the rest, {direction}"


class _Event(NamedTuple):
  """A kernel or what the host does; the operation is the compiled program's."""

  name: str
  operation: str
  ms: float


def _events(folder: str) -> tuple[list[_Event], list[_Event]]:
  """Returns the first GPU's kernels in a profile, and the host's events."""
  (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
  kernels, host = [], []
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      gpu = plane.name.startswith("/device:GPU:0") and "Stream" in line.name
      if gpu or plane.name.startswith("/host"):
        (kernels if gpu else host).extend(
          _Event(
            event.name,
            str(dict(event.stats).get("hlo_op", event.name)) if gpu else "",
            event.duration_ns / 1e6,
          )
          for event in line.events
        )
  return kernels, host


def profile(
  step: Callable[..., tuple[Any, Any]], program: str, state: Any, batch: Any
) -> str:
  """Profiles two steps; returns a table of milliseconds a step.

  XLA launches no CUDA graphs meanwhile, but kernel by kernel.

  Args:
    step: makes the next state of one, which it takes over, and a batch.
    program: what XLA compiled of it, as text.
    state: to begin with; donated.
    batch: for both steps.
  """
  scopes = dict(
    re.findall(r"%?([\w.\-]+) = [^\n]*?op_name=\"([^\"]*)\"", program)
  )
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      started = time.perf_counter()
      for _ in range(_STEPS):
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
      waited = 1e3 * (time.perf_counter() - started) / _STEPS
    events, host = _events(folder)
  preparation = sum(x.ms for x in host if x.name == _PREPARATION) / _STEPS
  parts, kernels, launches = (collections.Counter() for _ in range(3))
  for event in events:
    scope = scopes.get(event.operation, "")
    ms = event.ms / _STEPS
    parts[part(scope)] += ms
    launches[part(scope)] += 1 / _STEPS
    kernel = re.sub(r"<.*|[\d.]+", "", event.name)[:50]
    kernels[f"{kernel} {'/'.join(scope.split('/')[-3:])[-70:]}"] += ms
  busy = sum(parts.values())
  lines = [
    f"{busy:8.1f} ms in {sum(launches.values()):.0f} kernels",
    f"{waited - busy:8.1f} ms without; the host prepares for {preparation:.1f}",
    *(
      f"{ms:8.1f} ms in {launches[part]:6.0f}: {part}"
      for part, ms in parts.most_common()
    ),
    *(
      f"{ms:8.1f} ms: {kernel}" for kernel, ms in kernels.most_common(_KERNELS)
    ),
  ]
  return "\n".join(lines)
