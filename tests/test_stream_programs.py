"""How a stream's programs are made beside a live stream."""

import contextlib
import sys

import pytest

import point3r_jax as p3r
from point3r_jax import stream_programs
from tests import micro


def test_while_programs_are_made_threads_have_quick_turns(monkeypatch):
  seconds = [5e-3]
  monkeypatch.setattr(sys, "getswitchinterval", lambda: seconds[-1])
  monkeypatch.setattr(sys, "setswitchinterval", seconds.append)
  turns = stream_programs._QuickTurns()
  with turns:
    with turns:
      assert seconds == [5e-3, 5e-4]
    assert seconds == [5e-3, 5e-4]
  assert seconds == [5e-3, 5e-4, 5e-3]


def test_quick_turns_end_with_a_compilation_that_fails(monkeypatch):
  events = []

  @contextlib.contextmanager
  def turns():
    events.append("enter")
    try:
      yield
    finally:
      events.append("leave")

  monkeypatch.setattr(stream_programs, "_quick_turns", turns())
  programs = stream_programs.StreamPrograms(
    micro.CONFIG, p3r.StepOptions(), micro.IMAGE_SIZE, 1, 1
  )

  def fail():
    events.append("fail")
    raise MemoryError

  with pytest.raises(MemoryError):
    programs._submit("program", None, fail).result()
  assert events == ["enter", "fail", "leave"]
