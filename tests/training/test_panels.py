"""The panel: its layout, its colours, and predictions that make no sense."""

import numpy as np
import pytest

from point3r_jax.export import colors
from point3r_jax.training import panels
from point3r_jax.training.panels import training_panel

pytestmark = pytest.mark.filterwarnings("error")

HEIGHT, WIDTH = 120, 160  # Drawn as they are: neither enlarged nor reduced.
INPUT, TRUE, PREDICTED, ERROR, CONFIDENCE = range(5)


@pytest.fixture
def sequence():
  """Two views of a slope; the prediction is right but for its scale."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8)
  slope = np.linspace(4, 1, HEIGHT, dtype=np.float32)[:, None]
  depth = np.tile(slope, (2, 1, WIDTH))
  return {
    "images": images,
    "depth_true": depth,
    "depth_predicted": depth / 2,
    "confidence": np.exp(depth),
    "pointers": np.array([192, 300]),
  }


def cell(panel, row, view=0):
  top = panels._GAP + row * (HEIGHT + panels._GAP)
  left = panels._LABEL_WIDTH + view * (WIDTH + panels._GAP)
  return panel[top : top + HEIGHT, left : left + WIDTH]


def is_color(picture, color):
  return (picture == color).all(-1)


def test_cells_of_a_perfect_prediction(sequence):
  panel = training_panel(**sequence)
  for view, image in enumerate(sequence["images"]):
    np.testing.assert_array_equal(cell(panel, INPUT, view), image)
    true = cell(panel, TRUE, view)
    np.testing.assert_array_equal(cell(panel, PREDICTED, view), true)
    assert is_color(cell(panel, ERROR, view), colors.INFERNO[0]).all()
    assert is_color(true[-1], colors.TURBO[-1]).all()  # Near is red.
    assert is_color(true[0], colors.TURBO[0]).all()
    confidence = cell(panel, CONFIDENCE, view)
    assert is_color(confidence[0], colors.VIRIDIS[-1]).all()


def test_error_is_relative_and_after_scaling(sequence):
  sequence["depth_predicted"][:, 10:20, 10:20] *= 1.2
  sequence["depth_predicted"][:, 40:50, 10:20] *= 3
  panel = training_panel(**sequence)
  error = cell(panel, ERROR)
  assert is_color(error[10:20, 10:20], colors.INFERNO[102]).all()
  assert is_color(error[40:50, 10:20], colors.INFERNO[255]).all()
  assert is_color(error[60:], colors.INFERNO[0]).all()


def test_unknown_truth_is_grey(sequence):
  true = sequence["depth_true"]
  true[0, :30], true[0, 30:40], true[0, 40:50] = 0, np.nan, np.inf
  panel = training_panel(**sequence)
  for row in (TRUE, ERROR):
    grey = is_color(cell(panel, row), colors.NO_TRUTH)
    assert grey[:50].all() and not grey[50:].any()
  assert not is_color(cell(panel, PREDICTED), colors.NO_TRUTH).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, 0.0])
def test_broken_predictions_are_magenta(sequence, bad):
  good = training_panel(**sequence)
  sequence["depth_predicted"][0, 20:30, 5:15] = bad
  sequence["confidence"][0, 20:30, 5:15] = bad
  sequence["depth_true"][0, 25:30] = 0
  panel = training_panel(**sequence)
  for row in (PREDICTED, CONFIDENCE):
    magenta = is_color(cell(panel, row), colors.BROKEN)
    assert magenta[20:30, 5:15].all() and magenta.sum() == 100
  magenta = is_color(cell(panel, ERROR), colors.BROKEN)
  assert magenta[20:25, 5:15].all() and magenta.sum() == 50
  np.testing.assert_array_equal(
    cell(panel, PREDICTED, 1)[::7], cell(good, PREDICTED, 1)[::7]
  )


@pytest.mark.parametrize(
  "name", ["depth_true", "depth_predicted", "confidence"]
)
@pytest.mark.parametrize("value", [0.0, np.nan, 2.0])
def test_maps_without_any_contrast(sequence, name, value):
  sequence[name] = np.full_like(sequence[name], value)
  assert training_panel(**sequence).std() > 0


def test_views_are_few_and_evenly_chosen(sequence):
  views = 15
  for name, values in sequence.items():
    sequence[name] = np.repeat(values[:1], views, axis=0)
  sequence["images"][:] = np.arange(views)[:, None, None, None]
  panel = training_panel(**sequence)
  step = WIDTH + panels._GAP
  assert panel.shape[1] == panels._LABEL_WIDTH + panels.MAX_VIEWS * step
  shown = [cell(panel, INPUT, v)[0, 0, 0] for v in range(panels.MAX_VIEWS)]
  assert shown == [0, 2, 4, 6, 8, 10, 12, 14]


def test_labels_tell_scale_and_pointers(sequence, monkeypatch):
  texts, text = [], panels.ImageDraw.ImageDraw.text

  def record(self, place, string, *arguments):
    texts.append(string)
    text(self, place, string, *arguments)

  monkeypatch.setattr(panels.ImageDraw.ImageDraw, "text", record)
  training_panel(**sequence)
  assert {"x 2", "0.5", "view 0: 192 pointers", "view 1: 300 pointers"} <= set(
    texts
  )


@pytest.mark.parametrize(
  ("width", "drawn"), [(32, 160), (100, 200), (384, 384), (512, 256)]
)
def test_size_of_views(width, drawn):
  picture = np.zeros((40, width, 3), np.uint8)
  assert panels._fit(picture).size == (drawn, 40 * drawn // width)


@pytest.mark.parametrize(
  ("name", "value", "match"),
  [
    ("images", np.zeros((2, HEIGHT, WIDTH, 3)), "uint8"),
    ("images", np.zeros((0, HEIGHT, WIDTH, 3), np.uint8), "at least one view"),
    ("confidence", np.zeros((2, HEIGHT, 1)), "confidence must be"),
    ("pointers", np.zeros(3, int), "each of the 2 views"),
  ],
)
def test_shapes_that_do_not_fit(sequence, name, value, match):
  sequence[name] = value
  with pytest.raises(ValueError, match=match):
    training_panel(**sequence)
