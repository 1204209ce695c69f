"""The cache folder: whole files or none, damage noticed, limits kept, other people's folders refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md3cli.errors import OutputError
from md3cli.file_cache import HEADER_BYTES, FileCache


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10**6)
    assert cache.get(key_of(1)) is None
    cache.put(key_of(1), b"one")
    cache.put(key_of(1), b"one")
    assert FileCache(tmp_path, 10**6).get(key_of(1)) == b"one"
    assert cache.info().num_files == 1


def test_the_folder_is_private(tmp_path: Path) -> None:
    FileCache(tmp_path / "c", 10**6)
    assert (tmp_path / "c/encodings").stat().st_mode & 0o777 == 0o700


@settings(max_examples=60, deadline=None)
@given(payload=st.binary(min_size=1, max_size=64), bit=st.integers(min_value=0))
def test_any_flipped_bit_is_noticed_and_removed(
    payload: bytes, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = FileCache(folder, 10**6)
    cache.put(key_of(0), payload)
    (file,) = folder.rglob("*.enc")
    content = bytearray(file.read_bytes())
    bit %= len(content) * 8
    content[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(content)
    assert cache.get(key_of(0)) is None
    assert not file.exists()


@pytest.mark.parametrize("is_renamed", [True, False])
def test_a_file_under_another_key_is_not_believed(tmp_path: Path, is_renamed: bool) -> None:
    cache = FileCache(tmp_path, 10**6)
    cache.put(key_of(1), b"one")
    cache.put(key_of(2), b"two")
    one, two = (tmp_path / "encodings" / key_of(n)[:2] / f"{key_of(n)}.enc" for n in (1, 2))
    if is_renamed:
        one.replace(two)
    else:
        two.write_bytes(one.read_bytes())
    assert cache.get(key_of(2)) is None
    assert not two.exists()
    assert cache.get(key_of(1)) == (None if is_renamed else b"one")


@pytest.mark.parametrize("length", [0, 5, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 2])
def test_a_file_cut_short_is_absent(tmp_path: Path, length: int) -> None:
    cache = FileCache(tmp_path, 10**6)
    cache.put(key_of(0), b"payload")
    (file,) = tmp_path.rglob("*.enc")
    file.write_bytes(file.read_bytes()[:length])
    assert cache.get(key_of(0)) is None


def test_least_recently_read_go_first(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10 * (HEADER_BYTES + 100))
    for number in range(10):
        cache.put(key_of(number), bytes(100))
        (path,) = tmp_path.rglob(f"{key_of(number)}.enc")
        os.utime(path, (number + 1, number + 1))
    assert cache.get(key_of(0)) is not None  # reading makes it recent
    cache.put(key_of(10), bytes(100))
    left = [number for number in range(11) if cache.get(key_of(number)) is not None]
    assert 0 in left
    assert 10 in left
    assert 1 not in left
    assert cache.info().num_bytes <= cache.limit_bytes


def test_clear_and_prune_say_what_they_removed(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10**6)
    for number in range(4):
        cache.put(key_of(number), bytes(10))
    assert cache.prune(10**6).num_files == 0
    assert cache.clear().num_files == 4
    assert cache.info().num_files == 0


def test_unfinished_files_of_the_dead_are_swept(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, 10**6)
    cache.put(key_of(0), b"x")
    (file,) = tmp_path.rglob("*.enc")
    old, young = file.parent / ".tmp-old", file.parent / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.info()
    assert not old.exists()
    assert young.exists()


def test_a_folder_others_may_write_to_is_refused(tmp_path: Path) -> None:
    FileCache(tmp_path, 10**6)
    (tmp_path / "encodings").chmod(0o777)
    with pytest.raises(OutputError, match="not yours alone"):
        FileCache(tmp_path, 10**6)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--no-cache"):
        FileCache(tmp_path / "file" / "cache", 10**6)


WRITER = """
import sys
from pathlib import Path
from md3cli.file_cache import FileCache
cache = FileCache(Path(sys.argv[1]), 40_000)
for round in range(60):
    key = f"{round % 12:02x}" * 32
    cache.put(key, key.encode() * 100)
    found = cache.get(f"{(round * 7) % 12:02x}" * 32)
    assert found is None or found == f"{(round * 7) % 12:02x}".encode() * 3200, "another key's bytes"
"""


@pytest.mark.process
def test_processes_share_a_folder(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(3)]
    assert [writer.wait(timeout=240) for writer in writers] == [0, 0, 0]
