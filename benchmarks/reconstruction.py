"""Times a reconstruction from a video's file to files, beside its parts alone.

  python -m benchmarks.reconstruction --model untrained:point3r_512
  python -m benchmarks.reconstruction --model tiny --frames 200 --source 480 640

Prints a line of JSON, all in frames a second:

- read: the video decoded and brought to the network's size, nothing else.
- step: frames that are read already through `Stream.extend`, results left on
  the device: the same frames, from the stream's first one on.
- written: what `reconstruct.py` does, from one written frame to the next, but
  for the first ones, which fill the queues.
- share: of `written` in `step`.

The stream has grown and all is compiled before a step is timed. The video is
a walk through a synthetic room, enlarged to 1080p, unless there is one of one's
own.

Random weights make noise: depth maps that do not compress, clouds in which
hardly two points share a voxel. That is the most there is to write. "surfaces"
says what it is when maps of curved walls take the place of the predicted ones,
which is nearer to trained weights.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence

import av
import jax
import numpy as np
from PIL import Image

from benchmarks.streaming_inputs import scene, to_and_fro
from point3r_jax.checkpoints import UNTRAINED, load_checkpoint
from point3r_jax.data.frames import FrameSource, open_frames
from point3r_jax.export.scene import SceneOptions
from point3r_jax.export.scene_process import SceneProcess
from point3r_jax.pipeline import Progress, reconstruct
from point3r_jax.precision import get_precision
from point3r_jax.stream import Stream
from point3r_jax.streaming import Prediction

# Frames of the synthetic walk, which is rendered so many times smaller.
_VIEWS = 60
_ENLARGED = 4
# Frames that do not count at the start, at most a quarter of all.
_WARM_UP = 50


def make_video(
  path: pathlib.Path, size: tuple[int, int], frames: int, views: int = _VIEWS
) -> None:
  """Writes a walk through a synthetic room, up and down.

  Args:
    path: of the file, with the suffix of a container that holds H.264.
    size: (H, W), multiples of 8.
    frames: of the video.
    views: different ones.
  """
  height, width = size
  small = (height // _ENLARGED, width // _ENLARGED)
  images = [
    np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    for image in scene(small, min(views, frames))
  ]
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=30)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    for frame in range(frames):
      image = images[to_and_fro(len(images), frame)]
      picture = av.VideoFrame.from_ndarray(image, "rgb24")
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def _rate(frames: int, seconds: float) -> float:
  return round(frames / seconds, 1)


def time_reading(source: FrameSource) -> tuple[float, list[np.ndarray]]:
  """Returns frames a second that are read, and their images."""
  started = time.perf_counter()
  images = [frame.image for frame in source]
  return _rate(len(images), time.perf_counter() - started), images


def time_steps(stream: Stream, images: Sequence[np.ndarray]) -> float:
  """Returns frames a second of a stream that has seen the images before."""
  stream.reset()
  started = time.perf_counter()
  (last,) = collections.deque(stream.extend(images), maxlen=1)
  jax.block_until_ready(last)
  return _rate(len(images), time.perf_counter() - started)


class Surfaces:
  """A stream of which all is as it was, but for its maps: curved walls."""

  def __init__(self, stream: Stream):
    """Puts the maps of some views on the device."""
    self._stream = stream
    self.look_ahead = stream.look_ahead
    height, width = stream.image_size
    v, u = np.mgrid[-0.5 : 0.5 : height * 1j, -1 : 1 : width * 1j]
    self._maps = []
    for shift in np.linspace(0, 0.5, _VIEWS):
      depth = 2 + 0.3 * np.sin(3 * u + shift) + 0.2 * np.cos(5 * v)
      points = np.stack([u * depth + shift, v * depth, depth], axis=-1)
      confidence = 1 + np.exp(0.1 * np.sin(40 * u) - u**2 - v**2)
      maps = points.astype(np.float32), confidence.astype(np.float32)
      self._maps.append(jax.device_put([x[None] for x in maps]))

  def extend(self, images: Iterable[np.ndarray]) -> Iterator[Prediction]:
    """Yields a prediction for each image."""
    for frame, prediction in enumerate(self._stream.extend(images)):
      points, confidence = self._maps[to_and_fro(_VIEWS, frame)]
      yield prediction.replace(
        points_world=points,
        points_camera=points,
        confidence_world=confidence,
        confidence_camera=confidence,
      )


def time_writing(
  stream: Stream, source: FrameSource, folder: pathlib.Path, surfaces: bool
) -> tuple[float, dict]:
  """Returns frames a second from file to files, and facts about the cloud."""
  stream.reset()
  folder.mkdir()
  progress, finished = Progress(), False
  scene_process = SceneProcess(folder, SceneOptions(), stream.image_size)
  try:
    maker = Surfaces(stream) if surfaces else stream
    reconstruct(source, maker, scene_process, progress)
    finished = True
  finally:
    facts = scene_process.close(complete=finished)
  first = min(_WARM_UP, len(progress.seconds) // 4)
  counted = progress.seconds[first:]
  return _rate(len(counted), sum(counted)), facts["cloud"]


def measure(flags: argparse.Namespace, folder: pathlib.Path) -> dict:
  """Measures with files in a folder; returns what to print."""
  video = flags.video
  if video is None:
    video = folder / "walk.mp4"
    make_video(video, flags.source, flags.frames)
  precision = get_precision(flags.precision)
  config, params = load_checkpoint(flags.model, precision=precision)

  def read() -> FrameSource:
    size = flags.size or config.image_size
    return open_frames(
      [str(video)],
      size=size,
      max_frames=flags.frames,
      on_device=True,
    )

  image_size = read().image_size
  stream = Stream(config, params, image_size, precision=precision)
  reading, images = time_reading(read())
  time_steps(stream, images)  # Grows, and compiles.
  stream.wait_for_compiles()
  steps = time_steps(stream, images)
  pointers = stream.pointer_count

  def write(name: str, surfaces: bool) -> dict:
    rate, cloud = time_writing(stream, read(), folder / name, surfaces)
    share = round(rate / steps, 3)
    return {"written": rate, "share": share, "cloud": cloud}

  results = write("output", surfaces=False)
  if flags.model.startswith(UNTRAINED):
    results["surfaces"] = write("surfaces", surfaces=True)
  return {
    "model": flags.model,
    "precision": precision.name,
    "image_size": list(image_size),
    "frames": len(images),
    "pointers": pointers,
    "capacity": stream.capacity,
    "read": reading,
    "step": steps,
    **results,
    "processors": os.cpu_count(),
    "device": jax.devices()[0].device_kind,
  }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the flags of a command line; None: this process's."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--model", default=f"{UNTRAINED}point3r_512", help="or a checkpoint")
  add("--video", type=pathlib.Path, help="default: a synthetic one")
  add(
    "--source",
    type=int,
    nargs=2,
    default=(1080, 1920),
    metavar=("H", "W"),
    help="size of the synthetic video (default: 1080 1920)",
  )
  add("--frames", type=int, default=600)
  add("--size", type=int, help="long side for the network (default: model's)")
  add("--precision", help="default: the device's")
  return parser.parse_args(arguments)


def main() -> None:
  """Measures what is asked for."""
  with tempfile.TemporaryDirectory() as folder:
    print(json.dumps(measure(parse(), pathlib.Path(folder))))


if __name__ == "__main__":
  main()
