"""A remote file as an open, seekable one: for manifests, for the headers of a tar, for Parquet.

Read by ranges, a block at a time, so that a tar's headers cost little more than themselves where its members are
large, and no more than one pass over it where they are small. A web server that gives no parts of files is read
once, into a nameless file of the cache folder.
"""

from __future__ import annotations

import io
import tempfile
from typing import IO

from md3cli.errors import ImageError, InputError
from md3cli.remote.patience import Patience
from md3cli.remote.reading import Reader, explain
from md3cli.scratch import scratch_folder

BLOCK_BYTES = 1 << 18
DOWNLOAD_LIMIT_BYTES = 16 << 30
RANGE_LIMIT_BYTES = 1 << 40  # of one read; whoever reads knows what it asks for


class RangedFile(io.RawIOBase):
    """The bytes at an address, whose size is known, read where they are asked for."""

    def __init__(self, reader: Reader, address: str, size: int) -> None:
        super().__init__()
        self._reader, self._address, self._size, self._at = reader, address, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Raises InputError: the bytes cannot be had. Not OSError, which readers of tar and Parquet take for damage."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        try:
            data = self._reader.read(self._address, RANGE_LIMIT_BYTES, start=self._at, end=end)
        except ImageError as error:
            raise InputError(f"cannot read {explain(self._address, error)}; then the same command goes on") from error
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_remote(address: str, reader: Reader) -> IO[bytes]:
    """The file at `address`.

    Raises:
        ImageError: it cannot be opened.
    """
    facts = reader.facts(address)
    if facts.is_folder:
        raise ImageError("not_a_file", "this is a folder or a web page, not a file")
    if facts.has_ranges and facts.size is not None:
        return io.BufferedReader(RangedFile(reader, address, facts.size), BLOCK_BYTES)
    return _downloaded(address, reader)


def _downloaded(address: str, reader: Reader) -> IO[bytes]:
    file = tempfile.TemporaryFile(prefix="fetched-", dir=scratch_folder())  # noqa: SIM115 - whoever reads it closes it

    def attempt() -> None:
        file.seek(0)
        file.truncate()
        for piece in reader.pieces(address, Patience(reader.timeout_s), DOWNLOAD_LIMIT_BYTES):
            file.write(piece)

    try:
        reader.retries.run(attempt)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file
