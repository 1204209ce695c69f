"""What people see: documents and tables on stdout, progress, warnings and the summary on stderr.

Nothing in data (file names, model text, messages) can steer a terminal or is read as markup; to a pipe or a file a
document goes byte for byte. Colour and the moving bar are for terminals only; NO_COLOR, TERM=dumb and the options turn
them off. rich and tqdm are known in this room alone; how a run works is not. What is printed is here, what it says in
the files beside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from md3cli.console.progress import Progress, shown_progress, told_progress
from md3cli.console.summary import Summary, summary_lines
from md3cli.console.table import TableHead
from md3cli.records import RecordDict, Request, is_printable, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LEAST_WIDTH = 40  # of the table; a narrower terminal breaks its lines


def harmless(text: bytes) -> bytes:
    """Return UTF-8 for a terminal: what could steer it as `\\uNNNN`, which to a reader of JSON is the same."""
    shown = (c if c == "\n" or is_printable(c) else f"\\u{ord(c):04x}" for c in text.decode("utf-8", "replace"))
    return "".join(shown).encode()


def say(text: str, *, err: bool = False) -> None:
    """Print `text` on stdout (or stderr), harmless where that is a terminal."""
    stream = sys.stderr if err else sys.stdout
    print(harmless(text.encode("utf-8", "replace")).decode() if stream.isatty() else text, file=stream, flush=True)


def size_words(num_bytes: float) -> str:
    """Return a size as a person reads it: `512 bytes`, `6.6 MB`, `18.5 GB`."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


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


class LiveText:
    """An answer on stdout as it comes, and on stderr, dim, the thoughts before it.

    `has_thoughts` and `has_waiting` say whether stderr shows thoughts, and what is waited for before any text;
    `has_notes` whether it has a line about an answer that is not as it should be.
    """

    def __init__(self, *, has_thoughts: bool, has_waiting: bool, has_notes: bool = True) -> None:
        self._has_thoughts, self._has_waiting, self._has_notes = has_thoughts, has_waiting, has_notes
        self._is_waiting = self._is_thinking = self._is_answering = False

    def wait(self, text: str) -> None:
        """Say what is waited for; the next text takes its place."""
        if self._has_waiting:
            sys.stderr.write(f"\r\x1b[K{text}\r")  # the cursor stays before it, so that a warning lies over it
            sys.stderr.flush()
            self._is_waiting = True

    def think(self, text: str) -> None:
        """Print the next piece of what the model thinks."""
        if text and self._has_thoughts:
            self._stop_waiting()
            self._is_thinking = True
            sys.stderr.write(f"\x1b[2m{harmless(text.encode('utf-8', 'replace')).decode()}\x1b[22m")
            sys.stderr.flush()

    def answer(self, text: str) -> None:
        """Print the next piece of the answer."""
        if text:
            self._stop_waiting()
            self._stop_thinking()
            self._is_answering = True
            sys.stdout.write(harmless(text.encode("utf-8", "replace")).decode())
            sys.stdout.flush()

    def end(self) -> None:
        """End the line that was begun, if any was; a second call does nothing."""
        self._stop_waiting()
        self._stop_thinking()
        if self._is_answering:
            self._is_answering = False
            sys.stdout.write("\n")
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something about the answer that has ended, on stderr."""
        if self._has_notes:
            say(f"note: {text}", err=True)

    def _stop_waiting(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _stop_thinking(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            sys.stderr.write("\n")
            sys.stderr.flush()


class RunConsole:
    """The terminal of one run; streams are looked at when they are used, so that tests may replace them."""

    def __init__(
        self,
        *,
        is_quiet: bool = False,
        is_verbose: bool = False,
        has_progress: bool = True,
        has_color: bool = True,
    ) -> None:
        self.is_quiet, self.is_verbose = is_quiet, is_verbose
        self.has_progress = has_progress and not is_quiet
        self._has_color = has_color
        self._head: TableHead | None = None
        self._is_begun = False

    @property
    def is_stdout_terminal(self) -> bool:
        """Return whether a person, not a program, reads stdout."""
        return sys.stdout.isatty()

    def live_text(self) -> LiveText:
        """Return what prints a single answer while it grows; without colours thoughts could not be told from it."""
        has_escapes = os.environ.get("TERM") != "dumb" and (os.name != "nt" or "WT_SESSION" in os.environ)
        is_capable = sys.stderr.isatty() and has_escapes and not self.is_quiet
        has_thoughts = is_capable and self._has_color and not os.environ.get("NO_COLOR")
        return LiveText(
            has_thoughts=has_thoughts, has_waiting=is_capable and self.has_progress, has_notes=not self.is_quiet
        )

    @contextlib.contextmanager
    def progress(self, total: int | None, what: str = "") -> Iterator[Progress | None]:
        """Show the progress of a run or of `what`, or yield None where it is not wanted. `total` None: not known."""
        if not self.has_progress:
            yield None
            return
        with shown_progress(total, what) as display:
            yield display

    def told_progress(self, what: str) -> contextlib.AbstractContextManager[Callable[[int, int | None], object]]:
        """Return `progress.told_progress`, or what shows nothing where that is not wanted."""
        return told_progress(what) if self.has_progress else contextlib.nullcontext(lambda done, total: None)

    def say(self, text: str, *, style: str = "") -> None:
        """Print a line on stderr, unless --quiet; a moving bar makes room for it."""
        if not self.is_quiet:
            with _bar_aside(sys.stderr):
                _plain_console(sys.stderr, has_color=self._has_color).print(_text(text, style))

    def warn(self, text: str) -> None:
        """Print a line that begins with `warning:`."""
        self.say(f"warning: {text}", style="yellow")

    def begin_table(self, requests: Sequence[Request]) -> None:
        """Have the table of records say above its rows what all of `requests` share."""
        self._head = TableHead.of(requests)

    def show_record(self, record: RecordDict) -> None:
        """Print a record as a row of the table on stdout; above the first one what the table shows."""
        from rich.table import Table

        head = self._head = self._head or TableHead()
        with _bar_aside(sys.stdout):
            console = _plain_console(sys.stdout, has_color=self._has_color)
            width = max(console.width, LEAST_WIDTH)
            if not self._is_begun and head.title:
                console.print(_text(head.title, "bold"))
            for task in [*head.tasks, *(() if record["error"] else [str(record["task"])])]:
                if explanation := head.explain(task):
                    console.print(_text(explanation, "dim"))
            table = Table(box=None, show_header=not self._is_begun, pad_edge=False, header_style="bold")
            for name, share in head.columns():
                table.add_column(name, width=int(width * share) - 1, overflow="fold")
            asked, answer = head.cells(record, width)
            table.add_row(*map(_text, asked), _lines(answer, "red" if record["error"] else ""))
            console.print(table)
            self._is_begun = True

    def summarize(self, summary: Summary) -> None:
        """Print on stderr what was done."""
        width = _plain_console(sys.stderr, has_color=False).width if sys.stderr.isatty() else None
        for line, style in summary_lines(summary, is_verbose=self.is_verbose, width=width):
            self.say(line, style=style)


def _plain_console(stream: IO[str], *, has_color: bool) -> Console:
    """Return a rich console that reads nothing into what it prints: no markup, no emoji names, no highlights."""
    from rich.console import Console

    has_color = has_color and not os.environ.get("NO_COLOR")
    # Without a colour system rich writes no escape codes at all, no bold either.
    color_system: Literal["auto"] | None = "auto" if has_color else None
    return Console(file=stream, color_system=color_system, markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Container[str], is_ruled: bool
) -> None:
    """Print a table on stdout; cells are data, never markup.

    Args:
        right: the columns whose cells stand at the right.
        is_ruled: with a line below the head, which else is bold.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD) if is_ruled else Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(_text(column), justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*map(_text, row))
    Console().print(table)


