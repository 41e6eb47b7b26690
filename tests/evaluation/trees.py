"""Miniature copies of the benchmarks, in their layouts on disk.

Every writer fills a folder and returns what the readers must find in it. Sizes
are (height, width). Open them with a small image size, as in

  tree = trees.write_bonn(tmp_path)
  open_benchmark("video_depth", "bonn", tree.root, {"size": 64})

For 7-Scenes and NRGBD the intrinsics are options as well: see `rgbd_options`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from point3r_jax.evaluation import sequences
from point3r_jax.evaluation.benchmarks import bonn, sintel

SIZE = (48, 64)
TAG = np.float32(202021.25)


class Tree(NamedTuple):
  """What a writer wrote, by the names of the sequences.

  Attributes:
    root: the dataset's own folder.
    images: (T, H, W, 3) uint8 of all frames on disk.
    depths: (T, H, W) metres, as they are to be read; empty if there are none.
    poses: (T, 4, 4) camera-to-world, as they are to be read; likewise.
  """

  root: Path
  images: dict[str, np.ndarray]
  depths: dict[str, np.ndarray]
  poses: dict[str, np.ndarray]


def empty_tree(root: Path) -> Tree:
  return Tree(root, {}, {}, {})


def make_images(count: int, size: tuple[int, int], seed: int) -> np.ndarray:
  """(T, H, W, 3) uint8 blotches."""
  coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 8, 3))
  images = [
    Image.fromarray(c).resize(size[::-1], Image.Resampling.BICUBIC)
    for c in coarse.astype(np.uint8)
  ]
  return np.stack([np.asarray(image) for image in images])


def make_depths(count: int, size: tuple[int, int], seed: int) -> np.ndarray:
  """(T, H, W) float64 metres from 1 to 9, not smooth."""
  return np.random.default_rng(seed).uniform(1, 9, (count, *size))


def make_poses(count: int, seed: int) -> np.ndarray:
  """(T, 4, 4) float64 camera-to-world, a walk with turns."""
  rng = np.random.default_rng(seed)
  poses = np.tile(np.eye(4), (count, 1, 1))
  turns = rng.normal(0, 0.2, (count, 3)).cumsum(axis=0)
  poses[:, :3, :3] = Rotation.from_rotvec(turns).as_matrix()
  poses[:, :3, 3] = rng.normal(0, 0.3, (count, 3)).cumsum(axis=0)
  return poses


def write_image(path: Path, pixels: np.ndarray) -> None:
  """Writes uint8 colour or uint16 grey."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, compress_level=1)


