"""What the command-line programs share: the model's flags, errors, Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from point3r_jax.checkpoints import CheckpointError
from point3r_jax.convert.tensor_file import CheckpointFileError
from point3r_jax.data.errors import InputError
from point3r_jax.export.scene import OutputError
from point3r_jax.precision import POLICIES

# Errors of the user's input or disk: one line and no traceback.
_USER_ERRORS = (
  CheckpointError,
  CheckpointFileError,
  InputError,
  OutputError,
  OSError,
)

# Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130

# Options of `Stream` that `add_model_flags` makes flags of.
_OPTIONS = (
  *("precision", "capacity", "max_capacity"),
  *("fusion", "fusion_divisor", "rotary"),
)


def add_model_flags(
  parser: argparse.ArgumentParser, precision: str
) -> Callable[..., argparse.Action]:
  """Adds the flags that say how to run the model, for `model_options`.

  Args:
    parser: of a program.
    precision: the program's default, in words.

  Returns:
    What adds a flag to their group.
  """
  add = parser.add_argument_group("model").add_argument
  add("--precision", choices=sorted(POLICIES), help=f"default: {precision}")
  add("--capacity", type=int, help="pointers to have room for at the start")
  add("--max_capacity", type=int, help="pointers never to exceed")
  add(
    "--no_fusion",
    dest="fusion",
    action="store_false",
    default=None,
    help="keep all pointers",
  )
  add(
    "--fusion_divisor",
    type=float,
    help="the scene's extent over this is the fusion distance (default: 20)",
  )
  add(
    "--no_rotary",
    dest="rotary",
    action="store_false",
    default=None,
    help="leave out the 3D rotary embedding: for models trained without it",
  )
  return add


def model_options(flags: argparse.Namespace) -> dict[str, Any]:
  """Returns the options of `Stream` that the model's flags give."""
  options = {name: getattr(flags, name) for name in _OPTIONS}
  return {name: x for name, x in options.items() if x is not None}


def run(program: Callable[[], int | None]) -> int:
  """Runs a program.

  Returns:
    Its exit code; 2 after saying what was wrong with the input; 130 if it was
    interrupted.
  """
  try:
    return program() or 0
  except _USER_ERRORS as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    _ignore_interrupts()
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def _ignore_interrupts() -> None:
  """Lets a process that is ending anyway end in order."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
  """Turns Ctrl-C into an event, so that what was begun can be finished.

  A program that was stopped is about to end: further Ctrl-C are ignored until
  it has, so the interpreter's own end is not cut short either.
  """
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop  # Signals are not this thread's.
    return

  def handle(*_):
    if not stop.is_set():
      print("\nstopping after the frames under way ...", file=sys.stderr)
    stop.set()

  previous = signal.signal(signal.SIGINT, handle)
  try:
    yield stop
  finally:
    if stop.is_set():
      _ignore_interrupts()
    else:
      signal.signal(signal.SIGINT, previous)
