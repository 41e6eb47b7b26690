"""Times what a frame of a live stream costs.

  python -m benchmarks.streaming --case latency throughput
  python -m benchmarks.streaming --case batch --streams 8
  python -m benchmarks.streaming --case latency --size 224 224
  python -m benchmarks.streaming --case compile
  python -m benchmarks.streaming --case growth --model CHECKPOINT \\
    --frames 2000 --output output/streaming
  python -m benchmarks.streaming --tiny --case latency growth

Prints a line of JSON for each case:

- latency: each frame waited for. uint8 image on the host in, pose and world
  points on the device out.
- throughput: frames fed without waiting, in blocks at whose end is a wait; none
  is looked at ahead.
- ahead: the same through `Stream.extend`, which encodes several at once.
- batch: the same two with several streams side by side; milliseconds are those
  of a frame of every stream, frames a second those of all streams together.
- compile: seconds to trace and compile encoder and step, in part side by side,
  without and with the persistent cache (a temporary one), each time in a
  process of its own; and until the first frame is there.
- growth: a stream from its first frame on, each frame waited for; memory grows
  as it must. Also writes growth.json, with every frame, and growth.svg.

All but growth run at a number of pointers that stays: the memory is filled with
random ones spread over a kilometre, among them one where the camera is. Fusion
compares distances with a twentieth of that, so that all pointers of a frame
fuse into the one nearby, whatever the weights; "pointers" says the least and
the most that were counted. Nothing else differs from a live stream: same step,
same fusion, memory donated from frame to frame. There is room for as many
pointers as in a stream that grew to so many with its frames taken in the same
way. Random weights predict noise, but run as long.

Peak memory is the process's, weights and compilation included: for that ask for
one case a call. `--tiny` runs on a CPU in a minute.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.streaming_inputs import (
  fill_memory,
  live_capacity,
  noise,
  scene,
  to_and_fro,
)
from benchmarks.streaming_plot import draw, summarize
from point3r_jax.checkpoints import UNTRAINED, load_checkpoint
from point3r_jax.config import ModelConfig
from point3r_jax.errors import InputError
from point3r_jax.models.attention import IMPLEMENTATIONS
from point3r_jax.models.point3r import HEADS
from point3r_jax.precision import POLICIES, get_precision
from point3r_jax.stream import Stream

# What flags are by default, and with --tiny.
DEFAULTS = {
  "model": (f"{UNTRAINED}point3r_512", f"{UNTRAINED}small"),
  "size": ((384, 512), (96, 128)),
  "streams": (8, 2),
  "frames": (200, 20),
  "pointers": (2500, 160),
}
# Frames before the first that counts, and frames between two waits.
_WARM_UP = 10
_BLOCK = 25
# Images to take turns, and frames of a synthetic scene's path.
_IMAGES = 8
_VIEWS = 100
_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
  """Gives a list to which the seconds of every compilation are added."""
  seconds = []

  def listen(name, duration, **_):
    if name == _COMPILED:
      seconds.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def quantile(values: Sequence[float], share: float) -> float:
  """Returns the least value that so large a share does not exceed."""
  return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def overlaps(
  spans: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]
) -> list[bool]:
  """Says of each span of time whether one of the others shares a part of it."""
  return [
    any(start < end and begin < stop for begin, end in others)
    for start, stop in spans
  ]


def _options(flags: argparse.Namespace) -> dict[str, str]:
  return {
    "precision": flags.precision,
    "attention": flags.attention,
    "heads": flags.heads,
  }


def open_stream(
  model: tuple[ModelConfig, dict],
  flags: argparse.Namespace,
  streams: int,
  under_way: int = 1,
) -> Stream:
  """Returns a stream in whose memory the wanted number of pointers stays."""
  config, params = model
  capacity = flags.capacity or live_capacity(
    config, flags.size, flags.pointers, under_way
  )
  stream = Stream(
    config,
    params,
    flags.size,
    batch_size=streams,
    capacity=capacity,
    compile_ahead=1.0,
    look_ahead=flags.look_ahead,
    **_options(flags),
  )
  stream.memory = fill_memory(
    config, streams, flags.size, capacity, flags.pointers
  )
  return stream


def _wait(prediction: Any) -> None:
  jax.block_until_ready((prediction.pose, prediction.points_world))


def time_frames(
  stream: Stream, images: np.ndarray, frames: int
) -> tuple[list[float], list[jax.Array]]:
  """Returns every frame's seconds when waited for, and its pointers."""
  times, counts = [], []
  for frame in range(_WARM_UP + frames):
    started = time.perf_counter()
    prediction = stream(images[frame % len(images)])
    _wait(prediction)
    times.append(time.perf_counter() - started)
    counts.append(prediction.pointer_count)
  return times[_WARM_UP:], counts


