"""Tests of the readers of datasets, on miniature copies of them."""

from __future__ import annotations

import concurrent.futures
import shutil

import numpy as np
import pytest
from PIL import Image

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks import (
  DATASETS,
  Dataset,
  Layout,
  default_task,
  open_benchmark,
  sintel,
)
from point3r_jax.evaluation.benchmarks.rgbd import RgbdOptions
from point3r_jax.evaluation.options import options_dict
from tests.data.media import cut
from tests.evaluation import trees

SMALL = {"size": 64}
LANCZOS = Image.Resampling.LANCZOS


def open_depth(dataset, tree, task="video_depth", **options):
  return open_benchmark(task, dataset, tree.root, SMALL | options)


def names(benchmark) -> list[str]:
  return [sequence.name for sequence in benchmark.sequences]


def check_depth(benchmark, tree, image_size=(48, 64)) -> None:
  """Compares the truth with that of a tree, and the images' sizes."""
  assert names(benchmark) == sorted(tree.images)
  assert not benchmark.left_out
  for sequence in benchmark.sequences:
    truth = tree.depths[sequence.name]
    assert len(sequence) == len(truth)
    assert sequence.image_size == image_size
    for i, expected in enumerate(truth):
      assert sequence.load_image(i).shape == (*image_size, 3)
      assert sequence.load_image(i).dtype == np.uint8
      got = sequence.load_depth(i)
      assert got.dtype == truth.dtype
      np.testing.assert_array_equal(got, expected)
    assert sequence.load_trajectory is None and sequence.load_points is None


def check_poses(benchmark, tree, stamps) -> None:
  assert names(benchmark) == sorted(tree.images)
  for sequence in benchmark.sequences:
    got = sequence.load_trajectory()
    np.testing.assert_array_equal(got.timestamps, stamps)
    np.testing.assert_allclose(
      got.camera_to_world, tree.poses[sequence.name], atol=1e-9
    )
    for i, pixels in enumerate(tree.images[sequence.name]):
      np.testing.assert_array_equal(sequence.load_image(i), pixels)
    assert sequence.load_depth is None and sequence.load_points is None


def fails(task, dataset, root, message, options=None) -> None:
  options = SMALL if options is None else options
  with pytest.raises(InputError, match=message):
    open_benchmark(task, dataset, root, options)


