"""Ctrl-C and the end of programs: nobody waits for what nobody needs."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from point3r_jax.cli import common

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def started(script):
  """Yields a process that runs a script; it has a minute."""
  process = subprocess.Popen(
    [sys.executable, "-c", script],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  timer = threading.Timer(60, process.kill)
  timer.start()
  with process:
    yield process
  timer.cancel()


def test_a_device_without_memory_is_one_line(capsys):
  def program():
    jax.block_until_ready(jax.numpy.zeros((2**20, 2**20, 2**10)))

  assert common.run(program) == 2
  error = capsys.readouterr().err
  assert "memory does not suffice" in error and error.count("\n") == 1


BUSY = """
import concurrent.futures, time
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(time.sleep, 300)
"""


@pytest.mark.parametrize("before", [BUSY, ""])
def test_the_end_waits_for_no_thread_and_loses_nothing(before):
  script = f"""{before}
from point3r_jax.cli import common
print("all done", end="")
common.end(3)
"""
  with started(script) as process:
    output, error = process.communicate()
  assert (process.returncode, output, error) == (3, "all done", "")


# A second lock of a mutex never returns to the interpreter, as a device that
# hangs does not.
HUNG = """
import ctypes
from point3r_jax.cli import common
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
with common.stop_on_interrupt() as stop:
  lock(mutex)
  print("hung", flush=True)
  lock(mutex)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how mutexes begin")
def test_a_second_ctrl_c_ends_a_hung_program_at_once():
  with started(HUNG) as process:
    assert process.stdout.readline() == "hung\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "Ctrl-C again ends at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
  assert process.returncode == common.INTERRUPTED
  assert error == "\ninterrupted again: ending at once\n"


@pytest.fixture
def heeded_ctrl_c():
  """Heeds SIGINT, which programs in the background of a shell ignore."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield signal.default_int_handler
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_an_event_while_asked_for_and_no_longer(
  capsys, heeded_ctrl_c
):
  handler = heeded_ctrl_c
  with common.stop_on_interrupt() as stop:
    assert not stop.wait(0.05)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.wait(30)
  assert "stopping after the frames under way" in capsys.readouterr().err
  assert signal.getsignal(signal.SIGINT) is handler
  assert signal.set_wakeup_fd(-1) == -1
  with pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
