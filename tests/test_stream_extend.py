"""Streams that encode several images at once."""

import chex
import jax
import numpy as np
import pytest

from tests import micro
from tests.streams import FRAMES, images, make_stream

pytestmark = pytest.mark.usefixtures("shared_programs", "finished_streams")


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


@pytest.mark.slow
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
  mixed = [images()[0], images()[0] / np.float32(255)]
  with pytest.raises(ValueError, match="must be of one type"):
    list(make_stream(look_ahead=2).extend(mixed))
  with pytest.raises(ValueError, match="look_ahead must be at least 1, got 0"):
    make_stream(look_ahead=0)
