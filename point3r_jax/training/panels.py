"""Pictures of what a model in training sees, one column a view."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from point3r_jax.export import colors

MAX_VIEWS = 8
MAX_ERROR = 0.5  # Relative; larger errors look the same.

_INK, _FAINT = (34, 34, 34), (140, 140, 140)

# Pixels of the finished picture.
_MIN_WIDTH, _MAX_WIDTH = 160, 384  # Of a view.
_LABEL_WIDTH, _MIN_HEIGHT = 136, 80  # Of a row's label; of a row.
_GAP, _FONT_SIZE = 4, 14


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row of the panel.

  Attributes:
    title: lines of text.
    pictures: (T, H, W, 3) uint8.
    table: (256, 3) uint8, the colours in use; None: no scale is drawn.
    ends: what the first and the last colour stand for.
    scale: what is between them.
  """

  title: Sequence[str]
  pictures: np.ndarray
  table: np.ndarray | None = None
  ends: tuple[float, float] = (0.0, 1.0)
  scale: str = "log"


def _rows(
  images: np.ndarray,
  true: np.ndarray,
  predicted: np.ndarray,
  confidence: np.ndarray,
  scale: float,
) -> list[_Row]:
  """Colours the maps of the views to show.

  Args:
    images: (T, H, W, 3) uint8.
    true: (T, H, W) depth.
    predicted: (T, H, W) depth, already multiplied by `scale`.
    confidence: (T, H, W).
    scale: for the label.
  """
  reference = true if colors.is_measure(true).any() else predicted
  depth_ends = colors.usual_range(reference)
  confidence_ends = colors.usual_range(confidence)
  depth_table = colors.NEAR_IS_RED
  true_picture = colors.log_colors(
    true, depth_ends, depth_table, colors.NO_TRUTH
  )
  predicted_picture = colors.log_colors(predicted, depth_ends, depth_table)
  error_picture = colors.error_colors(predicted, true, MAX_ERROR)
  confidence_picture = colors.log_colors(
    confidence, confidence_ends, colors.VIRIDIS
  )
  error_ends = (0.0, MAX_ERROR)
  predicted_title = ["predicted depth", f"x {scale:.3g}"]
  return [
    _Row(["input"], images),
    _Row(["true depth"], true_picture, depth_table, depth_ends),
    _Row(predicted_title, predicted_picture, depth_table, depth_ends),
    _Row(
      ["relative error"], error_picture, colors.INFERNO, error_ends, "linear"
    ),
    _Row(["confidence"], confidence_picture, colors.VIRIDIS, confidence_ends),
  ]