def write_dpt(path: Path, depth: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  size = np.array(depth.shape[::-1], "<i4").tobytes()
  path.write_bytes(TAG.tobytes() + size + depth.astype("<f4").tobytes())


def write_cam(path: Path, camera_to_world: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  intrinsics = np.array([[1120.0, 0, 511.5], [0, 1120, 217.5], [0, 0, 1]])
  extrinsics = np.linalg.inv(camera_to_world)[:3]
  path.write_bytes(
    TAG.tobytes() + intrinsics.tobytes() + extrinsics.astype("<f8").tobytes()
  )


def write_sintel(
  root: Path,
  sequences: Sequence[str] = sintel.ALL,
  frames: int = 3,
  size: tuple[int, int] = SIZE,
) -> Tree:
  """The poses of the tree are centred on their mean."""
  tree = empty_tree(root)
  for seed, name in enumerate(sequences):
    images = make_images(frames, size, seed)
    depths = make_depths(frames, size, seed).astype(np.float32)
    poses = make_poses(frames, seed)
    for i in range(frames):
      frame = f"{name}/frame_{i + 1:04d}"
      write_image(root / f"training/final/{frame}.png", images[i])
      write_dpt(root / f"training/depth/{frame}.dpt", depths[i])
      write_cam(root / f"training/camdata_left/{frame}.cam", poses[i])
    poses[:, :3, 3] -= poses[:, :3, 3].mean(axis=0)
    tree.images[name], tree.depths[name] = images, depths
    tree.poses[name] = poses
  return tree


def _write_depth_png(
  path: Path, metres: np.ndarray, steps_per_metre: int
) -> np.ndarray:
  """Writes a map with a hole at the top left; returns what is to be read."""
  raw = np.round(metres * steps_per_metre).astype(np.uint16)
  raw[0, :2] = 0
  write_image(path, raw)
  return np.where(raw == 0, -1, raw / steps_per_metre)


def write_bonn(
  root: Path,
  sequences: Sequence[str] = bonn.SEQUENCES,
  frames: int = 3,
  size: tuple[int, int] = SIZE,
) -> Tree:
  tree = empty_tree(root)
  for seed, name in enumerate(sequences):
    folder = root / f"rgbd_bonn_{name}"
    images = make_images(frames, size, seed)
    depths = make_depths(frames, size, seed)
    for i in range(frames):
      # Names are timestamps, those of depth a little later.
      write_image(folder / f"rgb_110/15481.{i:04d}1.png", images[i])
      path = folder / f"depth_110/15481.{i:04d}7.png"
      depths[i] = _write_depth_png(path, depths[i], 5000)
    tree.images[name], tree.depths[name] = images, depths
  return tree


def write_kitti(
  root: Path,
  sequences: Sequence[str] = ("drive_0002_sync_02", "drive_0005_sync_02"),
  frames: int = 3,
  size: tuple[int, int] = (19, 64),
) -> Tree:
  tree = empty_tree(root)
  gathered = root / "depth_selection/val_selection_cropped"
  for seed, name in enumerate(sequences):
    images = make_images(frames, size, seed)
    depths = make_depths(frames, size, seed)
    for i in range(frames):
      path = gathered / f"image_gathered/{name}/{i:010d}.png"
      write_image(path, images[i])
      path = gathered / f"groundtruth_depth_gathered/{name}/{i:010d}.png"
      depths[i] = _write_depth_png(path, depths[i], 256)
    tree.images[name], tree.depths[name] = images, depths
  return tree


def write_nyu(
  root: Path, frames: int = 4, size: tuple[int, int] = SIZE
) -> Tree:
  tree = empty_tree(root)
  images = make_images(frames, size, 0)
  depths = make_depths(frames, size, 0).astype(np.float32)
  (root / "nyu_depths").mkdir(parents=True)
  for i in range(frames):
    write_image(root / f"nyu_images/{i:05d}.png", images[i])
    np.save(root / f"nyu_depths/{i:05d}.npy", depths[i])
  tree.images["nyu"], tree.depths["nyu"] = images, depths
  return tree


def write_tum(
  root: Path,
  sequences: Sequence[str] = ("sitting_halfsphere", "walking_xyz"),
  frames: int = 4,
  size: tuple[int, int] = SIZE,
) -> Tree:
  tree = empty_tree(root)
  for seed, name in enumerate(sequences):
    images, poses = make_images(frames, size, seed), make_poses(frames, seed)
    quaternions = Rotation.from_matrix(poses[:, :3, :3]).as_quat()
    rows = [
      " ".join(map(repr, [stamp, *pose[:3, 3].tolist(), *q.tolist()]))
      for stamp, pose, q in zip(
        tum_stamps(frames), poses, quaternions, strict=True
      )
    ]
    for i in range(frames):
      write_image(root / name / f"rgb_90/1341846.{i:04d}.png", images[i])
    text = "\n".join(["# timestamp tx ty tz qx qy qz qw", *rows])
    (root / name / "groundtruth_90.txt").write_text(text + "\n")
    tree.images[name], tree.poses[name] = images, poses
  return tree


def tum_stamps(frames: int) -> list[float]:
  return [1341846313.5 + 0.1 * i for i in range(frames)]


def write_scannet(
  root: Path,
  sequences: Sequence[str] = ("scene0707_00", "scene0708_00"),
  frames: int = 4,
  size: tuple[int, int] = SIZE,
  columns: int = 16,
) -> Tree:
  """Images are lossless, as `.png`; the real ones are `.jpg`."""
  tree = empty_tree(root)
  for seed, name in enumerate(sequences):
    images, poses = make_images(frames, size, seed), make_poses(frames, seed)
    for i in range(frames):
      write_image(root / name / f"color_90/frame_{i:04d}.png", images[i])
    rows = poses.reshape(frames, 16)[:, :columns]
    np.savetxt(root / name / "pose_90.txt", rows, fmt="%.17g")
    tree.images[name], tree.poses[name] = images, poses
  return tree


def rgbd_options(size: tuple[int, int] = SIZE) -> dict[str, str]:
  """Options that make frames of this size those of a camera of their own."""
  height, width = size
  return {
    "size": str(width // 16 * 16),
    "focal": str(0.82 * width),
    "principal_point": f"{width / 2},{height / 2}",
  }


def _write_millimetres(path: Path, metres: np.ndarray) -> np.ndarray:
  """Writes a map with all that counts as not measured, in its first row."""
  raw = np.round(metres * 1000).astype(np.uint16)
  raw[0, :5] = [0, 65535, 10001, 10000, 1]
  write_image(path, raw)
  depth = (raw / 1000).astype(np.float32)
  depth[0, 1:3] = 0
  return depth


def write_seven_scenes(
  root: Path,
  scenes: Mapping[str, Sequence[int]] | None = None,
  frames: int = 5,
  size: tuple[int, int] = SIZE,
) -> Tree:
  """`scenes` are the numbers of the test sequences; None: chess and heads."""
  tree = empty_tree(root)
  for scene, numbers in (scenes or {"chess": (3, 5), "heads": (1,)}).items():
    (root / scene).mkdir(parents=True)
    split = "".join(f"sequence{number}\n" for number in numbers)
    (root / scene / "TestSplit.txt").write_text(split)
    for number in numbers:
      name = f"{scene}/seq-{number:02d}"
      images = make_images(frames, size, number)
      poses = make_poses(frames, number)
      depths = make_depths(frames, size, number).astype(np.float32)
      for i in range(frames):
        stem = f"{name}/frame-{i:06d}"
        write_image(root / f"{stem}.color.png", images[i])
        path = root / f"{stem}.depth.proj.png"
        depths[i] = _write_millimetres(path, depths[i])
        text = "\n".join(" \t ".join(map(repr, r)) for r in poses[i].tolist())
        (root / f"{stem}.pose.txt").write_text(text)
      tree.images[name], tree.depths[name] = images, depths
      tree.poses[name] = poses
  return tree


def write_nrgbd(
  root: Path,
  scenes: Sequence[str] = ("breakfast_room", "kitchen"),
  frames: int = 5,
  size: tuple[int, int] = SIZE,
  without_pose: Sequence[int] = (),
) -> Tree:
  """Frames `without_pose` have NaN in poses.txt and in the tree."""
  tree = empty_tree(root)
  for seed, name in enumerate(scenes):
    images, poses = make_images(frames, size, seed), make_poses(frames, seed)
    depths = make_depths(frames, size, seed).astype(np.float32)
    poses[list(without_pose)] = np.nan
    for i in range(frames):
      write_image(root / name / f"images/img{i}.png", images[i])
      path = root / name / f"depth/depth{i}.png"
      depths[i] = _write_millimetres(path, depths[i])
    opengl = poses * [1, -1, -1, 1]
    np.savetxt(root / name / "poses.txt", opengl.reshape(-1, 4), fmt="%.17g")
    tree.images[name], tree.depths[name] = images, depths
    tree.poses[name] = poses
  return tree


def file_names(sequence: sequences.Sequence) -> tuple[str, ...]:
  """Returns the names of a sequence's images, without their folder."""
  return tuple(Path(frame).name for frame in sequence.frames)
