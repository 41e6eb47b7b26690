"""Predictions on disk: written frame by frame, trusted only when verified.

  DIR/manifest.json               what made them: model, options, versions
  DIR/SEQUENCE/prediction.json    frames, counts, times, SHA-256 of the arrays
  DIR/SEQUENCE/NAME.npy           (T, …) arrays

`SEQUENCE` is the sequence's name, quoted as in a URL.
`prediction.json` is written last, so a sequence without one is not complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from point3r_jax.differences import differences
from point3r_jax.errors import InputError, one_line
from point3r_jax.evaluation.sequences import Sequence
from point3r_jax.files import atomic_file

_MANIFEST = "manifest.json"
_FACTS = "prediction.json"
# Bytes of an image file that stand for all of it, together with its size.
_BEGINNING = 1 << 16

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SavedPrediction:
  """What a model said of a sequence.

  Attributes:
    arrays: (T, …) by name, mapped from disk: what is not read is not loaded.
    pointers: pointers in memory after each frame.
    seconds: time of each frame.
    overflow: pointers that found no room.
  """

  arrays: Mapping[str, np.ndarray]
  pointers: list[int]
  seconds: list[float]
  overflow: int


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  with atomic_file(path) as file:
    file.write((json.dumps(values, indent=2) + "\n").encode())


def _digest(array: np.ndarray) -> str:
  """Returns the SHA-256 of an array's bytes; reads a frame at a time."""
  digest = hashlib.sha256()
  for frame in array:
    digest.update(np.ascontiguousarray(frame).data)
  return digest.hexdigest()


def _inputs(sequence: Sequence) -> str:
  """Returns a hash of a sequence's images: names, sizes and how files begin."""
  digest = hashlib.sha256(str(sequence.image_size).encode())
  for name in sequence.frames:
    digest.update(f"{os.path.basename(name)}\n".encode())
    if os.path.isfile(name):
      with open(name, "rb") as file:
        digest.update(file.read(_BEGINNING))
        digest.update(f"{os.fstat(file.fileno()).st_size}\n".encode())
  return digest.hexdigest()


def _json_digest(values: Mapping[str, Any]) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


class _FrameFile:
  """A .npy file whose frames are written in any order.

  Written, not mapped: where a mapped file finds the disk full, the process is
  killed.
  """

  def __init__(self, path: pathlib.Path, frames: int, like: np.ndarray):
    """Opens it for arrays (frames, …) of frames like one of them."""
    self._file = path.open("wb")
    header = {
      "descr": np.lib.format.dtype_to_descr(like.dtype),
      "fortran_order": False,
      "shape": (frames, *like.shape),
    }
    np.lib.format.write_array_header_1_0(self._file, header)
    self._like, self._start = like, self._file.tell()
    self._file.truncate(self._start + frames * like.nbytes)

  def write(self, index: int, frame: np.ndarray) -> None:
    """Writes one frame."""
    if (frame.shape, frame.dtype) != (self._like.shape, self._like.dtype):
      raise ValueError(
        f"frame {index} is {frame.dtype} {frame.shape}, others are "
        f"{self._like.dtype} {self._like.shape}"
      )
    self._file.seek(self._start + index * frame.nbytes)
    self._file.write(np.ascontiguousarray(frame).data)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class PredictionWriter:
  """Takes the frames of a sequence, in any order."""

  def __init__(self, folder: pathlib.Path, sequence: Sequence, made_by: str):
    """Makes the folder anew; `made_by` is a digest."""
    if folder.exists():
      shutil.rmtree(folder)
    folder.mkdir(parents=True)
    self._folder = folder
    self._made_by = made_by
    self._sequence = sequence
    self._arrays = {}
    self._pointers = [0] * len(sequence)
    self._seconds = [0.0] * len(sequence)
    self._overflow = 0
    self._missing = len(sequence)

  def write(
    self,
    index: int,
    arrays: Mapping[str, np.ndarray],
    pointers: int,
    overflow: int,
    seconds: float,
  ) -> bool:
    """Writes a frame; returns whether it was the last one that was missing.

    Args:
      index: of the frame, each once.
      arrays: of the frame, by name; the same names and shapes for all frames.
      pointers: in memory after the frame.
      overflow: pointers without room so far.
      seconds: that the frame took.
    """
    for name, value in arrays.items():
      if name not in self._arrays:
        self._arrays[name] = _FrameFile(
          self._folder / f"{name}.npy", len(self._sequence), value
        )
      self._arrays[name].write(index, value)
    self._pointers[index] = pointers
    self._seconds[index] = round(seconds, 6)
    self._overflow = max(self._overflow, overflow)
    self._missing -= 1
    if not self._missing:
      self._complete()
    return not self._missing

  def discard(self) -> None:
    """Removes what is written of a sequence that will not be complete."""
    self._close()
    shutil.rmtree(self._folder)

  def _close(self) -> None:
    for file in self._arrays.values():
      file.close()

  def _complete(self) -> None:
    self._close()
    facts = {
      "sequence": self._sequence.name,
      "made_by": self._made_by,
      "inputs": _inputs(self._sequence),
      "arrays": {
        name: _digest(np.load(self._folder / f"{name}.npy", mmap_mode="r"))
        for name in self._arrays
      },
      "pointers": self._pointers,
      "seconds": self._seconds,
      "overflow": self._overflow,
    }
    _write_json(self._folder / _FACTS, facts)


