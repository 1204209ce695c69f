"""One door to everything remote: what stands at an address, what is in a folder, the bytes of a file."""

from __future__ import annotations

import contextlib
import html.parser
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from md3cli.errors import ImageError
from md3cli.remote import stores
from md3cli.remote.address import is_web, shown
from md3cli.remote.calls import Calls
from md3cli.remote.failures import FetchError, RangeError, of_exception
from md3cli.remote.options import FetchOptions
from md3cli.remote.patience import Patience
from md3cli.remote.stores import Entry
from md3cli.remote.web import Web

PIECE_BYTES = 8 << 20  # of an object store, in one request; most pictures are smaller
PAGE_LIMIT_BYTES = 64 << 20
_web = cache(Web)  # connections are shared by all who follow the same rules


class Facts(NamedTuple):
    """What stands at an address. `size` None: not said; `has_ranges`: parts of it can be read."""

    is_folder: bool
    size: int | None
    has_ranges: bool


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
        """What stands at an address; an HTML page is taken for a folder.

        Raises:
            FetchError: it cannot be looked at; tried several times.
        """
        if not is_web(address):
            found = self.retries.run(lambda: stores.facts(address))
            return Facts(found.is_folder, found.size, True)
        return self.retries.run(lambda: self._web_facts(address))

    def _web_facts(self, address: str) -> Facts:
        try:
            body = _web(self._rules).get(address, self._calls, self.timeout_s, start=0, end=1)
        except RangeError:  # an empty file
            return Facts(False, 0, True)
        with contextlib.closing(body):
            return Facts(body.is_page, body.total, body.is_partial)

    def entries(self, folder: str) -> list[Entry]:
        """The names in a folder, in any order; of a web server, those that its page links to.

        Raises:
            FetchError: it cannot be listed; tried several times.
        """
        if is_web(folder):
            return _linked_entries(folder, self.read(folder.rstrip("/") + "/", PAGE_LIMIT_BYTES))
        return self.retries.run(lambda: list(stores.entries(folder)))

    def read(self, address: str, limit_bytes: int, *, start: int = 0, end: int | None = None) -> bytes:
        """A file, or bytes `start` to `end` (exclusive) of it.

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
        """A file, or a part of it, piece by piece, in one attempt.

        Raises:
            ImageError: `too_large`, as soon as more than `limit_bytes` are announced or came.
            FetchError, and whatever stores and aiohttp raise: see `failures.of_exception`.
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


def _linked_entries(folder: str, page: bytes) -> list[Entry]:
    """What lies directly in `folder` among the links of its page; a slash at the end says it is a folder."""
    links = _Links()
    links.feed(page.decode("utf-8", "replace"))
    base = urlsplit(folder.rstrip("/") + "/")
    names: dict[str, Entry] = {}
    for link in links.found:
        try:
            target = urlsplit(urljoin(base.geturl(), link))
        except ValueError:
            continue
        inside = target.path.removeprefix(base.path)
        is_below = target.path.startswith(base.path) and target.netloc == base.netloc and not target.query
        name = inside.removesuffix("/")
        if is_below and name and "/" not in name and unquote(name) not in (".", ".."):
            names[name] = Entry(name, inside.endswith("/"))
    return list(names.values())


def explain(address: str, error: ImageError) -> str:
    """For a message to the user: which address, what is wrong with it."""
    return f"{shown(address)}: {error}"
