"""Tests of videos as frames: order, orientation, damage."""

import contextlib
import gc
import itertools
import struct
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from PIL import Image

from point3r_jax.data import video
from point3r_jax.data.frames import open_frames
from point3r_jax.errors import InputError
from tests.data.media import (
  FASTSTART,
  cut,
  greys,
  indices,
  save_video,
)

# Options of encoders that make them reorder frames.
B_FRAMES = {
  "libx264": {"x264-params": "bframes=3:b-adapt=0:scenecut=0"},
  "mpeg4": {"bf": "2"},
}


def times(source):
  return np.array([frame.timestamp for frame in source])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return save_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


class TestVideo:
  @pytest.mark.parametrize(
    "name, codec",
    [
      *[("a.mp4", "mpeg4"), ("a.mp4", "libx264"), ("a.mov", "libx264")],
      *[("a.mkv", "libx264"), ("a.webm", "libvpx")],
      *[("a.avi", "mpeg4"), ("a.gif", "gif")],
    ],
  )
  def test_containers(self, tmp_path, name, codec):
    path = save_video(tmp_path / name, 12, codec)
    source = open_frames(path, size=64)
    assert source.image_size == (48, 64)
    assert source.expected_frames == 12
    frames = list(source)
    assert [f.index for f in frames] == list(range(12))
    assert {f.source for f in frames} == {name}
    np.testing.assert_allclose(
      [f.timestamp for f in frames], np.arange(12) / 30, atol=0.01
    )
    if codec != "gif":
      np.testing.assert_allclose(greys(source), np.arange(12), atol=1)
    assert source.lost.frames == 0
    assert str(source.lost) == "no frame lost"

  def test_selection(self, clip):
    def chosen(**options):
      source = open_frames(clip, size=64, **options)
      found = indices(source)
      assert source.expected_frames == len(found)
      assert source.lost.frames == 0
      return found

    assert chosen(start=20, stride=4) == [20, 24, 28]
    assert chosen(start=3, end=9, stride=2) == [3, 5, 7]
    assert chosen(stride=10, max_frames=2) == [0, 10]
    assert chosen(start=28, end=99) == [28, 29]
    source = open_frames(str(clip), size=64, start=20, stride=4)
    np.testing.assert_allclose(greys(source), [20, 24, 28], atol=1)

  def test_a_glob_may_find_the_video(self, clip):
    assert len(list(open_frames(f"{clip.parent}/*.mp4", size=64))) == 30

  def test_no_shuffling(self, clip):
    with pytest.raises(InputError, match="cannot be shuffled"):
      open_frames(clip, shuffle_seed=0)

  def test_start_beyond_the_end(self, clip, tmp_path):
    with pytest.raises(InputError, match="has 30 frames, none left from 30"):
      open_frames(clip, start=30)
    uncounted = save_video(tmp_path / "a.mkv")
    with pytest.raises(InputError, match="has 30 frames, none left from 40"):
      list(open_frames(uncounted, start=40))

  @pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
  def test_variable_frame_rate(self, tmp_path, name):
    times = [0, 33, 100, 110, 400, 433, 500, 600, 700, 1500]
    path = save_video(tmp_path / name, 10, "libx264", times=times)
    source = open_frames(path, size=64)
    np.testing.assert_allclose(
      [frame.timestamp for frame in source], np.array(times) / 1000, atol=0.001
    )
    assert source.lost.frames == 0

  @pytest.mark.parametrize("name", ["a.avi", "a.wmv", "a.mkv", "a.ts"])
  @pytest.mark.parametrize("codec", B_FRAMES)
  def test_reordered_frames(self, tmp_path, caplog, name, codec):
    path = tmp_path / name
    save_video(path, 20, codec, codec_options=B_FRAMES[codec])
    with av.open(str(path)) as container:
      kinds = {frame.pict_type for frame in container.decode(video=0)}
    assert PictureType.B in kinds
    source = open_frames(path, size=64)
    found = times(source)
    start = found[0] if name == "a.ts" else 0
    np.testing.assert_allclose(found - start, np.arange(20) / 30, atol=0.001)
    np.testing.assert_allclose(greys(source), np.arange(20), atol=1)
    assert not caplog.records

  def test_avi_with_gaps(self, tmp_path):
    shown = [0, 1, 2, 5, 6, 10, 11, 12]
    stored = [1000 * i // 30 for i in shown]
    path = save_video(tmp_path / "a.avi", 8, "mpeg4", times=stored)
    np.testing.assert_allclose(
      times(open_frames(path, size=64)), np.array(stored) / 1000, atol=0.001
    )

  def test_colon_in_the_name(self, tmp_path):
    path = save_video(tmp_path / "rec 12:30.mp4", 2)
    assert len(list(open_frames(path, size=64))) == 2

  def test_leaves_nothing_behind(self, clip):
    frames = iter(open_frames(clip, size=64))
    next(frames)
    frames.close()
    with pytest.raises(StopIteration):
      next(frames)
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("frames") for name in names)

  def test_holds_few_frames(self, clip):
    """Reference cycles would keep decoded frames until a collection."""
    gc.collect()
    gc.disable()
    try:
      with contextlib.closing(iter(open_frames(clip, size=64))) as frames:
        for _ in itertools.islice(frames, 25):
          pass
        held = sum(isinstance(o, av.VideoFrame) for o in gc.get_objects())
    finally:
      gc.enable()
    assert held < 20


