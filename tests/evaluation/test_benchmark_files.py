"""Tests of the readers of files: benchmarks.files and .pose_files."""

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from point3r_jax.errors import InputError
from point3r_jax.evaluation.benchmarks import files, pose_files
from tests.data.media import cut
from tests.evaluation import trees

DEPTH = trees.make_depths(1, (3, 5), 0)[0].astype(np.float32)
POSES = trees.make_poses(3, 0)


class TestDpt:
  def test_reads(self, tmp_path):
    path = tmp_path / "a.dpt"
    depth = DEPTH.copy()
    depth[0, 0] = np.inf
    trees.write_dpt(path, depth)
    assert files.dpt_size(path) == (3, 5)
    np.testing.assert_array_equal(files.read_dpt(path), depth)
    assert files.read_dpt(path).dtype == np.float32

  def test_layout(self, tmp_path):
    data = np.array([202021.25], "<f4").tobytes()
    data += np.array([2, 1], "<i4").tobytes() + np.float32([7, 8]).tobytes()
    (tmp_path / "a.dpt").write_bytes(data)
    assert files.read_dpt(tmp_path / "a.dpt").tolist() == [[7, 8]]

  @pytest.mark.parametrize(
    "data, message",
    [
      (b"", "cut short"),
      (b"XXXX" + bytes(100), "no .dpt file, its tag is"),
      (trees.TAG.tobytes() + bytes(8), "says 0x0 pixels"),
      (trees.TAG.tobytes() + b"\5\0\0\0\3\0\0\0", "12 bytes instead of 72"),
    ],
  )
  def test_broken(self, tmp_path, data, message):
    (tmp_path / "a.dpt").write_bytes(data)
    for read in [files.dpt_size, files.read_dpt]:
      with pytest.raises(InputError, match=rf"a\.dpt: .*{message}"):
        read(tmp_path / "a.dpt")

  def test_nan(self, tmp_path):
    trees.write_dpt(tmp_path / "a.dpt", DEPTH * np.nan)
    with pytest.raises(InputError, match=r"a\.dpt: has depths that are not a"):
      files.read_dpt(tmp_path / "a.dpt")


