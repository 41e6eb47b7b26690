"""Where a dataset lies and what is in its folders; names in string order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from point3r_jax.errors import InputError, one_line

# What the published loader takes for images.
_IMAGES = (".jpg", ".jpeg", ".png")


def find_root(root: Path | None, marker: str, path: str) -> Path:
  """The folder that holds a dataset: the one given, or one below it.

  Args:
    root: what the user gave.
    marker: a glob that matches something in the dataset's folder.
    path: of the dataset's folder in the published layout. The user may give
      any of its folders or what it lies in.

  Raises:
    InputError: listing what was looked for.
  """
  if root is None:
    raise InputError(
      f"a folder with data is needed (--data): one with {marker}"
    )
  if not root.is_dir():
    raise InputError(f"{root}: no such folder")
  parts = PurePosixPath(path).parts
  tails = [PurePosixPath(*parts[i:]) for i in range(len(parts), -1, -1)]
  for tail in tails:
    if any((root / tail).glob(marker)):
      return root / tail
  looked_for = ", ".join(str(tail / marker) for tail in tails)
  raise InputError(f"{root}: has none of: {looked_for}")


def entries(folder: Path) -> list[Path]:
  """All that is in a folder but hidden files.

  Raises:
    InputError: there is no such folder, or it cannot be read.
  """
  if not folder.is_dir():
    raise InputError(f"{folder}: no such folder")
  try:
    paths = [p for p in folder.iterdir() if not p.name.startswith(".")]
  except OSError as error:
    raise InputError(f"{folder}: cannot be read ({one_line(error)})") from error
  return sorted(paths, key=lambda path: path.name)


def subfolders(folder: Path) -> list[str]:
  """The names of the folders in a folder."""
  return [path.name for path in entries(folder) if path.is_dir()]


def images_in(folder: Path) -> list[Path]:
  """The images in a folder: one at least."""
  return files_in(folder, _IMAGES)


def files_in(folder: Path, suffixes: Iterable[str]) -> list[Path]:
  """The files in a folder that end in one of `.png`, …: one at least."""
  found = [p for p in entries(folder) if p.suffix.lower() in suffixes]
  if not found:
    raise InputError(f"{folder}: has no {'/'.join(suffixes)} files")
  return found