class TestOpenBenchmark:
  def test_datasets(self):
    published = {
      "mv_recon": ["7scenes", "nrgbd"],
      "monodepth": ["nyu", "sintel", "bonn", "kitti"],
      "video_depth": ["sintel", "bonn", "kitti"],
      "relpose": ["scannet", "tum", "sintel"],
    }
    for task, datasets in published.items():
      assert list(DATASETS[task]) == datasets
      for dataset in DATASETS[task].values():
        assert options_dict(dataset.options())["size"] == 512

  @pytest.mark.parametrize(
    "task, dataset", [("relpose", "kitti"), ("depth", "kitti")]
  )
  def test_unknown_pair(self, tmp_path, task, dataset):
    message = f"no dataset '{dataset}' for '{task}'.*relpose: scannet, tum, "
    fails(task, dataset, tmp_path, message)

  def test_default_task(self):
    assert default_task("tum") == "relpose"
    with pytest.raises(InputError, match=r"sintel is in monodepth, .*relpose"):
      default_task("sintel")
    with pytest.raises(InputError, match="no dataset 'tun'; there are mv_rec"):
      default_task("tun")

  def test_options(self, tmp_path):
    fails("relpose", "tum", tmp_path, "no option 'x'; .*stride", {"x": 1})
    fails("relpose", "tum", tmp_path, "stride: 0 is less", {"stride": 0})
    fails("relpose", "tum", tmp_path, "size 500 is not a", {"size": 500})
    fails("mv_recon", "nrgbd", tmp_path, "max_frames: 0", {"max_frames": "0"})
    bad = {"preparation": "pad"}
    fails("monodepth", "nyu", tmp_path, "'pad' is none of: resize, crop", bad)

  @pytest.mark.parametrize(
    "writer, task, dataset, place",
    [
      (trees.write_sintel, "relpose", "sintel", "sintel"),
      (trees.write_bonn, "video_depth", "bonn", "rgbd_bonn_dataset"),
      (trees.write_kitti, "video_depth", "kitti", "kitti"),
      (trees.write_nyu, "monodepth", "nyu", "nyu_v2/val"),
      (trees.write_tum, "relpose", "tum", "tum_dynamics"),
      (trees.write_scannet, "relpose", "scannet", "scannet_eval"),
    ],
  )
  def test_finds_the_root(self, tmp_path, writer, task, dataset, place):
    writer(tmp_path / place, frames=1)
    for root in [tmp_path, tmp_path / place, (tmp_path / place).parent]:
      benchmark = open_benchmark(task, dataset, str(root), SMALL)
      assert benchmark.root.is_relative_to(tmp_path / place)
      assert (benchmark.task, benchmark.dataset) == (task, dataset)

  def test_no_root(self, tmp_path):
    looked_for = (
      "has none of: training/final, sintel/training/final",
      "has none of: nyu_images, val/nyu_images, nyu_v2/val/nyu_images",
    )
    fails("monodepth", "sintel", tmp_path, looked_for[0])
    fails("monodepth", "nyu", tmp_path, looked_for[1])
    fails("monodepth", "nyu", tmp_path / "x", "x: no such folder")
    fails("monodepth", "nyu", None, "a folder with data is needed")

  def test_lists_what_is_broken(self, tmp_path):
    tree = trees.write_bonn(tmp_path, frames=2)
    (tmp_path / "rgbd_bonn_crowd2/depth_110/15481.00017.png").unlink()
    shutil.rmtree(tmp_path / "rgbd_bonn_crowd3")
    fails(
      *("video_depth", "bonn", tmp_path),
      r"^2 of 5 sequences cannot be used: crowd2: \S*rgb_110: has 2 images, but"
      r" there are 1 depth maps in \S*; crowd3: \S*rgb_110: no such folder\."
      r" Repair them",
    )
    benchmark = open_benchmark(
      "video_depth", "bonn", tmp_path, SMALL, allow_missing=True
    )
    assert names(benchmark) == ["balloon2", "person_tracking2", "synchronous"]
    assert [name for name, _ in benchmark.left_out] == ["crowd2", "crowd3"]
    assert "rgb_110: no such folder" in benchmark.left_out[1].reason
    assert benchmark.expected_sequences == len(tree.images) == 5

  def test_lists_ten(self, tmp_path):
    trees.write_sintel(tmp_path, ["alley_1"], frames=1)
    fails("monodepth", "sintel", tmp_path, "22 of 23 .*; and 12 more\\. Repair")

  def test_nothing_left(self, tmp_path):
    trees.write_nyu(tmp_path, frames=2)
    (tmp_path / "nyu_depths/00001.npy").unlink()
    for allow_missing in [False, True]:
      with pytest.raises(InputError, match=r"1 of 1 sequences .*: nyu: "):
        open_benchmark("monodepth", "nyu", tmp_path, SMALL, allow_missing)
    trees.write_bonn(tmp_path, ["crowd2"], frames=1)
    none = {"sequences": ""}
    fails("monodepth", "bonn", tmp_path, "there are no sequences", none)

  def test_is_open_to_more(self, monkeypatch, tmp_path):
    made_up = Dataset(RgbdOptions, lambda root, options: Layout({"a": object}))
    monkeypatch.setitem(DATASETS, "synthetic", {"rooms": made_up})
    benchmark = open_benchmark("synthetic", "rooms", None)
    assert len(benchmark.sequences) == 1 and benchmark.root is None
    assert benchmark.options == RgbdOptions()

  def test_loaders_serve_threads(self, tmp_path):
    sequence = open_depth(
      "bonn", trees.write_bonn(tmp_path, frames=8), sequences="crowd2"
    ).sequences[0]
    alone = [sequence.load_image(i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      together = list(pool.map(sequence.load_image, range(8)))
    np.testing.assert_array_equal(alone, together)


class TestDepth:
  """What all depth datasets do."""

  def test_squeezes_images(self, tmp_path):
    tree = trees.write_sintel(tmp_path, ["cave_2"], size=(56, 128))
    options = {"sequences": "cave_2"}
    (sequence,) = open_depth("sintel", tree, **options).sequences
    assert sequence.image_size == (16, 64)
    expected = Image.fromarray(tree.images["cave_2"][1])
    expected = expected.resize((64, 28), LANCZOS).resize((64, 16), LANCZOS)
    np.testing.assert_array_equal(sequence.load_image(1), np.asarray(expected))
    np.testing.assert_array_equal(
      sequence.load_depth(1), tree.depths["cave_2"][1]
    )

  def test_crops_images_and_truth(self, tmp_path):
    tree = trees.write_sintel(tmp_path, ["cave_2"], size=(56, 128))
    options = {"sequences": "cave_2", "preparation": "crop"}
    (sequence,) = open_depth("sintel", tree, **options).sequences
    assert sequence.image_size == (16, 64)
    expected = Image.fromarray(tree.images["cave_2"][1])
    expected = np.asarray(expected.resize((64, 28), LANCZOS))[6:22]
    np.testing.assert_array_equal(sequence.load_image(1), expected)
    np.testing.assert_array_equal(
      sequence.load_depth(1), tree.depths["cave_2"][1][12:44]
    )

  def test_published_size(self, tmp_path):
    tree = trees.write_kitti(tmp_path, ["d"], frames=1, size=(375, 1242))
    (sequence,) = open_benchmark("video_depth", "kitti", tree.root).sequences
    assert sequence.image_size == (144, 512)
    assert sequence.load_image(0).shape == (144, 512, 3)
    assert sequence.load_depth(0).shape == (375, 1242)

  def test_mixed_sizes(self, tmp_path):
    trees.write_kitti(tmp_path)
    gathered = tmp_path / "depth_selection/val_selection_cropped"
    name = "drive_0005_sync_02/0000000002.png"
    path = gathered / "groundtruth_depth_gathered" / name
    trees.write_image(path, np.full((19, 60), 999, np.uint16))
    message = rf"{name}: has 60x19 pixels, 0000000000.png has 64x19"
    fails("monodepth", "kitti", tmp_path, message)
    path = gathered / "image_gathered" / name
    trees.write_image(path, np.zeros((20, 64, 3), np.uint8))
    message = rf"drive_0005_sync_02: \S*image_gathered/{name}: has 64x20"
    fails("monodepth", "kitti", tmp_path, message)

  def test_too_elongated(self, tmp_path):
    trees.write_kitti(tmp_path, ["d"], size=(3, 64))
    fails("video_depth", "kitti", tmp_path, "0000000000.png: .*elongated")

  def test_broken_image(self, tmp_path):
    tree = trees.write_bonn(tmp_path)
    path = tmp_path / "rgbd_bonn_crowd2/rgb_110/15481.00011.png"
    cut(path, 0.5)
    sequence = open_depth("bonn", tree).sequences[1]
    with pytest.raises(
      InputError, match=r"crowd2/rgb_110/15481\.00011\.png: c"
    ):
      sequence.load_image(1)
    path.write_bytes(b"")
    message = r"crowd2: \S*15481.00011.png: is not an image"
    fails("video_depth", "bonn", tmp_path, message)

  def test_turned_image(self, tmp_path):
    tree = trees.write_nyu(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "nyu_images/00001.png"
    Image.open(path).save(path, exif=exif)
    (sequence,) = open_depth("nyu", tree, "monodepth").sequences
    with pytest.raises(InputError, match=r"00001\.png: is turned by its EXIF"):
      sequence.load_image(1)

  def test_other_files_do_not_count(self, tmp_path):
    tree = trees.write_bonn(tmp_path)
    (tmp_path / "rgbd_bonn_crowd2/rgb_110/.DS_Store").touch()
    (tmp_path / "rgbd_bonn_crowd2/rgb_110/Thumbs.db").touch()
    check_depth(open_depth("bonn", tree), tree)


class TestSintel:
  def test_depth(self, tmp_path):
    tree = trees.write_sintel(tmp_path, frames=2)
    for task in ["monodepth", "video_depth"]:
      benchmark = open_depth("sintel", tree, task)
      check_depth(benchmark, tree)
      assert benchmark.expected_sequences == len(benchmark.sequences) == 23
      assert benchmark.expected_frames == 1064
      sequence = benchmark.sequences[0]
      assert trees.file_names(sequence) == ("frame_0001.png", "frame_0002.png")
      assert sequence.independent == (task == "monodepth")

  def test_subsets(self, tmp_path):
    tree = trees.write_sintel(tmp_path, frames=1)
    fourteen = open_depth("sintel", tree, sequences="14")
    assert names(fourteen) == list(sintel.FOURTEEN)
    assert len(set(sintel.FOURTEEN)) == 14 and len(set(sintel.ALL)) == 23
    two = open_depth("sintel", tree, sequences="cave_4,alley_1")
    assert names(two) == ["cave_4", "alley_1"]

  def test_poses(self, tmp_path):
    tree = trees.write_sintel(tmp_path, sintel.FOURTEEN, frames=5)
    benchmark = open_depth("sintel", tree, "relpose")
    check_poses(benchmark, tree, [1, 2, 3, 4, 5])
    assert benchmark.expected_sequences == 14
    path = benchmark.sequences[0].load_trajectory().camera_to_world
    np.testing.assert_allclose(path[:, :3, 3].mean(axis=0), 0, atol=1e-12)

  def test_stride(self, tmp_path):
    tree = trees.write_sintel(tmp_path, ["cave_2"], frames=5)
    options = {"sequences": "cave_2", "stride": "2"}
    (sequence,) = open_depth("sintel", tree, "relpose", **options).sequences
    assert trees.file_names(sequence) == tuple(
      f"frame_000{i}.png" for i in [1, 3, 5]
    )
    path = sequence.load_trajectory()
    assert path.timestamps.tolist() == [1, 3, 5]
    np.testing.assert_allclose(
      path.camera_to_world, tree.poses["cave_2"][::2], atol=1e-9
    )
    expected = tree.images["cave_2"][2]
    np.testing.assert_array_equal(sequence.load_image(1), expected)

  def test_crops_for_poses(self, tmp_path):
    tree = trees.write_sintel(tmp_path, ["cave_2"], size=(28, 64))
    options = {"sequences": "cave_2"}
    (sequence,) = open_depth("sintel", tree, "relpose", **options).sequences
    expected = tree.images["cave_2"][0][6:22]
    np.testing.assert_array_equal(sequence.load_image(0), expected)

  def test_pairs_by_name(self, tmp_path):
    trees.write_sintel(tmp_path, ["cave_2"], frames=3)
    only = {"sequences": "cave_2", **SMALL}
    folder = tmp_path / "training/depth/cave_2"
    (folder / "frame_0002.dpt").rename(folder / "frame_0004.dpt")
    message = r"cave_2: \S*frame_0002.png: has no .dpt file of its name"
    fails("video_depth", "sintel", tmp_path, message, only)
    folder = tmp_path / "training/final/cave_2"
    (folder / "frame_0003.png").unlink()
    message = r"cave_2: \S*frame_0003.cam: has no image of its name"
    fails("relpose", "sintel", tmp_path, message, only)

  def test_broken_truth(self, tmp_path):
    trees.write_sintel(tmp_path, ["cave_2"], frames=3)
    only = {"sequences": "cave_2", **SMALL}
    cut(tmp_path / "training/depth/cave_2/frame_0002.dpt")
    message = r"cave_2: \S*frame_0002.dpt: \d+ bytes instead of 12300"
    fails("monodepth", "sintel", tmp_path, message, only)
    cut(tmp_path / "training/camdata_left/cave_2/frame_0003.cam")
    message = r"cave_2: \S*frame_0003.cam: 103 bytes instead of 172"
    fails("relpose", "sintel", tmp_path, message, only)

  def test_frame_numbers(self, tmp_path):
    trees.write_sintel(tmp_path, ["cave_2"], frames=2)
    only = {"sequences": "cave_2", **SMALL}
    for name, message in [
      ("last", "last.cam: has no frame number"),
      ("z1", ""),
    ]:
      for part in ["final", "camdata_left"]:
        for path in (tmp_path / f"training/{part}/cave_2").iterdir():
          if not path.stem.endswith("1"):
            path.rename(path.with_stem(name))
      fails("relpose", "sintel", tmp_path, message or "do not increase", only)


class TestBonn:
  @pytest.mark.parametrize("task", ["monodepth", "video_depth"])
  def test_reads(self, tmp_path, task):
    tree = trees.write_bonn(tmp_path)
    benchmark = open_depth("bonn", tree, task)
    check_depth(benchmark, tree)
    sequence = benchmark.sequences[2]
    np.testing.assert_array_equal(
      sequence.load_image(1), tree.images["crowd3"][1]
    )
    assert sequence.load_depth(0)[0, 0] == -1
    assert trees.file_names(sequence)[2] == "15481.00021.png"
    assert sequence.independent == (task == "monodepth")
    assert benchmark.expected_sequences == 5
    assert benchmark.expected_frames == 550

  def test_8_bits(self, tmp_path):
    tree = trees.write_bonn(tmp_path)
    path = tmp_path / "rgbd_bonn_crowd2/depth_110/15481.00017.png"
    trees.write_image(path, np.full(trees.SIZE, 255, np.uint16))
    sequence = open_depth("bonn", tree).sequences[1]
    with pytest.raises(InputError, match=r"15481\.00017\.png: no value exc"):
      sequence.load_depth(1)
    trees.write_image(path, np.full(trees.SIZE, 255, np.uint8))
    message = r"crowd2: \S*15481.00017.png: is PNG of mode L, not a 16-bit"
    fails("monodepth", "bonn", tmp_path, message)


class TestKitti:
  @pytest.mark.parametrize("task", ["monodepth", "video_depth"])
  def test_reads(self, tmp_path, task):
    tree = trees.write_kitti(tmp_path)
    benchmark = open_depth("kitti", tree, task)
    check_depth(benchmark, tree, (16, 64))
    assert benchmark.sequences[1].load_depth(0)[0, 1] == -1
    assert benchmark.expected_sequences == 13
    chosen = open_depth("kitti", tree, sequences="drive_0005_sync_02")
    assert names(chosen) == ["drive_0005_sync_02"]

  def test_lonely_folders(self, tmp_path):
    trees.write_kitti(tmp_path)
    gathered = tmp_path / "depth_selection/val_selection_cropped"
    shutil.rmtree(gathered / "image_gathered/drive_0002_sync_02")
    message = r"drive_0002_sync_02: \S*image_gathered\S*: no such folder"
    fails("monodepth", "kitti", tmp_path, message)
    (gathered / "image_gathered/drive_0002_sync_02").mkdir()
    fails("monodepth", "kitti", tmp_path, "drive_0002_sync_02: has no .jpg/")
    shutil.rmtree(gathered / "groundtruth_depth_gathered")
    message = r"drive_0005_sync_02: \S*depth_gathered\S*: no such folder"
    fails("monodepth", "kitti", tmp_path, message)


class TestNyu:
  def test_reads(self, tmp_path):
    tree = trees.write_nyu(tmp_path)
    benchmark = open_depth("nyu", tree, "monodepth")
    check_depth(benchmark, tree)
    assert benchmark.sequences[0].independent
    assert benchmark.expected_sequences == 1
    assert benchmark.expected_frames == 654
    for i, pixels in enumerate(tree.images["nyu"]):
      got = benchmark.sequences[0].load_image(i)
      np.testing.assert_array_equal(got, pixels)


class TestTum:
  def test_reads(self, tmp_path):
    tree = trees.write_tum(tmp_path)
    benchmark = open_depth("tum", tree, "relpose")
    check_poses(benchmark, tree, trees.tum_stamps(4))
    assert benchmark.expected_sequences is None
    assert trees.file_names(benchmark.sequences[0])[3] == "1341846.0003.png"

  def test_broken(self, tmp_path):
    trees.write_tum(tmp_path)
    path = tmp_path / "walking_xyz/groundtruth_90.txt"
    rows = path.read_text()
    path.write_text(rows[: rows.rstrip().rindex("\n")])
    message = r"walking_xyz: \S*rgb_90: has 4 images, but .* has 3 poses"
    fails("relpose", "tum", tmp_path, message)
    path.write_text("1 2 3\n")
    message = r"walking_xyz: \S*groundtruth_90.txt: line 1 has 3 numbers"
    fails("relpose", "tum", tmp_path, message)
    path.unlink()
    message = r"walking_xyz: \S*groundtruth_90.txt: no such file"
    fails("relpose", "tum", tmp_path, message)

  def test_every_folder_counts(self, tmp_path):
    tree = trees.write_tum(tmp_path)
    (tmp_path / "logs").mkdir()
    fails("relpose", "tum", tmp_path, "1 of 3 .*logs: ")
    chosen = open_depth("tum", tree, "relpose", sequences="walking_xyz")
    assert names(chosen) == ["walking_xyz"]


class TestScanNet:
  @pytest.mark.parametrize("columns", [12, 16])
  def test_reads(self, tmp_path, columns):
    tree = trees.write_scannet(tmp_path, columns=columns)
    benchmark = open_depth("scannet", tree, "relpose")
    check_poses(benchmark, tree, [0, 1, 2, 3])

  def test_jpeg(self, tmp_path):
    trees.write_scannet(tmp_path, ["a"], frames=3)
    folder = tmp_path / "a/color_90"
    for i, suffix in enumerate([".jpg", ".JPEG"]):
      path = folder / f"frame_000{i}.png"
      Image.open(path).save(path.with_suffix(suffix))
      path.unlink()
    (sequence,) = open_benchmark("relpose", "scannet", tmp_path).sequences
    assert trees.file_names(sequence) == tuple(
      f"frame_000{i}.{kind}" for i, kind in enumerate(["jpg", "JPEG", "png"])
    )
    assert sequence.load_image(1).shape == (384, 512, 3)

  def test_stride(self, tmp_path):
    tree = trees.write_scannet(tmp_path)
    benchmark = open_depth("scannet", tree, "relpose", stride=3)
    assert len(benchmark.sequences[0]) == 2
    path = benchmark.sequences[0].load_trajectory()
    assert path.timestamps.tolist() == [0, 3]

  def test_non_finite_pose(self, tmp_path):
    trees.write_scannet(tmp_path)
    path = tmp_path / "scene0708_00/pose_90.txt"
    lines = path.read_text().splitlines()
    lines[2] = " ".join(["-inf"] * 16)
    path.write_text("\n".join(lines))
    benchmark = open_benchmark("relpose", "scannet", tmp_path, SMALL)
    _, poses = benchmark.sequences[1].load_trajectory()
    assert np.isinf(poses[2, :3]).all() and np.isfinite(poses[3]).all()
