"""What a stream compiles: how often, beside a live stream, on how many rows."""

import contextlib
import threading

import chex
import jax
import numpy as np
import pytest

import point3r_jax as p3r
from point3r_jax import stream_programs, streaming
from point3r_jax.gpu_options import GRAPHS
from point3r_jax.models.point3r import Point3R
from tests import goldens, micro
from tests.streams import FRAMES, images, make_stream

pytestmark = pytest.mark.usefixtures("shared_programs", "finished_streams")


def test_quick_turns_end_with_a_compilation_that_fails(monkeypatch):
  events = []

  @contextlib.contextmanager
  def turns():
    events.append("enter")
    try:
      yield
    finally:
      events.append("leave")

  monkeypatch.setattr(stream_programs, "quick_turns", turns())
  programs = stream_programs.StreamPrograms(
    micro.CONFIG, p3r.StepOptions(), micro.IMAGE_SIZE, 1, 1
  )

  def fail():
    events.append("fail")
    raise MemoryError

  with pytest.raises(MemoryError):
    programs._submit("program", None, fail, {}).result()
  assert events == ["enter", "fail", "leave"]


@pytest.mark.parametrize("devices", [1, 2])
def test_several_gpus_have_graphs_only_of_loaded_kernels(devices, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
  monkeypatch.setattr(stream_programs, "has_kernels", lambda _: True)
  programs = stream_programs.StreamPrograms(
    micro.CONFIG,
    p3r.StepOptions(),
    micro.IMAGE_SIZE,
    devices,
    1,
    jax.devices()[:devices],
  )

  class Lowered:
    def compile(self, options):
      return options

  given = stream_programs._STEP_OPTIONS
  options = programs._submit("program", None, Lowered, given).result()
  assert options == (given if devices == 1 else {**given, GRAPHS: ""})


def test_encoder_and_step_are_compiled_side_by_side(own_programs, monkeypatch):
  both = threading.Barrier(2, timeout=120)
  compile_alone = jax.stages.Lowered.compile

  def compile_together(lowered, *options):
    both.wait()  # Otherwise it is broken, which is an error.
    return compile_alone(lowered, *options)

  monkeypatch.setattr(jax.stages.Lowered, "compile", compile_together)
  stream = make_stream()
  stream(images(1)[0])
  assert set(stream.compile_seconds) == {"encoder", stream.capacity}


@pytest.mark.slow
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


@pytest.mark.slow
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
  assert streaming.row_choices(1024) == (512, 1024)
  assert streaming.row_choices(2752) == (2048, 2560, 2752)
  assert streaming.row_choices(3840) == (2560, 3072, 3840)
  for capacity in range(1024, 9000, 8):
    *fewer, all_rows = streaming.row_choices(capacity)
    assert all_rows == capacity and 1 <= len(fewer) <= 2
    assert list(fewer) == sorted(set(fewer))
    assert all(0 < rows < capacity and rows % 512 == 0 for rows in fewer)


@pytest.mark.slow
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
  monkeypatch.setattr(streaming, "_ROW_BLOCK", 1)
  monkeypatch.setattr(streaming, "_ROW_SHARES", (2 / 3, 5 / 6))
  rows, decode = [], Point3R.decode

  def spy(self, begun, context):
    rows.append(context.feature.shape[1])
    assert context.position.shape[1] == rows[-1]
    return decode(self, begun, context)

  monkeypatch.setattr(Point3R, "decode", spy)
  found = run()
  assert rows == [28, 35, 42]
  counts = [prediction.pointer_count.tolist() for prediction in found]
  assert counts[3:] == [[24, 12], [30, 18], [36, 24]]
  chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
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
