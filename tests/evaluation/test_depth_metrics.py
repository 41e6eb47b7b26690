import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from point3r_jax.errors import InputError
from point3r_jax.evaluation.depth import (
  align_depth,
  depth_metrics,
  frame_abs_rel,
  resize_depth,
  weighted_mean,
)
from point3r_jax.evaluation.depth_alignment import (
  ALIGNMENTS,
  Alignment,
  DepthOptions,
)
from tests.goldens import FOLDER

_settings = settings(deadline=None, max_examples=30)
_seeds = st.integers(0, 1000)

_NAMES = {
  "abs_rel": "Abs Rel",
  "sq_rel": "Sq Rel",
  "rmse": "RMSE",
  "log_rmse": "Log RMSE",
  "delta_1_25": "delta < 1.25",
  "delta_1_25_2": "delta < 1.25^2",
  "delta_1_25_3": "delta < 1.25^3",
  "valid_pixels": "valid_pixels",
}

with np.load(FOLDER / "evaluation.npz") as _file:
  _GOLDEN = {key: _file[key] for key in _file if key.startswith("depth/")}
_RESULTS = json.loads(str(_GOLDEN["depth/results"]))


def _maps(seed, count=300, noise=0.1):
  """Depth of any scale with noise and outliers, (count,) each."""
  rng = np.random.default_rng(seed)
  truth = rng.gamma(2, 2, count) + 0.5
  prediction = (truth + 0.3) / rng.uniform(0.5, 4)
  prediction *= np.exp(rng.normal(0, noise, count))
  outliers = rng.random(count) < 0.05
  prediction[outliers] *= 3
  return prediction.astype(np.float32), truth.astype(np.float32)


def _loss(fit, prediction, truth):
  scale, shift = fit
  return np.abs(scale * prediction.astype(np.float64) + shift - truth).sum()


@pytest.mark.parametrize("case", _RESULTS)
def test_metrics_are_the_published_ones(case):
  alignment, *single = case.split("/")
  alignment, *limits = alignment.split("_max70")
  alignment = alignment.replace("scale_and_shift", "scale_shift")
  # The single map is the second one; the others are scored as one video.
  frames = 1 if single else slice(None)
  limit = 70.0 if limits else None
  metrics = depth_metrics(
    _GOLDEN["depth/pred"][frames],
    _GOLDEN["depth/gt"][frames],
    alignment,
    DepthOptions(max_depth=limit, post_clip=limit),
  )
  expected = {ours: _RESULTS[case][name] for ours, name in _NAMES.items()}
  tolerance = 1e-3 if alignment == "scale_shift" else 1e-4
  assert metrics == pytest.approx(expected, rel=tolerance)


def test_metrics_by_hand():
  truth = np.array([[1.0, 2, 4, 0, -1]], np.float32)
  prediction = np.array([[2.0, 2, 5, 7, np.nan]], np.float32)
  metrics = depth_metrics(prediction, truth, "metric")
  log = np.log([2, 1, 1.25])
  assert metrics == pytest.approx(
    {
      "abs_rel": (1 + 0 + 0.25) / 3,
      "sq_rel": (1 + 0 + 0.25) / 3,
      "rmse": np.sqrt((1 + 0 + 1) / 3),
      "log_rmse": np.sqrt(np.mean(log**2)),
      "delta_1_25": 1 / 3,  # The bound itself is not below it.
      "delta_1_25_2": 2 / 3,
      "delta_1_25_3": 2 / 3,
      "valid_pixels": 3,
    },
    rel=1e-6,
  )


def test_the_median_of_an_even_count_is_the_lower_one():
  truth = np.array([[1.0, 2, 4, 8]], np.float32)
  fit = align_depth(truth * 3 + [[0, 2, 0, 0]], truth, "median")
  assert fit == (2 / 8, 0)


def test_limits_on_depth():
  truth = np.array([[1.0, 2, 70, 80]], np.float32)
  prediction = np.array([[1.0, 90, 1, 1]], np.float32)
  limits = DepthOptions(max_depth=70)
  metrics = depth_metrics(prediction, truth, "metric", limits)
  assert metrics["valid_pixels"] == 2
  assert metrics["abs_rel"] == pytest.approx(44 / 2)
  limits = DepthOptions(max_depth=70, post_clip=4)
  metrics = depth_metrics(prediction, truth, "metric", limits)
  assert metrics["abs_rel"] == pytest.approx(1 / 2)


