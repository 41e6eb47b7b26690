"""Tests of reading ahead and of mapping in threads."""

import itertools
import threading
import time

import pytest

from point3r_jax.data.frames import open_frames
from point3r_jax.data.prefetch import ordered_map, prefetch
from point3r_jax.errors import InputError
from tests.data.media import indices, save_video


def prefetch_threads():
  return [t for t in threading.enumerate() if t.name == "prefetch"]


class TestPrefetch:
  @pytest.fixture(autouse=True)
  def no_thread_is_left(self):
    yield
    assert not prefetch_threads()

  def test_order(self):
    assert list(prefetch(range(100), 3)) == list(range(100))
    assert list(prefetch([])) == []

  def test_frames(self, tmp_path):
    source = open_frames(save_video(tmp_path / "a.mp4"), size=64)
    assert indices(prefetch(source)) == list(range(30))

  def test_runs_ahead_but_not_further_than_depth(self):
    made = []

    def items():
      for i in range(100):
        made.append(i)
        yield i

    ready = prefetch(items(), depth=3)
    assert not made
    assert next(ready) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4
    ready.close()

  def test_exception_comes_in_its_turn(self):
    def items():
      yield 1
      yield 2
      raise InputError("broken")

    ready = prefetch(items())
    assert next(ready) == 1
    time.sleep(0.05)
    assert next(ready) == 2
    with pytest.raises(InputError, match="broken"):
      next(ready)

  def test_not_iterable(self):
    with pytest.raises(TypeError):
      list(prefetch(None))

  @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
  def test_consumer_leaves(self, error):
    closed = []

    def items():
      try:
        yield from itertools.count()
      finally:
        closed.append(threading.current_thread().name)

    with pytest.raises(error):
      for i in prefetch(items(), depth=2):
        if i == 5:
          raise error
    for i in prefetch(items(), depth=2):
      if i == 5:
        break
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
      time.sleep(0.01)
    assert closed == ["prefetch"] * 2

  def test_never_started(self):
    prefetch(range(3))
    assert not prefetch_threads()

  def test_depth(self):
    with pytest.raises(ValueError, match="depth"):
      prefetch([], depth=0)


class TestOrderedMap:
  def test_order(self):
    def slow_if_even(i):
      time.sleep(0.01 * (i % 2 == 0))
      return -i

    assert list(ordered_map(slow_if_even, range(20))) == [-i for i in range(20)]
    assert list(ordered_map(slow_if_even, [])) == []

  def test_bad_input_comes_in_its_turn(self):
    def items():
      yield 1
      yield 2
      raise InputError("broken")

    mapped = ordered_map(str, items())
    assert [next(mapped), next(mapped)] == ["1", "2"]
    with pytest.raises(InputError, match="broken"):
      next(mapped)

  def test_runs_no_further_ahead_than_there_are_threads(self, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    taken = []

    def items():
      for i in range(100):
        taken.append(i)
        yield i

    mapped = ordered_map(str, items())
    for i in range(5):
      assert next(mapped) == str(i)
      assert len(taken) <= i + 3
    mapped.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("frames") for name in names)
