"""The command line of `gpu_check.py`; whatever is wrong with it is one line and status 2."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

CONFIGS = ("mini", "mid", "full")
WHOLE_RUN_S = 370.0


@dataclass(frozen=True)
class Options:
    """What was asked; `names` are the parts to run, `command` the command line as it was typed."""

    device: str
    config: str
    out: Path
    names: tuple[str, ...]
    budget_s: float
    command: tuple[str, ...]


class OneLineParser(argparse.ArgumentParser):
    """argparse, saying what is wrong in one line instead of three."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu_check.py: {message}\n")


def read_options(arguments: Sequence[str], part_names: Sequence[str], extra_names: Sequence[str] = ()) -> Options:
    """The options in `arguments`; ends the program with one line and status 2 where they make no sense.

    Of `part_names` those in `extra_names` are run where `--only` names them.
    """
    parser = OneLineParser(prog="gpu_check.py", description="Prove and measure md3's GPU path on the card at hand.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--config", choices=CONFIGS, help="sizes of the network: full on CUDA, mini on a CPU")
    parser.add_argument("--out", type=Path, help="folder of results.json; default runs/gpu_check-DATE-TIME")
    parser.add_argument("--only", action="append", default=[], metavar="A,B", help=f"of {', '.join(part_names)}")
    parser.add_argument("--skip", action="append", default=[], metavar="A,B", help="parts to leave out")
    parser.add_argument("--budget", type=_seconds, default=WHOLE_RUN_S, metavar="S", help="seconds; default 370")
    asked = parser.parse_args(arguments)
    only, skip = _names(parser, asked.only, part_names), _names(parser, asked.skip, part_names)
    return Options(
        device=asked.device,
        config=asked.config or ("full" if asked.device == "cuda" else "mini"),
        out=asked.out or Path("runs") / time.strftime("gpu_check-%Y%m%d-%H%M%S"),
        names=tuple(n for n in part_names if (n in only if only else n not in extra_names) and n not in skip),
        budget_s=asked.budget,
        command=("tests/gpu_check.py", *arguments),
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def _names(parser: OneLineParser, lists: Sequence[str], known: Sequence[str]) -> set[str]:
    """The part names of all comma lists of an option."""
    names = {name.strip() for text in lists for name in text.split(",")}
    if unknown := sorted(names.difference(known)):
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(known)}")
    return names


def leave(problem: str) -> NoReturn:
    """End the program with one line that says what to do."""
    print(f"gpu_check.py: {problem}", file=sys.stderr)
    raise SystemExit(2)
