"""http(s) over aiohttp, read piece by piece from ordinary threads.

fsspec's own http file system reads bodies whole, whatever their size, and follows redirects anywhere. Here every step
is looked at: which host is spoken to (hosts.py), where it sends on to, how much it sends. Apart from reader.py, its
only user, because what a server may do to its client is a question of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import socket
import urllib.request
from collections import OrderedDict
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from fsspec.asyn import get_loop
from yarl import URL

from md3cli import __version__
from md3cli.remote.hosts import HostRules, Zone, zone_of
from md3cli.remote.retry import FetchError, of_status, truncated
from md3cli.remote.stores import Calls

MAX_REDIRECTS = 5
PIECE_BYTES = 1 << 18
MAX_SIZE_DIGITS = 18  # of a file's bytes; Python refuses to read a number of thousands
_REDIRECTS = {301, 302, 303, 307, 308}
_HEADERS = {
    "User-Agent": f"md3cli/{__version__}",
    "Accept": "image/*,*/*;q=0.8",
    "Accept-Encoding": "identity",  # what is hashed and measured is the file itself
}
_MAX_KNOWN_HOSTS = 4096


class _RefusedHostError(OSError):
    """The resolver's way to say that a host lies where it must not."""

    def __init__(self, zone: Zone) -> None:
        super().__init__()
        self.zone = zone


class _KnownZones:
    """The zones of the hosts that were resolved last."""

    def __init__(self) -> None:
        self._zones: OrderedDict[str, Zone] = OrderedDict()

    def note(self, host: str, zone: Zone) -> None:
        self._zones[host] = zone
        self._zones.move_to_end(host)
        while len(self._zones) > _MAX_KNOWN_HOSTS:
            self._zones.popitem(last=False)

    def of(self, host: str) -> Zone:
        """Return the zone of a host; an unknown one counts as public, which allows least."""
        return zone_of(host) or self._zones.get(host, Zone.PUBLIC)


class _ZonedResolver(AbstractResolver):
    """The system's resolver, without the addresses that lie farther than `farthest`."""

    def __init__(self, farthest: Zone, known: _KnownZones) -> None:
        self._farthest, self._known = farthest, known
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        zones = [zone_of(address["host"]) or Zone.PUBLIC for address in found]
        self._known.note(host, min(zones, default=Zone.PUBLIC))
        allowed = [address for address, zone in zip(found, zones, strict=True) if zone <= self._farthest]
        if not allowed:
            raise _RefusedHostError(min(zones, default=Zone.PRIVATE))
        return allowed

    async def close(self) -> None:
        await self._resolver.close()


class Body:
    """A server's answer, whose body is read piece by piece.

    Attributes:
        num_bytes: how long the body says it is; None where it does not.
        is_partial: whether it is the range that was asked for, not the whole file.
        total: the bytes of the whole file; None where it is not said.
        first: the offset in the file at which a partial body begins.
        is_page: whether it is HTML.
    """

    def __init__(self, response: aiohttp.ClientResponse, calls: Calls) -> None:
        self._response, self._calls = response, calls
        self.num_bytes = response.content_length
        self.is_partial = response.status == 206
        content_range = response.headers.get("Content-Range", "")
        size = content_range.rpartition("/")[2] if self.is_partial else ""
        self.total = _number(size) if self.is_partial else self.num_bytes
        self.first = _number(content_range.partition("-")[0].rpartition(" ")[2]) or 0
        self.is_page = response.content_type == "text/html"

    def read(self, timeout_s: float) -> bytes:
        """Return the next piece; empty at the end.

        Raises:
            FetchError: the body ended too early.
            TimeoutError: nothing came.
        """
        try:
            return self._calls.run(self._response.content.read(PIECE_BYTES), timeout_s)
        except (aiohttp.ClientPayloadError, ConnectionError) as error:
            raise truncated(self.num_bytes) from error

    def close(self) -> None:
        """Let go of the connection, which is used again if the body was read to its end."""
        with contextlib.suppress(RuntimeError):  # the loop is gone at the end of the process
            get_loop().call_soon_threadsafe(self._response.close)


