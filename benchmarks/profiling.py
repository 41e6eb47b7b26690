"""Where the time of a compiled step on a GPU goes, by part and by kernel."""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from typing import Any

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


def _part(scope: str) -> str:
  """Names the part of the model and the direction of a scope."""
  direction = "backward" if "transpose(" in scope else "forward"
  if "rematted_computation" in scope:
    direction = "again"
  for name, pattern in _PARTS:
    if re.search(pattern, scope):
      return f"{name}, {direction}"
  return f"the rest, {direction}"


def _events(folder: str):
  """Yields the kernels in a profile of the first GPU."""
  (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    if not plane.name.startswith("/device:GPU:0"):
      continue
    for line in plane.lines:
      if "Stream" in line.name:
        yield from line.events


def profile(compiled: Any, state: Any, batch: Any) -> str:
  """Profiles two steps; returns a table of milliseconds a step.

  Args:
    compiled: a step that donates its state.
    state: to begin with; donated.
    batch: for both steps.
  """
  scopes = dict(
    re.findall(
      r"%?([\w.\-]+) = [^\n]*?op_name=\"([^\"]*)\"", compiled.as_text()
    )
  )
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(_STEPS):
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
    events = list(_events(folder))
  parts, kernels, launches = (collections.Counter() for _ in range(3))
  for event in events:
    operation = str(dict(event.stats).get("hlo_op", event.name))
    scope = scopes.get(operation, "")
    ms = event.duration_ns / 1e6 / _STEPS
    parts[_part(scope)] += ms
    launches[_part(scope)] += 1 / _STEPS
    kernel = re.sub(r"<.*|[\d.]+", "", event.name)[:50]
    kernels[f"{kernel} {'/'.join(scope.split('/')[-3:])[-70:]}"] += ms
  lines = [
    f"{sum(parts.values()):8.1f} ms in {sum(launches.values()):.0f} kernels",
    *(
      f"{ms:8.1f} ms in {launches[part]:6.0f}: {part}"
      for part, ms in parts.most_common()
    ),
    *(
      f"{ms:8.1f} ms: {kernel}" for kernel, ms in kernels.most_common(_KERNELS)
    ),
  ]
  return "\n".join(lines)
