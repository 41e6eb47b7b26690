"""Tests of the readers of 7-Scenes and NRGBD, on miniature copies."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks import (
  nrgbd,
  open_benchmark,
  seven_scenes,
)
from point3r_jax.evaluation.benchmarks.rgbd import RgbdOptions
from tests.evaluation import trees

# The camera of `trees.rgbd_options`.
FOCAL, CENTRE = 0.82 * 64, (32, 24)


def open_scenes(dataset, root, size=trees.SIZE, **options):
  options = {**trees.rgbd_options(size), "scenes": "none", **options}
  return open_benchmark("mv_recon", dataset, root, options)


def fails(dataset, root, message, **options):
  with pytest.raises(InputError, match=message):
    open_scenes(dataset, root, **options)


def expected_points(depth, pose, u, v):
  """The point of one pixel, step by step."""
  x = (u - CENTRE[0]) * depth[v, u] / FOCAL
  y = (v - CENTRE[1]) * depth[v, u] / FOCAL
  return (pose @ [x, y, depth[v, u], 1])[:3]


def check_sequence(sequence, tree, chosen, name=None):
  """Compares a sequence with frames of a tree that are not scaled."""
  name = name or sequence.name
  assert len(sequence) == len(chosen)
  assert sequence.image_size == trees.SIZE
  assert sequence.load_depth is None and sequence.load_trajectory is None
  for i, frame in enumerate(chosen):
    image, depth = tree.images[name][frame], tree.depths[name][frame]
    pose = tree.poses[name][frame]
    np.testing.assert_array_equal(sequence.load_image(i), image)
    points, valid, camera_to_world = sequence.load_points(i)
    assert points.shape == (48, 64, 3) and points.dtype == np.float32
    assert camera_to_world.dtype == np.float32
    np.testing.assert_allclose(camera_to_world, pose, atol=1e-6)
    np.testing.assert_array_equal(valid, depth > 0)
    for u, v in [(0, 0), (63, 0), (5, 40), (32, 24), (63, 47)]:
      expected = expected_points(depth, pose, u, v)
      np.testing.assert_allclose(points[v, u], expected, atol=1e-5)


class TestChoice:
  def test_sparse(self):
    options = RgbdOptions()
    assert list(options.choose(1000, 200)) == [0, 200, 400, 600, 800]
    assert list(options.choose(500, 200)) == [0, 200, 400]
    assert list(RgbdOptions(stride=300).choose(1000, 200)) == [0, 300, 600, 900]

  @pytest.mark.parametrize(
    "count, chosen",
    [
      (900, [0, 450]),
      (871, [0, 435, 870]),
      (1210, [0, 500, 1000]),
      (1519, [0, 500, 1000, 1500]),
      (2, [0, 1]),
      (1, [0]),
    ],
  )
  def test_sparse_nrgbd(self, count, chosen):
    stride = nrgbd.sparse_stride(count)
    assert list(RgbdOptions().choose(count, stride)) == chosen

  def test_long(self):
    options = RgbdOptions(setting="long")
    assert options.choose(500, 200) == range(500)
    assert options.choose(1519, 500) == range(1000)
    options = RgbdOptions(setting="long", stride=2, max_frames=300)
    assert options.choose(500, 200) == range(0, 500, 2)
    assert options.choose(1000, 200) == range(0, 600, 2)


class TestSevenScenes:
  def test_reads(self, tmp_path):
    tree = trees.write_seven_scenes(tmp_path)
    benchmark = open_scenes("7scenes", tmp_path, stride=2)
    names = [sequence.name for sequence in benchmark.sequences]
    assert names == ["chess/seq-03", "chess/seq-05", "heads/seq-01"]
    assert benchmark.expected_sequences == 18
    for sequence in benchmark.sequences:
      assert trees.file_names(sequence)[1] == "frame-000002.color.png"
      check_sequence(sequence, tree, [0, 2, 4])

  def test_measured_depth(self, tmp_path):
    """Of zero, 65535, 10.001 m, 10 m and 1 mm the last two count."""
    trees.write_seven_scenes(tmp_path)
    sequence = open_scenes("7scenes", tmp_path).sequences[0]
    points, valid, _ = sequence.load_points(0)
    assert valid[0, :5].tolist() == [False] * 3 + [True] * 2
    assert np.isfinite(points).all()
    sequence = open_scenes("7scenes", tmp_path, max_depth="5").sequences[0]
    assert not sequence.load_points(0).valid[0, 3]

  def test_published_frames(self, tmp_path):
    """At 640x480 nothing need be said, and every 200th frame is taken."""
    tree = trees.write_seven_scenes(tmp_path, {"heads": (1,)}, 1, (480, 640))
    folder = tmp_path / "heads/seq-01"
    for i in range(1, 201):
      for kind in ["color.png", "depth.proj.png", "pose.txt"]:
        (folder / f"frame-{i:06d}.{kind}").touch()
    for kind in ["color.png", "depth.proj.png", "pose.txt"]:
      path = folder / f"frame-000000.{kind}"
      shutil.copy(path, folder / f"frame-000200.{kind}")
    (sequence,) = open_benchmark(
      "mv_recon", "7scenes", tmp_path, {"scenes": "heads"}
    ).sequences
    assert trees.file_names(sequence) == tuple(
      f"frame-000{i}00.color.png" for i in range(0, 4, 2)
    )
    assert sequence.image_size == (384, 512)
    image = Image.fromarray(tree.images["heads/seq-01"][0])
    expected = image.resize((512, 384), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(sequence.load_image(1), np.asarray(expected))
    points, valid, pose = sequence.load_points(1)
    assert points.shape == (384, 512, 3) and valid.shape == (384, 512)
    # Pixel (101, 51) shows the depth of source pixel (126, 63).
    depth = tree.depths["heads/seq-01"][0][63, 126]
    ray = np.array([(101 - 255.9) / 420.00000525, (51 - 191.9) / 420.00000525])
    expected = pose @ [*(ray * depth), depth, 1]
    np.testing.assert_allclose(points[51, 101], expected[:3], atol=1e-5)

  def test_224_is_the_middle_of_512(self, tmp_path):
    trees.write_seven_scenes(tmp_path, {"heads": (1,)}, 1, (480, 640))
    big, small = (
      open_benchmark(
        "mv_recon", "7scenes", tmp_path, {"scenes": "heads", "size": size}
      ).sequences[0]
      for size in [512, 224]
    )
    assert small.image_size == (224, 224)
    middle = np.s_[80:304, 144:368]
    np.testing.assert_array_equal(
      small.load_image(0), big.load_image(0)[middle]
    )
    for got, expected in zip(
      small.load_points(0)[:2], big.load_points(0)[:2], strict=True
    ):
      np.testing.assert_array_equal(got, expected[middle])

  def test_colour_takes_the_size_of_depth(self, tmp_path):
    trees.write_seven_scenes(tmp_path, {"heads": (1,)}, 1)
    grey = np.full((96, 128, 3), 77, np.uint8)
    trees.write_image(tmp_path / "heads/seq-01/frame-000000.color.png", grey)
    (sequence,) = open_scenes("7scenes", tmp_path).sequences
    got = sequence.load_image(0)
    np.testing.assert_array_equal(got, np.full((48, 64, 3), 77))

  def test_portrait_is_laid_on_its_side(self, tmp_path):
    tree = trees.write_seven_scenes(tmp_path, {"heads": (1,)}, 1, (64, 48))
    options = {"focal": FOCAL, "principal_point": "24,32"}
    (sequence,) = open_scenes(
      "7scenes", tmp_path, size=(48, 64), **options
    ).sequences
    assert sequence.image_size == (48, 64)
    image = tree.images["heads/seq-01"][0]
    np.testing.assert_array_equal(
      sequence.load_image(0), image.transpose(1, 0, 2)
    )
    points, valid, pose = sequence.load_points(0)
    depth = tree.depths["heads/seq-01"][0]
    np.testing.assert_array_equal(valid, depth.T > 0)
    u, v = 7, 50
    camera = np.array([(u - 24) / FOCAL, (v - 32) / FOCAL, 1]) * depth[v, u]
    expected = pose[:3, :3] @ camera + pose[:3, 3]
    np.testing.assert_allclose(points[u, v], expected, atol=1e-5)

  def test_near_squares_stay_as_they_fell(self, tmp_path):
    trees.write_seven_scenes(tmp_path, {"heads": (1,)}, 8, (64, 64))
    options = {"focal": FOCAL, "principal_point": "32,32", "stride": 1}
    sequences = [
      open_scenes("7scenes", tmp_path, seed=seed, **options).sequences[0]
      for seed in [0, 0, 1]
    ]
    images = [[s.load_image(i) for i in range(8)] for s in sequences]
    np.testing.assert_array_equal(images[0], images[1])
    assert np.shape(images) == (3, 8, 48, 64, 3)
    assert (np.array(images[0]) != images[2]).any()

  def test_scenes(self, tmp_path):
    trees.write_seven_scenes(tmp_path)
    assert len(seven_scenes.SCENES) == 7
    options = {**trees.rgbd_options(), "scenes": "chess,office"}
    benchmark = open_benchmark(
      "mv_recon", "7scenes", tmp_path, options, allow_missing=True
    )
    assert [s.name for s in benchmark.sequences] == [
      "chess/seq-03",
      "chess/seq-05",
    ]
    assert benchmark.left_out[0].name == "office"
    assert "office/TestSplit.txt: no such file" in benchmark.left_out[0].reason
    with pytest.raises(InputError, match=r"5 of 8 .* fire: .*TestSplit.txt"):
      open_benchmark("mv_recon", "7scenes", tmp_path, trees.rgbd_options())

  def test_split(self, tmp_path):
    path = tmp_path / "TestSplit.txt"
    path.write_text("sequence3\r\nsequence14\n\n")
    assert seven_scenes.read_split(path) == ["seq-03", "seq-14"]
    for text in ["", "sequence\n"]:
      path.write_text(text)
      with pytest.raises(InputError, match=r"TestSplit.txt: lines must be"):
        seven_scenes.read_split(path)

  def test_broken(self, tmp_path):
    trees.write_seven_scenes(tmp_path, {"heads": (1, 2)})
    folder = tmp_path / "heads/seq-02"
    path = folder / "frame-000000.pose.txt"
    np.savetxt(path, np.diag([1, np.nan, 1, 1]))
    message = r"heads/seq-02: \S*frame-000000.pose.txt: pose 0 is not finite"
    fails("7scenes", tmp_path, message)
    path.unlink()
    message = "seq-02: has 5 color images, 5 depth.proj maps and 4 poses"
    fails("7scenes", tmp_path, message)
    (folder / "frame-000009.pose.txt").touch()
    message = r"heads/seq-02: \S*frame-000000.pose.txt: no such file"
    fails("7scenes", tmp_path, message)
    shutil.rmtree(folder)
    fails("7scenes", tmp_path, r"heads/seq-02: \S*seq-02: no such folder")
    folder.mkdir()
    fails("7scenes", tmp_path, r"heads/seq-02: \S*seq-02: has no color images")

  def test_bad_frames(self, tmp_path):
    trees.write_seven_scenes(tmp_path, {"heads": (1,)})
    path = tmp_path / "heads/seq-01/frame-000000.depth.proj.png"
    fails(
      "7scenes",
      tmp_path,
      r"depth.proj.png: the principal",
      focal=1,
      principal_point="2,2",
    )
    trees.write_image(path, np.zeros(trees.SIZE, np.uint8))
    fails("7scenes", tmp_path, r"seq-01: \S*depth.proj.png: .* not a 16-bit")
    trees.write_image(path, np.zeros((10, 10), np.uint16))
    fails("7scenes", tmp_path, "has 64x48 pixels, .* has 10x10", stride=2)


class TestNrgbd:
  def test_reads(self, tmp_path):
    tree = trees.write_nrgbd(tmp_path)
    benchmark = open_scenes("nrgbd", tmp_path)
    assert [s.name for s in benchmark.sequences] == sorted(tree.images)
    assert benchmark.expected_sequences is None
    for sequence in benchmark.sequences:
      assert trees.file_names(sequence) == ("img0.png", "img2.png", "img4.png")
      check_sequence(sequence, tree, [0, 2, 4])

  def test_names_are_numbers(self, tmp_path):
    tree = trees.write_nrgbd(tmp_path, ["a"], frames=12)
    (sequence,) = open_scenes("nrgbd", tmp_path, setting="long").sequences
    assert trees.file_names(sequence) == tuple(f"img{i}.png" for i in range(12))
    check_sequence(sequence, tree, range(12))

  def test_long(self, tmp_path):
    tree = trees.write_nrgbd(tmp_path, ["a"])
    options = {"setting": "long", "max_frames": "3"}
    (sequence,) = open_scenes("nrgbd", tmp_path, **options).sequences
    check_sequence(sequence, tree, [0, 1, 2])

  def test_published_camera(self, tmp_path):
    trees.write_nrgbd(tmp_path, ["a"], 1, (480, 640))
    benchmark = open_benchmark("mv_recon", "nrgbd", tmp_path)
    assert benchmark.options.focal == 554.2562584220408
    assert benchmark.sequences[0].image_size == (384, 512)
    points, _, pose = benchmark.sequences[0].load_points(0)
    camera = (points[9, 8] - pose[:3, 3]) @ pose[:3, :3]
    expected = (8 - 255.9) / (554.2562584220408 * 0.80000001) * camera[2]
    assert camera[0] == pytest.approx(expected, rel=1e-5)

  def test_without_pose(self, tmp_path):
    tree = trees.write_nrgbd(tmp_path, ["a"], without_pose=[2])
    (sequence,) = open_scenes("nrgbd", tmp_path).sequences
    tree.poses["a"][2] = np.diag([1, -1, -1, 1])
    check_sequence(sequence, tree, [0, 2, 4])
    drop = {"non_finite_pose": "drop"}
    (sequence,) = open_scenes("nrgbd", tmp_path, **drop).sequences
    assert trees.file_names(sequence) == ("img0.png", "img4.png")
    check_sequence(sequence, tree, [0, 4])

  def test_no_pose_at_all(self, tmp_path):
    trees.write_nrgbd(tmp_path, ["a"], frames=1, without_pose=[0])
    message = r"a: \S*poses.txt: has no pose for any"
    fails("nrgbd", tmp_path, message, non_finite_pose="drop")

  def test_broken(self, tmp_path):
    trees.write_nrgbd(tmp_path)
    folder = tmp_path / "kitchen"
    rows = (folder / "poses.txt").read_text().splitlines()
    broken = [*rows[:9], "0 inf 0 0", *rows[10:]]
    (folder / "poses.txt").write_text("\n".join(broken))
    message = r"kitchen: \S*poses.txt: pose 2 is not finite"
    fails("nrgbd", tmp_path, message)
    (folder / "poses.txt").write_text("\n".join(rows[4:]))
    message = r"kitchen: has 5 images, 5 depth maps and 4 poses"
    fails("nrgbd", tmp_path, message)
    (folder / "images/Thumbs.db").touch()
    message = r"kitchen: \S*Thumbs.db: is no frame, and would be counted"
    fails("nrgbd", tmp_path, message)
    shutil.rmtree(folder / "images")
    fails("nrgbd", tmp_path, r"kitchen: \S*images: no such folder")
    (folder / "poses.txt").unlink()
    fails("nrgbd", tmp_path, r"1 of 2 .*kitchen: \S*poses.txt: no such file")

  def test_gaps(self, tmp_path):
    trees.write_nrgbd(tmp_path, ["a"])
    for kind in ["images/img", "depth/depth"]:
      (tmp_path / f"a/{kind}2.png").rename(tmp_path / f"a/{kind}7.png")
    fails("nrgbd", tmp_path, r"a: \S*img2.png: no such file")
