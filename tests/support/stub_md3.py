"""The `md3` program as a process of its own for tests of signals, pipes and kills, with a stub in the model's place.

python stub_md3.py [--step-seconds S] [--real] [--delay D] [--count FILE] [--fault ACTION:K:FOLDER]
                   [--absorb SIGNAL:MOMENT:K] ARGUMENTS OF md3...

`--real` takes the real model after all, and `--delay` lets its engine read results so many launches late; `--count`,
`--fault` and `--absorb` are what tests/support/faults.py does. The file of `--count` is there as soon as the program
has taken the signals over.
"""

from __future__ import annotations

# First, as in the real program: its first lines set the signals.
import md3cli.__main__  # isort: skip

import argparse
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import faults
import stub_scale
from stub_engine import StubModel

import md3cli.pipeline
from md3cli.run.model_handle import find_model

MANY = {"--devices", "--workers-per-device", "--engine"}  # options that start workers, which find their own stub
OPTIONS = {"--step-seconds": float, "--delay": int, "--count": str, "--fault": str, "--absorb": str}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name, kind in OPTIONS.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("--real", action="store_true")
    own, rest = parser.parse_args(_own_arguments()), sys.argv[1 + len(_own_arguments()) :]

    def find(options: Any) -> Any:
        model = find_model(options) if own.real else StubModel(options, step_s=own.step_seconds or 0.0)
        return faults.CountedModel(model, own.count) if own.count else model

    if own.count:
        Path(own.count).touch()
    if own.fault:
        action, at, folder = own.fault.split(":", 2)
        faults.install(action, int(at), folder)
    if own.delay is not None:
        from md3cli.model.engine import load

        load.Engine = functools.partial(load.Engine, delay=own.delay)  # type: ignore[attr-defined, misc, assignment]
    if own.absorb:
        name, moment, at = own.absorb.split(":")
        faults.signal_at_absorption(signal.Signals[name], moment, int(at))
    sys.argv[1:] = rest
    if MANY & set(rest):
        from md3cli.scale import shard_runner

        shard_runner.FINDER = shard_runner.FINDER if own.real else stub_scale.FINDER
        os.environ[stub_scale.STEP_SECONDS] = str(own.step_seconds or 0.0)
    md3cli.pipeline.run = functools.partial(md3cli.pipeline.run, find=find)
    md3cli.__main__.main()


def _own_arguments() -> list[str]:
    """What stands before the first argument that is md3's."""
    at = 1
    while at < len(sys.argv) and (sys.argv[at] in OPTIONS or sys.argv[at] == "--real"):
        at += 2 if sys.argv[at] in OPTIONS else 1
    return sys.argv[1:at]


if __name__ == "__main__":
    main()
