"""One run a folder: a second one would mix its files with the first one's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from point3r_jax.errors import InputError

_NAME = ".lock"


@contextlib.contextmanager
def lock_folder(directory: str | os.PathLike) -> Iterator[None]:
  """Holds a folder for this process until the block ends or the process dies.

  The lock is the operating system's (`fcntl.flock`): none is left behind by a
  process that was killed. File systems that know no locks give none.

  Args:
    directory: made if need be.

  Raises:
    InputError: another process holds it; says which.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with (directory / _NAME).open("a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise InputError(
        f"{directory} is in use by {file.read() or 'another process'}: wait "
        "until it ends, or choose another folder"
      ) from None
    except OSError:
      pass  # Such as a network file system without locks.
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    yield
