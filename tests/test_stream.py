"""The host-side stream: growth without loss, overflow, what it refuses."""

import concurrent.futures
import logging

import chex
import jax
import numpy as np
import PIL.Image
import pytest

import point3r_jax as p3r
from point3r_jax import stream as stream_module
from tests import micro
from tests.streams import FRAMES, images, make_stream

pytestmark = pytest.mark.usefixtures("shared_programs", "finished_streams")


def test_equals_scan_while_growing():
  stream = make_stream(capacity=micro.TOKENS, fusion=False)
  predictions = [jax.device_get(stream(image)) for image in images()]
  assert stream.capacity >= FRAMES * micro.TOKENS > micro.TOKENS
  assert stream.pointer_count == FRAMES * micro.TOKENS
  assert stream.overflow == 0
  memory, expected = p3r.scan(
    micro.SCANNED,
    micro.scanned_params(),
    p3r.init_memory(micro.SCANNED, 1, micro.IMAGE_SIZE, stream.capacity),
    images()[:, None],
    fusion=False,
  )
  stacked = jax.tree.map(lambda *x: np.stack(x), *predictions)
  chex.assert_trees_all_close(stacked, expected, atol=1e-5, rtol=1e-5)
  chex.assert_trees_all_close(stream.memory, memory, atol=1e-5, rtol=1e-5)


def test_predictions_outlive_later_frames_whose_buffers_stay():
  """What a step writes is where it was, so that CUDA graphs stay as they are.

  Predictions are copies of that.
  """

  def places():
    arrays = jax.tree.leaves((stream._memory, stream._last, stream._frames))
    return [array.unsafe_buffer_pointer() for array in arrays]

  stream = make_stream(capacity=FRAMES * micro.TOKENS)
  before = places()
  predictions, expected = [], []
  for image in images():
    predictions.append(stream(image))
    expected.append(jax.device_get(predictions[-1]))
  chex.assert_trees_all_equal(jax.device_get(predictions), expected)
  counts = [int(p.pointer_count[0]) for p in predictions]
  assert counts[0] == micro.TOKENS and counts == sorted(counts)
  assert places() == before


def test_reset_starts_over():
  stream = make_stream()
  first = [jax.device_get(stream(image)) for image in images()]
  stream.reset()
  assert stream.frames == 0 and stream.pointer_count == 0
  second = [jax.device_get(stream(image)) for image in images()]
  chex.assert_trees_all_equal(first, second)
  stream.reset(np.array([True]))
  assert stream.frames == 0 and stream.pointer_count == 0


@pytest.mark.slow
def test_streams_side_by_side_are_what_they_are_alone():
  """On two devices, growing, and some of them starting anew halfway."""
  anew = np.array([False, True, False, True])
  images = micro.images(4, len(anew))
  stream = make_stream(
    batch_size=len(anew),
    devices=jax.devices()[:2],
    capacity=micro.TOKENS,
    fusion=False,
  )
  together = []
  for frame in range(4):
    if frame == 2:
      stream.reset(anew)
    together.append(jax.device_get(stream(images[frame])))
  assert stream.capacity >= stream.pointer_count == 4 * micro.TOKENS

  alone = make_stream(fusion=False)
  for sample, again in enumerate(anew):
    for frame in range(4):
      if frame == 0 or (again and frame == 2):
        alone.reset()
      expected = jax.device_get(alone(images[frame, sample]))
      found = jax.tree.map(lambda x: x[sample], together[frame])  # noqa: B023
      chex.assert_trees_all_close(
        found, jax.tree.map(lambda x: x[0], expected), atol=1e-5, rtol=1e-5
      )


@pytest.mark.parametrize("which", [[True], np.ones(2), np.ones((2, 1), bool)])
def test_what_starts_anew_is_named_for_each_stream(which):
  with pytest.raises(ValueError, match=r"which must be \(2,\) bool"):
    make_stream(batch_size=2).reset(which)


def test_streams_are_divided_equally():
  with pytest.raises(ValueError, match="3 streams cannot be divided equally"):
    make_stream(batch_size=3, devices=jax.devices()[:2])


def test_a_reset_mends_what_an_interruption_left():
  """Between the encoder's taking over of buffers and its giving them back."""
  stream = make_stream()
  expected = jax.device_get(stream(images()[0]))

  def interrupted(*_):
    jax.tree.map(lambda x: x.delete(), (stream._frames, stream._last))
    raise KeyboardInterrupt

  future = concurrent.futures.Future()
  future.set_result(interrupted)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stream._programs, "encoder", lambda *_: future)
    with pytest.raises(KeyboardInterrupt):
      stream(images()[0])
  stream.reset()
  found = jax.device_get(stream(images()[0]))
  chex.assert_trees_all_equal(found, expected)


@pytest.mark.slow
def test_an_interrupted_frame_counts_what_it_left_in_memory():
  """Between the step and the copy of its prediction, which is lost."""
  clip = images()
  expected = list(make_stream(capacity=128, fusion=False).extend(clip))
  # With no room to spare.
  stream = make_stream(capacity=2 * micro.TOKENS, fusion=False)
  stream(clip[0])

  def interrupted(_):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stream._programs, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
      stream(clip[1])
  found = [stream(image) for image in clip[2:]]
  assert stream.overflow == 0 and stream.frames == FRAMES
  chex.assert_trees_all_close(found, expected[2:], atol=1e-5, rtol=1e-5)


