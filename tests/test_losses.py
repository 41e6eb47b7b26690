"""The loss against numbers of the published losses, and at its edges."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from point3r_jax import geometry
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


def evaluate(fields, targets: Targets, options: LossOptions):
  @jax.jit
  def run(fields, targets):
    return jax.value_and_grad(
      lambda fields: point3r_loss(make_prediction(fields), targets, options),
      has_aux=True,
    )(fields)

  return run(fields, targets)


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
