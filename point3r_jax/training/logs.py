"""What a training run tells: metrics in files, a line on the console, rates."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from PIL import Image
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from point3r_jax.errors import InputError
from point3r_jax.files import atomic_file

_logger = logging.getLogger(__name__)

# Key of a value, how the console line shows it, and what it is multiplied by.
_OPTIMIZATION = (
  ("epoch", "epoch {:.2f}", 1),
  ("loss", "loss {:.4g}", 1),
  ("loss_camera", "camera {:.3g}", 1),
  ("loss_world", "world {:.3g}", 1),
  ("loss_pose", "pose {:.3g}", 1),
  ("lr", "lr {:.1e}", 1),
  ("grad_norm", "grad {:.3g}", 1),
  ("skipped", "skipped {:.0f}", 1),
  ("pointers", "pointers {:.0f}", 1),
  ("overflow", "overflow {:.0f}", 1),
)
_SPEED = (
  ("frames_per_s", "{:.1f} frames/s", 1),
  ("ms_per_step", "{:.0f} ms/step", 1),
  ("data_wait", "wait {:.1f} %", 100),
  ("memory_gib", "mem {:.1f} GiB", 1),
)
_ONLY_IF_POSITIVE = ("skipped", "overflow")


class _EventFile:
  """A TensorBoard event file that is complete on disk after every call.

  tensorboardX's SummaryWriter would queue events for a thread: lost when the
  process is killed, and a deadlock when that thread dies of a full disk.
  """

  def __init__(self, directory: pathlib.Path, first_step: int):
    """Starts a file; TensorBoard forgets older events from `first_step` on."""
    directory.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads the files of a folder in the order of their names.
    name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
    self._records = RecordWriter(str(directory / name))
    self._write(file_version="brain.Event:2")
    start = SessionLog(status=SessionLog.START)
    self._write(step=first_step, session_log=start)

  def _write(self, **fields) -> None:
    event = Event(wall_time=time.time(), **fields)
    self._records.write(event.SerializeToString())
    self._records.flush()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the scalars of a step."""
    summary = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
    self._write(step=step, summary=Summary(value=summary))

  def image(self, step: int, name: str, size: tuple[int, int], png: bytes):
    """Writes an encoded RGB image of (H, W) pixels."""
    height, width = size
    picture = Summary.Image(
      height=height, width=width, colorspace=3, encoded_image_string=png
    )
    value = Summary.Value(tag=name, image=picture)
    self._write(step=step, summary=Summary(value=[value]))

  def close(self) -> None:
    self._records.close()


def _keep_until(path: pathlib.Path, last_step: int) -> None:
  """Drops the rows of later steps, and a last line that was cut off.

  Raises:
    InputError: if any other line is not a row of metrics.
  """
  if not path.exists():
    return
  content = path.read_bytes()
  lines = content.split(b"\n")
  if not lines[-1]:
    lines.pop()
  kept = []
  for number, line in enumerate(lines, start=1):
    try:
      step = int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines):
        break
      raise InputError(
        f"{path}, line {number} is not a row of metrics: {line[:80]!r}; "
        "repair the file or move it away"
      ) from error
    if step <= last_step:
      kept.append(line + b"\n")
  if b"".join(kept) == content:
    return
  _logger.warning(
    "%s: dropped %d of %d rows, which are after step %d or were cut off; the "
    "run goes on from that step",
    *(path, len(lines) - len(kept), len(lines), last_step),
  )
  with atomic_file(path) as file:
    file.writelines(kept)


