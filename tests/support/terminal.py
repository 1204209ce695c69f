"""A terminal for tests."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal(**environment: str) -> Iterator[Terminal]:
    """A colour terminal, 100 characters wide, as stdout and stderr."""
    stream = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in ({"COLUMNS": "100", "TERM": "xterm-256color"} | environment).items():
            patch.setenv(name, value)
        yield stream