def _fit(picture: np.ndarray) -> Image.Image:
  """Returns an (H, W, 3) picture, its size changed by a whole number."""
  width = picture.shape[1]
  if width < _MIN_WIDTH:
    factor = -(-_MIN_WIDTH // width)
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
  image = Image.fromarray(picture)
  return image.reduce(-(-width // _MAX_WIDTH)) if width > _MAX_WIDTH else image


def _draw_label(draw: ImageDraw.ImageDraw, top: int, row: _Row) -> None:
  """Draws title and colour scale, or what the two special colours mean."""
  font = ImageFont.load_default(_FONT_SIZE)
  small = ImageFont.load_default(_FONT_SIZE - 2)
  left, right = 2 * _GAP, _LABEL_WIDTH - 3 * _GAP
  for line in row.title:
    draw.text((left, top), line, _INK, font)
    top += 18
  top += 4
  if row.table is None:
    marks = (
      (colors.NO_TRUTH, "no truth"),
      (colors.BROKEN, "not finite or <= 0"),
    )
    for color, text in marks:
      draw.rectangle((left, top + 3, left + 8, top + 11), color)
      draw.text((left + 14, top), text, _INK, small)
      top += 18
    return
  for x in range(left, right):
    color = row.table[255 * (x - left) // (right - left - 1)]
    draw.line((x, top, x, top + 9), tuple(color.tolist()))
  low, high = (f"{end:.3g}" for end in row.ends)
  draw.text((left, top + 12), low, _INK, small)
  draw.text((right, top + 12), high, _INK, small, "ra")
  draw.text(((left + right) / 2, top + 12), row.scale, _FAINT, small, "ma")


def _sheet(rows: Sequence[_Row], captions: Sequence[str]) -> np.ndarray:
  """Draws rows of pictures with labels, and a caption under each column."""
  width, height = _fit(rows[0].pictures[0]).size
  pitch = max(height, _MIN_HEIGHT) + _GAP
  size = (
    _LABEL_WIDTH + len(captions) * (width + _GAP),
    _GAP + len(rows) * pitch + 24,
  )
  sheet = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(sheet)
  for i, row in enumerate(rows):
    top = _GAP + i * pitch
    _draw_label(draw, top, row)
    for column, picture in enumerate(row.pictures):
      left = _LABEL_WIDTH + column * (width + _GAP)
      sheet.paste(_fit(picture), (left, top))
  font = ImageFont.load_default(_FONT_SIZE)
  for column, caption in enumerate(captions):
    left = _LABEL_WIDTH + column * (width + _GAP)
    draw.text((left + width / 2, size[1] - 22), caption, _INK, font, "ma")
  return np.asarray(sheet)


def _check_shapes(images, pointers, **maps) -> None:
  if (
    images.ndim != 4
    or images.shape[-1] != 3
    or not images.size
    or images.dtype != np.uint8
  ):
    raise ValueError(
      "images must be (T, H, W, 3) uint8 with at least one view, not "
      f"{images.shape} {images.dtype}"
    )
  for name, values in maps.items():
    if values.shape != images.shape[:3]:
      raise ValueError(
        f"{name} must be {images.shape[:3]} like the images, not {values.shape}"
      )
  if pointers.shape != images.shape[:1]:
    raise ValueError(
      f"pointers must be a number for each of the {len(images)} views, not "
      f"{pointers.shape}"
    )


def training_panel(
  images: np.ndarray,
  depth_true: np.ndarray,
  depth_predicted: np.ndarray,
  confidence: np.ndarray,
  pointers: np.ndarray,
) -> np.ndarray:
  """Draws a sequence: input, true and predicted depth, error, confidence.

  One column a view, at most `MAX_VIEWS`, evenly chosen. Predicted depth is
  multiplied by the median of true over predicted depth (of the whole sequence;
  its label says by how much) and has the colours of true depth. The error is
  |predicted - true| / true after that. Depth and confidence have logarithmic
  scales between percentiles 2 and 98. Dark grey: no true depth. Magenta:
  predictions that are not finite or not positive.

  Args:
    images: (T, H, W, 3) uint8 RGB.
    depth_true: (T, H, W) z-depth; not positive or not finite: unknown.
    depth_predicted: (T, H, W) z-depth.
    confidence: (T, H, W).
    pointers: (T,) int, pointers in memory after each view.

  Returns:
    (height, width, 3) uint8 RGB.

  Raises:
    ValueError: if the shapes do not fit each other.
  """
  images, pointers = np.asarray(images), np.asarray(pointers)
  true, predicted, confidence = (
    np.asarray(x, np.float64) for x in (depth_true, depth_predicted, confidence)
  )
  _check_shapes(
    images,
    pointers,
    depth_true=true,
    depth_predicted=predicted,
    confidence=confidence,
  )
  both = colors.is_measure(true) & colors.is_measure(predicted)
  scale = np.median(true[both] / predicted[both]) if both.any() else 1.0
  views = len(images)
  shown = np.linspace(0, views - 1, min(views, MAX_VIEWS)).round().astype(int)
  rows = _rows(
    images[shown],
    true[shown],
    scale * predicted[shown],
    confidence[shown],
    scale,
  )
  captions = [f"view {i}: {pointers[i]} pointers" for i in shown]
  return _sheet(rows, captions)