class MetricLog:
  """Metrics and images of a run, for programs and for TensorBoard.

  In the directory:
    metrics.jsonl: a JSON object a line, "step" and the values of that step,
      each step once, in order. JSON has no numbers that are not finite; they
      are the strings "nan", "inf" and "-inf", which Python's `float` reads.
    tensorboard/: event files with the same values, and the images.
    images/NAME_STEP.png: the images.

  All of it is on disk when a call returns. A run that resumes at step S drops
  what a crashed one wrote of later steps (images are overwritten when the run
  gets there again). Usable as a context manager.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    start_step: int,
    active: bool = True,
  ):
    """Opens the log.

    Args:
      directory: of the run; made if need be.
      start_step: the last step that is done, 0 for a new run.
      active: False makes an object that writes nothing: for all processes but
        the first.

    Raises:
      InputError: if there is a metrics.jsonl that holds something else.
    """
    self._active = active
    if not active:
      return
    self._directory = pathlib.Path(directory)
    self._directory.mkdir(parents=True, exist_ok=True)
    self._last_step = start_step
    path = self._directory / "metrics.jsonl"
    _keep_until(path, start_step)
    self._rows = path.open("a", encoding="utf-8")
    self._events = _EventFile(self._directory / "tensorboard", start_step + 1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes all values of a step.

    Args:
      step: after the one written before, and after the start step.
      values: numbers or arrays without axes, by name.

    Raises:
      ValueError: if the step is not after the last one, or a value is no
        number; nothing is written then.
    """
    if not self._active:
      return
    if step <= self._last_step:
      raise ValueError(
        f"cannot write step {step} after step {self._last_step}; put all "
        "values of a step into one call"
      )
    if "step" in values:
      raise ValueError('no value may be named "step"; rename it')
    values = {name: _number(name, value) for name, value in values.items()}
    row = {
      name: value if math.isfinite(value) else str(value)
      for name, value in values.items()
    }
    self._rows.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
    self._rows.flush()
    self._last_step = step
    self._events.scalars(step, values)

  def write_image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes an image.

    Args:
      step: that it shows.
      name: letters, digits, "_" and "-"; "/" makes folders.
      image: (H, W, 3) uint8 RGB.

    Raises:
      ValueError: if the name or the image does not suit.
    """
    if not self._active:
      return
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", name):
      raise ValueError(
        f"{name!r} cannot name an image: use letters, digits, _, - and /"
      )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
      raise ValueError(
        f"image {name} must be (H, W, 3) uint8, not {image.shape} {image.dtype}"
      )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    path = self._directory / "images" / f"{name}_{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
      file.write(buffer.getvalue())
    self._events.image(step, name, image.shape[:2], buffer.getvalue())

  def close(self) -> None:
    """Closes the files; further calls have no effect."""
    if self._active:
      self._rows.close()
      self._events.close()

  def __enter__(self) -> MetricLog:
    """Returns the log, which is closed at the end of the block."""
    return self

  def __exit__(self, *_) -> None:
    """Closes the files."""
    self.close()


def _number(name: str, value) -> float:
  """Returns a value as a float, exactly."""
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"metric {name!r} must be a number or an array without axes, not "
      f"{type(value).__name__} {np.shape(value)}"
    ) from error


def _duration(seconds: float) -> str:
  """Returns a time in its two largest units."""
  if seconds < 60:
    return f"{seconds:.0f} s"
  hours, minutes = divmod(round(seconds / 60), 60)
  if hours < 1:
    return f"{minutes} min"
  if hours < 48:
    return f"{hours} h {minutes} min"
  return f"{hours // 24} d {hours % 24} h"


def format_line(
  step: int, steps: int, values: Mapping[str, float | None]
) -> str:
  """Returns the one console line of a log interval.

  Args:
    step: steps done.
    steps: of the whole run.
    values: any of epoch, loss, loss_camera, loss_world, loss_pose, lr,
      grad_norm, pointers (mean number), frames_per_s, ms_per_step, data_wait (a
      fraction), memory_gib, and skipped and overflow, which are shown only if
      positive. What is None or missing is left out.
  """

  def show(fields):
    return [
      template.format(scale * values[key])
      for key, template, scale in fields
      if values.get(key) is not None
      and (key not in _ONLY_IF_POSITIVE or values[key] > 0)
    ]

  progress = f"step {step}/{steps} ({100 * step / steps:.1f} %)"
  groups = [[progress, *show(_OPTIMIZATION)], show(_SPEED)]
  if values.get("ms_per_step") is not None:
    seconds = (steps - step) * values["ms_per_step"] / 1000
    groups.append([f"eta {_duration(seconds)}"])
  return " | ".join(" ".join(group) for group in groups if group)


class Meter:
  """Rates of a log interval, from the host's clock.

  Devices run behind the host: read the meter, and enter `paused`, only after
  waiting for the device (as fetching a step's metrics does).
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    """Starts the first interval.

    Args:
      clock: gives seconds.
    """
    self._clock = clock
    self._restart()

  def _restart(self) -> None:
    self._start = self._clock()
    self._steps = self._frames = 0
    self._waited = self._paused = 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around what waits for data."""
    start = self._clock()
    yield
    self._waited += self._clock() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around what is no training: evaluation, checkpoints, pictures."""
    start = self._clock()
    yield
    self._paused += self._clock() - start

  def step(self, frames: int) -> None:
    """Counts a step.

    Args:
      frames: of its batch, B·T, over all processes if the rate is to be theirs.
    """
    self._steps += 1
    self._frames += frames

  def read(self) -> dict[str, float]:
    """Ends the interval and starts the next one.

    Returns:
      frames_per_s; ms_per_step; data_wait, the fraction of the time that went
      into waiting for data. Empty if no step was done.
    """
    seconds = self._clock() - self._start - self._paused
    rates = {}
    if self._steps:
      rates = {
        "frames_per_s": self._frames / seconds,
        "ms_per_step": 1000 * seconds / self._steps,
        "data_wait": self._waited / seconds,
      }
    self._restart()
    return rates


def device_memory_gib() -> float | None:
  """Returns the most memory that a device of this process has had in use.

  In GiB since the process started, the largest of the local devices; None where
  devices do not tell (CPUs).
  """
  statistics = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [
    s["peak_bytes_in_use"] for s in statistics if "peak_bytes_in_use" in s
  ]
  return max(peaks) / 2**30 if peaks else None
