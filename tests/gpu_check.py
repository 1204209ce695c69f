"""Prove and measure md3's GPU path on the card at hand: one script, 370 seconds, from the source tree.

    python tests/gpu_check.py                                 # the first CUDA device, real sizes
    python tests/gpu_check.py --only limits,tiles             # which tiles suit a new card
    python tests/gpu_check.py --device cpu --config mini      # all of it, small, without a GPU

It needs torch 2.11 or newer, triton (on CUDA) and md3's other dependencies; md3 itself need not be
installed. Each part, and each kernel, is measured by a process of its own with a deadline, so that a crash
costs no more than that. It prints a table and keeps `results.json` in the folder of `--out`, rewritten
as it goes; what a card has shown belongs into examples/gpu (README.md there).

Exit status: 0 nothing failed, 1 a part failed, 2 the command line or the machine is wrong (one line says
what to do). A part that does not fit the budget is "not measured".
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from gpu.check import Check
from gpu.options import read_options
from gpu.parts import PARTS, Part
from gpu.table import table_of


def main(arguments: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    """Run the check; its exit status."""
    extra = [part.name for part in parts if part.is_extra]
    options = read_options(arguments, [part.name for part in parts], extra)
    signal.signal(signal.SIGTERM, _leave)  # so that no child outlives a run that is ended
    check = Check(options, parts)
    status = check.run()
    print(f"\n{table_of(check.results.data)}\n{check.results.path}")
    return status


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
