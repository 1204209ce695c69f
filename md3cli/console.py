"""What people see: documents and tables on stdout, progress, warnings and the summary on stderr.

Nothing in data (file names, model text, messages) can steer a terminal or is read as markup; to a pipe or a file a
document goes byte for byte. Colour and the moving bar are for terminals only; NO_COLOR, TERM=dumb and the options turn
them off. rich and tqdm are known here alone; how a run works is not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from md3cli.records import RecordDict, is_printable, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

PLAIN_INTERVAL_S = 10.0  # between two progress lines where there is no terminal
MOST_OBJECTS_SHOWN = 6
SHOWN_LOAD_S = 0.1  # loading that took less is not worth a word


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


class Progress:
    """Images done of all, with rate and time left; call `update_to` as they are finished."""

    def __init__(self, stream: IO[str], total: int | None, *, is_bar: bool) -> None:
        self._stream, self._total = stream, total
        self._done = self._failed = 0
        self._started_at = self._told_at = time.monotonic()
        self._bar: Any = None
        if is_bar:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="img", file=stream, dynamic_ncols=True, smoothing=0.1)

    def update_to(self, num_images: int, num_failed: int) -> None:
        """Show that so many images are finished, and so many requests failed, of all so far."""
        step, self._done, self._failed = num_images - self._done, num_images, num_failed
        if self._bar is not None:
            if num_failed:
                self._bar.set_postfix(failed=num_failed, refresh=False)
            self._bar.update(step)
        elif time.monotonic() - self._told_at >= PLAIN_INTERVAL_S:
            self._told_at = time.monotonic()
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    def restart_clock(self) -> None:
        """Reckon rate and time left from now on."""
        self._started_at = time.monotonic()
        if self._bar is not None:
            self._bar.start_t = self._bar.last_print_t = self._bar._time()

    def describe(self, text: str) -> None:
        """Put what is going on before the bar; empty: nothing special."""
        if self._bar is not None:
            self._bar.set_description(text)

    def line(self) -> str:
        """Return the state as one plain line: `1200/5000 24.1 img/s eta 2:38 failed 3`."""
        rate = self._done / max(time.monotonic() - self._started_at, 1e-9)
        parts = [f"{self._done}" if self._total is None else f"{self._done}/{self._total}", f"{rate:.1f} img/s"]
        if self._total is not None and self._done:
            parts.append(f"eta {clock((self._total - self._done) / rate)}")
        if self._failed:
            parts.append(f"failed {self._failed}")
        return " ".join(parts)

    def close(self) -> None:
        """Leave the last state of the bar standing."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def loading(progress: Progress | None) -> Iterator[None]:
    """Say that a model is being loaded, and reckon the rate from its end on."""
    if progress is None:
        yield
        return
    progress.describe("loading the model")
    try:
        yield
    finally:
        progress.describe("")
        progress.restart_clock()


