"""What the command-line programs share."""

from __future__ import annotations

import sys
from collections.abc import Callable

from point3r_jax.checkpoints import CheckpointError
from point3r_jax.convert.tensor_file import CheckpointFileError
from point3r_jax.data.errors import InputError
from point3r_jax.export.scene import OutputError

# Errors of the user's input: one line and no traceback.
_USER_ERRORS = (CheckpointError, CheckpointFileError, InputError, OutputError)


def run(program: Callable[[], int | None]) -> int:
  """Runs a program; returns its exit code, or 2 after saying what was wrong."""
  try:
    return program() or 0
  except _USER_ERRORS as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
