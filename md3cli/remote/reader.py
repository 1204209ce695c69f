"""The one door to everything remote: what stands at an address, what a folder holds, the bytes of a file.

A manifest, a tar or a Parquet file is opened as a seekable file and read by ranges, a block at a time: the headers of
a tar cost little where its members are large, and one pass over it where they are small. A file on a web server that
gives no ranges is read once, into a nameless file of the cache folder. A picture is read whole, within limits and
with retries, by the threads that fetch ahead of the decode workers.
"""

from __future__ import annotations

import contextlib
import html.parser
import io
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from typing import IO
from urllib.parse import unquote, urljoin, urlsplit

from md3cli.errors import ImageError, InputError
from md3cli.files import scratch_folder
from md3cli.records import ImageItem
from md3cli.remote import stores
from md3cli.remote.address import is_web, shown
from md3cli.remote.hosts import FetchOptions
from md3cli.remote.http import Web
from md3cli.remote.retry import ByteBudget, FetchError, Patience, RangeError, of_exception, truncated
from md3cli.remote.stores import Calls, Facts, ListedName

PIECE_BYTES = 8 << 20  # of an object store, in one request; most pictures are smaller
PAGE_LIMIT_BYTES = 64 << 20
_web = cache(Web)  # connections are shared by all who follow the same rules


class Reader:
    """Reads what is remote by the rules of one run; one for each user of it, for all its threads."""

    def __init__(self, options: FetchOptions) -> None:
        self.timeout_s, self.retries = options.timeout_s, options.retries
        self._rules = options.rules
        self._calls = Calls()

    def close(self) -> None:
        """Cancel what is under way."""
        self._calls.close()

    def facts(self, address: str) -> Facts:
        """Return what stands at an address; an HTML page is taken for a folder.

        Raises:
            FetchError: it cannot be looked at; tried several times.
        """
        if not is_web(address):
            return self.retries.run(lambda: stores.facts(address))
        return self.retries.run(lambda: self._web_facts(address))

    def _web_facts(self, address: str) -> Facts:
        try:
            body = _web(self._rules).get(address, self._calls, self.timeout_s, start=0, end=1)
        except RangeError:  # an empty file
            return Facts(False, 0, True)
        with contextlib.closing(body):
            return Facts(body.is_page, body.total, body.is_partial)

    def entries(self, folder: str) -> list[ListedName]:
        """Return the names in a folder, in any order; on a web server, the names that its page links to.

        Raises:
            FetchError: it cannot be listed; tried several times.
        """
        if is_web(folder):
            return _linked_entries(folder, self.read(folder.rstrip("/") + "/", PAGE_LIMIT_BYTES))
        return self.retries.run(lambda: list(stores.entries(folder)))

    def read(self, address: str, limit_bytes: int, *, start: int = 0, end: int | None = None) -> bytes:
        """Return a file, or bytes `start` to `end` (exclusive) of it.

        Raises:
            FetchError: it cannot be read; tried several times.
            ImageError: `too_large`.
        """

        def attempt() -> bytes:
            return b"".join(self.pieces(address, Patience(self.timeout_s), limit_bytes, start=start, end=end))

        return self.retries.run(attempt)

    def pieces(
        self, address: str, patience: Patience, limit_bytes: int, *, start: int = 0, end: int | None = None
    ) -> Iterator[bytes]:
        """Yield a file, or a part of it, piece by piece, in one attempt.

        Raises:
            ImageError: `too_large`, as soon as more than `limit_bytes` are announced or came.
            FetchError, and whatever stores and aiohttp raise: see `retry.of_exception`.
        """
        num_bytes = 0
        source = self._web_pieces if is_web(address) else self._store_pieces
        for piece in source(address, patience, limit_bytes, start, end):
            num_bytes += len(piece)
            if num_bytes > limit_bytes:
                raise _too_large(num_bytes, limit_bytes)
            patience.came(len(piece))
            yield piece

    def _web_pieces(
        self, address: str, patience: Patience, limit_bytes: int, start: int, end: int | None
    ) -> Iterator[bytes]:
        is_part = start > 0 or end is not None
        body = _web(self._rules).get(
            address, self._calls, patience.left_s(), start=start if is_part else None, end=end if is_part else None
        )
        with contextlib.closing(body):
            if is_part and not (body.is_partial and body.first == start):
                raise FetchError("io", "the server does not give parts of files; download this one first")
            if body.num_bytes is not None and body.num_bytes > limit_bytes:
                raise _too_large(body.num_bytes, limit_bytes)
            while piece := body.read(patience.left_s()):
                yield piece

    def _store_pieces(
        self, address: str, patience: Patience, limit_bytes: int, start: int, end: int | None
    ) -> Iterator[bytes]:
        last = start + limit_bytes + 1 if end is None else end  # one more than allowed tells that it is too large
        at = start
        while at < last:
            wanted = min(PIECE_BYTES, last - at)
            try:
                piece = stores.read(address, self._calls, patience.left_s(), at, at + wanted)
            except OSError as error:
                failure = of_exception(error)
                if isinstance(failure, RangeError) and at > start:
                    return  # it ended where the piece before did
                raise failure from error
            yield piece
            at += len(piece)
            if len(piece) < wanted:
                return


