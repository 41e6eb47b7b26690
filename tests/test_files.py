import errno

import pytest

from point3r_jax import files


def test_atomic_file_appears_complete(tmp_path):
  path = tmp_path / "a.bin"
  with files.atomic_file(path) as file:
    file.write(b"one")
    assert not path.exists()
  assert path.read_bytes() == b"one"
  assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_file_keeps_the_old_one_on_failure(tmp_path, error):
  path = tmp_path / "a.bin"
  path.write_bytes(b"old")
  with pytest.raises(error), files.atomic_file(path) as file:
    file.write(b"new")
    raise error
  assert path.read_bytes() == b"old"
  assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_append_file_always_ends_in_its_footer(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("something older and longer")
  file = files.AppendFile(path, b"[", b"]")
  assert path.read_bytes() == b"[]"
  file.append(b"1")
  assert path.read_bytes() == b"[1]"
  file.append(b",2", b"!]")
  assert path.read_bytes() == b"[1,2!]"
  file.append(b"", b"]")
  assert path.read_bytes() == b"[1,2]"
  file.close()
  file.close()


class _FullDisk:
  """Takes a few bytes, then fails as a full disk does; shorter writes pass."""

  def __init__(self, file, room):
    self._file, self._room = file, room

  def __getattr__(self, name):
    return getattr(self._file, name)

  def write(self, data):
    if len(data) <= self._room:
      return self._file.write(data)
    self._file.write(data[: self._room])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_append_file_recovers_from_a_full_disk(tmp_path):
  path = tmp_path / "a.txt"
  file = files.AppendFile(path, b"[", b"  ]")
  file.append(b"1")
  file._file = _FullDisk(file._file, 4)
  with pytest.raises(OSError, match="No space"):
    file.append(b",2222222222222")
  assert path.read_bytes() == b"[1  ]"
  file.close()


def test_append_file_continues_short_writes(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  file = files.AppendFile(path)
  raw = file._file

  class Short:
    seek, truncate, close = raw.seek, raw.truncate, raw.close

    def write(self, data):
      return raw.write(data[:2])

  file._file = Short()
  file.append(b"abcdefg\n")
  file.close()
  assert path.read_bytes() == b"abcdefg\n"
