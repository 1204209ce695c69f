"""The web server of the other tests: who hangs up is not told of, what the tests do wrong is."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from threading import Thread

import pytest
from chaos import wait_until
from quiet_server import QuietServer

AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: the connection is reset, not closed


def serve(act: Callable[[], None]) -> tuple[QuietServer, list[int]]:
    """A server, and its requests that have ended."""
    ended: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            act()
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Silence."""

    class Counting(QuietServer):
        def shutdown_request(self, request: object) -> None:
            ended.append(1)
            super().shutdown_request(request)  # type: ignore[arg-type]

    server = Counting(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server, ended


def ask_and_reset(server: QuietServer) -> None:
    with socket.create_connection(server.server_address[:2]) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(12)


def test_a_client_who_hangs_up_is_not_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    server, ended = serve(lambda: None)
    ask_and_reset(server)
    wait_until(lambda: bool(ended), "the connection did not end")
    server.shutdown()
    server.server_close()
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_tests_own_is_raised_at_the_end() -> None:
    def fail() -> None:
        raise KeyError("a handler")

    server, ended = serve(fail)
    ask_and_reset(server)
    wait_until(lambda: bool(ended), "the request did not end")
    server.shutdown()
    with pytest.raises(KeyError, match="a handler"):
        server.server_close()
