"""The `md3` program with a stub in the model's place, as a process of its own for tests of signals and pipes.

python tests/stub_md3.py [--step-seconds S] ARGUMENTS OF md3...
"""

from __future__ import annotations

import functools
import sys

from stub_engine import StubModel

import md3cli.__main__  # first, as in the real program: its first lines set the signals
import md3cli.pipeline


def main() -> None:
    step_s = 0.0
    if sys.argv[1] == "--step-seconds":
        step_s = float(sys.argv[2])
        del sys.argv[1:3]
    find = functools.partial(StubModel, step_s=step_s)
    md3cli.pipeline.run = functools.partial(md3cli.pipeline.run, find=find)
    md3cli.__main__.main()


if __name__ == "__main__":
    main()