def test_negative_depth_is_raised_for_logarithm_and_deltas_only():
  truth = np.ones((1, 1), np.float32)
  metrics = depth_metrics(-truth, truth, "metric")
  assert metrics["abs_rel"] == 2
  assert metrics["log_rmse"] == pytest.approx(-np.log(1e-5), rel=1e-5)
  assert metrics["delta_1_25_3"] == 0


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_nothing_valid_scores_zero(alignment):
  metrics = depth_metrics(np.ones((2, 3)), np.zeros((2, 3)), alignment)
  assert set(metrics) == set(_NAMES)
  assert not any(metrics.values())


@_settings
@given(_seeds, st.integers(-9, 9), st.sampled_from(("median", "scale")))
def test_scale_does_not_matter(seed, exponent, alignment):
  prediction, truth = _maps(seed)
  expected = depth_metrics(prediction, truth, alignment)
  # Powers of two change no digit of any number; but scales are kept above 1e-3.
  assume(align_depth(prediction, truth, alignment).scale > 1e-3 * 2**exponent)
  scaled = prediction * np.float32(2.0**exponent)
  assert depth_metrics(scaled, truth, alignment) == expected


@_settings
@given(
  _seeds,
  st.floats(0.1, 10),
  st.floats(-3, 3),
  st.sampled_from(("least_squares", "lad")),
)
def test_scale_and_shift_do_not_matter(seed, factor, shift, alignment):
  prediction, truth = _maps(seed)
  fit = align_depth(prediction, truth, alignment)
  moved = (prediction - np.float32(shift)) / np.float32(factor)
  again = align_depth(moved, truth, alignment)
  aligned = fit.scale * prediction + fit.shift
  # A least absolute deviation need not be unique, but its sum is.
  if alignment == "least_squares":
    np.testing.assert_allclose(
      again.scale * moved + again.shift, aligned, rtol=1e-3, atol=1e-3
    )
  assert _loss(again, moved, truth) == pytest.approx(
    _loss(fit, prediction, truth), rel=1e-4
  )


@pytest.mark.parametrize("alignment", ("scale_shift", "least_squares", "lad"))
def test_a_true_scale_and_shift_is_found(alignment):
  prediction, _ = _maps(0)
  truth = np.float32(1.05) * prediction + np.float32(0.05)
  fit = align_depth(prediction, truth, alignment)
  # Adam's steps are coarse, and it starts from the medians.
  tolerance = 0.05 if alignment == "scale_shift" else 1e-5
  assert fit == pytest.approx((1.05, 0.05), abs=tolerance)


def test_least_squares_are_numpys():
  prediction, truth = _maps(1)
  columns = np.stack([prediction, np.ones_like(prediction)], 1)
  expected = np.linalg.lstsq(columns.astype(np.float64), truth, rcond=None)[0]
  fit = align_depth(prediction, truth, "least_squares")
  assert fit == pytest.approx(tuple(expected), rel=1e-9)


