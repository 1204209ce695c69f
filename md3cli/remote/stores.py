"""Object stores (`s3:// gs:// hf://`) through fsspec: facts, listings, byte ranges.

Credentials and settings come from the environment alone, as each store's own tools read them: AWS_*, GOOGLE_*,
HF_TOKEN, and fsspec's FSSPEC_S3_* (FSSPEC_S3_ANON=true for a public bucket). Threads hand their coroutines to the one
event loop that fsspec keeps for all its stores.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple, TypeVar

import fsspec
from fsspec.asyn import get_loop

from md3cli.remote.address import scheme_of
from md3cli.remote.hosts import require_extra

_T = TypeVar("_T")


class Calls:
    """Runs coroutines and can cancel all that are under way, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[Future[Any]] = set()
        self._is_closed = False

    def run(self, coroutine: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Return what `coroutine` returns.

        Raises:
            TimeoutError: it took longer; it is cancelled.
            CancelledError: `close` was called.
        """
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout_s), get_loop())
            self._under_way.add(future)
        try:
            return future.result()
        finally:
            future.cancel()  # where a signal ended the wait; else it is done
            with self._lock:
                self._under_way.discard(future)

    def close(self) -> None:
        """Cancel what is under way, and whatever is still asked for."""
        with self._lock:
            self._is_closed = True
            under_way = list(self._under_way)
        for future in under_way:
            future.cancel()


# We try again ourselves, within one image's time: botocore's own tries, and s3fs's, would multiply with ours.
_S3_OPTIONS = {"config_kwargs": {"max_pool_connections": 32, "retries": {"mode": "standard", "total_max_attempts": 1}}}
_lock = threading.Lock()
_open_stores: dict[str, Any] = {}


class ListedName(NamedTuple):
    """A name in a folder."""

    name: str
    is_folder: bool


class Facts(NamedTuple):
    """What stands at an address.

    `size` is in bytes, None for a folder or where nobody says it; `has_ranges` says whether parts can be read.
    """

    is_folder: bool
    size: int | None
    has_ranges: bool


def facts(address: str) -> Facts:
    """Return what stands at an address; raises what the store raises."""
    found = store_for(address).info(_key(address).rstrip("/"))
    is_folder = found.get("type") == "directory"
    return Facts(is_folder, None if is_folder else int(found.get("size") or 0), True)


def read(address: str, calls: Calls, timeout_s: float, start: int, end: int) -> bytes:
    """Return bytes `start` to `end` (exclusive), fewer where the file ends before; raises what the store raises."""
    store, key = store_for(address), _key(address)
    if store.async_impl:
        data = calls.run(store._cat_file(key, start=start, end=end), timeout_s)
    else:
        data = store.cat_file(key, start=start, end=end)
    return bytes(data)


def entries(address: str) -> Iterator[ListedName]:
    """Yield the names in a folder, in any order; raises what the store raises."""
    store, key = store_for(address), _key(address).rstrip("/")
    if "s3" in store.protocol:
        yield from _s3_entries(store, key)
        return
    for found in store.ls(key, detail=True, refresh=True):
        name = found["name"].rstrip("/").rpartition("/")[2]
        if found["name"].strip("/") != key.strip("/"):
            yield ListedName(name, found.get("type") == "directory")


def _s3_entries(store: Any, key: str) -> Iterator[ListedName]:
    bucket, _, folder = key.partition("/")
    prefix = f"{folder}/" if folder else ""
    # Page by page: `ls` would hold a kilobyte for each of what may be millions of objects in one folder.
    query = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", **store.req_kw}
    while True:
        page = store.call_s3("list_objects_v2", **query)
        for found in page.get("CommonPrefixes", ()):
            yield ListedName(found["Prefix"][len(prefix) : -1], True)
        for found in page.get("Contents", ()):
            yield ListedName(found["Key"][len(prefix) :], False)
        if not page.get("IsTruncated"):
            return
        query["ContinuationToken"] = page["NextContinuationToken"]


def store_for(address: str) -> Any:
    """Return fsspec's file system for an address; there is one of each kind in a process."""
    require_extra(address)
    protocol = scheme_of(address)  # fsspec calls its file systems as we call the schemes
    with _lock:
        if protocol not in _open_stores:
            options = _S3_OPTIONS if protocol == "s3" else {}
            store = _open_stores[protocol] = fsspec.filesystem(protocol, use_listings_cache=False, **options)
            store.retries = 1  # of s3fs: see _S3_OPTIONS
        return _open_stores[protocol]


def _key(address: str) -> str:
    """Return bucket and key in one, as fsspec's methods want them."""
    return address.partition("://")[2]
