"""Renders a clip, reconstructs it and draws what came out; needs no download.

python -m point3r_jax.cli.demo --output output/demo
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from point3r_jax.cli import reconstruct

_CHECKPOINT = "untrained:small"
_UNTRAINED = "Untrained, random weights: the geometry means nothing."
_NOTICE = f"""\
{_UNTRAINED}
The demo shows that everything runs and what it writes. For the real model,
convert the published weights with convert_torch_weights.py (see README.md)."""

_SIZE = (192, 256)
_RATE = 12

# The scene, in metres, y down: a room, boxes (low corner, high corner, colour)
# and a ball (centre, radius, colour).
_ROOM = ((-3.0, -1.5, -2.5), (3.0, 1.2, 4.5), (0.86, 0.80, 0.70))
_BOXES = (
  ((-2.0, 0.35, 1.8), (-0.6, 1.2, 2.9), (0.75, 0.35, 0.25)),
  ((1.5, -0.7, 2.8), (2.4, 1.2, 3.6), (0.30, 0.45, 0.65)),
)
_BALL = ((0.7, 0.75, 1.7), 0.45, (0.45, 0.65, 0.30))
_FACE_LIGHT = np.array([0.80, 1.0, 0.92])  # Of faces across x, y, z.
_SUN = np.array([-0.5, -0.75, -0.43])  # Towards the light.
_WAVES = np.random.default_rng(0).normal(0, 8, (3, 12))  # Of the texture.

# Red, green and blue of five depths from near to far.
_COLOURS = (
  (253, 245, 183, 81, 13),
  (231, 125, 55, 18, 8),
  (140, 21, 84, 124, 60),
)
_INK, _FAINT, _ACCENT = "#222222", "#cccccc", "#b4361c"


def _slabs(origin, rays, low, high) -> tuple[np.ndarray, np.ndarray]:
  """Returns where rays enter and leave a box, in ray lengths."""
  a, b = (low - origin) / rays, (high - origin) / rays
  return np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)


def _texture(points: np.ndarray) -> np.ndarray:
  """Returns a brightness that depends on the place: a checker and waves."""
  checker = np.floor(2 * points + 0.37).sum(-1) % 2
  return 0.72 + 0.18 * checker + 0.1 * np.sin(points @ _WAVES).mean(-1)


def render(camera_to_world: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Casts a ray through every pixel of a 70-degree camera in the room.

  Args:
    camera_to_world: (3, 4), OpenCV axes.
    size: (H, W).

  Returns:
    (H, W, 3) uint8.
  """
  height, width = size
  focal = width / 2 / np.tan(np.deg2rad(35))
  y, x = np.mgrid[:height, :width] - np.array(size)[:, None, None] / 2 + 0.5
  rays = np.stack([x / focal, y / focal, np.ones(size)], axis=-1)
  rays, origin = rays @ camera_to_world[:, :3].T, camera_to_world[:, 3]
  rays[rays == 0] = 1e-9  # They are divided by.

  def shade(depth, surface, light):
    points = origin + depth[..., None] * rays
    return (light(points) * _texture(points))[..., None] * np.array(surface)

  def face_light(low, high):
    centre, half = np.add(low, high) / 2, np.subtract(high, low) / 2
    return lambda p: _FACE_LIGHT[(np.abs(p - centre) / half).argmax(-1)]

  low, high, surface = _ROOM
  nearest = _slabs(origin, rays, low, high)[1]
  colour = shade(nearest, surface, face_light(low, high))
  for low, high, surface in _BOXES:
    depth, leave = _slabs(origin, rays, low, high)
    hit = (depth > 0) & (depth < np.minimum(leave, nearest))
    nearest = np.where(hit, depth, nearest)
    box = shade(depth, surface, face_light(low, high))
    colour = np.where(hit[..., None], box, colour)

  centre, radius, surface = _BALL
  a, b = (rays**2).sum(-1), rays @ (origin - centre)
  root = b**2 - a * (np.sum((origin - centre) ** 2) - radius**2)
  depth = (-b - np.sqrt(np.maximum(root, 0))) / a
  hit = (root > 0) & (depth > 0) & (depth < nearest)
  ball = shade(
    depth,
    surface,
    lambda p: 0.65 + 0.4 * np.clip((p - centre) @ _SUN / radius, -0.5, 1),
  )
  colour = np.where(hit[..., None], ball, colour)
  return np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8)


