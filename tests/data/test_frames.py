"""Tests of images as frames and of bad input."""

import numpy as np
import pytest

from point3r_jax.data.frames import open_frames
from point3r_jax.data.paths import find_files
from point3r_jax.errors import InputError
from tests.data.media import cut, greys, indices, save_image, save_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return save_video(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Twelve images whose order by name is not the natural one."""
  path = tmp_path_factory.mktemp("folder")
  for i in range(12):
    save_image(path / f"img{i}.{'JPG' if i % 2 else 'png'}", grey=8 * i)
  (path / "notes.txt").write_text("no image")
  (path / "._img0.png").write_text("left by a Mac")
  return path


class TestImages:
  def test_folder_in_natural_order(self, folder):
    source = open_frames(folder, size=64)
    assert source.image_size == (48, 64)
    assert source.expected_frames == 12
    frames = list(source)
    assert [f.index for f in frames] == list(range(12))
    assert [f.source for f in frames][:3] == [
      "img0.png",
      "img1.JPG",
      "img2.png",
    ]
    assert frames[10].source == "img10.png"
    assert greys(source) == list(range(12))  # A second pass.
    assert frames[0].image.dtype == np.uint8
    assert frames[0].timestamp is None
    assert frames[0].preparation.source_size == (48, 64)
    assert source.lost.frames == source.mixed_sizes == 0

  def test_selection(self, folder):
    def chosen(**options):
      source = open_frames(str(folder), size=64, **options)
      found = indices(source)
      assert source.expected_frames == len(found)
      return found

    assert chosen(stride=5) == [0, 5, 10]
    assert chosen(start=3, end=9, stride=2) == [3, 5, 7]
    assert chosen(start=10, end=99) == [10, 11]
    assert chosen(stride=3, max_frames=2) == [0, 3]

  def test_shuffle_depends_on_the_seed(self, folder):
    first = indices(open_frames(folder, size=64, shuffle_seed=1, end=8))
    again = indices(open_frames(folder, size=64, shuffle_seed=1, end=8))
    other = indices(open_frames(folder, size=64, shuffle_seed=2, end=8))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(8))

  def test_glob(self, folder, tmp_path):
    found = open_frames(str(folder / "*.png"), size=64)
    assert [f.source for f in found][-2:] == ["img8.png", "img10.png"]
    for name in ["b/2.png", "b/10.png", "a/c/1.png", "0.png"]:
      save_image(tmp_path / name)
    found = open_frames(f"{tmp_path}/**/*", size=64)
    assert sorted(f.source for f in found) == sorted(
      ["0.png", "a/c/1.png", "b/2.png", "b/10.png"]
    )

  def test_glob_characters_in_a_name(self, tmp_path):
    path = save_image(tmp_path / "img[1].png")
    assert find_files(str(path)) == [path]

  def test_several_inputs_keep_their_order(self, folder, tmp_path):
    extra = save_image(tmp_path / "extra.png")
    inputs = [str(extra), folder / "img3.JPG", str(folder / "img1*.png")]
    names = [path.name for path in find_files(inputs)]
    assert names == ["extra.png", "img3.JPG", "img10.png"]
    assert len({f.source for f in open_frames(inputs, size=64)}) == 3

  def test_mixed_sizes_conform_to_the_first(self, tmp_path):
    for i, size in enumerate([(64, 48), (128, 96), (48, 64), (96, 64)]):
      save_image(tmp_path / f"{i}.png", size)
    source = open_frames(tmp_path, size=64)
    frames = list(source)
    assert {frame.image.shape for frame in frames} == {(48, 64, 3)}
    assert source.mixed_sizes == 2  # 96x64 becomes 64x32.
    assert frames[2].preparation.resized_size == (85, 64)

  def test_unreadable_image_is_named(self, tmp_path):
    for i in range(3):
      save_image(tmp_path / f"{i}.png", (64, 48))
    cut(tmp_path / "1.png")
    frames = iter(open_frames(tmp_path, size=64))
    assert next(frames).index == 0
    with pytest.raises(InputError, match=r"1\.png: cannot read"):
      next(frames)

  def test_elongated_image_is_named(self, tmp_path):
    save_image(tmp_path / "0.png")
    save_image(tmp_path / "1.png", (900, 2))
    with pytest.raises(InputError, match=r"1\.png: .*elongated"):
      open_frames(tmp_path / "1.png", size=64)
    with pytest.raises(InputError, match=r"1\.png: .*elongated"):
      list(open_frames(tmp_path, size=64))


class TestErrors:
  @pytest.mark.parametrize(
    "options, word",
    [
      (dict(stride=0), "stride"),
      (dict(stride=-1), "stride"),
      (dict(start=-1), "start"),
      (dict(start=5, end=5), "end"),
      (dict(max_frames=0), "max_frames"),
      (dict(start=12), "12 images, none left"),
      (dict(size=500), "multiple of 16"),
    ],
  )
  def test_options(self, folder, options, word):
    with pytest.raises(InputError, match=word):
      open_frames(folder, **options)

  def test_inputs(self, folder, clip, tmp_path):
    def says(inputs, message):
      with pytest.raises(InputError, match=message) as caught:
        open_frames(inputs)
      assert "\n" not in str(caught.value)

    says([], "no input")
    says("", "no input")
    says(tmp_path / "none", "none: no such file or folder")
    says(f"{folder}/*.webp", "matches no image")
    says(folder / "notes.txt", r"notes\.txt: neither")
    says([folder, folder / "notes.txt"], r"notes\.txt: neither")
    says(tmp_path, "has no images")
    says(clip.parent, r"no images but videos \(clip\.mp4\)")
    says([clip, folder], "a single video")
    says([clip, clip], "a single video")
    (tmp_path / "inner").mkdir()
    says(tmp_path, r"subfolders write '.*/\*\*/\*\.jpg'")
