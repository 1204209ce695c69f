"""A web server of the standard library for tests, which writes nothing into what they read of stderr."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer
from typing import Any


class QuietServer(ThreadingHTTPServer):
    """Says nothing of clients who hang up between two requests, as those of a killed or refused run do.

    The standard library would print a traceback of it at any later moment, into what another test reads of stderr.
    Any other error of a handler is one of the test's own code, and is kept for `server_close` to raise.
    """

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._error: BaseException | None = None
        super().__init__(*arguments)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self._error = error

    def server_close(self) -> None:
        super().server_close()
        if self._error is not None:
            raise self._error
