"""A folder belongs to one process at a time."""

import os
import subprocess
import sys

import pytest

from point3r_jax.errors import InputError
from point3r_jax.folder_lock import lock_folder

HOLD = """
import sys
from point3r_jax.folder_lock import lock_folder
with lock_folder(sys.argv[1]):
  print("held", flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_it(tmp_path):
  folder = tmp_path / "run"
  holder = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(folder)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert holder.stdout.readline() == "held\n"
  with pytest.raises(InputError, match=f"in use by process {holder.pid} on "):
    lock_folder(folder).__enter__()
  holder.kill()  # What is killed leaves no lock behind.
  holder.communicate()
  with lock_folder(folder):
    assert (folder / ".lock").read_text().startswith(f"process {os.getpid()}")
  with lock_folder(folder):
    pass