def clock(seconds: float) -> str:
    """Return seconds as `7.5 s`, `2:38` or `1:02:05`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Failure(NamedTuple):
    """A picture (or the prompt, where there is no picture) and why there is no answer, as the record has them."""

    name: str
    type: str
    message: str


@dataclass(slots=True)
class Summary:
    """How a run went; filled while it runs. Counts are requests unless they say images.

    `num_done_before` were in OUTPUT already; `stages_s` are seconds by stage; `skipped` counts what
    INPUT held and was not taken for a picture, by reason; `failures` are some of those now or before, and
    `failures_command` lists all of them.
    """

    num_images: int = 0
    num_ok: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    num_done_before: int = 0
    num_failed_before: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    elapsed_s: float = 0.0
    load_s: float = 0.0
    stages_s: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    failures_command: str | None = None
    outputs: Sequence[str] = ()
    next_command: str | None = None

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())


class LiveText:
    """An answer on stdout as it comes, and on stderr, dim, the thoughts before it.

    `has_thoughts` and `has_waiting` say whether stderr shows thoughts, and what is waited for before any text.
    """

    def __init__(self, *, has_thoughts: bool, has_waiting: bool) -> None:
        self._has_thoughts, self._has_waiting = has_thoughts, has_waiting
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
        self._has_header = False

    @property
    def is_stdout_terminal(self) -> bool:
        """Return whether a person, not a program, reads stdout."""
        return sys.stdout.isatty()

    def live_text(self) -> LiveText:
        """Return what prints a single answer while it grows; without colours thoughts could not be told from it."""
        is_capable = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not self.is_quiet
        has_thoughts = is_capable and self._has_color and not os.environ.get("NO_COLOR")
        return LiveText(has_thoughts=has_thoughts, has_waiting=is_capable and self.has_progress)

    @contextlib.contextmanager
    def progress(self, total: int | None) -> Iterator[Progress | None]:
        """Show the progress of a run, or yield None where it is not wanted. `total` None: not known yet."""
        if not self.has_progress:
            yield None
            return
        is_bar = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        with contextlib.closing(Progress(sys.stderr, total, is_bar=is_bar)) as display:
            yield display

    def say(self, text: str, *, style: str = "") -> None:
        """Print a line on stderr, unless --quiet; a moving bar makes room for it."""
        if not self.is_quiet:
            with _bar_aside(sys.stderr):
                _plain_console(sys.stderr, has_color=self._has_color).print(_text(text, style))

    def warn(self, text: str) -> None:
        """Print a line that begins with `warning:`."""
        self.say(f"warning: {text}", style="yellow")

    def show_record(self, record: RecordDict) -> None:
        """Print a record as a row of the table on stdout."""
        from rich.table import Table

        with _bar_aside(sys.stdout):
            console = _plain_console(sys.stdout, has_color=self._has_color)
            width = max(console.width, 40)
            table = Table(box=None, show_header=not self._has_header, pad_edge=False, header_style="bold")
            for name, share in (("image", 0.3), ("asked", 0.2), ("answer", 0.5)):
                table.add_column(name, width=int(width * share) - 1, overflow="fold")
            style = "red" if record["error"] else ""
            asked = record["task"] if record["prompt"] is None else f"{record['task']} {record['prompt']}"
            table.add_row(_text(record["image"] or "-"), _text(asked), _text(describe(record), style))
            console.print(table)
            self._has_header = True

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


def describe(record: RecordDict) -> str:
    """Return what a record says, in a few words."""
    if record["error"]:
        return f"{record['error']['type']}: {record['error']['message']}"
    if record["task"] == "caption":
        return str(record["caption"])
    if record["task"] == "query":
        return str(record["answer"])
    if record["task"] == "detect":
        corners = ("x_min", "y_min", "x_max", "y_max")
        return _listing([f"{_score(box)}[{' '.join(f'{box[c]:.2f}' for c in corners)}]" for box in record["objects"]])
    if record["task"] == "point":
        return _listing([f"{_score(point)}({point['x']:.2f} {point['y']:.2f})" for point in record["points"]])
    return _listing([f"{_score(part)}{part['svg_path'] or part.get('parse_error', '')}" for part in record["segments"]])


def _score(found: Mapping[str, Any]) -> str:
    return f"{found['score']:.2f} " if "score" in found else ""


def _listing(parts: Sequence[str]) -> str:
    if not parts:
        return "none"
    more = f" and {len(parts) - MOST_OBJECTS_SHOWN} more" if len(parts) > MOST_OBJECTS_SHOWN else ""
    return f"{len(parts)}: {', '.join(parts[:MOST_OBJECTS_SHOWN])}{more}"


def summary_lines(summary: Summary, *, is_verbose: bool = False, width: int | None = None) -> list[tuple[str, str]]:
    """Return the lines of the summary, each with its style; failures are cut to `width`, where there is one."""
    num_new = summary.num_ok + summary.num_failed
    lines = [(f"{_count(num_new, 'request')} of {_count(summary.num_images, 'image')}: {_outcome(summary)}", "bold")]
    if summary.num_done_before:
        failed = f" ({summary.num_failed_before:,} of them failed)" if summary.num_failed_before else ""
        lines.append((f"{_count(summary.num_done_before, 'request')} done before{failed}", ""))
    lines += [(_failure_line(failure, width), "red") for failure in summary.failures]
    if summary.failures and summary.failures_command:
        lines.append((f"all failures: {summary.failures_command}", "cyan"))
    if num_new:
        lines.append((_speed(summary), ""))
    if is_verbose and summary.stages_s:
        lines.append((", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.stages_s.items()), "dim"))
    if summary.skipped:
        kinds = ", ".join(f"{count:,} {reason}" for reason, count in summary.skipped.items())
        lines.append((f"not taken: {kinds}", "dim"))
    if summary.outputs:
        lines.append((f"written: {', '.join(summary.outputs)}", ""))
    if summary.next_command:
        lines.append((f"next: {summary.next_command}", "cyan"))
    return lines


def _failure_line(failure: Failure, width: int | None) -> str:
    """Return `  a/b.jpg: decode: message`, cut so that the end of the name and the beginning of the message stay."""
    name, rest = printable(failure.name), printable(f"{failure.type}: {failure.message}")
    if width is None:
        return f"  {name}: {rest}"
    from rich.cells import cell_len
    from rich.text import Text

    most = max(width // 2, width - 4 - cell_len(rest))
    if cell_len(name) > most:
        name = f"…{name[1 - most :]}"
        while cell_len(name) > most:
            name = f"…{name[2:]}"
    shown = Text(f"  {name}: {rest}")
    shown.truncate(width, overflow="ellipsis")
    return shown.plain


def _outcome(summary: Summary) -> str:
    parts = [f"{summary.num_ok:,} ok"]
    if summary.failed:
        types = ", ".join(f"{name} {count:,}" for name, count in sorted(summary.failed.items()))
        parts.append(f"{summary.num_failed:,} failed ({types})")
    return ", ".join(parts)


def _speed(summary: Summary) -> str:
    text = clock(summary.elapsed_s)
    if summary.num_images:
        text += f", {summary.num_images / max(summary.elapsed_s - summary.load_s, 1e-9):.1f} img/s"
    if summary.load_s >= SHOWN_LOAD_S:
        text += f" after {clock(summary.load_s)} of loading the model"
    if summary.output_tokens:
        text += f"; {summary.prompt_tokens:,} prompt and {summary.output_tokens:,} output tokens"
    total = sum(summary.stages_s.values())
    if total > 0:
        shares = [f"{name} {seconds / total:.0%}" for name, seconds in summary.stages_s.items() if seconds > 0]
        text += f"; {', '.join(shares)}"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
