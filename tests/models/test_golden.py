"""Parity with the published model: outputs, memory and taps, part by part."""

import functools

import jax
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax.models.compute import Compute
from point3r_jax.models.point3r import Point3R
from point3r_jax.precision import get_precision
from point3r_jax.streaming import read_memory
from tests import goldens

# Largest deviation over the largest reference value. Reached on a CPU: 3.2e-6
# by the small files, 6.7e-6 by the full one.
SMALL, FULL = 2e-5, 1e-4
FILES = [
  ("small_landscape", SMALL),
  pytest.param("small_portrait", SMALL, marks=pytest.mark.slow),
  pytest.param("small_long", SMALL, marks=pytest.mark.slow),
  pytest.param("small_nofusion", SMALL, marks=pytest.mark.slow),
  pytest.param("full_224", FULL, marks=pytest.mark.slow),
]
OUTPUTS = {
  "pts3d_in_self_view": "points_camera",
  "conf_self": "confidence_camera",
  "pts3d_in_other_view": "points_world",
  "conf": "confidence_world",
}


@functools.lru_cache(maxsize=8)
def run(name):
  """Streams a golden's images; returns each frame's memory and prediction."""
  golden = goldens.load_golden(name)
  config, params = goldens.seeded_params(golden.size, golden.salt)
  params = jax.device_put(params)
  frames, batch, *image_size, _ = golden.images.shape
  tokens = image_size[0] * image_size[1] // config.patch_size**2
  memory = p3r.init_memory(config, batch, image_size, capacity=frames * tokens)
  results = []
  for images in golden.images:
    memory, prediction = p3r.step(
      config,
      params,
      memory,
      images,
      precision="float32",
      fusion=name != "small_nofusion",
    )
    results.append(jax.device_get((memory, prediction)))
  return golden, results


@functools.lru_cache(maxsize=8)
def taps(name):
  """Runs the network on the first two frames; returns what it sows."""
  golden, results = run(name)
  config, params = goldens.seeded_params(golden.size, golden.salt)
  model = Point3R(config, Compute(get_precision("float32"), "xla"))
  image_size = golden.images.shape[2:4]

  @jax.jit
  def apply(params, images, memory):
    context = read_memory(memory)

    def network(model):
      tokens = model.encode(images)
      return tokens, model(tokens, context, config.grid(image_size))

    with jax.default_matmul_precision("highest"):
      (tokens, _), state = model.apply(
        {"params": params}, method=network, mutable=["intermediates"]
      )
    sown = {key: x[0] for key, x in state["intermediates"].items()}
    return {"encoder_tokens": tokens, **sown}

  empty = p3r.reset(results[0][0])
  memories = [empty, results[0][0]]
  return golden, [
    apply(params, golden.images[t], memories[t]) for t in range(2)
  ]


def deviation(value, reference):
  assert value.shape == reference.shape
  return np.abs(value - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("key", OUTPUTS)
@pytest.mark.parametrize(("name", "tolerance"), FILES)
def test_maps(name, tolerance, key):
  golden, results = run(name)
  for frame, (_, prediction) in enumerate(results):
    value = golden.maps(getattr(prediction, OUTPUTS[key]))
    reference = golden.arrays[f"frame{frame}/{key}"]
    assert deviation(value, reference.reshape(value.shape)) < tolerance


@pytest.mark.parametrize(("name", "tolerance"), FILES)
def test_pose(name, tolerance):
  golden, results = run(name)
  for frame, (_, prediction) in enumerate(results):
    reference = golden.arrays[f"frame{frame}/camera_pose"]
    assert deviation(prediction.pose, reference) < tolerance


@pytest.mark.parametrize(("name", "tolerance"), FILES)
def test_pointers(name, tolerance):
  golden, results = run(name)
  for frame, (memory, prediction) in enumerate(results):
    counts = golden.arrays[f"frame{frame}/pointer_count"]
    np.testing.assert_array_equal(memory.count, counts)
    np.testing.assert_array_equal(prediction.pointer_count, counts)
    np.testing.assert_array_equal(memory.overflow, 0)
    for sample, count in enumerate(counts):
      reference = golden.arrays[f"frame{frame}/pointer_position/{sample}"]
      value = memory.position[sample, :count]
      assert deviation(value, reference) < tolerance
      assert not memory.position[sample, count:].any()
  for sample, count in enumerate(counts):
    reference = golden.arrays[f"frame{frame}/pointer_feature/{sample}"]
    value = memory.feature[sample, :count:4]
    assert deviation(value, reference) < tolerance


@pytest.mark.parametrize(("name", "tolerance"), FILES)
def test_pose_slots(name, tolerance):
  golden, results = run(name)
  for frame, (memory, _) in enumerate(results):
    reference = golden.arrays[f"frame{frame}/pose_memory_mean"]
    assert deviation(memory.pose_slots.mean(1), reference) < tolerance


@pytest.mark.parametrize(
  ("key", "frame"),
  [
    ("encoder_tokens", 0),
    ("pose_query", 1),
    *(
      (f"decoder_{layer}", frame)
      for layer in ("half", "three_quarters", "last")
      for frame in (0, 1)
    ),
  ],
)
@pytest.mark.parametrize(("name", "tolerance"), [FILES[0], FILES[1], FILES[-1]])
def test_taps(name, tolerance, key, frame):
  golden, sown = taps(name)
  reference = golden.arrays[f"frame{frame}/{key}"]
  value = np.asarray(sown[frame][key])
  if value.ndim == 3:
    value = value[:, ::8]
  assert deviation(value, reference) < tolerance
