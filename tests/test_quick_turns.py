"""When threads hand on the interpreter's lock sooner."""

import sys

import pytest

from point3r_jax.quick_turns import _QuickTurns


@pytest.fixture
def seconds(monkeypatch):
  """The intervals that were set, the first one before."""
  values = [5e-3]
  monkeypatch.setattr(sys, "getswitchinterval", lambda: values[-1])
  monkeypatch.setattr(sys, "setswitchinterval", values.append)
  return values


def test_as_long_as_anyone_is_inside(seconds):
  turns = _QuickTurns()
  with turns:
    with turns:
      assert seconds == [5e-3, 5e-4]
    assert seconds == [5e-3, 5e-4]
  assert seconds == [5e-3, 5e-4, 5e-3]


def test_shorter_ones_stay(seconds):
  seconds.append(1e-4)
  with _QuickTurns():
    assert seconds[-1] == 1e-4


def test_they_end_with_an_error(seconds):
  with pytest.raises(ValueError), _QuickTurns():
    raise ValueError
  assert seconds == [5e-3, 5e-4, 5e-3]
