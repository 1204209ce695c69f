"""How a run went, in a few lines for people: counts and speed first, then what failed, was left out, and comes next.

Lines are plain text with a style each; printing them is the console's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from md3cli.console.progress import clock, shown_rate
from md3cli.records import printable

SHOWN_S = 0.1  # what took less is not worth a word, and a rate of it says nothing


class Failure(NamedTuple):
    """A picture (or the prompt, where there is no picture) and why there is no answer, as the record has them."""

    name: str
    type: str
    message: str


@dataclass(slots=True)
class Summary:
    """How a run went; filled while it runs. Counts are requests unless they say rows or images.

    A row is a picture, or a question without one; `num_rows_failed` of `num_rows` have a request that failed.
    `num_done_before` were in OUTPUT already; `answering_s` and `load_s` (of it) are seconds until the last answer,
    `writing_s` those for other formats behind it, `stages_s` seconds by stage; `skipped` counts what INPUT held and
    was not taken for a picture, by reason; `failures` are some of those now or before, and `failures_command` lists
    all of them.
    """

    num_rows: int = 0
    num_rows_failed: int = 0
    num_images: int = 0
    num_ok: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    num_done_before: int = 0
    num_failed_before: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    answering_s: float = 0.0
    writing_s: float = 0.0
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


def summary_lines(summary: Summary, *, is_verbose: bool = False, width: int | None = None) -> list[tuple[str, str]]:
    """Return the lines of the summary, each with its style; failures are cut to `width`, where there is one."""
    num_new = summary.num_ok + summary.num_failed
    lines = [(_done(summary) if num_new else _nothing(summary), "bold")]
    if num_new and summary.num_done_before:
        lines.append((f"{summary.num_done_before:,} more were done before{_failed_before(summary)}", ""))
    lines += [(_failure_line(failure, width), "red") for failure in summary.failures]
    if summary.failures and summary.failures_command:
        lines.append((f"all failures: {summary.failures_command}", "cyan"))
    if is_verbose:
        lines += [(line, "dim") for line in _costs(summary)]
    if summary.skipped:
        kinds = ", ".join(f"{count:,} {reason}" for reason, count in summary.skipped.items())
        lines.append((f"not taken: {kinds}", "dim"))
    if summary.outputs:
        lines.append((f"written: {', '.join(summary.outputs)}", ""))
    if summary.next_command:
        lines.append((f"next: {summary.next_command}", "cyan"))
    return lines


def _done(summary: Summary) -> str:
    """Return `23 of 24 ok, 1 failed (decode 1), 12 images in 1.0 s (12.2/s), model loaded in 3.4 s`."""
    parts = [f"{summary.num_ok:,} of {summary.num_ok + summary.num_failed:,} ok"]
    if summary.failed:
        types = ", ".join(f"{name} {count:,}" for name, count in sorted(summary.failed.items()))
        parts.append(f"{summary.num_failed:,} failed ({types})")
    work_s = max(summary.answering_s - summary.load_s, 0.0)
    speed = f"in {clock(work_s)}"
    if summary.num_images:
        speed = f"{summary.num_images:,} image{'' if summary.num_images == 1 else 's'} {speed}"
        if summary.num_ok and work_s >= SHOWN_S:  # pictures that fail take no time to speak of
            speed += f" ({shown_rate(summary.num_images / work_s)}/s)"
    parts.append(speed)
    if summary.load_s >= SHOWN_S:
        parts.append(f"model loaded in {clock(summary.load_s)}")
    if summary.writing_s >= 1:
        parts.append(f"files written in {clock(summary.writing_s)}")
    return ", ".join(parts)


def _nothing(summary: Summary) -> str:
    if not summary.num_done_before:
        return "nothing to do"
    done = "the one request was" if summary.num_done_before == 1 else f"all {summary.num_done_before:,} were"
    return f"nothing to do: {done} done before{_failed_before(summary)}"


def _failed_before(summary: Summary) -> str:
    return f" ({summary.num_failed_before:,} of them failed)" if summary.num_failed_before else ""


def _costs(summary: Summary) -> Iterator[str]:
    if summary.output_tokens:
        yield f"{summary.prompt_tokens:,} prompt and {summary.output_tokens:,} output tokens"
    total_s = sum(summary.stages_s.values())
    if total_s > 0:
        yield ", ".join(
            f"{name} {seconds:.1f} s ({seconds / total_s:.0%})" for name, seconds in summary.stages_s.items() if seconds
        )


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