class TestPng:
  def test_reads_16_bits(self, tmp_path):
    raw = np.array([[0, 1, 300], [65535, 5000, 256]], np.uint16)
    trees.write_image(tmp_path / "a.png", raw)
    assert files.png16_size(tmp_path / "a.png") == (2, 3)
    got = files.read_png16(tmp_path / "a.png")
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, raw)
    depth = files.read_depth_png(tmp_path / "a.png", 5000)
    assert depth.dtype == np.float64
    assert depth.tolist() == [[-1, 1 / 5000, 0.06], [13.107, 1, 0.0512]]

  def test_other_images(self, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "8.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "a.tif")
    for name in ["8.png", "rgb.png", "a.tif"]:
      for read in [files.png16_size, files.read_png16]:
        with pytest.raises(InputError, match=f"{name}: is .* not a 16-bit"):
          read(tmp_path / name)

  def test_8_bits_in_16(self, tmp_path):
    trees.write_image(tmp_path / "a.png", np.full((4, 4), 255, np.uint16))
    with pytest.raises(InputError, match=r"a\.png: no value exceeds 255"):
      files.read_depth_png(tmp_path / "a.png", 256)
    trees.write_image(tmp_path / "a.png", np.full((4, 4), 256, np.uint16))
    assert files.read_depth_png(tmp_path / "a.png", 256).max() == 1

  def test_cut_short_or_missing(self, tmp_path):
    path = tmp_path / "a.png"
    trees.write_image(path, np.arange(4096, dtype=np.uint16).reshape(64, 64))
    cut(path, 0.5)
    assert files.png16_size(path) == (64, 64)
    with pytest.raises(InputError, match=r"a\.png: cannot read the image"):
      files.read_png16(path)
    path.write_text("hello")
    with pytest.raises(InputError, match=r"a\.png: is not an image"):
      files.image_size(path)
    with pytest.raises(InputError, match="no such file"):
      files.image_size(tmp_path / "b.png")
    with pytest.raises(InputError, match="cannot be read"):
      files.image_size(tmp_path)

  def test_colour(self, tmp_path):
    pixels = np.array([[[9, 8, 7, 0], [1, 2, 3, 255]]], np.uint8)
    trees.write_image(tmp_path / "a.png", pixels)
    got = files.read_rgb(tmp_path / "a.png")
    np.testing.assert_array_equal(got, pixels[..., :3])
    trees.write_image(tmp_path / "b.png", np.ones((2, 2), np.uint16))
    with pytest.raises(InputError, match=r"b\.png: has more than 8 bits"):
      files.read_rgb(tmp_path / "b.png")


class TestNpy:
  @pytest.mark.parametrize("dtype", [np.float32, np.float64])
  def test_reads_as_is(self, tmp_path, dtype):
    np.save(tmp_path / "a.npy", DEPTH.astype(dtype))
    assert files.npy_size(tmp_path / "a.npy") == (3, 5)
    got = files.read_npy(tmp_path / "a.npy")
    assert got.dtype == dtype and type(got) is np.ndarray
    np.testing.assert_array_equal(got, DEPTH.astype(dtype))

  @pytest.mark.parametrize(
    "array, message",
    [
      (DEPTH[None], r"float32 of shape \(1, 3, 5\) is no depth map"),
      (DEPTH.astype(int), "int64 of shape"),
      (np.array([None]), "cannot read the array"),
    ],
  )
  def test_other_arrays(self, tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=rf"a\.npy: {message}"):
      files.npy_size(tmp_path / "a.npy")

  def test_broken(self, tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, DEPTH)
    cut(path, 0.9)
    with pytest.raises(InputError, match=r"a\.npy: cannot read the array"):
      files.npy_size(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.npy: cannot read the array"):
      files.npy_size(path)
    np.savez(path.with_suffix(".npz"), DEPTH)
    path.with_suffix(".npz").rename(path)
    with pytest.raises(InputError, match=r"a\.npy: is not a \.npy file"):
      files.npy_size(path)
    np.save(path, DEPTH * np.inf)
    with pytest.raises(InputError, match=r"a\.npy: has depths that are not f"):
      files.read_npy(path)


class TestCam:
  def test_reads(self, tmp_path):
    trees.write_cam(tmp_path / "a.cam", POSES[1])
    assert (tmp_path / "a.cam").stat().st_size == 4 + 72 + 96
    intrinsics, extrinsics = pose_files.read_cam(tmp_path / "a.cam")
    assert intrinsics.tolist()[0] == [1120, 0, 511.5]
    np.testing.assert_allclose(extrinsics @ POSES[1], np.eye(4), atol=1e-12)

  def test_broken(self, tmp_path):
    path = tmp_path / "a.cam"
    trees.write_cam(path, POSES[1])
    data = path.read_bytes()
    for broken, message in [
      (data[:-8], "164 bytes instead of 172"),
      (b"XXXX" + data[4:], "no .cam file, its tag"),
      (data[:4] + np.float64(np.nan).tobytes() + data[12:], "intrinsics"),
      (data[:-8] + np.float64(np.inf).tobytes(), "pose 0 is not finite"),
      (data[:76] + bytes(96), "pose 0 is no rigid motion"),
    ]:
      path.write_bytes(broken)
      with pytest.raises(InputError, match=rf"a\.cam: .*{message}"):
        pose_files.read_cam(path)


class TestTum:
  ROW = "1.5 1 2 3 0 0 0 1\n"

  def test_reads(self, tmp_path):
    tree = trees.write_tum(tmp_path, ["a"], frames=20)
    stamps, poses = pose_files.read_tum(tmp_path / "a/groundtruth_90.txt")
    assert stamps.tolist() == trees.tum_stamps(20)
    np.testing.assert_allclose(poses, tree.poses["a"], atol=1e-12)

  def test_quaternions_are_normalised(self, tmp_path):
    (tmp_path / "a.txt").write_text("0 0 0 0 0.2 -0.4 0.6 1.3\n")
    expected = Rotation.from_quat([0.2, -0.4, 0.6, 1.3]).as_matrix()
    poses = pose_files.read_tum(tmp_path / "a.txt").camera_to_world
    np.testing.assert_allclose(poses[0, :3, :3], expected, atol=1e-15)

  @pytest.mark.parametrize(
    "text, message",
    [
      ("", "has no poses"),
      ("# only a comment\n\n", "has no poses"),
      ("#\n" + ROW + "2 1 2 3\n", "line 3 has 4 numbers instead of 8"),
      (ROW + ROW.replace("3", "x"), "line 2 is not made of numbers"),
      (ROW + ROW.replace("1.5", "nan"), "pose 1 is not finite"),
      (ROW + ROW, "timestamp of pose 1 does not increase"),
      (ROW.replace("0 0 0 1", "0 0 0 0"), "quaternion 0 is zero"),
    ],
  )
  def test_broken(self, tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=rf"a\.txt: .*{message}"):
      pose_files.read_tum(tmp_path / "a.txt")


class TestPoseRows:
  @pytest.mark.parametrize("columns", [12, 16])
  def test_reads(self, tmp_path, columns):
    rows = POSES.reshape(-1, 16)[:, :columns]
    np.savetxt(tmp_path / "a.txt", rows, fmt="%.17g")
    got = pose_files.read_pose_rows(tmp_path / "a.txt")
    np.testing.assert_array_equal(got, POSES)

  def test_broken(self, tmp_path):
    path = tmp_path / "a.txt"
    for value in (np.nan, -np.inf):  # Whether they matter is not for it to say.
      poses = POSES.copy()
      poses[1, 1, 1] = value
      np.savetxt(path, poses.reshape(-1, 16))
      np.testing.assert_array_equal(pose_files.read_pose_rows(path), poses)
    poses[2, 1, 1] = 5
    np.savetxt(path, poses.reshape(-1, 16))
    with pytest.raises(InputError, match=r"a\.txt: pose 2 is no rigid motion"):
      pose_files.read_pose_rows(path)
    np.savetxt(path, POSES.transpose(0, 2, 1).reshape(-1, 16))
    with pytest.raises(InputError, match="no rigid motion"):
      pose_files.read_pose_rows(path)
    np.savetxt(path, POSES.reshape(-1, 8))
    with pytest.raises(InputError, match="line 1 has 8 numbers instead of 12"):
      pose_files.read_pose_rows(path)
    path.write_text("")
    with pytest.raises(InputError, match="has no poses"):
      pose_files.read_pose_rows(path)

  def test_mirrors_are_no_motion(self, tmp_path):
    np.savetxt(tmp_path / "a.txt", np.diag([1, 1, -1, 1]).reshape(1, 16))
    with pytest.raises(InputError, match="no rigid motion"):
      pose_files.read_pose_rows(tmp_path / "a.txt")


class TestPoseBlocks:
  def test_reads(self, tmp_path):
    poses = POSES.copy()
    poses[1] = np.nan
    np.savetxt(tmp_path / "a.txt", poses.reshape(-1, 4), fmt="%.17g")
    got = pose_files.read_pose_blocks(tmp_path / "a.txt")
    np.testing.assert_array_equal(got, poses)
    np.savetxt(tmp_path / "b.txt", POSES[2], fmt="%.17g")
    got = pose_files.read_pose(tmp_path / "b.txt")
    np.testing.assert_array_equal(got, POSES[2])

  def test_broken(self, tmp_path):
    path = tmp_path / "a.txt"
    np.savetxt(path, POSES.reshape(-1, 4)[:-1])
    with pytest.raises(InputError, match=r"a\.txt: has 11 lines, not four"):
      pose_files.read_pose_blocks(path)
    np.savetxt(path, POSES.reshape(-1, 4))
    with pytest.raises(InputError, match=r"a\.txt: has 3 poses instead of"):
      pose_files.read_pose(path)
    np.savetxt(path, POSES[0] * np.nan)
    with pytest.raises(InputError, match=r"a\.txt: pose 0 is not finite"):
      pose_files.read_pose(path)
    with pytest.raises(InputError, match="no such file"):
      pose_files.read_pose(tmp_path / "b.txt")