def _number(text: str) -> int | None:
    """Return a size in bytes as a server says it; None where it says none, or none that any file has."""
    return int(text) if text.isdecimal() and len(text) <= MAX_SIZE_DIGITS else None


class Web:
    """Requests by the rules of one run; connections are kept and shared by all threads."""

    def __init__(self, rules: HostRules) -> None:
        self._rules = rules
        self._known = _KnownZones()
        self._sessions: dict[Zone | None, aiohttp.ClientSession] = {}
        atexit.register(self.close)

    def get(
        self, address: str, calls: Calls, timeout_s: float, *, start: int | None = None, end: int | None = None
    ) -> Body:
        """Return the answer to a GET, of bytes `start` to `end` (exclusive) where given.

        Raises:
            FetchError: the server says no, or sends to where nothing may be fetched from.
            TimeoutError, OSError, aiohttp.ClientError: it does not answer.
        """
        headers = {}
        if start is not None or end is not None:
            headers["Range"] = f"bytes={start or 0}-{'' if end is None else end - 1}"
        return Body(calls.run(self._get(address, headers), timeout_s), calls)

    def close(self) -> None:
        """Close all connections."""
        sessions = list(self._sessions.values())
        self._sessions.clear()
        for session in sessions:
            with contextlib.suppress(RuntimeError, TimeoutError):
                asyncio.run_coroutine_threadsafe(session.close(), get_loop()).result(timeout=1.0)

    async def _get(self, address: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        try:
            url = URL(address)
            host = url.host or ""
        except ValueError as error:
            raise FetchError("bad_request", "the URL makes no sense") from error
        farthest = self._rules.farthest(host)
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get_one(url, farthest, headers)
            location = response.headers.get("Location", "")
            if response.status not in _REDIRECTS or not location:
                if response.status not in (200, 206):
                    response.close()
                    raise of_status(response.status, response.headers.get("Retry-After", ""))
                return response
            response.close()
            url = _next_url(url, location)
            if not self._rules.may_send_to(str(url)):
                raise FetchError("outside_root", "the server sends on to an address outside of --root")
            sender, host = self._known.of(host), url.host or ""
            farthest = self._rules.farthest_after(host, sender)
        raise FetchError("io", f"sent on more than {MAX_REDIRECTS} times")

    async def _get_one(self, url: URL, farthest: Zone, headers: dict[str, str]) -> aiohttp.ClientResponse:
        host = url.host or ""
        zone = zone_of(host) or Zone.PUBLIC
        if zone > farthest:
            raise _refused(zone)
        proxy = _proxy_for(url)
        session = self._session(None if proxy else farthest)
        try:
            return await session.get(url, headers=headers, proxy=proxy, allow_redirects=False)
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, _RefusedHostError):
                raise _refused(error.os_error.zone) from error
            raise
        except ValueError as error:  # aiohttp.InvalidURL among them
            raise FetchError("bad_request", "the URL makes no sense") from error

    def _session(self, farthest: Zone | None) -> aiohttp.ClientSession:
        """Return the session for hosts up to a zone; None: through a proxy, which resolves names itself."""
        if farthest not in self._sessions:
            resolver = None if farthest is None else _ZonedResolver(farthest, self._known)
            self._sessions[farthest] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=64, resolver=resolver),
                timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                headers=_HEADERS,
            )
        return self._sessions[farthest]


def _next_url(url: URL, location: str) -> URL:
    try:
        target = url.join(URL(location))
    except ValueError as error:
        raise FetchError("io", "sent on to a URL that makes no sense") from error
    if target.scheme not in ("http", "https"):
        raise FetchError("bad_request", f"sent on to a {target.scheme[:20]}: address, which is not fetched")
    return target.with_user(None)


def _refused(zone: Zone) -> FetchError:
    if zone is Zone.FORBIDDEN:
        return FetchError(
            "bad_request", "the address is link-local or a cloud's own, where no pictures are; it is not fetched"
        )
    return FetchError(
        "bad_request", "the host is in a private network, and only a manifest names it; --remote allows that"
    )


def _proxy_for(url: URL) -> str | None:
    """Return the proxy that the environment names for a URL."""
    proxies: dict[str, Any] = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host or ""):
        return None
    return str(proxy)
