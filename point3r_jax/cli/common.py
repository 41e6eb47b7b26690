"""What the command-line programs share: the model's flags, errors, Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing.util
import os
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from point3r_jax.errors import UserError
from point3r_jax.precision import POLICIES

# Errors of the user's input or disk: one line and no traceback.
_USER_ERRORS = (UserError, OSError)

# Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130

_ONCE = "\nstopping after the frames under way; Ctrl-C again ends at once"
_AGAIN = "\ninterrupted again: ending at once"

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
  add(
    "--precision",
    choices=sorted(POLICIES),
    help=f"of arithmetic (default: {precision})",
  )
  add("--capacity", type=int, help="pointers to make room for at the start")
  add(
    "--max_capacity",
    type=int,
    help="most pointers to keep; others are merged into their nearest",
  )
  add(
    "--no_fusion",
    dest="fusion",
    action="store_false",
    default=None,
    help="keep all pointers and fuse none",
  )
  add(
    "--fusion_divisor",
    type=float,
    help="pointers are fused within the scene's extent divided by this "
    "(default: 20)",
  )
  add(
    "--no_rotary",
    dest="rotary",
    action="store_false",
    default=None,
    help="leave out the 3D rotary embedding, for models trained without it",
  )
  return add


def model_options(flags: argparse.Namespace) -> dict[str, Any]:
  """Returns the options of `Stream` that the model's flags give."""
  options = {name: getattr(flags, name) for name in _OPTIONS}
  return {name: x for name, x in options.items() if x is not None}


def run(program: Callable[[], int | None]) -> int:
  """Runs a program.

  Returns:
    Its exit code; 2 after saying what was wrong with the input, or that the
    device's memory does not suffice; 130 if it was interrupted.
  """
  try:
    return program() or 0
  except _USER_ERRORS as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith("RESOURCE_EXHAUSTED"):
      raise
    reason = " ".join(str(error).split())
    print(
      "error: the device's memory does not suffice; lower the size, the batch "
      f"or the memory's capacity ({textwrap.shorten(reason, 200)})",
      file=sys.stderr,
    )
    return 2
  except KeyboardInterrupt:
    _end_on_interrupt()
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def end(code: int) -> NoReturn:
  """Ends the process of a script, whose work is done.

  The interpreter would wait for its threads. One that compiles a program ahead
  of need can take minutes, and nobody needs the program any more.

  Args:
    code: the exit code.
  """
  _end_on_interrupt()
  running = set(threading.enumerate()) - {threading.main_thread()}
  if all(thread.daemon for thread in running):
    sys.exit(code)
  # What the interpreter would have done that matters here.
  multiprocessing.util._run_finalizers()  # Removes its temporary folder.
  leave(code)


def leave(code: int) -> NoReturn:
  """Ends the process at once: all that is waiting to be printed is printed."""
  logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _end_on_interrupt() -> None:
  """Lets Ctrl-C end a process that is ending anyway, without a traceback."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
  """Turns Ctrl-C into an event, so that what was begun can be finished.

  A second one ends the process at once: a compilation cannot be stopped, and a
  device may never answer.
  """
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop  # Signals are not this thread's.
    return
  # A handler in Python would have to wait until the main thread comes back from
  # the device; numbers of signals come through this at once.
  receiver, sender = socket.socketpair()
  sender.setblocking(False)

  def watch() -> None:
    while number := receiver.recv(1):
      if number[0] != signal.SIGINT:
        continue
      again = stop.is_set()
      stop.set()
      with contextlib.suppress(OSError):  # Nobody may be there to read it.
        print(_AGAIN if again else _ONCE, file=sys.stderr)
      if again:
        os._exit(INTERRUPTED)

  thread = threading.Thread(target=watch, name="interrupts", daemon=True)
  with receiver, sender:
    thread.start()
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
      yield stop
    finally:
      signal.set_wakeup_fd(wakeup)
      signal.signal(signal.SIGINT, handler)
      sender.shutdown(socket.SHUT_WR)  # Ends the thread.
      thread.join()
