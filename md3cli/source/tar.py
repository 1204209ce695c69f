"""Where the members of a plain tar lie: one walk over its headers, nothing unpacked, nothing held.

A tar without compression is a list of byte ranges, so its pictures are opened like files, in any order and by several
workers (the WebDataset layout). Headers are of unknown origin, and a long name or a pax block says itself how long it
is: what tarfile reads of the headers of one member is bounded.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from typing import IO, cast

from md3cli.errors import InputError, RowError
from md3cli.records import printable

MEMBER_LIMIT_BYTES = 1 << 20  # of all the blocks that describe one member; names of 100 KB are met
_COMPRESSED = (  # how files begin that are called .tar and are packed, and what unpacks them to stdout
    (b"\x1f\x8b", "gzip -dc"),
    (b"\x28\xb5\x2f\xfd", "zstd -dc"),
    (b"\xfd7zXZ\0", "xz -dc"),
    (b"BZh", "bzip2 -dc"),
)
# All that tarfile raises on headers that make no sense; OverflowError is of a size that no file can have.
_UNREADABLE = (tarfile.TarError, OSError, ValueError, RecursionError, ArithmeticError, LookupError)


class _HeaderReader:
    """A file for tarfile to read headers from: of one member not more than MEMBER_LIMIT_BYTES."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._read = file.read
        self._left = MEMBER_LIMIT_BYTES

    def start_member(self) -> None:
        """Begin the headers of another member."""
        self._left = MEMBER_LIMIT_BYTES

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes.

        Raises:
            tarfile.ReadError: the member's headers are longer than any can be meant to be.
        """
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"a header that claims {size:,} bytes, more than {MEMBER_LIMIT_BYTES >> 20} MiB")
        return self._read(size)


def tar_members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, which messages call `name`, in their order.

    Raises:
        InputError: on the first step, when it is no plain tar.
        RowError: `decode`, the tar is damaged behind the members that came so far.
    """
    headers = _HeaderReader(file)
    try:
        tar = tarfile.open(fileobj=cast(IO[bytes], headers), mode="r:")  # noqa: SIM115 - closes nothing
    except _UNREADABLE as error:
        raise InputError(f"cannot read {printable(name)} as a tar: {_why_not(file, error)}") from error
    position = 0
    while True:
        headers.start_member()
        try:
            member = tar.next()
            if member is None:
                _check_end(file, tar.offset)
                return
            if member.size < 0 or tar.offset <= position:
                raise tarfile.ReadError("a member of negative size")  # would lead back for ever
            if sum(map(len, tar.pax_headers.values())) > MEMBER_LIMIT_BYTES:  # those for all members behind
                raise tarfile.ReadError("global headers without end")
        except _UNREADABLE as error:
            raise RowError("decode", f"the tar is damaged at byte {position}: {_words(error)}") from error
        position = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        yield member


def _why_not(file: IO[bytes], error: Exception) -> str:
    """Return why the head of a file is not a tar's: it may be compressed."""
    with contextlib.suppress(*_UNREADABLE):
        file.seek(0)
        head = file.read(8)
        if head.startswith(b"PK\x03\x04"):
            return "it is a zip archive; unpack it, and give the folder"
        if command := next((command for start, command in _COMPRESSED if head.startswith(start)), None):
            return f"it is compressed; unpack it: {command} OLD.tar > NEW.tar"
    return printable(str(error))


def _words(error: Exception) -> str:
    if isinstance(error, RecursionError):  # tarfile calls itself for each
        return "hundreds of headers for one member"
    return printable((error.strerror if isinstance(error, OSError) else None) or str(error))


def _check_end(file: IO[bytes], offset: int) -> None:
    # tarfile takes a damaged header for the end; only zeros, or the end of the file, are one.
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("no valid header")