class PredictionStore:
  """The predictions of one model on one dataset."""

  def __init__(self, directory: str | os.PathLike):
    """Opens a folder; nothing is written yet."""
    self.directory = pathlib.Path(directory)
    self._made_by = ""  # A digest, once it is known.
    self._verified = set()  # Names: arrays are read in full for it only once.

  def manifest(self) -> dict[str, Any]:
    """Returns what made the predictions that are here.

    Raises:
      InputError: if there are none.
    """
    path = self.directory / _MANIFEST
    try:
      manifest = json.loads(path.read_text())
      dict(manifest["made_by"])
      return manifest
    except FileNotFoundError:
      raise InputError(
        f"{self.directory} holds no predictions to score; make them with "
        "--checkpoint"
      ) from None
    except (ValueError, KeyError, TypeError) as error:
      raise InputError(
        f"{path} is damaged ({one_line(error)}); --overwrite the predictions"
      ) from error

  def start(self, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, or sees that it is the one that is here.

    Args:
      manifest: JSON-friendly; under "made_by" all that the predictions depend
        on.

    Raises:
      InputError: if predictions of another model or with other options are
        here; says how they differ.
    """
    path = self.directory / _MANIFEST
    if path.exists():
      self.check(manifest["made_by"])
      for change in differences(self.manifest(), manifest):
        _log.info("changed since the first predictions here: %s", change)
      return
    self.directory.mkdir(parents=True, exist_ok=True)
    _write_json(path, manifest)
    self._made_by = _json_digest(manifest["made_by"])
    self._verified.clear()

  def check(self, made_by: Mapping[str, Any]) -> None:
    """Sees that the predictions were made like this.

    Args:
      made_by: what of the manifest's "made_by" is known now.

    Raises:
      InputError: if they were not, or there are none; says how they differ.
    """
    here = json.loads(json.dumps(made_by))
    there = self.manifest()["made_by"]
    self._made_by = _json_digest(there)
    changed = list(differences({key: there.get(key) for key in here}, here))
    if changed:
      raise InputError(
        f"{self.directory} holds predictions that were made otherwise: "
        f"{'; '.join(changed)}. Choose another --output, or --overwrite them "
        "with a --checkpoint"
      )

  def clear(self) -> None:
    """Removes all predictions; none of them is left to be mistaken for new."""
    old = self.directory.with_name(f".{self.directory.name}.old")
    if old.exists():
      shutil.rmtree(old)
    if self.directory.exists():
      self.directory.rename(old)
      shutil.rmtree(old)
    self._verified.clear()

  def _folder(self, sequence: Sequence) -> pathlib.Path:
    # Flat and reversible, so that no two names share a folder.
    name = urllib.parse.quote(sequence.name, safe=" ").replace(".", "%2E")
    return self.directory / name

  def writer(self, sequence: Sequence) -> PredictionWriter:
    """Returns what takes a sequence's frames; what was there is removed."""
    self._verified.discard(sequence.name)
    return PredictionWriter(self._folder(sequence), sequence, self._made_by)

  def load(self, sequence: Sequence) -> SavedPrediction | None:
    """Returns a sequence's verified prediction; None if there is none.

    One that is damaged, of other images, or not by what the manifest names,
    counts as none, with a warning. What was verified before is not read again.
    """
    folder = self._folder(sequence)
    try:
      facts = json.loads((folder / _FACTS).read_text())
      arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in facts["arrays"]
      }
      found = SavedPrediction(
        arrays, facts["pointers"], facts["seconds"], facts["overflow"]
      )
      origin = [facts[key] for key in ("sequence", "inputs", "made_by")]
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError, OSError) as error:
      _log.warning("%s is damaged (%s)", folder, one_line(error))
      return None
    if sequence.name in self._verified:
      return found
    if origin[:2] != [sequence.name, _inputs(sequence)]:
      _log.warning("%s is of other images", folder)
      return None
    if origin[2] != self._made_by:
      _log.warning("%s was made by something else", folder)
      return None
    for name, array in arrays.items():
      if len(array) != len(sequence) or facts["arrays"][name] != _digest(array):
        _log.warning("%s is damaged: %s.npy has changed", folder, name)
        return None
    self._verified.add(sequence.name)
    return found
