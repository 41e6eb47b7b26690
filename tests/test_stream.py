"""The host-side stream: growth without loss, compile counts, overflow."""

import concurrent.futures
import logging

import chex
import jax
import numpy as np
import PIL.Image
import pytest

import point3r_jax as p3r
from point3r_jax import stream as stream_module
from point3r_jax import stream_programs, streaming
from point3r_jax.models.point3r import BegunFrame
from tests import goldens, micro

FRAMES = 6

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def own_programs(monkeypatch):
  """For tests of what is compiled."""
  monkeypatch.setattr(
    stream_module, "StreamPrograms", stream_programs.StreamPrograms
  )


def images(frames=FRAMES):
  return micro.images(frames, 1)[:, 0]


OPEN = []


def make_stream(**options):
  """Opens a stream; it compiles what it needs only, unless told otherwise."""
  options = {"compile_ahead": 1.0, **options}
  OPEN.append(
    p3r.Stream(
      micro.SCANNED, micro.scanned_params(), micro.IMAGE_SIZE, **options
    )
  )
  return OPEN[-1]


@pytest.fixture(autouse=True)
def finish_compiling():
  """No test counts what another one's streams compile in the background."""
  yield
  while OPEN:
    OPEN.pop().wait_for_compiles()


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


def test_what_gpus_are_given_is_the_same_function(own_programs, monkeypatch):
  """Options and layouts that are for GPUs are known, and change no result."""
  stream = make_stream()
  expected = [jax.device_get(stream(image)) for image in images(2)]
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  stream = make_stream(precision="float32", look_ahead=1)
  got = [jax.device_get(stream(image)) for image in images(2)]
  params = stream._params.others.split()
  kernel = params["camera_dense"]["head_0"]["kernel"]
  assert kernel.format.layout.major_to_minor == (3, 0, 1, 2)
  chex.assert_trees_all_close(got, expected, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize(
  "look_ahead", [pytest.param(1, marks=pytest.mark.slow), 4]
)
def test_extend_is_one_call_after_the_other(own_programs, look_ahead):
  """Six images in fours: the last two fill half of what is encoded at once."""
  one_by_one = make_stream(capacity=micro.TOKENS, fusion=False)
  expected = [jax.device_get(one_by_one(image)) for image in images()]
  stream = make_stream(
    capacity=micro.TOKENS, fusion=False, look_ahead=look_ahead
  )
  found = jax.device_get(list(stream.extend(images())))
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)
  chex.assert_trees_all_close(
    stream.memory, one_by_one.memory, atol=1e-5, rtol=1e-5
  )
  assert stream.frames == FRAMES
  assert "encoder" in stream.compile_seconds


def test_frames_in_between_do_not_disturb_what_extend_encoded():
  """A call, another `extend` that is not taken to its end, and a reset."""
  clip, other = images(), make_stream()
  order = [0, 3, 1, 4, 2]
  expected = [jax.device_get(other(clip[i])) for i in order]
  other.reset()
  expected.append(jax.device_get(other(clip[5])))
  stream, found = make_stream(look_ahead=4), []
  frames = stream.extend(clip[[0, 1, 2, 5]])
  found.append(jax.device_get(next(frames)))
  found.append(jax.device_get(stream(clip[3])))
  found.append(jax.device_get(next(frames)))
  found.append(jax.device_get(next(stream.extend(clip[4:]))))
  found.append(jax.device_get(next(frames)))
  stream.reset()
  found += map(jax.device_get, frames)
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


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
def test_extend_takes_streams_on_several_devices():
  clip = micro.images(3, 2)
  stream = make_stream(batch_size=2, devices=jax.devices()[:2], look_ahead=2)
  found = jax.device_get(list(stream.extend(clip)))
  together = make_stream(batch_size=2)
  expected = [jax.device_get(together(images)) for images in clip]
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


def test_extend_takes_what_came_before_an_error():
  def broken():
    yield from images(3)
    raise OSError("the video ends here")

  stream, found = make_stream(look_ahead=2), []
  with pytest.raises(OSError, match="ends here"):
    for prediction in stream.extend(broken()):
      found.append(prediction)
  assert len(found) == stream.frames == 3


def test_extend_refuses_a_mixture_of_types():
  mixed = [images()[0], images()[0].astype(np.float32)]
  with pytest.raises(ValueError, match="must be of one type"):
    list(make_stream(look_ahead=2).extend(mixed))
  with pytest.raises(ValueError, match="look_ahead must be at least 1, got 0"):
    make_stream(look_ahead=0)


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


def test_rows_that_are_not_read_hold_nothing(own_programs, monkeypatch):
  """Before each frame of a memory that can grow, a frame's rows are free."""
  seen = []
  interact = stream_programs.interact_fn

  def spy(config, options, params, memory, *operands, unread, **others):
    seen.append((memory.capacity, unread))
    return interact(
      config, options, params, memory, *operands, unread=unread, **others
    )

  monkeypatch.setattr(stream_programs, "interact_fn", spy)
  stream = make_stream(
    capacity=micro.TOKENS,
    max_capacity=128 + micro.TOKENS,
    fusion=False,
    look_ahead=2,
  )
  before = []
  for _ in stream.extend(np.concatenate([images()] * 5)):
    before.append((stream.capacity, stream.pointer_count - micro.TOKENS))
  unread = dict(seen)
  # Too small for it, large enough, and no longer able to grow.
  assert unread == {micro.TOKENS: 0, 128: micro.TOKENS, 128 + micro.TOKENS: 0}
  assert all(count <= room - unread[room] for room, count in before)
  assert stream.overflow > 0


