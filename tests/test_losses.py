"""The loss against numbers of the published losses, and at its edges."""

import functools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from point3r_jax.losses import LossOptions, Targets, make_targets, point3r_loss
from point3r_jax.streaming import Prediction
from tests.goldens import FOLDER, loss_targets

CASES = {
  "regr3dpose": False,
  "regr3dpose_all_metric": False,
  "batchlist": True,
  "batchlist_flags": True,
  "batchlist_camera_only": True,
}
FIELDS = {
  "points_camera": "pts3d_in_self_view",
  "confidence_camera": "conf_self",
  "points_world": "pts3d_in_other_view",
  "confidence_world": "conf",
  "pose": "camera_pose",
}


def make_prediction(fields) -> Prediction:
  batch = fields["pose"].shape[:2]
  return Prediction(
    **fields, pointer_count=np.zeros(batch), overflow=np.zeros(batch)
  )


@functools.partial(jax.jit, static_argnums=2)
def evaluate(fields, targets: Targets, options: LossOptions):
  """Returns (loss, parts) and the gradient on the predictions."""
  return jax.value_and_grad(
    lambda fields: point3r_loss(make_prediction(fields), targets, options),
    has_aux=True,
  )(fields)


@pytest.fixture(params=CASES, scope="module")
def case(request):
  with np.load(FOLDER / f"loss_{request.param}.npz") as file:
    golden = dict(file)
  frames = sum(key.endswith("camera_pose") for key in golden) // 3
  fields, gradients = (
    {
      name: np.stack([golden[f"{kind}{t}/{key}"] for t in range(frames)])
      for name, key in FIELDS.items()
    }
    for kind in ("pred", "grad")
  )
  (loss, parts), gradient = evaluate(
    fields,
    loss_targets(golden, frames),
    LossOptions(per_sample=CASES[request.param]),
  )
  return golden, loss, parts, gradients, gradient


