"""Servers on the loopback that fail as they are told: a web server of bytes in memory, and a door before moto's S3."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from PIL import Image
from quiet_server import QuietServer

WITHOUT_EXTRA = "needs the extra: pip install 'md3cli[remote]'"


@dataclass(frozen=True)
class Fault:
    """How the first `times` requests for a path fail; None: all of them.

    One of: another `status` (with `headers`); the body cut after `cut_at` bytes though its length was told in full;
    a `pause_s` before each `drip` bytes of the body; a Content-Length that `claims` so many bytes (-1: none is told).
    `is_late`: what was asked is done before the other `status` says that it was not.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    pause_s: float = 0.0
    drip: int = 1
    claims: int | None = None
    times: int | None = None
    is_late: bool = False


class FaultyServer:
    """Serves on 127.0.0.1. `faults` by path (unquoted, with a slash in front); `requests` counts what was asked."""

    def __init__(self) -> None:
        self.faults: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.log: list[tuple[str, dict[str, str]]] = []
        self._lock = threading.Lock()
        self._server = QuietServer(("127.0.0.1", 0), self._handler_class())
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        self.faults.clear()
        self.requests.clear()
        self.log.clear()

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request that does not fail."""
        raise NotImplementedError

    def _fault_of(self, path: str, headers: dict[str, str]) -> Fault:
        with self._lock:
            self.requests[path] += 1
            self.log.append((path, headers))
            fault = self.faults.get(path, Fault())
            return fault if fault.times is None or self.requests[path] <= fault.times else Fault()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        fault = self._fault_of(path, dict(handler.headers.items()))
        if fault.status != 200:
            if fault.is_late:
                self.answer(handler)
            else:
                handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
            status, headers, body = fault.status, {}, b""
        else:
            status, headers, body = self.answer(handler)
        claimed = len(body) if fault.claims is None else fault.claims
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"} | fault.headers
        handler.send_response(status)
        told = headers.pop("Head-Length", str(claimed))
        for name, value in (headers | ({"Content-Length": told} if claimed >= 0 else {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        if fault.cut_at is not None or claimed != len(body):
            handler.close_connection = True
            body = body[: fault.cut_at]
        with contextlib.suppress(OSError):
            step = fault.drip if fault.pause_s else max(1, len(body))
            for at in range(0, len(body), step):
                time.sleep(fault.pause_s)
                handler.wfile.write(body[at : at + step])
                handler.wfile.flush()

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_any(self) -> None:
                server._handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

            def log_message(self, *args: Any) -> None:
                """Silence."""

        return Handler


class WebServer(FaultyServer):
    """`files` by path; a path that ends with a slash shows a page of what is below it, as Apache does."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.has_ranges = True
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.files.clear()
        self.has_ranges = True

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        path = unquote(urlsplit(handler.path).path)
        if path.endswith("/"):
            page = self._page(path)
            return (200, {"Content-Type": "text/html"}, page) if page else (404, {}, b"")
        data = self.files.get(path)
        if data is None:
            return 404, {}, b""
        wanted = handler.headers.get("Range", "").removeprefix("bytes=")
        if not wanted or not self.has_ranges:
            return 200, {"Content-Type": "application/octet-stream"}, data
        first, _, last = wanted.partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]

    def _page(self, folder: str) -> bytes:
        below = [path.removeprefix(folder) for path in self.files if path.startswith(folder)]
        names = sorted({name.partition("/")[0] + "/" * ("/" in name) for name in below})
        links = "".join(f'<li><a href="{name}">{name}</a>' for name in names)
        head = '<a href="../">Parent</a><a href="?C=N;O=D">Name</a><a href="http://elsewhere/x.png">ad</a>'
        return f"<html><body>{head}<ul>{links}</ul></body></html>".encode() if names else b""


class HubServer(FaultyServer):
    """A data set `a/b` of the Hugging Face Hub: what of its interface a file system of it asks for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        super().__init__()

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(handler.path).path).strip("/")
        if path.startswith("datasets/a/b/resolve/main/"):
            return self._file(path.removeprefix("datasets/a/b/resolve/main/"), handler.headers.get("Range", ""))
        what, _, rest = path.removeprefix("api/datasets/a/b").strip("/").partition("/")
        found: Any = None
        if (what, rest) in (("", ""), ("revision", "main")):
            found = {"id": "a/b", "sha": "0" * 40, "siblings": []}
        elif what == "tree":
            found = self._folder(rest.partition("/")[2])
        elif what == "paths-info":
            asked = [value for name, value in parse_qsl(body.decode()) if name == "paths"]
            below = [entry for name in asked for entry in self._folder(name.rpartition("/")[0])]
            found = [entry for entry in below if entry["path"] in asked]
        if found is None:
            return 404, {}, b""
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _folder(self, folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        names = sorted({name.removeprefix(prefix).partition("/")[0] for name in self.files if name.startswith(prefix)})
        return [
            {"type": "file", "path": prefix + name, "size": len(self.files[prefix + name]), "oid": "0" * 40}
            if prefix + name in self.files
            else {"type": "directory", "path": prefix + name, "oid": "0" * 40}
            for name in names
        ]

    def _file(self, name: str, wanted: str) -> tuple[int, dict[str, str], bytes]:
        data = self.files.get(name)
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        facts = {"ETag": '"0"', "X-Repo-Commit": "0" * 40}
        if not wanted:
            return 200, facts, data
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        return 206, facts | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}, part


class StoreDoor(FaultyServer):
    """Hands requests on to moto's S3 server; faults by `/bucket/key`. Lists `page_size` names at a time.

    Of requests `dropped_headers` (in lower case) are not handed on, as a store that does not know them would do.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.page_size = 1000
        self.dropped_headers: set[str] = set()
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.page_size = 1000
        self.dropped_headers = set()

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        length = int(handler.headers.get("Content-Length") or 0)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(connection):
            pages = f"&max-keys={self.page_size}" if "list-type=2" in handler.path else ""
            headers = {name: v for name, v in handler.headers.items() if name.lower() not in self.dropped_headers}
            connection.request(handler.command, handler.path + pages, _whole_body(handler, length), headers)
            answer = connection.getresponse()
            hop_by_hop = {"connection", "transfer-encoding", "server", "date"}
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in hop_by_hop}
            body = answer.read()
            if handler.command == "HEAD" and "Content-Length" in headers:
                headers["Head-Length"] = headers["Content-Length"]
            return answer.status, headers, body


def _whole_body(handler: BaseHTTPRequestHandler, length: int) -> bytes:
    body = handler.rfile.read(length)
    if len(body) < length:  # who was writing has been killed; moto would wait for the rest
        raise ConnectionAbortedError
    return body


@contextlib.contextmanager
def serving(server: FaultyServer) -> Iterator[FaultyServer]:
    try:
        yield server
    finally:
        server.close()


def picture(number: int, *, side: int = 24, format: str = "PNG") -> bytes:
    """A small picture, another for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side + number % 7, side), (number % 256, number // 256, 99)).save(buffer, format)
    return buffer.getvalue()


def incompressible(num_bytes: int) -> bytes:
    """A PNG of about so many bytes."""
    side = max(8, int((num_bytes / 3) ** 0.5))
    pixels = bytes((i * 7919 >> 3) % 251 ^ (i % 256) for i in range(side * side * 3))
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(buffer, "BMP")
    return buffer.getvalue()
