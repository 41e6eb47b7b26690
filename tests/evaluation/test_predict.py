"""Many sequences side by side: each frame once, as if it were alone."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import point3r_jax as p3r
from point3r_jax.errors import InputError
from point3r_jax.evaluation.predict import Keep, plan_lanes, predict
from point3r_jax.evaluation.predictions import PredictionStore
from point3r_jax.evaluation.sequences import Sequence
from point3r_jax.geometry import pose_to_matrix
from tests import micro

KEEP = Keep(
  depth=True, pose=True, points=True, crop=16, pixel_stride=3, confidence=True
)


def make_sequences(*lengths, independent=False, load=None):
  def sequence(number, length):
    images = micro.images(length, 1, seed=number)[:, 0]
    return Sequence(
      name=f"scene/{number}",
      frames=tuple(f"{number}-{frame}.png" for frame in range(length)),
      image_size=micro.IMAGE_SIZE,
      load_image=load or (lambda index: images[index]),
      independent=independent,
    )

  return [sequence(*item) for item in enumerate(lengths)]


@pytest.fixture(scope="module")
def make_stream():
  """Makes streams; those of one size share their compiled step."""
  made = {}

  def make(image_size, lanes):
    if lanes not in made:
      made[lanes] = p3r.Stream(
        micro.SCANNED,
        micro.scanned_params(),
        image_size,
        batch_size=lanes,
        devices=jax.devices()[:2] if lanes == 4 else None,
        capacity=6 * micro.TOKENS,
      )
    made[lanes].reset()
    return made[lanes]

  return make


@settings(max_examples=100, deadline=None)
@given(
  st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=12),
  st.integers(1, 5),
)
def test_plans_hold_every_frame_once_and_are_balanced(sequences, lanes):
  lengths, independent = [x for x, _ in sequences], [x for _, x in sequences]
  plan = plan_lanes(lengths, independent, lanes)
  assert len(plan) == lanes
  frames = sorted(
    (r.sequence, i) for lane in plan for r in lane for i in r.frames
  )
  assert frames == [
    (sequence, i) for sequence, n in enumerate(lengths) for i in range(n)
  ]
  longest = 1
  for lane in plan:
    for run in lane:
      if not independent[run.sequence]:
        assert run.frames == range(lengths[run.sequence])
        longest = max(longest, len(run.frames))
  loads = [sum(len(run.frames) for run in lane) for lane in plan]
  assert max(loads) - min(loads) <= longest


@pytest.mark.slow
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("lanes", [2, 4])
def test_side_by_side_is_what_each_is_alone(
  tmp_path, make_stream, lanes, independent
):
  """Four lanes are on two devices; one of them is idle at times."""
  sequences = make_sequences(3, 5, 2, independent=independent)
  store, done = PredictionStore(tmp_path), []
  predict(
    make_stream,
    sequences,
    store,
    KEEP,
    batch_size=min(lanes, 3),
    devices=lanes // 2,
    report=done.append,
  )
  assert sum(done) == 10
  stream = make_stream(micro.IMAGE_SIZE, 1)
  for sequence in sequences:
    found = store.load(sequence)
    stream.reset()
    for index in range(len(sequence)):
      if independent:
        stream.reset()
      alone = jax.device_get(stream(sequence.load_image(index)))
      expected = {
        "depth": alone.points_camera[0, ..., 2],
        "pose": alone.pose[0],
        "points": alone.points_world[0, 2::3, 1::3],
        "confidence": alone.confidence_world[0, 2::3, 1::3],
      }
      for name, value in expected.items():
        np.testing.assert_allclose(
          found.arrays[name][index], value, atol=1e-5, rtol=1e-5
        )
      assert found.pointers[index] == alone.pointer_count[0]
    assert found.overflow == 0 and all(x > 0 for x in found.seconds)


def test_poses_from_point_maps(tmp_path, make_stream):
  """The pose that takes one map to the other best, not the pose head's."""
  sequences = make_sequences(2)
  store = PredictionStore(tmp_path)
  keep = Keep(pose=True, solve_pose=True)
  assert keep.heads == "both"
  predict(make_stream, sequences, store, keep, batch_size=1)
  poses = store.load(sequences[0]).arrays["pose"]
  stream = make_stream(micro.IMAGE_SIZE, 1)
  for index in range(2):
    alone = jax.tree.map(
      lambda x: np.asarray(x[0], np.float64),
      jax.device_get(stream(sequences[0].load_image(index))),
    )
    weight = np.log(alone.confidence_camera) * np.log(alone.confidence_world)

    def cost(pose):
      matrix = np.asarray(pose_to_matrix(pose), np.float64)
      moved = alone.points_camera @ matrix[:3, :3].T + matrix[:3, 3]  # noqa: B023
      error = ((moved - alone.points_world) ** 2).sum(-1)  # noqa: B023
      return (weight * error).sum()  # noqa: B023

    best = cost(poses[index])
    assert best < cost(alone.pose)
    for nudge in 1e-2 * np.concatenate([np.eye(7), -np.eye(7)]):
      assert best <= cost(poses[index] + nudge) * (1 + 1e-6)


