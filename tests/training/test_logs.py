"""What is in the files of a log, also after a crash; the line; the rates."""

import io
import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from point3r_jax.errors import InputError
from point3r_jax.training import logs
from point3r_jax.training.logs import Meter, MetricLog, format_line

VALUES = {
  "epoch": 0.154,
  "loss": 1.2341,
  "loss_camera": 0.51,
  "loss_world": 0.62,
  "loss_pose": 0.02,
  "lr": 5e-5,
  "grad_norm": 1.23,
  "skipped": 0,
  "pointers": 1834.2,
  "overflow": 0,
  "frames_per_s": 212.4,
  "ms_per_step": 150.0,
  "data_wait": 0.003,
  "memory_gib": 45.1,
}


def rows(directory):
  text = (directory / "metrics.jsonl").read_text()
  assert text == "" or text.endswith("\n")

  def refuse(constant):
    raise ValueError(f"{constant} is no JSON")

  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(directory):
  """Reads the event files as TensorBoard does: in order, by length."""
  for path in sorted((directory / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield Event.FromString(data[12 : 12 + length])
      data = data[12 + length + 4 :]


def scalars(directory):
  """Returns {tag: {step: value}} after purging what restarts declare void."""
  result = {}
  for event in events(directory):
    if event.session_log.status == SessionLog.START:
      for points in result.values():
        for step in [s for s in points if s >= event.step]:
          del points[step]
    for value in event.summary.value:
      result.setdefault(value.tag, {})[event.step] = value.simple_value
  return result


def test_values_are_on_disk_at_once(tmp_path):
  with MetricLog(tmp_path / "run", start_step=0) as log:
    log.write(10, {"loss": jnp.float32(0.1), "pointers": np.int64(7)})
    log.write(20, {"loss": 0.5, "validation/loss": 2})
    loss = float(np.float32(0.1))
    assert rows(tmp_path / "run") == [
      {"step": 10, "loss": loss, "pointers": 7},
      {"step": 20, "loss": 0.5, "validation/loss": 2},
    ]
    assert scalars(tmp_path / "run") == {
      "loss": {10: loss, 20: 0.5},
      "pointers": {10: 7},
      "validation/loss": {20: 2},
    }


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
  with MetricLog(tmp_path, start_step=0) as log:
    log.write(1, {"a": jnp.float32("nan"), "b": math.inf, "c": -np.inf, "d": 1})
  (row,) = rows(tmp_path)
  assert row == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 1}
  assert scalars(tmp_path)["b"] == {1: math.inf}
  assert math.isnan(scalars(tmp_path)["a"][1])


@pytest.mark.parametrize(
  "torn", ["", '{"step": 40, "lo', '{"step": 40', "\0\0"]
)
def test_resuming_drops_what_is_computed_again(tmp_path, torn, caplog):
  with MetricLog(tmp_path, start_step=0) as log:
    for step in (10, 20, 30):
      log.write(step, {"loss": step, "old": 1})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(torn)
  with MetricLog(tmp_path, start_step=20) as log:
    assert "dropped" in caplog.text
    log.write(30, {"loss": 31})
  assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
    *((10, 10), (20, 20), (30, 31))
  ]
  assert scalars(tmp_path) == {
    "loss": {10: 10, 20: 20, 30: 31},
    "old": {10: 1, 20: 1},
  }
  caplog.clear()
  MetricLog(tmp_path, start_step=30).close()
  assert len(rows(tmp_path)) == 3 and not caplog.text


