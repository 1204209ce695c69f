"""Many small files about pictures, written by a child process while this one goes on to the next picture.

Creating files takes the system as long as a third of all the rest, or longer: 400,000 label files are there in 28 s
instead of 41 (2 cores, 2026-11-27). Threads would not help: each would wait for the interpreter's lock longer than for
the file system. The child is started once there are many; before that, on one core, and where a system has no such
children, this process writes. Knows nothing of what the files hold. Stands alone, because the child imports it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Self

from md3cli.child import Channel, Child, connect
from md3cli.errors import EngineError, ExportError
from md3cli.exporters.files import StagedFolder, write_new
from md3cli.records import printable
from md3cli.system import num_cores

UNTIL_WORTH_IT = 10_000  # files that this process writes first, so that small sets start no child
_BATCH_BYTES = 1 << 16
_FRAME = struct.Struct(">HI")  # lengths in bytes of a path and of what stands there


class SmallFiles:
    """Writes small files to a folder; a context, at whose end all are written.

    Only where the first name given for each is known to be free (`are_unique`), a child may write them: it answers
    nothing.
    """

    def __init__(self, folder: StagedFolder, *, are_unique: bool) -> None:
        self.folder = folder
        self._may_hand_over = are_unique and num_cores() > 1
        self._num_files = 0
        self._child: Child | None = None
        self._batch = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None and self._child is not None:
                self._send()
                self._send()  # an empty one: the last
                self._hear(self._child)
        finally:
            if self._child is not None:
                self._child.close()

    def write(self, candidates: Iterable[PurePosixPath], content: bytes, *, inside: str = "") -> PurePosixPath:
        """Write `content` to the first candidate that is free in the folder `inside`, which is there; return it.

        Raises:
            OSError: this file, or one before it, cannot be written.
            ExportError: the child is gone.
        """
        if self._num_files == UNTIL_WORTH_IT and self._may_hand_over:
            with suppress(EngineError, OSError):  # no room for a child, or no sockets for one
                self._child = Child("md3cli.exporters.small_files:write_for_parent")
        self._num_files += 1
        if self._child is None:
            return self.folder.write(candidates, content, inside=inside)
        name = next(iter(candidates))
        path = os.fsencode(f"{self.folder.path}/{inside}/{name}")
        self._batch += _FRAME.pack(len(path), len(content)) + path + content
        if len(self._batch) >= _BATCH_BYTES:
            self._send()
        return name

    def _send(self) -> None:
        assert self._child is not None
        try:
            self._child.channel.send_bytes(memoryview(len(self._batch).to_bytes(4) + self._batch))
        except OSError:  # it has ended: its last message says why
            self._hear(self._child)
        self._batch.clear()

    def _hear(self, child: Child) -> None:
        """Raise what the child met; return where it has written all."""
        try:
            said = child.channel.receive(None)
        except (EOFError, TimeoutError) as error:
            child.kill()
            raise ExportError(
                f"the process that writes the files has ended: {child.last_words() or 'killed'}"
            ) from error
        if "errno" in said:
            raise OSError(said["errno"], os.strerror(said["errno"]), printable(said["path"]))


def write_for_parent() -> None:
    """Write what the parent sends until an empty batch comes, and tell it; the first error ends it."""
    channel, path = connect(), ""
    with suppress(EOFError):  # the parent is gone
        try:
            while batch := _received(channel):
                for path, content in _files_in(batch):
                    write_new(path, content)
            channel.send({})
        except OSError as error:
            channel.send({"errno": error.errno, "path": path})


def _received(channel: Channel) -> bytearray:
    """Return the next batch; an empty one is the last."""
    length = bytearray(4)
    channel.receive_into(memoryview(length), None)
    batch = bytearray(int.from_bytes(length))
    channel.receive_into(memoryview(batch), None)
    return batch


def _files_in(batch: bytearray) -> Iterator[tuple[str, memoryview]]:
    """Yield the path and the content of each file in a batch."""
    view, start = memoryview(batch), 0
    while start < len(batch):
        path_bytes, content_bytes = _FRAME.unpack_from(batch, start)
        middle = start + _FRAME.size + path_bytes
        start_of_path, start = start + _FRAME.size, middle + content_bytes
        yield os.fsdecode(bytes(view[start_of_path:middle])), view[middle:start]