def _too_large(num_bytes: int, limit_bytes: int) -> ImageError:
    return FetchError("too_large", f"the file has {num_bytes:,} bytes or more; --max-file-size is {limit_bytes:,}")


class _Links(html.parser.HTMLParser):
    """Collects the `href` of every `<a>`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _linked_entries(folder: str, page: bytes) -> list[ListedName]:
    """Return what lies directly in `folder` among the links of its page; one with a slash at its end is a folder."""
    links = _Links()
    links.feed(page.decode("utf-8", "replace"))
    base = urlsplit(folder.rstrip("/") + "/")
    names: dict[str, ListedName] = {}
    for link in links.found:
        try:
            target = urlsplit(urljoin(base.geturl(), link))
        except ValueError:
            continue
        inside = target.path.removeprefix(base.path)
        is_below = target.path.startswith(base.path) and target.netloc == base.netloc and not target.query
        name = inside.removesuffix("/")
        if is_below and name and "/" not in name and unquote(name) not in (".", ".."):
            names[name] = ListedName(name, inside.endswith("/"))
    return list(names.values())


def explain(address: str, error: ImageError) -> str:
    """Return for a message which address could not be read, and why."""
    return f"{shown(address)}: {error}"


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
    """Open the file at `address`, to be read and sought in.

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


class Fetcher:
    """Fetches whole pictures, for any number of threads."""

    def __init__(self, options: FetchOptions, budget: ByteBudget) -> None:
        self._options, self._budget = options, budget
        self._reader = Reader(options)
        self._stopped = threading.Event()

    def fetch(self, item: ImageItem, number: int) -> bytes:
        """Return the bytes of `item`, taken from the budget under `number`.

        Raises:
            FetchError: as its record says it; what may pass was tried again.
            CancelledError: `close` was called.
        """
        return self._options.retries.run(lambda: self._attempt(item, number), stopped=self._stopped)

    def close(self) -> None:
        """Stop what is under way."""
        self._stopped.set()
        self._reader.close()

    def _attempt(self, item: ImageItem, number: int) -> bytes:
        self._budget.start_over(number)
        patience = Patience(self._options.timeout_s)
        end = None if item.size is None else item.offset + item.size
        pieces: list[bytes] = []
        for piece in self._reader.pieces(item.path, patience, self._options.limit_bytes, start=item.offset, end=end):
            patience.paused(self._budget.take(number, len(piece)))
            pieces.append(piece)
        data = b"".join(pieces)
        if item.size is not None and len(data) < item.size:
            raise truncated(item.size)
        if not data:
            raise FetchError("empty", "the file is empty (0 bytes)")
        return data