def walk(frames: int) -> Iterator[np.ndarray]:
  """Yields the (3, 4) camera-to-world poses of someone who strolls along."""
  for t in np.linspace(0, 1, frames):
    step = 2 * np.pi * 4 * t
    position = np.array([1.6 * t - 1.0, 0.03 * np.sin(2 * step), 1.1 * t - 2.0])
    target = [0.9 * np.sin(4 * t) - 0.3, 0.25 + 0.04 * np.sin(step), 3.0]
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross([0.02 * np.sin(step), 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    yield np.stack([right, down, forward, position], axis=1)


def write_clip(path: pathlib.Path, images: Sequence[np.ndarray]) -> None:
  """Writes (H, W, 3) uint8 images as a video."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=_RATE, options={"crf": "16"})
    stream.height, stream.width = images[0].shape[:2]
    stream.pix_fmt = "yuv420p"
    for image in images:
      frame = av.VideoFrame.from_ndarray(image, "rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _depth_pictures(paths: Sequence[pathlib.Path]) -> list[Image.Image]:
  """Returns depth maps in colours of one scale: near is light."""
  depths = np.stack([np.asarray(Image.open(path)) for path in paths])
  valid = depths > 0
  low, high = np.percentile(depths[valid], [2, 98]) if valid.any() else (0, 1)
  level = (depths - low) / max(high - low, 1e-9)
  colours = np.stack(
    [np.interp(level, np.linspace(0, 1, 5), c) for c in _COLOURS], axis=-1
  )
  return [
    Image.fromarray(picture.astype(np.uint8))
    for picture in np.where(valid[..., None], colours, 0)
  ]


def _plot(draw, box, values, first: int, title: str, number: str) -> None:
  """Draws values of frames, from `first` on, as a line above zero."""
  left, top, right, bottom = box
  high = max(values) or 1
  draw.text((left, top), title, _INK, ImageFont.load_default(15))
  draw.line([(left, bottom), (right, bottom)], _FAINT)
  draw.line([(left, top + 30), (right, top + 30)], _FAINT)
  x = np.linspace(left, right, len(values))
  y = bottom - np.array(values) / high * (bottom - top - 30)
  draw.line(list(zip(x, y, strict=True)), _ACCENT, width=2)
  small = ImageFont.load_default(12)
  draw.text((right, top + 26), number.format(high), _INK, small, "rb")
  draw.text((left, bottom + 4), f"frame {first}", _INK, small)
  end = f"frame {first + len(values) - 1}"
  draw.text((right, bottom + 4), end, _INK, small, "ra")


def draw_sheet(
  images: Sequence[np.ndarray], scene: pathlib.Path
) -> Image.Image:
  """Draws input frames, their predicted depth, and what frames cost.

  Args:
    images: (H, W, 3) uint8, the clip.
    scene: the folder that reconstruct.py wrote.
  """
  summary = json.loads((scene / "summary.json").read_text())
  shown = np.linspace(0, len(images) - 1, min(6, len(images))).astype(int)
  depths = sorted((scene / "depth").glob("*.png"))
  rows = (
    ("input", [Image.fromarray(images[i]) for i in shown]),
    ("predicted depth", _depth_pictures([depths[i] for i in shown])),
  )
  sheet = Image.new("RGB", (1200, 640), "white")
  draw = ImageDraw.Draw(sheet)
  draw.text((20, 16), _UNTRAINED, _ACCENT, ImageFont.load_default(22))
  top = 54
  for title, pictures in rows:
    draw.text((20, top), title, _INK, ImageFont.load_default(15))
    for column, picture in enumerate(pictures):
      picture = picture.resize((187, 140), Image.Resampling.BILINEAR)
      sheet.paste(picture, (20 + 195 * column, top + 22))
    top += 180
  warm_up = min(3, len(images) - 1)  # Compilation would dwarf the rest.
  seconds = summary["seconds_of_frames"][warm_up:]
  bottom = top + 190
  pointers = "pointers in memory"
  _plot(draw, (20, top, 580, bottom), summary["pointers"], 0, pointers, "{}")
  title = f"seconds per frame ({summary['device']})"
  _plot(draw, (620, top, 1180, bottom), seconds, warm_up, title, "{:.2g} s")
  return sheet


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m point3r_jax.cli.demo",
    description="Renders a clip of a made-up room, reconstructs it with an "
    "untrained model and draws what came out.",
  )
  parser.add_argument(
    "--output", default="output/demo", help="folder (default: %(default)s)"
  )
  parser.add_argument(
    "--frames", type=int, default=36, help="of the clip (default: %(default)s)"
  )
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  parser = _parser()
  flags = parser.parse_args(arguments)
  if flags.frames < 1:
    parser.error("--frames must be at least 1")
  output = pathlib.Path(flags.output)
  clip, scene, picture = (
    output / name for name in ("clip.mp4", "scene", "demo.png")
  )
  print(_NOTICE, flush=True)
  output.mkdir(parents=True, exist_ok=True)
  images = [render(pose, _SIZE) for pose in walk(flags.frames)]
  write_clip(clip, images)
  command = {
    "--input": clip,
    "--checkpoint": _CHECKPOINT,
    "--output": scene,
    "--size": max(_SIZE),
  }
  words = [str(word) for pair in command.items() for word in pair]
  words.append("--overwrite")
  print("\n$ python reconstruct.py", *words, flush=True)
  status = reconstruct.main(words)
  if status:
    return status
  draw_sheet(images, scene).save(picture)
  print(f"\n{_NOTICE}\n\nLook at {picture}; the clip is {clip}.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
