"""Text from files and models to a terminal: nothing in it can steer the terminal.

To a pipe or a file the same text goes byte for byte. Escapes are those of JSON, so that a document that is
printed reads as before.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from md3cli.records import is_printable


def harmless(text: bytes) -> bytes:
    """UTF-8 for a terminal: what could steer it as `\\uNNNN`, which to a reader of JSON is the same; lines stay."""
    shown = (c if c == "\n" or is_printable(c) else f"\\u{ord(c):04x}" for c in text.decode("utf-8", "replace"))
    return "".join(shown).encode()


def say(text: str, *, err: bool = False) -> None:
    """Print `text` on stdout (or stderr), harmless where that is a terminal."""
    stream = sys.stderr if err else sys.stdout
    print(harmless(text.encode("utf-8", "replace")).decode() if stream.isatty() else text, file=stream, flush=True)


def print_bytes(text: bytes) -> None:
    """Print UTF-8 as it is, harmless where stdout is a terminal."""
    sys.stdout.buffer.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.buffer.flush()


def print_document(path: Path) -> None:
    """Print a finished document, byte for byte where stdout is no terminal."""
    with path.open("rb") as file:
        if sys.stdout.isatty():
            sys.stdout.buffer.writelines(map(harmless, file))
        else:
            shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.flush()