def test_a_whole_last_row_without_line_end_is_kept(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
  with MetricLog(tmp_path, start_step=2) as log:
    log.write(3, {})
  assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_file_of_something_else_is_left_alone(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\nnotes\n{"step": 2}\n')
  with pytest.raises(InputError, match=r"line 2 is not a row .*'notes'"):
    MetricLog(tmp_path, start_step=1)
  assert path.read_text() == '{"step": 1}\nnotes\n{"step": 2}\n'


@pytest.mark.parametrize(
  ("step", "values", "match"),
  [
    (5, {"loss": 1.0}, "cannot write step 5 after step 5"),
    (6, {"loss": np.zeros(3)}, r"'loss' must be a number .* \(3,\)"),
    (6, {"loss": 1.0, "memory": None}, "'memory' must be a number"),
    (6, {"step": 1.0}, "rename"),
  ],
)
def test_bad_values_write_nothing(tmp_path, step, values, match):
  with MetricLog(tmp_path, start_step=0) as log:
    log.write(5, {"loss": 1.0})
    with pytest.raises(ValueError, match=match):
      log.write(step, values)
    log.write(6, {"loss": 2.0})
  assert [row["step"] for row in rows(tmp_path)] == [5, 6]


def test_images(tmp_path):
  image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  with MetricLog(tmp_path, start_step=0) as log:
    log.write_image(7, "panel/room", image)
    with pytest.raises(ValueError, match="cannot name an image"):
      log.write_image(7, "../panel", image)
    with pytest.raises(ValueError, match=r"uint8, not \(4, 6, 3\) float"):
      log.write_image(7, "panel", image / 255)
  file = tmp_path / "images" / "panel" / "room_00000007.png"
  np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
  (event,) = [e for e in events(tmp_path) if e.summary.value]
  (value,) = event.summary.value
  assert (event.step, value.tag) == (7, "panel/room")
  assert (value.image.height, value.image.width) == (4, 6)
  png = io.BytesIO(value.image.encoded_image_string)
  np.testing.assert_array_equal(np.asarray(Image.open(png)), image)


def test_an_inactive_log_writes_nothing(tmp_path):
  with MetricLog(tmp_path / "run", start_step=3, active=False) as log:
    log.write(4, {"loss": 1.0})
    log.write_image(4, "panel", np.zeros((2, 2, 3), np.uint8))
  assert not (tmp_path / "run").exists()


def test_line():
  assert format_line(1200, 78100, VALUES) == (
    "step 1200/78100 (1.5 %) epoch 0.15 loss 1.234 camera 0.51 world 0.62 "
    "pose 0.02 lr 5.0e-05 grad 1.23 pointers 1834 | 212.4 frames/s 150 ms/step "
    "wait 0.3 % mem 45.1 GiB | eta 3 h 12 min"
  )


def test_line_of_bad_times_is_short_enough():
  values = VALUES | {"skipped": 123, "overflow": 45678, "loss": math.nan}
  line = format_line(199999, 200000, values)
  assert "loss nan" in line and "skipped 123" in line
  assert "overflow 45678" in line and line.endswith("eta 0 s")
  assert len(line) <= 220


def test_line_leaves_out_what_is_unknown():
  values = {"loss": -0.25, "memory_gib": None}
  assert format_line(1, 2, values) == "step 1/2 (50.0 %) loss -0.25"


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (59, "59 s"),
    (3570, "1 h 0 min"),
    (3500, "58 min"),
    (47.9 * 3600, "47 h 54 min"),
    (50 * 3600, "2 d 2 h"),
  ],
)
def test_eta(seconds, text):
  line = format_line(0, 1000, {"ms_per_step": seconds})
  assert line.endswith(f"| eta {text}")


def test_meter():
  now = [100.0]

  def spend(seconds):
    now[0] += seconds

  meter = Meter(clock=lambda: now[0])
  assert meter.read() == {}
  for _ in range(4):
    with meter.waiting():
      spend(0.5)
    spend(1.5)
    meter.step(frames=20)
  with meter.paused():
    spend(1000)
  assert meter.read() == {
    "frames_per_s": 10.0,
    "ms_per_step": 2000.0,
    "data_wait": 0.25,
  }
  spend(0.5)
  meter.step(frames=1)
  assert meter.read() == {
    "frames_per_s": 2.0,
    "ms_per_step": 500.0,
    "data_wait": 0.0,
  }


def test_device_memory(monkeypatch):
  class Device:
    def __init__(self, statistics):
      self.memory_stats = lambda: statistics

  statistics = [{"peak_bytes_in_use": gib * 2**30} for gib in (1, 3, 2)]
  for known, expected in ((statistics, 3.0), ([None], None), ([{}], None)):
    devices = [Device(s) for s in known]
    monkeypatch.setattr(jax, "local_devices", lambda d=devices: d)
    assert logs.device_memory_gib() == expected