class TestTimestamps:
  """What becomes of timestamps that do not increase."""

  @pytest.mark.parametrize(
    "stored, bad, want",
    [
      ([1, 3, 4, 2, 6, 7, 5, 9], 3, [1, 3, 4, 5, 6, 7, 8, 9]),
      ([0, 1, 2, 2, 4, 5, 6, 7], 3, [0, 1, 2, 3, 4, 5, 6, 7]),
      ([20, 21, 22, 0, 1, 2, 3, 4], 3, [20, 21, 22, 23, 24, 25, 26, 27]),
      ([0, 9, 12, 3, 14, 15, 18, 27], 3, [0, 9, 12, 13, 14, 15, 18, 27]),
      ([None] * 8, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
      ([3, 4, None, None, 7, 8, 9, 10], 2, [3, 4, 5, 6, 7, 8, 9, 10]),
    ],
    ids=["shuffled", "twice", "jump_back", "uneven", "missing", "some_missing"],
  )
  def test_time_goes_on(self, caplog, stored, bad, want):
    clock = video._Clock("a.mkv", Fraction(30))
    found = [
      clock.read(index, None if time is None else time / 30)
      for index, time in enumerate(stored)
    ]
    np.testing.assert_allclose(found, np.array(want) / 30, atol=1e-9)
    (record,) = caplog.records
    assert f"a.mkv: the timestamp of frame {bad} is" in record.getMessage()

  def test_lost_frames_take_their_time(self):
    clock = video._Clock("a.mkv", Fraction(10))
    assert [clock.read(i, None) for i in (2, 3, 7)] == [0.2, 0.3, 0.7]

  def test_joined_files(self, tmp_path, caplog):
    path = save_video(tmp_path / "a.ts", 20, "libx264")
    path.write_bytes(2 * path.read_bytes())
    found = times(open_frames(path, size=64))  # The seam may cost a frame.
    assert found[-1] - found[0] == pytest.approx(39 / 30, abs=1e-4)
    assert (np.diff(found) > 0.03).all() and (np.diff(found) < 0.07).all()
    assert len(caplog.records) == 1

  def test_a_stream_without_a_container(self, tmp_path, caplog):
    path = save_video(tmp_path / "a.264", 20, "libx264")
    path = path.rename(tmp_path / "a.mpg")
    found = times(open_frames(path, size=64))
    np.testing.assert_allclose(found, np.arange(20) / 25)
    assert "25 frames a second" in caplog.text
    assert len(caplog.records) == 1


# Display matrices (a, b, c, d) and what they do to an array.


TURNS = {
  "upright": ((1, 0, 0, 1), lambda x: x),
  "clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
  "half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
  "counterclockwise": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
  "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
  "transposed": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
}


def pack_matrix(a, b, c, d, order):
  one = 1 << 16
  rows = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
  return struct.pack(f"{order}9i", *rows)


class TestOrientation:
  @pytest.mark.parametrize("name", TURNS)
  def test_display_matrix(self, name):
    matrix, turned = TURNS[name]
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    shown = video._turned(
      Image.fromarray(pixels), pack_matrix(*matrix, order="=")
    )
    np.testing.assert_array_equal(np.asarray(shown), turned(pixels))

  @pytest.mark.parametrize("name", TURNS)
  def test_phone_video(self, tmp_path, name):
    matrix, turned = TURNS[name]
    path = save_video(tmp_path / "a.mp4", 2)
    plain = next(iter(open_frames(path, size=64))).image
    data = path.read_bytes()
    identity = pack_matrix(1, 0, 0, 1, order=">")
    place = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(
      data[:place]
      + pack_matrix(*matrix, order=">")
      + data[place + len(identity) :]
    )
    source = open_frames(path, size=64)
    shown = next(iter(source)).image
    assert shown.shape[:2] == source.image_size
    np.testing.assert_array_equal(shown, turned(plain))

  def test_pixels_become_square(self, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
      stream = container.add_stream("mpeg4", rate=30)
      stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
      stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
      frame = av.VideoFrame(48, 48, "yuv420p")
      container.mux(stream.encode(frame))
      container.mux(stream.encode())
    frame = next(iter(open_frames(path, size=64)))
    assert frame.preparation.source_size == (48, 64)


class TestDamage:
  @pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
  def test_cut_mp4_gives_what_is_there(self, tmp_path, codec):
    path = save_video(tmp_path / "a.mp4", 60, codec, options=FASTSTART)
    source = open_frames(cut(path), size=64)
    assert source.expected_frames == 60
    count = len(list(source))
    assert 10 < count < 50
    assert source.lost.frames == 60 - count
    assert source.lost.expected == 60
    assert f"{60 - count} of 60 frames lost (" in str(source.lost)
    list(source)
    assert source.lost.frames == 60 - count  # Not added up over passes.

  @pytest.mark.parametrize(
    "name, codec", [("a.mkv", "mpeg4"), ("a.webm", "libvpx")]
  )
  def test_cut_mkv_estimates_the_loss(self, tmp_path, name, codec):
    path = save_video(tmp_path / name, 60, codec)
    source = open_frames(cut(path), size=64)
    count = len(list(source))
    assert 10 < count < 50
    assert abs(source.lost.frames - (60 - count)) <= 1
    assert source.lost.error

  def test_loss_counts_only_what_was_wanted(self, tmp_path):
    path = save_video(tmp_path / "a.mp4", 60, options=FASTSTART)
    cut(path)
    source = open_frames(path, size=64, end=5)
    assert len(list(source)) == 5
    assert source.lost.frames == 0
    source = open_frames(path, size=64, end=50)
    count = len(list(source))
    assert source.lost.frames == 50 - count

  def test_nothing_left_of_what_was_wanted(self, tmp_path):
    path = cut(save_video(tmp_path / "a.mp4", 60, options=FASTSTART))
    with pytest.raises(InputError, match=r"of 60 frames lost .* left from 55"):
      list(open_frames(path, size=64, start=55))

  def test_damage_in_the_middle(self, tmp_path):
    path = save_video(tmp_path / "a.mp4", 30, "libx264")
    with av.open(str(path)) as container:
      packets = [(p.pos, p.size) for p in container.demux() if p.size]
    data = bytearray(path.read_bytes())
    position, size = packets[12]
    data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    source = open_frames(path, size=64)
    found = indices(source)
    assert len(found) == 29
    assert found == sorted(set(found)) and found[-1] == 29
    assert source.lost.frames == 1
    assert source.lost.error

  def test_reading_fails_half_way(self, clip, monkeypatch):
    def failing(stream, lost):
      yield from itertools.islice(packets(stream, lost), 10)
      lost.error = "Input/output error"
      yield None

    packets = video._packets
    monkeypatch.setattr(video, "_packets", failing)
    source = open_frames(clip, size=64)
    count = len(list(source))
    assert 0 < count <= 10
    assert source.lost.frames == 30 - count

  def test_trimmed_by_an_edit_list_is_no_loss(self, tmp_path):
    path = save_video(tmp_path / "a.mp4", 60, "libx264")
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 4 + 8
    _, media_time = struct.unpack(">Ii", data[place : place + 8])
    edit = struct.pack(">Ii", 1000, media_time + 7 * 512)
    data[place : place + 8] = edit
    path.write_bytes(data)
    source = open_frames(path, size=64)
    assert len(list(source)) == 30
    assert source.lost.frames == 0

  def test_no_video_inside(self, tmp_path):
    cut(save_video(tmp_path / "cut.mp4"))  # Its index was at the end.
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "empty.mkv").write_bytes(b"")
    for name in ["cut.mp4", "text.mp4", "empty.mkv"]:
      with pytest.raises(InputError, match=f"{name}: cannot open the video"):
        open_frames(tmp_path / name)

  def test_sound_only(self, tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
      stream = container.add_stream("aac", rate=48000, layout="mono")
      frame = av.AudioFrame.from_ndarray(
        np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
      )
      frame.sample_rate = 48000
      container.mux(stream.encode(frame))
      container.mux(stream.encode())
    with pytest.raises(InputError, match="no video stream"):
      open_frames(path)

  def test_nothing_decodes(self, tmp_path):
    path = save_video(tmp_path / "a.mp4", 3, "libx264")
    with av.open(str(path)) as container:
      packets = [(p.pos, p.size) for p in container.demux() if p.size]
    data = bytearray(path.read_bytes())
    for position, size in packets:
      data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    with pytest.raises(InputError, match="none of its frames"):
      open_frames(path)