def time_blocks(
  stream: Stream, images: np.ndarray, frames: int
) -> tuple[list[float], list[jax.Array]]:
  """Returns seconds a frame of every block of frames, and the pointers."""
  times, counts = [], []
  length = min(_BLOCK, frames)
  for _ in range(1 + -(-frames // length)):
    started = time.perf_counter()
    for frame in range(length):
      prediction = stream(images[frame % len(images)])
      counts.append(prediction.pointer_count)
    _wait(prediction)
    times.append((time.perf_counter() - started) / length)
  return times[1:], counts


def time_ahead(
  stream: Stream, images: np.ndarray, frames: int
) -> tuple[list[float], list[jax.Array]]:
  """Returns seconds a frame of every chunk, from its predictions' last on."""
  chunk = stream.look_ahead
  chunks = 1 + -(-frames // chunk)
  order = (images[i % len(images)] for i in range((chunks + 1) * chunk))
  times, counts, started = [], [], None
  for number, prediction in enumerate(stream.extend(order), start=1):
    counts.append(prediction.pointer_count)
    if number % chunk == 0:
      # The chunk before: the device always has this one to go on with.
      counts[max(number - 1 - chunk, 0)].block_until_ready()
      now = time.perf_counter()
      if started is not None:
        times.append((now - started) / chunk)
      started = now
  return times[1:], counts


def _statistics(seconds: Sequence[float], streams: int) -> dict[str, Any]:
  """Says what times of a frame (of every stream) come to."""
  median = statistics.median(seconds)
  return {
    "ms": round(1e3 * median, 3),
    "ms_p95": round(1e3 * quantile(seconds, 0.95), 3),
    "ms_min_max": [round(1e3 * t, 3) for t in (min(seconds), max(seconds))],
    "frames_per_s": round(streams / median, 2),
  }


def _device() -> dict[str, Any]:
  """Names the device, and says what it has held; None where it cannot tell."""
  device = jax.local_devices()[0]
  memory = device.memory_stats() or {}

  def gib(key):
    return round(memory[key] / 2**30, 2) if key in memory else None

  return {
    "device": device.device_kind,
    "peak_gib": gib("peak_bytes_in_use"),
    "in_use_gib": gib("bytes_in_use"),
  }


def _timed(stream: Stream, flags: argparse.Namespace, measures: dict) -> dict:
  """Measures at a number of pointers that stays; returns what to print."""
  streams = stream.batch_size
  images = noise(_IMAGES, streams, *flags.size)
  results, counts = {}, []
  for name, measure in measures.items():
    times, found = measure(stream, images, flags.frames)
    results[name] = _statistics(times, streams)
    counts += found
  counts = np.concatenate(jax.device_get(counts))
  if len(results) == 1:
    (results,) = results.values()
  return {
    "streams": streams,
    "frames": flags.frames,
    "pointers": [int(counts.min()), int(counts.max())],
    "capacity": stream.capacity,
    **results,
    "compile_s": round(sum(stream.compile_seconds.values()), 1),
    **_device(),
  }


def _latency(model, flags) -> dict:
  stream = open_stream(model, flags, 1, under_way=0)
  return _timed(stream, flags, {"": time_frames})


def _throughput(model, flags) -> dict:
  return _timed(open_stream(model, flags, 1), flags, {"": time_blocks})


def _ahead(model, flags) -> dict:
  return _timed(open_stream(model, flags, 1), flags, {"": time_ahead})


def _batch(model, flags) -> dict:
  measures = {"latency": time_frames, "throughput": time_blocks}
  return _timed(open_stream(model, flags, flags.streams), flags, measures)


def _keep_programs(folder: str) -> None:
  """Has this process keep compiled programs in a folder, and look for them."""
  # The process that began this one may hold most of a GPU's memory.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _first_frame(flags: argparse.Namespace) -> dict:
  """Opens a stream and waits for its first frame."""
  model = load_checkpoint(flags.model, precision=flags.precision)
  stream = open_stream(model, flags, 1)
  image = noise(1, *flags.size)[0]
  started = time.perf_counter()
  _wait(stream(image))
  return {
    "first_frame": time.perf_counter() - started,
    "compile": sum(stream.compile_seconds.values()),
    "capacity": stream.capacity,
    "device": _device(),
  }


def _compile(model, flags) -> dict:
  """Compiles both programs in two processes, in turn, with one cache."""
  del model  # They load their own.
  spawn = multiprocessing.get_context("spawn")
  runs = []
  with tempfile.TemporaryDirectory() as folder:
    for _ in range(2):
      process = concurrent.futures.ProcessPoolExecutor(
        1, spawn, _keep_programs, (folder,)
      )
      with process:
        runs.append(process.submit(_first_frame, flags).result())
  cold, cached = runs
  return {
    "capacity": cold["capacity"],
    "cold_s": round(cold["compile"], 2),
    "cached_s": round(cached["compile"], 2),
    "first_frame_s": [round(run["first_frame"], 2) for run in runs],
    **cold["device"],
  }


def _growth(model, flags) -> dict:
  """Follows a stream from its first frame on; writes frames and a plot."""
  config, params = model
  trained = not flags.model.startswith(UNTRAINED)
  if trained:
    images = scene(flags.size, min(_VIEWS, flags.frames))
  else:
    images = noise(_IMAGES, *flags.size)
  stream = Stream(
    config, params, flags.size, capacity=flags.capacity, **_options(flags)
  )
  rows = {name: [] for name in ("ms", "pointers", "capacity", "compilations")}
  spans, compiles = [], {}

  def note_compiles():
    """Notes when capacities were compiled that were not when last asked."""
    now = time.perf_counter()
    for capacity, seconds in list(stream.compile_seconds.items()):
      compiles.setdefault(capacity, (now - seconds, now))

  with compilations() as compiled:
    for frame in range(flags.frames):
      image = images[to_and_fro(len(images), frame)]
      before = len(compiled)
      started = time.perf_counter()
      prediction = stream(image)
      _wait(prediction)
      ended = time.perf_counter()
      spans.append((started, ended))
      note_compiles()
      rows["ms"].append(round(1e3 * (ended - started), 3))
      rows["pointers"].append(int(np.asarray(prediction.pointer_count)[0]))
      rows["capacity"].append(stream.capacity)
      rows["compilations"].append(len(compiled) - before)
    stream.wait_for_compiles()
    note_compiles()
  rows["compiling"] = overlaps(spans, list(compiles.values()))
  result = {
    "images": "a synthetic room, to and fro" if trained else "noise",
    "frames": flags.frames,
    **summarize(rows),
    "compile_s": {
      capacity: round(seconds, 1)
      for capacity, seconds in stream.compile_seconds.items()
    },
    **_device(),
  }
  folder = pathlib.Path(flags.output)
  folder.mkdir(parents=True, exist_ok=True)
  contents = {**_setting(flags), **result, "each": rows}
  (folder / "growth.json").write_text(json.dumps(contents) + "\n")
  try:
    draw(contents, folder / "growth.svg")
  except InputError as error:
    note = f"no plot: {error}; benchmarks.streaming_plot draws it later"
    print(note, file=sys.stderr)
  return result


CASES: dict[str, Callable[..., dict]] = {
  "latency": _latency,
  "throughput": _throughput,
  "ahead": _ahead,
  "batch": _batch,
  "compile": _compile,
  "growth": _growth,
}


def _setting(flags: argparse.Namespace) -> dict[str, Any]:
  """Says what was measured, as far as it is the same in all cases."""
  return {
    "model": flags.model,
    "image_size": list(flags.size),
    "precision": flags.precision,
    "attention": flags.attention,
    "heads": flags.heads,
  }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the flags; fills in what --tiny changes.

  Args:
    arguments: those of a command line; None: this process's.
  """
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument

  def add_default(name, text, **options):
    usual, tiny = DEFAULTS[name]
    add(f"--{name}", help=f"{text} (default: {usual}; tiny: {tiny})", **options)

  add("--case", nargs="+", choices=CASES, default=["latency"])
  add_default("model", f"a checkpoint or {UNTRAINED}PRESET")
  add_default("size", "of images", type=int, nargs=2, metavar=("H", "W"))
  add_default("streams", "side by side, for batch", type=int)
  add_default("frames", "that count; of growth all", type=int)
  add_default("pointers", "in memory, but for growth", type=int)
  add(
    "--look_ahead",
    type=int,
    default=8,
    help="images to encode at once, for ahead (default: %(default)s)",
  )
  add(
    "--capacity",
    type=int,
    help="pointers there is room for; of growth at the start (default: that "
    "of a stream that grew to so many pointers; of growth a new stream's)",
  )
  add("--precision", choices=sorted(POLICIES), help="default: the device's")
  add("--attention", choices=IMPLEMENTATIONS, default="auto")
  add("--heads", choices=[h for h in HEADS if h != "camera"], default="both")
  add("--output", default="output/streaming", help="folder for growth's files")
  add("--tiny", action="store_true", help="small sizes, for a CPU")
  flags = parser.parse_args(arguments)
  for name, values in DEFAULTS.items():
    if getattr(flags, name) is None:
      setattr(flags, name, values[flags.tiny])
  flags.size = tuple(flags.size)
  return flags


def main() -> None:
  """Measures the cases asked for."""
  flags = parse()
  flags.precision = get_precision(flags.precision).name
  # Cast on the host: the device never holds the weights in float32.
  model = load_checkpoint(flags.model, precision=flags.precision)
  for case in flags.case:
    result = {**_setting(flags), **CASES[case](model, flags)}
    print(json.dumps({"case": case, **result}), flush=True)


if __name__ == "__main__":
  main()
