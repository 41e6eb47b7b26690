"""Where a compiled step's time goes, by part of the model and by kernel."""

from __future__ import annotations

import collections
import glob
import re
import tempfile

import jax

# First expression found in an operation's scope names its part.
PARTS = (
  ("encoder", r"\bencoder\b"),
  ("value encoder", r"value_encoder"),
  ("pointer blocks", r"pointer_block"),
  ("image blocks", r"image_block"),
  ("pose memory", r"pose_memory"),
  ("dense heads", r"camera_dense|world_head/dense|/dense"),
  ("modulated blocks", r"world_head"),
  ("key head", r"key_head"),
)


def _scopes(text: str) -> dict[str, str]:
  """Returns instruction → scope of an HLO text."""
  pattern = r"%?([\w.\-]+) = [^\n]*?op_name=\"([^\"]*)\""
  return dict(re.findall(pattern, text))


def _part(scope: str) -> str:
  direction = "backward" if "transpose(" in scope else "forward"
  if "rematted_computation" in scope:
    direction = "again"
  for name, pattern in PARTS:
    if re.search(pattern, scope):
      return f"{name}, {direction}"
  return f"other, {direction}"


def report(compiled, run, steps: int = 2, top: int = 25) -> str:
  """Profiles `run()`, called `steps` times, and returns a table."""
  scopes = _scopes(compiled.as_text())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(steps):
        run()
    path = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)[0]
    data = jax.profiler.ProfileData.from_file(path)
  parts, kernels = collections.Counter(), collections.Counter()
  raw = collections.defaultdict(lambda: [0, 0.0])
  for plane in data.planes:
    if not plane.name.startswith("/device:GPU:0"):
      continue
    for line in plane.lines:
      if "Stream" not in line.name:
        continue
      for event in line.events:
        stats = dict(event.stats)
        op = str(stats.get("hlo_op", event.name))
        # Inside command buffers only the kernel's name tells what it is of.
        name = re.sub(r"_(\d+)(_\d+)?$", r".\1", event.name)
        scope = scopes.get(op) or scopes.get(name) or ""
        ms = event.duration_ns / 1e6 / steps
        raw[f"{event.name[:120]}|{op}"][0] += 1
        raw[f"{event.name[:120]}|{op}"][1] += ms
        parts[_part(scope)] += ms
        short = re.sub(r"[\d.]+", "", re.sub(r"<.*", "", event.name))[:50]
        kernels[short, "/".join(scope.split("/")[-3:])[-70:]] += ms
  import gzip, json, os
  out = os.environ.get("OUT", "/tmp")
  json.dump(raw, open(f"{out}/kernels.json", "w"))
  gzip.open(f"{out}/hlo.txt.gz", "wt").write(compiled.as_text())
  lines = [f"{sum(parts.values()):9.2f} ms of kernels a step"]
  lines += [f"{ms:9.2f} {part}" for part, ms in parts.most_common()]
  lines += [
    f"{ms:9.2f} {kernel} {scope}"
    for (kernel, scope), ms in kernels.most_common(top)
  ]
  return "\n".join(lines)