def test_a_memory_may_come_from_another_device():
  stream = make_stream(capacity=FRAMES * micro.TOKENS)
  stream(images()[0])
  kept = jax.device_put(stream.memory, jax.devices()[1])
  expected = jax.device_get(stream(images()[1]))
  stream.memory = kept
  chex.assert_trees_all_equal(jax.device_get(stream(images()[1])), expected)


@pytest.mark.slow
def test_a_memory_that_was_kept_goes_on_where_it_was():
  """With no room to spare: the stream must know how full it is."""
  stream = make_stream(capacity=4 * micro.TOKENS, fusion=False)
  clip = images()
  for image in clip[:4]:
    stream(image)
  kept = jax.tree.map(np.array, stream.memory)
  expected = [jax.device_get(stream(image)) for image in clip[4:]]

  other = make_stream(fusion=False)
  other.memory = jax.tree.map(jax.numpy.asarray, kept)
  assert other.pointer_count == 4 * micro.TOKENS and other.frames == 4
  found = [jax.device_get(other(image)) for image in clip[4:]]
  assert other.overflow == 0
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)

  # The capacity that it grows to is compiled already, but not for growing.
  smaller = make_stream(capacity=128, fusion=False)
  smaller(clip[0])
  smaller.memory = jax.tree.map(jax.numpy.asarray, kept)
  found = [jax.device_get(smaller(image)) for image in clip[4:]]
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)

  with pytest.raises(ValueError, match=r"position of \(2, .* not \(1, "):
    make_stream(batch_size=2).memory = stream.memory
  with pytest.raises(ValueError, match="above max_capacity 12"):
    make_stream(capacity=12, max_capacity=12).memory = stream.memory


def test_full_memory_warns_once_and_counts(caplog):
  stream = make_stream(
    capacity=micro.TOKENS, max_capacity=2 * micro.TOKENS, fusion=False
  )
  with caplog.at_level(logging.WARNING):
    for image in images():
      jax.block_until_ready(stream(image))
  assert stream.capacity == 2 * micro.TOKENS
  assert stream.overflow == (FRAMES - 2) * micro.TOKENS
  assert len(caplog.records) == 1
  assert "full at its maximal capacity of 12" in caplog.text


def test_calls_do_not_wait_when_they_need_not(monkeypatch):
  """Neither at the maximal capacity nor with room for all frames under way."""
  waited = []

  class Unready:
    """A count whose frame never seems to be finished."""

    def __init__(self, array):
      self._array = array

    def copy_to_host_async(self):
      pass

    def is_ready(self):
      return False

    def __array__(self, *args, **kwargs):
      waited.append(self)
      return np.asarray(self._array)

  add = stream_module._Counts.add
  monkeypatch.setattr(
    stream_module._Counts,
    "add",
    lambda counts, prediction: add(
      counts,
      prediction.replace(
        pointer_count=Unready(prediction.pointer_count),
        overflow=Unready(prediction.overflow),
      ),
    ),
  )
  full = 2 * micro.TOKENS
  stream = make_stream(capacity=full, max_capacity=full)
  for image in images():
    stream(image)
  roomy = make_stream(capacity=FRAMES * micro.TOKENS)
  for image in images():
    roomy(image)
  assert not waited
  roomy(images()[0])  # Might not fit: now the oldest frames are waited for.
  assert 0 < len(waited) < 2 * FRAMES


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (np.zeros((32, 32, 3), np.uint8), "images of shape"),
    (np.zeros((32, 48, 3), np.int64), "must be uint8"),
  ],
)
def test_wrong_images_are_refused(image, message):
  with pytest.raises(ValueError, match=message):
    make_stream()(image)


def test_an_image_that_is_not_finite_is_refused():
  image = np.zeros((1, *micro.IMAGE_SIZE, 3), np.float32)
  image[0, 1, 2, 0] = np.nan
  with pytest.raises(ValueError, match="finite"):
    make_stream()(image)


def test_max_capacity_below_the_first_is_refused():
  with pytest.raises(ValueError, match="max_capacity"):
    make_stream(capacity=64, max_capacity=32)


def test_max_capacity_alone_bounds_the_first_one():
  assert make_stream(max_capacity=micro.TOKENS + 1).capacity == micro.TOKENS + 1


def test_parameters_of_another_model_are_refused():
  with pytest.raises(ValueError, match="do not fit the model config"):
    p3r.Stream(
      micro.SCANNED.replace(pose_slots=5),
      micro.scanned_params(),
      micro.IMAGE_SIZE,
    )


@pytest.mark.parametrize(
  "look_ahead", [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_an_image_may_be_overwritten_once_it_is_taken(look_ahead):
  stream = make_stream(look_ahead=look_ahead)
  expected = [jax.device_get(stream(image)) for image in images(4)]
  # Where JAX would not copy.
  size = images()[0].nbytes
  memory = np.zeros(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  buffer = memory[start : start + size].reshape(images()[0].shape)

  def camera():
    for image in images(4):
      buffer[:] = image
      yield buffer
      buffer[:] = 0

  stream.reset()
  got = list(stream.extend(camera()))
  chex.assert_trees_all_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
  "convert",
  [PIL.Image.fromarray, lambda x: jax.device_put(x, jax.devices()[1])],
)
def test_images_may_be_of_another_library_or_device(convert):
  stream = make_stream()
  expected = jax.device_get(stream(images()[0]))
  stream.reset()
  got = jax.device_get(stream(convert(images()[0])))
  chex.assert_trees_all_equal(got, expected)
