"""Files that are valid under their final name at every moment."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """Opens a file for writing that appears under its name only when complete.

  Args:
    path: Final name. An existing file stays until the new one replaces it.

  Yields:
    A seekable binary file beside the final name. It is renamed when the block
    ends, and removed when the block raises.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  try:
    with temporary.open("xb") as file:
      yield file
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


class AppendFile:
  """A file that grows by whole records and always ends in its footer.

  Each append overwrites the footer with a record and a new footer, unbuffered;
  where that fails half-way (disk full, Ctrl-C) the former end is restored. So
  the file can be read at any time, also after the process was killed between
  two appends.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    header: bytes = b"",
    footer: bytes = b"",
  ):
    """Starts the file with a header and a footer, replacing an older one.

    Args:
      path: Name of the file.
      header: First bytes.
      footer: Last bytes, as long as nothing is appended.
    """
    with atomic_file(path) as file:
      file.write(header + footer)
    self._file = Path(path).open("r+b", buffering=0)  # noqa: SIM115
    self._end = len(header)  # Where the footer begins.
    self._footer = footer

  def append(self, record: bytes, footer: bytes | None = None) -> None:
    """Puts a record after the former ones.

    Args:
      record: Bytes to add.
      footer: Replaces the footer from now on, where given.
    """
    footer = self._footer if footer is None else footer
    try:
      self._write(record + footer)
      self._end, self._footer = self._end + len(record), footer
    except BaseException:
      self._write(self._footer)
      raise

  def _write(self, data: bytes) -> None:
    """Makes `data` all that follows the records."""
    self._file.seek(self._end)
    rest = memoryview(data)
    while rest:
      rest = rest[self._file.write(rest) :]
    self._file.truncate()

  def close(self) -> None:
    """Closes the file; further calls have no effect."""
    self._file.close()
