"""What is kept of a program once it is lowered, and when it is lowered anew."""

import importlib.metadata

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Layout, with_layout_constraint

from point3r_jax import lowered_programs, stream_programs
from point3r_jax.lowered_programs import lower_once
from tests.streams import images, make_stream

STATE = {"sum": jnp.zeros(3), "nothing": None}


class Adder:
  """A program that knows how often it was traced."""

  def __init__(self):
    self.traced = 0

  def __call__(self, amount, state, unused):
    del unused
    self.traced += 1
    return {"sum": state["sum"] + amount, "nothing": None}

  def lower(self, amount=2.0, name="adder", dtype=np.float32):
    operands = (np.asarray(amount, dtype), STATE, jnp.ones(2))
    return lower_once(self, operands, name=name, result=STATE, donate=(1,))


def files(folder):
  return sorted(folder.glob("point3r-*.lowered"))


def test_a_program_is_lowered_once(folder):
  first, second = Adder(), Adder()
  lowered = first.lower()
  (path,) = files(folder)
  again = second.lower()
  assert (first.traced, second.traced) == (1, 0)
  assert files(folder) == [path]
  # JAX's cache finds it.
  assert again.as_text() == lowered.as_text()


def test_kernels_are_compiled_ahead_of_what_is_lowered_anew(
  folder, monkeypatch
):
  ahead = []
  monkeypatch.setattr(lowered_programs, "compile_kernels", ahead.append)
  lowered = Adder().lower()
  assert ahead == [lowered]
  Adder().lower()  # Reads it.
  assert ahead == [lowered]
  unnamed = Adder().lower(name=None)
  assert ahead == [lowered, unnamed]


def test_kernels_of_another_form_are_left_to_the_program(
  folder, monkeypatch, caplog
):
  def fail(_):
    raise KeyError("kernel_hash")

  monkeypatch.setattr(lowered_programs, "compile_kernels", fail)
  lowered = Adder().lower()
  assert "not compiled ahead" in caplog.text and "kernel_hash" in caplog.text
  state = {"sum": jnp.zeros(3), "nothing": None}
  got = lowered.compile()(np.float32(2), state, jnp.ones(2))
  chex.assert_trees_all_equal(got["sum"], np.full(3, 2, np.float32))


@pytest.mark.parametrize("package", ["jax", "jaxlib", "flax", "optax"])
def test_another_version_makes_another_program(folder, monkeypatch, package):
  Adder().lower()
  version = importlib.metadata.version
  monkeypatch.setattr(
    importlib.metadata,
    "version",
    lambda name: "99" if name == package else version(name),
  )
  other = Adder()
  other.lower()
  assert other.traced == 1 and len(files(folder)) == 2


def test_what_was_read_does_the_same_with_donated_buffers(folder):
  for _ in range(2):
    state = {"sum": jnp.arange(3.0), "nothing": None}
    got = Adder().lower().compile()(np.float32(2), state, jnp.ones(2))
    chex.assert_trees_all_equal(got, {"sum": np.arange(3) + 2, "nothing": None})
    assert state["sum"].is_deleted()


def test_what_asks_for_layouts_is_kept(folder):
  def turn(x):
    return with_layout_constraint(2 * x, Layout((0, 1)))

  x = jnp.arange(6.0).reshape(2, 3)
  for _ in range(2):
    lowered = lower_once(turn, (x,), name="turn", result=x)
    np.testing.assert_array_equal(lowered.compile()(x), 2 * x)
  assert len(files(folder)) == 1


@pytest.mark.parametrize(
  "change", [{"name": "another"}, {"amount": [2, 2, 2]}, {"dtype": np.int32}]
)
def test_another_program_is_another_file(folder, change):
  Adder().lower()
  other = Adder()
  other.lower(**change)
  assert other.traced == 1
  assert len(files(folder)) == 2


