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

from point3r_jax.data.errors import InputError, one_line
from point3r_jax.differences import differences
from point3r_jax.evaluation.sequences import Sequence
from point3r_jax.export.files import atomic_file

_MANIFEST = "manifest.json"
_FACTS = "prediction.json"

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
  """Returns a hash of which images a sequence has; files by their size, too."""
  digest = hashlib.sha256(str(sequence.image_size).encode())
  for name in sequence.frames:
    size = os.stat(name).st_size if os.path.exists(name) else 0
    digest.update(f"{os.path.basename(name)}:{size}\n".encode())
  return digest.hexdigest()


class PredictionWriter:
  """Takes the frames of a sequence, in any order."""

  def __init__(self, folder: pathlib.Path, sequence: Sequence):
    """Makes the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    self._folder = folder
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
        self._arrays[name] = np.lib.format.open_memmap(
          self._folder / f"{name}.npy",
          mode="w+",
          dtype=value.dtype,
          shape=(len(self._sequence), *value.shape),
        )
      self._arrays[name][index] = value
    self._pointers[index] = pointers
    self._seconds[index] = round(seconds, 6)
    self._overflow = max(self._overflow, overflow)
    self._missing -= 1
    if not self._missing:
      self._complete()
    return not self._missing

  def _complete(self) -> None:
    for array in self._arrays.values():
      array.flush()
    facts = {
      "sequence": self._sequence.name,
      "inputs": _inputs(self._sequence),
      "arrays": {name: _digest(x) for name, x in self._arrays.items()},
      "pointers": self._pointers,
      "seconds": self._seconds,
      "overflow": self._overflow,
    }
    self._arrays.clear()
    _write_json(self._folder / _FACTS, facts)


class PredictionStore:
  """The predictions of one model on one dataset."""

  def __init__(self, directory: str | os.PathLike):
    """Opens a folder; nothing is written yet."""
    self.directory = pathlib.Path(directory)

  def manifest(self) -> dict[str, Any]:
    """Returns what made the predictions that are here.

    Raises:
      InputError: if there are none.
    """
    path = self.directory / _MANIFEST
    try:
      return json.loads(path.read_text())
    except FileNotFoundError:
      raise InputError(
        f"{self.directory} holds no predictions to score; make them with "
        "--checkpoint"
      ) from None
    except ValueError as error:
      raise InputError(f"{path} is damaged ({one_line(error)})") from error

  def start(self, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest, or sees that it is the one that is here.

    Args:
      manifest: JSON-friendly; under "made_by" all that the predictions depend
        on.

    Raises:
      InputError: if predictions of another model or with other options are
        here; says how they differ.
    """
    manifest = json.loads(json.dumps(manifest))
    path = self.directory / _MANIFEST
    if path.exists():
      before = self.manifest()
      changed = list(differences(before["made_by"], manifest["made_by"]))
      if changed:
        raise InputError(
          f"{self.directory} holds predictions that were made otherwise: "
          f"{'; '.join(changed)}. Choose another --output, or --overwrite them"
        )
      return
    self.directory.mkdir(parents=True, exist_ok=True)
    _write_json(path, manifest)

  def clear(self) -> None:
    """Removes all predictions."""
    shutil.rmtree(self.directory, ignore_errors=True)

  def _folder(self, sequence: Sequence) -> pathlib.Path:
    # Flat and reversible, so that no two names share a folder.
    name = urllib.parse.quote(sequence.name, safe=" ").replace(".", "%2E")
    return self.directory / name

  def writer(self, sequence: Sequence) -> PredictionWriter:
    """Returns what takes a sequence's frames; what was there is removed."""
    return PredictionWriter(self._folder(sequence), sequence)

  def load(self, sequence: Sequence) -> SavedPrediction | None:
    """Returns a sequence's verified prediction; None if there is none.

    One that is damaged, or of other images, counts as none, with a warning.
    """
    folder = self._folder(sequence)
    try:
      facts = json.loads((folder / _FACTS).read_text())
      arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in facts["arrays"]
      }
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, OSError) as error:
      _log.warning("%s is damaged (%s)", folder, one_line(error))
      return None
    if facts["sequence"] != sequence.name or facts["inputs"] != _inputs(
      sequence
    ):
      _log.warning("%s is of other images", folder)
      return None
    for name, array in arrays.items():
      if len(array) != len(sequence) or facts["arrays"][name] != _digest(array):
        _log.warning("%s is damaged: %s.npy has changed", folder, name)
        return None
    return SavedPrediction(
      arrays, facts["pointers"], facts["seconds"], facts["overflow"]
    )