def test_choices_of_rows_are_blocks_of_large_memories():
  assert streaming.row_choices(1023) == (1023,)
  assert streaming.row_choices(3840) == (2560, 3200, 3840)
  for capacity in range(1024, 9000, 8):
    few, more, all_rows = streaming.row_choices(capacity)
    assert 0 < few < more < all_rows == capacity
    assert few % 128 == more % 128 == 0


@pytest.mark.parametrize("rotary", [True, False])
def test_decoders_run_on_as_few_rows_as_hold_all_pointers(
  own_programs, monkeypatch, rotary
):
  """Pointers of two streams, of which 28, 35 or 42 rows can be chosen."""
  options = {
    "capacity": 8 * micro.TOKENS,
    "batch_size": 2,
    "fusion": False,
    "rotary": rotary,
  }

  def run():
    stream, found = make_stream(**options), []
    for frame, image in enumerate(micro.images(FRAMES, 2)):
      if frame == 2:
        stream.reset(np.array([False, True]))
      found.append(jax.device_get(stream(image)))
    return found

  expected = run()
  monkeypatch.setattr(streaming, "_MANY_ROWS", 1)
  monkeypatch.setattr(streaming, "BLOCK", 1)
  rows, cut = [], BegunFrame.first_pointers

  def spy(self, count):
    rows.append(count)
    return cut(self, count)

  monkeypatch.setattr(BegunFrame, "first_pointers", spy)
  found = run()
  assert rows == [28, 35, 42]
  counts = [prediction.pointer_count.tolist() for prediction in found]
  assert counts[3:] == [[24, 12], [30, 18], [36, 24]]
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


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


def test_what_fails_ahead_is_said_once_and_tried_again_when_needed(
  own_programs, monkeypatch, caplog
):
  capacity, tried = 4 * micro.TOKENS, []
  interact = stream_programs.interact_fn

  def fail_once(config, options, params, memory, *operands, **others):
    if memory.capacity > capacity:
      tried.append(memory.capacity)
      if len(tried) == 1:
        raise MemoryError("no room")
    return interact(config, options, params, memory, *operands, **others)

  monkeypatch.setattr(stream_programs, "interact_fn", fail_once)
  stream = make_stream(capacity=capacity, fusion=False, compile_ahead=0.0)
  stream(images()[0])
  for image in images()[1:4]:
    jax.block_until_ready(stream(image))
    stream.wait_for_compiles()
  assert len(tried) == 1
  assert caplog.text.count("could not be compiled ahead") == 1
  stream(images()[4])
  assert len(tried) == 2 and stream.pointer_count == 5 * micro.TOKENS


def test_the_next_capacity_is_compiled_ahead(own_programs):
  capacity = 8 * micro.TOKENS
  for ahead, compiled in ((0.5, 2), (1.0, 1)):
    stream = make_stream(capacity=capacity, fusion=False, compile_ahead=ahead)
    for image in images():
      jax.block_until_ready(stream(image))
    assert stream.capacity == capacity
    stream.wait_for_compiles()
    assert len(stream.compile_seconds.keys() - {"encoder"}) == compiled


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


def long_stream(model):
  """Returns a stream that grows now and then, a clip, and how often to run."""
  if model == "micro":
    stream = make_stream(
      capacity=8 * micro.TOKENS,
      max_capacity=256,
      fusion=False,
      compile_ahead=0.5,
    )
    return stream, images(), 60
  config, params = goldens.seeded_params("small", salt=2)
  clip = goldens.load_golden("small_long").images[:, 0]
  return p3r.Stream(config, params, clip.shape[1:3], capacity=96), clip, 300


@pytest.mark.parametrize(
  "model", ["micro", pytest.param("small", marks=pytest.mark.slow)]
)
def test_a_long_stream_compiles_once_per_capacity(
  own_programs, monkeypatch, model
):
  """Traces are counted by chex, compilations by what JAX reports."""
  capacities = 3
  chex.clear_trace_counter()
  counted = chex.assert_max_traces(stream_programs.interact_fn, n=capacities)
  monkeypatch.setattr(stream_programs, "interact_fn", counted)
  stream, clip, frames = long_stream(model)

  compiled = []

  def listen(name, *_, **__):
    if name == "/jax/core/compile/backend_compile_duration":
      compiled.append(stream.frames)

  used = set()
  try:
    for frame in range(frames):
      if frame == 1:
        jax.monitoring.register_event_duration_secs_listener(listen)
      stream(clip[frame % len(clip)])
      used.add(stream.capacity)
    stream.wait_for_compiles()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(used) >= 2
  steps = stream.compile_seconds.keys() - {"encoder"}
  assert len(steps) <= capacities
  # A capacity has two programs: the step, and the copy into the larger memory,
  # which JAX may know from an earlier test.
  grown = len(steps) - 1
  assert grown <= len(compiled) <= 2 * grown


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


@pytest.mark.parametrize("look_ahead", [1, 2])
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