def print_wrapped(text: str) -> None:
    """Print text on stdout, broken between words where a terminal is too narrow; it is data, never markup."""
    from rich.console import Console
    from rich.text import Text

    Console().print(Text(text))


@contextlib.contextmanager
def moving_bar(what: str, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr where that is a terminal; call what is yielded with so many bytes (or `unit`) more."""
    from tqdm import tqdm

    with tqdm(unit=unit, unit_scale=unit == "B", disable=None, desc=what) as bar:  # None: only on a terminal
        yield bar.update


def show_finding(name: str, health: str, text: str, advice: str, *, has_color: bool) -> None:
    """Print a check of `md3 doctor` on stdout: a line, and one more with what to do."""
    style = {"ok": "green", "note": "yellow"}.get(health, "red")
    console = _plain_console(sys.stdout, has_color=has_color)
    console.print(_text(f"{health:<5}", style) + _text(f"{name:<20} {text}"))
    if advice:
        console.print(_text(f"{'':<26}{advice}", "cyan"))


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(text), style=style)


def _lines(lines: Sequence[str], style: str) -> Text:
    from rich.text import Text

    return Text("\n".join(map(printable, lines)), style=style)


@contextlib.contextmanager
def _bar_aside(stream: IO[str]) -> Iterator[None]:
    """Clear a moving bar while something else is written to its terminal."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=stream):
        yield


def show_warning(message: Warning | str) -> None:
    """Print what a library or md3 itself warns of as one line.

    Python's own way shows the place in the code, and the message raw, which may hold a name out of somebody's file.
    """
    with _bar_aside(sys.stderr):
        sys.stderr.write(f"warning: {printable(str(message).strip())}\n")