def test_frames_are_read_no_further_ahead_than_a_few_steps(
  tmp_path, make_stream
):
  written, ahead, lock = [], [], threading.Lock()
  images = micro.images(1, 1)[0, 0]

  def load(index):
    with lock:
      ahead.append(index - sum(written))
    return images

  predict(
    make_stream,
    make_sequences(60, load=load),
    PredictionStore(tmp_path),
    Keep(pose=True),
    batch_size=1,
    report=written.append,
  )
  assert len(ahead) == 60 and max(ahead) < 15


@pytest.mark.slow
def test_a_frame_that_cannot_be_read_ends_it(tmp_path, make_stream):
  images = micro.images(9, 1)[:, 0]

  def load(index):
    if index == 7:
      raise InputError("7.png: cut short")
    return images[index]

  sequences = make_sequences(3, 9, load=load)
  store = PredictionStore(tmp_path)
  with pytest.raises(InputError, match=r"scene/1: 7\.png: cut short"):
    predict(make_stream, sequences, store, KEEP, batch_size=2)
  assert len(store.load(sequences[0]).pointers) == 3
  assert [path.name for path in tmp_path.iterdir()] == ["scene%2F0"]


@pytest.mark.slow
def test_what_cannot_be_read_may_be_left_out(tmp_path, make_stream):
  """The others are what they are without it; nothing of it stays."""
  sequences = make_sequences(3, 5, 2)
  images = sequences[1].load_image

  def load(index):
    if index == 2:
      raise InputError("2.png: cut short")
    return images(index)

  bad = [sequences[0], dataclasses.replace(sequences[1], load_image=load)]
  store, broken = PredictionStore(tmp_path), {}
  predict(
    make_stream,
    [*bad, sequences[2]],
    store,
    KEEP,
    batch_size=2,
    broken=broken,
  )
  assert broken == {"scene/1": "2.png: cut short"}
  good = PredictionStore(tmp_path / "good")
  predict(make_stream, sequences[::2], good, KEEP, batch_size=2)
  for sequence in sequences[::2]:
    np.testing.assert_allclose(
      store.load(sequence).arrays["depth"],
      good.load(sequence).arrays["depth"],
      atol=1e-5,
    )
  assert len([x for x in tmp_path.iterdir() if x.name != "good"]) == 2


def test_what_writing_raises_ends_it(tmp_path, make_stream):
  (tmp_path / "predictions").write_text("not a folder")
  store = PredictionStore(tmp_path / "predictions")
  with pytest.raises(OSError):
    predict(make_stream, make_sequences(20), store, KEEP, batch_size=1)


def test_a_stop_keeps_what_is_complete(tmp_path, make_stream):
  sequences, stop = make_sequences(2, 30), threading.Event()
  store = PredictionStore(tmp_path)
  predict(
    make_stream,
    sequences,
    store,
    KEEP,
    batch_size=2,
    report=lambda frames: stop.set() if frames == 1 else None,
    stop=stop,
  )
  assert store.load(sequences[0]) is not None
  assert [path.name for path in tmp_path.iterdir()] == ["scene%2F0"]
