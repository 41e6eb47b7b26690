"""Which files the user means: a file, a folder, a glob, or several of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from point3r_jax.data.images import HEIF_EXTENSIONS
from point3r_jax.errors import InputError

IMAGE_EXTENSIONS = (
  *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
  *HEIF_EXTENSIONS,
)
VIDEO_EXTENSIONS = (
  *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg"),
  *(".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv"),
)


def is_image(path: Path) -> bool:
  """Whether the file name is that of an image."""
  return path.suffix.lower() in IMAGE_EXTENSIONS


def is_video(path: Path) -> bool:
  """Whether the file name is that of a video (animated GIF included)."""
  return path.suffix.lower() in VIDEO_EXTENSIONS


def natural_key(path: Path) -> tuple:
  """Sorts img2 before img10, folder by folder, upper and lower case alike."""
  folded = [
    [int(run) if run.isdecimal() else run for run in re.split(r"(\d+)", part)]
    for part in (part.casefold() for part in path.parts)
  ]
  return folded, str(path)


def find_files(
  inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[Path]:
  """The files behind the inputs: either one video, or images.

  An input is a file, a folder (its images in natural order; subfolders are
  left alone) or a glob such as `scene/**/*.jpg` (likewise). Files in folders
  and globs that are no images are skipped, hidden ones too.

  Raises:
    InputError: There is nothing to read, or more than one video.
  """
  if isinstance(inputs, (str, os.PathLike)):
    inputs = [inputs]
  files = [file for entry in inputs for file in _expand(os.fspath(entry))]
  if not files:
    raise InputError("no input given")
  videos = [file for file in files if is_video(file)]
  if videos and len(files) > 1:
    raise InputError(
      "the input must be images or a single video, not"
      f" {len(files)} files with {len(videos)} videos ({_some(videos)})"
    )
  return files


def relative_names(files: Sequence[Path]) -> list[str]:
  """The paths relative to the innermost folder that holds all of them."""
  paths = [os.path.abspath(file) for file in files]
  root = os.path.commonpath([os.path.dirname(path) for path in paths])
  return [Path(os.path.relpath(path, root)).as_posix() for path in paths]


def _expand(entry: str) -> list[Path]:
  """The files behind one input."""
  path = Path(entry).expanduser()
  if not entry:
    raise InputError("no input given: the name is empty")
  if path.is_dir():
    return _from_folder(path)
  if path.exists():
    if not is_image(path) and not is_video(path):
      raise InputError(f"{path}: neither an image nor a video, by its name")
    return [path]
  if glob.has_magic(entry):
    return _from_glob(str(path))
  raise InputError(f"{path}: no such file or folder")


def _from_folder(folder: Path) -> list[Path]:
  """The images in a folder."""
  entries = [p for p in folder.iterdir() if not p.name.startswith(".")]
  images = _sorted(p for p in entries if is_image(p) and p.is_file())
  if images:
    return images
  videos = _sorted(p for p in entries if is_video(p))
  if videos:
    raise InputError(
      f"{folder}: has no images but videos ({_some(videos)}): name one of them"
    )
  hint = ""
  if any(p.is_dir() for p in entries):
    hint = f"; for its subfolders write '{folder}/**/*.jpg'"
  raise InputError(f"{folder}: has no images{hint}")


def _from_glob(pattern: str) -> list[Path]:
  """The images that match, or, if there are none, the videos."""
  matches = {Path(match) for match in glob.glob(pattern, recursive=True)}
  files = [match for match in matches if match.is_file()]
  found = _sorted(filter(is_image, files)) or _sorted(filter(is_video, files))
  if not found:
    raise InputError(f"{pattern}: matches no image and no video")
  return found


def _sorted(paths: Iterable[Path]) -> list[Path]:
  return sorted(paths, key=natural_key)


def _some(paths: Sequence[Path]) -> str:
  """A few names for a message."""
  names = ", ".join(path.name for path in paths[:3])
  return names + (", …" if len(paths) > 3 else "")