def _adam(prediction, truth, steps=1000, rate=1e-4):
  """The published search step by step, over all pixels, in float32."""
  f = np.float32

  def middle(values):
    return np.sort(values)[(values.size - 1) // 2]

  x = np.array([middle(truth) / middle(prediction), 0], f)
  m, v = np.zeros(2, f), np.zeros(2, f)
  for step in range(1, steps + 1):
    sign = np.sign(x[0] * prediction + x[1] - truth).astype(np.float64)
    g = np.array([(sign * prediction).sum(), sign.sum()], f)
    m = f(0.9) * m + f(0.1) * g
    v = f(0.999) * v + f(0.001) * g * g
    m_hat, v_hat = m / f(1 - 0.9**step), v / f(1 - 0.999**step)
    x = x - f(rate) * m_hat / (np.sqrt(v_hat) + f(1e-8))
  return x


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", (1e-4, 1e-3))
def test_scale_shift_is_adam_over_all_pixels(seed, rate):
  prediction, truth = _maps(seed, 3000)
  options = DepthOptions(adam_learning_rate=rate, adam_tolerance=0)
  fit = align_depth(prediction, truth, "scale_shift", options)
  expected = tuple(_adam(prediction, truth, rate=rate))
  assert fit == pytest.approx(expected, abs=rate / 5)


def test_scale_shift_stops_where_nothing_changes():
  prediction, truth = _maps(0)
  options = DepthOptions(adam_tolerance=np.inf)
  stopped = align_depth(prediction, truth, "scale_shift", options)
  expected = tuple(_adam(prediction, truth, 2))
  assert stopped == pytest.approx(expected, rel=1e-6)


@_settings
@given(_seeds, st.integers(3, 40), st.booleans())
def test_lad_is_the_linear_programs(seed, count, ties):
  prediction, truth = _maps(seed, count)
  if ties:
    prediction, truth = np.round(prediction * 2), np.round(truth * 2) + 1
    prediction[:2] = 1, 2  # A scale and shift needs two different depths.
  fit = align_depth(prediction, truth, "lad")
  # Minimise the sum of positive and negative parts of the errors.
  eye = np.eye(count)
  equal = np.column_stack([prediction, np.ones(count), eye, -eye])
  result = linprog(
    np.concatenate([[0, 0], np.ones(2 * count)]),
    A_eq=equal,
    b_eq=truth,
    bounds=[(None, None)] * 2 + [(0, None)] * 2 * count,
  )
  assert _loss(fit, prediction, truth) == pytest.approx(result.fun, rel=1e-7)


@_settings
@given(_seeds, st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
def test_lad_cannot_be_improved(seed, by_scale, by_shift):
  prediction, truth = _maps(seed)
  fit = align_depth(prediction, truth, "lad")
  least = _loss(fit, prediction, truth)
  other = (fit.scale + by_scale, fit.shift + by_shift)
  assert least <= _loss(other, prediction, truth) * (1 + 1e-8)
  for alignment in ("median", "scale", "least_squares"):
    other = align_depth(prediction, truth, alignment)
    assert least <= _loss(other, prediction, truth) * (1 + 1e-8)


def test_lad_of_many_pixels_beats_adam_and_its_neighbours():
  prediction, truth = _maps(0, 300_000)
  fit = align_depth(prediction, truth, "lad")
  least = _loss(fit, prediction, truth)
  adam = align_depth(prediction, truth, "scale_shift")
  assert least < 0.9999 * _loss(adam, prediction, truth)
  for change in np.array([[1, 0], [0, 1], [1, -3], [1, -5]]) * 1e-4:
    for sign in (-1, 1):
      other = fit + sign * change
      assert least <= _loss(other, prediction, truth) * (1 + 1e-8)
  assert align_depth(prediction, truth, "lad") == fit


def test_lad_of_exact_and_of_constant_truth():
  prediction = np.linspace(1, 9, 200_000, dtype=np.float32)
  truth = prediction.astype(np.float64) * 2 + 1
  truth[::5] = 100  # A fifth of outliers does not matter.
  fit = align_depth(prediction, truth, "lad")
  assert fit == pytest.approx((2, 1), rel=1e-6)
  fit = align_depth(prediction, np.full_like(prediction, 5), "lad")
  assert fit == pytest.approx((0, 5), abs=1e-6)


def test_one_alignment_serves_all_metrics():
  prediction, truth = _GOLDEN["depth/pred"], _GOLDEN["depth/gt"].copy()
  truth[1] = 0
  options = DepthOptions(max_depth=70, post_clip=20)
  fit = align_depth(list(prediction), list(truth), "scale", options)
  metrics = depth_metrics(prediction, truth, fit, options)
  assert metrics == depth_metrics(prediction, truth, "scale", options)
  errors = frame_abs_rel(prediction, truth, fit, options)
  assert errors.shape == (3,) and np.isnan(errors[1])
  pixels = [np.sum((frame > 0) & (frame < 70)) for frame in truth]
  total = np.nansum(errors * pixels) / np.sum(pixels)
  assert total == pytest.approx(metrics["abs_rel"], rel=1e-6)


def test_large_samples_are_the_mean_of_their_parts():
  prediction, truth = _maps(0, 1_200_000)
  fit = Alignment(1.1, 0.1)
  whole = depth_metrics(prediction, truth, fit)
  parts = [
    depth_metrics(prediction[part], truth[part], fit)
    for part in (slice(700_000), slice(700_000, None))
  ]
  weights = [part["valid_pixels"] for part in parts]
  mean = weighted_mean(parts, weights)
  assert mean["abs_rel"] == pytest.approx(whole["abs_rel"], rel=1e-9)
  assert mean["valid_pixels"] == 1_200_000


def test_averages():
  samples = [{"a": 1.0, "valid_pixels": 30}, {"a": 2.0, "valid_pixels": 10}]
  mean = weighted_mean(samples)
  assert mean == {"a": 1.5, "valid_pixels": 40}
  mean = weighted_mean(samples, [30, 10])
  assert mean == {"a": 1.25, "valid_pixels": 40}
  with pytest.raises(InputError, match="nothing to average"):
    weighted_mean(samples, [0, 0])


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_predictions_to_score_must_be_finite(alignment, value):
  prediction = np.ones((2, 3), np.float32)
  prediction[0, 0] = value
  with pytest.raises(InputError, match="1 of 6 predicted depths"):
    depth_metrics(prediction, np.ones((2, 3)), alignment)


def test_infinite_truth_is_refused_unless_too_far():
  truth = np.array([[1, np.inf]])
  with pytest.raises(InputError, match="1 of 2 true depths"):
    depth_metrics(np.ones((1, 2)), truth, "metric")
  limits = DepthOptions(max_depth=70)
  metrics = depth_metrics(np.ones((1, 2)), truth, "metric", limits)
  assert metrics["valid_pixels"] == 1


def test_inputs_that_make_no_sense():
  ones = np.ones((2, 3))
  with pytest.raises(InputError, match="resize the prediction first"):
    depth_metrics(np.ones((2, 2)), ones, "median")
  with pytest.raises(InputError, match="2 sizes"):
    depth_metrics([np.ones((2, 2)), ones], [ones, ones], "median")
  with pytest.raises(InputError, match="unknown alignment 'best'"):
    depth_metrics(ones, ones, "best")
  for alignment in ("median", "scale", "scale_shift"):
    with pytest.raises(InputError, match="zero on average"):
      depth_metrics(0 * ones, ones, alignment)
  for alignment in ("least_squares", "lad"):
    with pytest.raises(InputError, match="same everywhere"):
      depth_metrics(ones, ones, alignment)


def _bicubic_matrix(size, target):
  """Keys' kernel with a = -0.75, pixel centres aligned, edges repeated."""
  matrix = np.zeros((target, size))
  for row, position in enumerate((np.arange(target) + 0.5) * size / target):
    first = int(np.floor(position - 0.5)) - 1
    for column in range(first, first + 4):
      x = abs(position - 0.5 - column)
      near = 1.25 * x**3 - 2.25 * x**2 + 1
      far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
      weight = near if x <= 1 else far
      matrix[row, np.clip(column, 0, size - 1)] += weight
  return matrix


@pytest.mark.parametrize("size", ((9, 12), (30, 17), (5, 41)))
def test_bicubic_resizing(size):
  depth = np.random.default_rng(0).uniform(1, 5, (15, 21))
  expected = _bicubic_matrix(15, size[0]) @ depth
  expected = expected @ _bicubic_matrix(21, size[1]).T
  resized = resize_depth(depth, size)
  assert resized.dtype == np.float32
  np.testing.assert_allclose(resized, expected, atol=1e-5)


@pytest.mark.parametrize("filter", ("bicubic", "bilinear", "nearest"))
def test_resizing_keeps_constants_and_its_own_size(filter):
  flat = resize_depth(np.full((4, 6), 3.0), (7, 5), filter)
  np.testing.assert_allclose(flat, np.full((7, 5), 3), rtol=1e-6)
  depth = np.random.default_rng(0).random((4, 6), np.float32)
  np.testing.assert_allclose(
    resize_depth(depth, (4, 6), filter), depth, atol=1e-6
  )
