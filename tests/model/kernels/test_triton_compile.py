"""Every kernel compiles for every card it is meant for, without local memory and with the instructions that matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which the development extra brings on Linux")

HERE = Path(__file__).parents[2]
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # of one program


def compile_all(*targets: str) -> list[dict]:
    """What `triton_offline.py` found, in a process where the interpreter is not switched on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent)
    done = subprocess.run(
        [sys.executable, HERE / "support" / "triton_offline.py", *targets],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(row: dict) -> list[str]:
    """What is wrong with one kernel on one card."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["stack"] > row["stack_allowed"] or (row["local"] and not row["stack_allowed"]):
        found.append(f"{row['stack']} bytes of local memory")
    if row["shared"] > SHARED_KIB[row["target"]] * 1024:
        found.append(f"{row['shared']} bytes of shared memory")
    if row["has_products"] and not row["matrix"]:
        found.append("no matrix instructions")
    if row["wide_loads_wanted"] and not row["wide_loads"]:
        found.append("no 16-byte loads")
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", SHARED_KIB)
def test_every_kernel_compiles_well(target: str) -> None:
    rows = compile_all(target)
    assert len(rows) > 90
    for row in rows:
        shown = f"{row.get('registers', '-'):>4} registers {row.get('shared', 0) / 1024:6.1f} KiB shared"
        print(f"{target:7} {row['kernel']:36} {shown} {','.join(row.get('matrix', ()))}")
    wrong = {row["kernel"]: faults(row) for row in rows if faults(row)}
    assert not wrong
