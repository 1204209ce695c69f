"""Where the members of a plain tar lie: one walk over its headers, nothing unpacked, nothing held.

A tar without compression is a list of byte ranges, so its pictures are opened like files, in any
order and by several workers (the WebDataset layout).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO

from md3cli.errors import InputError, RowError
from md3cli.records import printable


def tar_members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo]:
    """The members in their order. `name` is how the tar is called.

    Raises:
        InputError: on the first step, when it is no plain tar.
        RowError: `decode`, it is damaged behind the members that came so far.
    """
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closing it is closing `file`
    except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {printable(name)} as a tar: {printable(str(error))}") from error
    position = 0
    while True:
        try:
            member = tar.next()
            if member is None:
                _check_end(file, tar.offset)
                return
            if member.size < 0 or tar.offset <= position:
                raise tarfile.ReadError("a member of negative size")  # would lead back for ever
        except (tarfile.TarError, OSError, ValueError, RecursionError) as error:
            raise RowError("decode", f"the tar is damaged at byte {position}: {printable(str(error))}") from error
        position = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header
        yield member


def _check_end(file: IO[bytes], offset: int) -> None:
    """tarfile takes a damaged header for the end: only zeros or the end of the file are one."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("no valid header")