def test_settings_and_sources_make_another_program(folder, monkeypatch):
  Adder().lower()
  other = Adder()
  before = jax.config.jax_numpy_rank_promotion
  jax.config.update("jax_numpy_rank_promotion", "warn")
  try:
    other.lower()
  finally:
    jax.config.update("jax_numpy_rank_promotion", before)
  assert other.traced == 1
  monkeypatch.setattr(lowered_programs, "_digest_sources", lambda: b"edited")
  monkeypatch.setattr(lowered_programs, "_SOURCES", b"edited")
  other.lower()
  assert other.traced == 2
  assert len(files(folder)) == 3


def test_files_edited_since_they_were_imported_keep_nothing(
  folder, monkeypatch
):
  """The next process, which imports them as they are now, must not read it."""
  Adder().lower()
  monkeypatch.setattr(lowered_programs, "_digest_sources", lambda: b"edited")
  for name in ("adder", "another"):
    other = Adder()
    other.lower(name=name)
    assert other.traced == 1
  assert len(files(folder)) == 1


@pytest.mark.parametrize(
  "damage", [lambda x: x[:-1], lambda _: b"", bytes.upper]
)
def test_a_damaged_file_is_said_and_written_anew(folder, caplog, damage):
  Adder().lower()
  (path,) = files(folder)
  path.write_bytes(damage(path.read_bytes()))
  second, third = Adder(), Adder()
  second.lower()
  assert "damaged" in caplog.text and str(path) in caplog.text
  third.lower()
  assert (second.traced, third.traced) == (1, 0)


def test_what_cannot_be_written_is_said_and_done_without(folder, caplog):
  folder.parent.mkdir()
  folder.write_bytes(b"")  # A file, where the folder would be.
  program = Adder()
  for _ in range(2):
    program.lower()
  assert program.traced == 2
  assert "could not write" in caplog.text


def test_what_cannot_be_exported_is_said_and_done_without(folder, caplog):
  def program(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(np.negative, shape, x)

  x = np.ones(3, np.float32)
  lowered = lower_once(program, (x,), name="callback", result=x)
  np.testing.assert_array_equal(lowered.compile()(x), -x)
  assert "could not make" in caplog.text and not files(folder)


def test_what_is_wrong_with_a_program_is_raised(folder):
  def program(x):
    raise ValueError("wrong shape")

  with pytest.raises(ValueError, match="wrong shape"):
    lower_once(program, (np.ones(3),), name="wrong", result=0)
  assert not files(folder)


def test_nothing_is_kept_without_a_local_folder(folder):
  jax.config.update("jax_compilation_cache_dir", "gs://bucket/jax")
  first, second = Adder(), Adder()
  first.lower()
  second.lower()
  assert (first.traced, second.traced) == (1, 1)
  assert not files(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("own_programs", "finished_streams")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_stream_whose_programs_were_kept_is_the_same(
  folder, monkeypatch, devices
):
  clip, options = images(4), {}
  if devices > 1:
    clip = np.stack(devices * [clip], axis=1)
    options = {"batch_size": devices, "devices": jax.devices()[:devices]}

  def run():
    stream = make_stream(look_ahead=2, **options)
    waited = [jax.device_get(stream(image)) for image in clip[:3]]
    return [*waited, *map(jax.device_get, stream.extend(clip))]

  jax.config.update("jax_enable_compilation_cache", False)
  expected = run()
  assert not files(folder)
  jax.config.update("jax_enable_compilation_cache", True)
  written = run()
  kept = files(folder)

  def unexpected(*_, **__):
    raise AssertionError("traced again")

  for name in ("interact_fn", "encode_fn"):
    monkeypatch.setattr(stream_programs, name, unexpected)
  read = run()
  assert len(kept) == 3  # Both encoders, one frame or two, and the step.
  assert files(folder) == kept
  chex.assert_trees_all_equal(written, expected)
  chex.assert_trees_all_equal(read, expected)
