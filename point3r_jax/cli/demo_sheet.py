"""The demo's picture: the scene, a few frames beside the truth, the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from point3r_jax.export import colors

# (H, W) of the drawing of the scene, and what is behind it.
OVERVIEW_SIZE = (512, 756)
BACKGROUND = (24, 27, 33)
ESTIMATE, TRUTH = (255, 138, 76), (255, 255, 255)  # Colours of paths.
MAX_ERROR = 0.25  # Relative; larger errors look the same.

_SIZE = (828, 1400)
_INK, _FAINT, _RULE = (236, 238, 241), (146, 153, 164), (52, 57, 66)
_MARGIN, _GAP = 32, 4
_CELL = (136, 102)  # Width and height of a frame.
_FRAMES = 6
_COLUMNS = ("input", "predicted depth", "true depth", "error of depth")
_TOP = 104  # Of the scene; what is above are titles.
_COLORS = 256  # Of the file's palette, for its size.


@dataclasses.dataclass(frozen=True)
class Sheet:
  """What the picture shows.

  Attributes:
    title: one line.
    subtitle: one line.
    overview: of `OVERVIEW_SIZE`.
    images: (T, H, W, 3) uint8.
    predicted: (T, H, W) depth in the truth's unit.
    true: (T, H, W) depth, metres.
    scores: value and what it is, eight of them.
    warning: whether the subtitle is one.
  """

  title: str
  subtitle: str
  overview: Image.Image
  images: np.ndarray
  predicted: np.ndarray
  true: np.ndarray
  scores: Sequence[tuple[str, str]]
  warning: bool = False


def _text(draw, place, text, size, color=_INK, anchor="la") -> None:
  draw.text(place, text, color, ImageFont.load_default(size), anchor)


def _draw_key(
  draw: ImageDraw.ImageDraw,
  box: tuple[int, int, int],
  table: np.ndarray,
  ends: tuple[str, str],
) -> None:
  """Draws colours from left to right; the box is left, right and top."""
  left, right, top = box
  for x in range(left, right):
    color = table[255 * (x - left) // (right - left - 1)]
    draw.line((x, top, x, top + 7), tuple(color.tolist()))
  _text(draw, (left, top + 12), ends[0], 13, _FAINT)
  _text(draw, (right, top + 12), ends[1], 13, _FAINT, "ra")


def _draw_frames(picture: Image.Image, sheet: Sheet) -> None:
  """Draws a few frames, a row each, and what their colours mean."""
  draw = ImageDraw.Draw(picture)
  width, height = _CELL
  pitch = width + _GAP
  lefts = [
    picture.width - _MARGIN - width - (len(_COLUMNS) - 1 - i) * pitch
    for i in range(len(_COLUMNS))
  ]
  views = len(sheet.images)
  shown = np.linspace(0, views - 1, min(_FRAMES, views)).round().astype(int)
  true, predicted = sheet.true[shown], sheet.predicted[shown]
  low, high = ends = colors.usual_range(sheet.true)
  table = colors.NEAR_IS_RED
  columns = (
    sheet.images[shown],
    colors.log_colors(predicted, ends, table),
    colors.log_colors(true, ends, table, colors.NO_TRUTH),
    colors.error_colors(predicted, true, MAX_ERROR),
  )
  for name, left, cells in zip(_COLUMNS, lefts, columns, strict=True):
    _text(draw, (left, _TOP - 8), name, 14, _INK, "ls")
    for row, cell in enumerate(cells):
      image = Image.fromarray(cell).resize(_CELL, Image.Resampling.BILINEAR)
      picture.paste(image, (left, _TOP + row * (height + _GAP)))
  for row, frame in enumerate(shown):
    place = (lefts[0] - 8, _TOP + row * (height + _GAP) + height // 2)
    _text(draw, place, str(frame), 13, _FAINT, "rm")
  top = _TOP + _FRAMES * (height + _GAP) + 8
  box = (lefts[1], lefts[2] + width - 12, top)
  _draw_key(draw, box, table, (f"{low:.1f} m", f"{high:.1f} m"))
  box = (lefts[3], lefts[3] + width, top)
  ends = ("0", f"{100 * MAX_ERROR:.0f} % and more")
  _draw_key(draw, box, colors.INFERNO, ends)


def _draw_scene(picture: Image.Image, sheet: Sheet) -> None:
  """Draws the scene and a legend of its lines."""
  draw = ImageDraw.Draw(picture)
  picture.paste(sheet.overview, (_MARGIN, _TOP))
  x, y = _MARGIN, _TOP + sheet.overview.height + 20
  legend = (
    (ESTIMATE, "estimated cameras"),
    (TRUTH, "true path, aligned"),
  )
  for color, text in legend:
    draw.line((x, y, x + 24, y), color, 3)
    _text(draw, (x + 34, y), text, 14, _INK, "lm")
    x += 60 + round(draw.textlength(text, ImageFont.load_default(14)))


def _draw_scores(picture: Image.Image, sheet: Sheet) -> None:
  """Draws numbers with their names under the scene, four in a row."""
  draw = ImageDraw.Draw(picture)
  width, top = sheet.overview.width, _TOP + sheet.overview.height + 46
  draw.line((_MARGIN, top, _MARGIN + width, top), _RULE)
  for index, (value, name) in enumerate(sheet.scores):
    row, column = divmod(index, 4)
    x, y = _MARGIN + column * width // 4, top + 18 + 66 * row
    _text(draw, (x, y), value, 25)
    _text(draw, (x, y + 32), name, 13, _FAINT)


def draw_sheet(sheet: Sheet) -> Image.Image:
  """Draws the picture; a palette with dithering keeps its file small."""
  picture = Image.new("RGB", _SIZE[::-1], BACKGROUND)
  draw = ImageDraw.Draw(picture)
  _text(draw, (_MARGIN, 26), sheet.title, 26)
  color = ESTIMATE if sheet.warning else _FAINT
  _text(draw, (_MARGIN, 64), sheet.subtitle, 15, color)
  _draw_scene(picture, sheet)
  _draw_scores(picture, sheet)
  _draw_frames(picture, sheet)
  palette = picture.quantize(_COLORS, kmeans=5)
  dither = Image.Dither.FLOYDSTEINBERG
  return picture.quantize(palette=palette, dither=dither)
