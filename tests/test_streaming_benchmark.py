"""The streaming benchmark's pure parts; nothing is timed."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import streaming, streaming_inputs, streaming_plot
from point3r_jax.config import preset
from point3r_jax.errors import InputError
from point3r_jax.memory import fuse
from tests import micro

ROWS = {
  "ms": [900.0, 10.0, 10.0, 12.0, 80.0, 20.0, 20.0, 20.0, 22.0],
  "pointers": [40, 50, 60, 70, 80, 90, 90, 90, 90],
  "capacity": [64] * 4 + [128] * 5,
  "compilations": [9, 0, 1, 1, 0, 0, 0, 0, 0],
  "compiling": [True, False, False, True] + 5 * [False],
}


def filled(pointers, capacity=24):
  return streaming_inputs.fill_memory(
    micro.CONFIG, 2, micro.IMAGE_SIZE, capacity, pointers
  )


@pytest.mark.parametrize("pointers", [3, 9, 24])
def test_filled_memory_is_a_valid_prefix(pointers):
  memory = filled(pointers)
  assert memory.count.tolist() == [pointers] * 2
  assert (memory.frame > 0).all()
  assert not memory.feature[:, pointers:].any()
  assert not memory.position[:, pointers:].any()
  assert memory.feature[:, :pointers].any(axis=-1).all()


def test_the_number_of_pointers_stays():
  """Wherever near the camera a frame's pointers are, and however often."""
  memory, rng = filled(9), np.random.default_rng(1)
  before = np.asarray(memory.position)
  for spread in (0.01, 1, 30, 0.1 * streaming_inputs.REACH):
    shape = (2, micro.TOKENS, 3)
    # At any distance up to the spread, in any direction.
    position = rng.normal(size=shape)
    position /= np.linalg.norm(position, axis=-1, keepdims=True)
    position *= rng.uniform(0, spread, (*shape[:2], 1))
    feature = jnp.ones((*shape[:2], micro.CONFIG.decoder_width))
    memory = fuse(memory, jnp.asarray(position, jnp.float32), feature)
    assert memory.count.tolist() == [9, 9]
    assert not memory.overflow.any()
  # The corners, which fix the extent, are still there.
  np.testing.assert_array_equal(memory.position[:, 1:3], before[:, 1:3])
  assert (np.abs(memory.position[:, 0]) > 0).all()


@pytest.mark.parametrize("pointers", [2, 25])
def test_pointers_that_cannot_be_are_refused(pointers):
  with pytest.raises(InputError, match="from 3 to the capacity, 24"):
    filled(pointers)


def test_capacity_is_that_of_a_stream_that_grew():
  config = preset("point3r_512")
  capacity = functools.partial(streaming_inputs.live_capacity, config)
  assert capacity((384, 512), 2500, under_way=0) == 3840
  assert capacity((384, 512), 2500, under_way=1) == 4608
  assert capacity((224, 224), 2500, under_way=1) == 2944


def test_a_path_is_walked_up_and_down():
  walk = [streaming_inputs.to_and_fro(4, frame) for frame in range(9)]
  assert walk == [0, 1, 2, 3, 2, 1, 0, 1, 2]
  assert [streaming_inputs.to_and_fro(1, frame) for frame in range(3)] == [
    0,
    0,
    0,
  ]


def test_spans_of_time_overlap():
  frames = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
  assert streaming.overlaps(frames, [(1.5, 2.5)]) == [False, True, True, False]
  assert streaming.overlaps(frames, [(1.0, 2.0)]) == [False, True, False, False]
  assert streaming.overlaps(frames, []) == [False] * 4


def test_quantile_is_one_of_the_values():
  values = list(range(1, 101))
  assert streaming.quantile(values, 0.95) == 95
  assert streaming.quantile([7.0], 0.95) == 7


def test_tiny_changes_only_what_is_not_asked_for():
  usual = streaming.parse([])
  assert (usual.size, usual.pointers, usual.streams) == ((384, 512), 2500, 8)
  tiny = streaming.parse(["--tiny", "--frames", "7"])
  assert (tiny.size, tiny.frames) == ((96, 128), 7)
  assert tiny.model == "untrained:small"


def test_summary_leaves_out_the_first_frame_and_growth():
  summary = streaming_plot.summarize(ROWS)
  assert summary["ms"] == 20
  assert summary["by_capacity"]["64"]["ms"] == 10
  assert summary["by_capacity"]["128"] == {
    "frames": 4,
    "ms": 20,
    "p95_over_median": 1.085,
  }
  assert summary["trend"] == 1.1
  assert summary["beside_compiling"]["ms"] == 12
  assert summary["growth_ms"] == {"4": 80}
  assert summary["first_frame_ms"] == 900
  assert summary["capacities"] == 2
  assert summary["compilations_after_first"] == 2
  assert summary["pointers_last_most"] == [90, 90]
  json.dumps(summary)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_short_streams_have_a_summary(frames):
  rows = {name: values[:frames] for name, values in ROWS.items()}
  json.dumps(streaming_plot.summarize(rows))


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_the_plot_depends_on_nothing_else(tmp_path, frames):
  pytest.importorskip("matplotlib")
  rows = {name: values[:frames] for name, values in ROWS.items()}
  files = [tmp_path / name for name in ("a.svg", "b.svg")]
  for file in files:
    streaming_plot.draw({"each": rows}, file)
  first, second = (file.read_text() for file in files)
  assert first == second
  assert "time a frame (ms)" in first and "dc:date" not in first


def test_the_plot_of_a_long_stream_is_small(tmp_path):
  pytest.importorskip("matplotlib")
  rows = {name: np.tile(values, 400) for name, values in ROWS.items()}
  rows["capacity"] = np.repeat([64, 128, 192], 1200)
  rows["compiling"] = np.arange(3600) % 1200 < 300
  streaming_plot.draw({"each": rows}, tmp_path / "long.svg")
  assert (tmp_path / "long.svg").read_text().count("while compiling") == 1
  assert (tmp_path / "long.svg").stat().st_size < 50_000