def test_total_and_parts(case):
  golden, loss, parts, _, _ = case
  np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
  details = json.loads(str(golden["details"]))
  names = {
    "camera": "_self_pts3d/",
    "world": "_pts3d/",
    "camera_confidence": "_conf_loss_self/",
    "world_confidence": "_conf_loss/",
  }
  for name, label in names.items():
    found = [
      value
      for key, value in details.items()
      if label in key and (name != "world" or "_self_" not in key)
    ]
    np.testing.assert_allclose(parts[name], found, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(parts["pose"], details["pose_loss"], rtol=1e-5)


@pytest.mark.parametrize("field", FIELDS)
def test_gradients_on_predictions(case, field):
  _, _, _, gradients, gradient = case
  want, have = gradients[field], gradient[field]
  np.testing.assert_allclose(have, want, rtol=0, atol=1e-4 * abs(want).max())


def example(frames=2, batch=3, size=(4, 5), seed=0):
  """Returns predictions near their targets, on views of a slanted plane."""
  rng = np.random.default_rng(seed)
  height, width = size
  shape = (frames, batch, height, width)
  depth = rng.uniform(1, 3, shape).astype(np.float32)
  camera = [[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]]
  poses = np.tile(np.eye(4, dtype=np.float32), (frames, batch, 1, 1))
  poses[..., :3, 3] = rng.normal(0, 0.3, (frames, batch, 3))
  absent = np.zeros(batch, bool)
  targets = make_targets(
    depth,
    np.tile(np.float32(camera), (frames, batch, 1, 1)),
    poses,
    is_metric=np.ones(batch, bool),
    camera_only=absent,
    depth_only=absent,
    single_view=absent,
  )
  fields = {
    "points_camera": targets.points_camera,
    "points_world": targets.points_world,
    "confidence_camera": np.full(shape, 2.0, np.float32),
    "confidence_world": np.full(shape, 2.0, np.float32),
    "pose": targets.pose,
  }
  return jax.device_get((fields, targets))


def test_targets_are_relative_to_the_first_view():
  _, targets = example()
  np.testing.assert_allclose(targets.pose[0, :, 3], 1)
  np.testing.assert_allclose(targets.pose[0, :, :3], 0, atol=1e-6)
  np.testing.assert_allclose(targets.points_world[0], targets.points_camera[0])
  # No turns here: the frames' axes differ by translations alone.
  moved = targets.points_camera + targets.pose[:, :, None, None, :3]
  np.testing.assert_allclose(targets.points_world, moved, atol=1e-5)


def test_perfect_predictions_cost_their_confidence_only():
  (loss, parts), gradient = evaluate(*example(), LossOptions())
  assert parts["pose"] == 0 and not parts["camera"].any()
  np.testing.assert_allclose(loss, -2 * 0.2 * np.log(2), rtol=1e-5)
  # Norms of zero have a gradient of zero, not of NaN.
  assert all(np.isfinite(x).all() for x in gradient.values())
  assert not gradient["points_camera"].any()


def test_nothing_valid_and_zero_points_stay_finite():
  fields, targets = example()
  nothing = np.zeros_like(targets.valid)
  zeros = {**fields, "points_camera": 0 * fields["points_camera"]}
  for changed in (targets.replace(valid=nothing), targets):
    for flags in ({}, {"depth_only": ~targets.depth_only}):
      (loss, _), gradient = evaluate(
        zeros, changed.replace(**flags), LossOptions()
      )
      assert np.isfinite(loss)
      assert all(np.isfinite(x).all() for x in gradient.values())


@pytest.mark.parametrize("field", FIELDS)
def test_nan_is_not_hidden(field):
  fields, targets = example()
  fields = {**fields, field: fields[field].copy()}
  fields[field][0, 0].flat[0] = np.nan
  (loss, _), _ = evaluate(fields, targets, LossOptions())
  assert np.isnan(loss)


def test_pose_loss_is_cut_off_without_gradient():
  fields, targets = example()
  far = {**fields, "pose": fields["pose"] + np.float32(2)}
  (loss, parts), gradient = evaluate(far, targets, LossOptions())
  assert parts["pose"] > 0.3 and not gradient["pose"].any()
  (near, _), _ = evaluate(fields, targets, LossOptions())
  np.testing.assert_allclose(loss - near, 5 * 0.3, rtol=1e-5)


def test_sky_trains_confidence_only():
  fields, targets = example()
  sky = np.zeros_like(targets.valid)
  sky[:, :, 0] = True
  targets = targets.replace(sky=sky, valid=targets.valid & ~sky)
  wrong = {**fields, "points_camera": fields["points_camera"] + sky[..., None]}
  (_, parts), gradient = evaluate(wrong, targets, LossOptions())
  np.testing.assert_allclose(parts["camera"], 2 * sky.mean((1, 2, 3)))
  assert not gradient["points_camera"][sky].any()
  assert (gradient["confidence_camera"][sky] > 0).all()


@given(factor=strategies.floats(0.2, 5), per_sample=strategies.booleans())
@settings(max_examples=10, deadline=None)
def test_only_metric_samples_see_the_scale(factor, per_sample):
  fields, targets = example()
  lengths = ("points_camera", "points_world", "pose")
  scaled = {**fields, **{x: fields[x] * np.float32(factor) for x in lengths}}
  scaled["pose"][..., 3:] = fields["pose"][..., 3:]
  options = LossOptions(per_sample=per_sample)
  relative = targets.replace(is_metric=~targets.is_metric)
  (one, _), _ = evaluate(fields, relative, options)
  (other, _), _ = evaluate(scaled, relative, options)
  np.testing.assert_allclose(one, other, atol=1e-4)
  (metric, parts), _ = evaluate(scaled, targets, options)
  np.testing.assert_allclose(
    parts["camera"], abs(factor - 1), rtol=0.1, atol=1e-4
  )
  assert metric >= one
