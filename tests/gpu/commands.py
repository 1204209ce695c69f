"""Part `commands`: whole commands of the embedded model on the device, record by record against the CPU's.

The model is `tiny`, whatever `--config` says, in float32: a decision that is clear on one device is on the other. No
other part asks about parts of pictures, looks in tiles, or has pictures cut by the device as they are decoded.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from support.record_equality import SCORE_TOLERANCE
from typer.testing import CliRunner

from md3cli.cli import app

from .child import Run

SCENES = Path(__file__).parents[2] / "examples" / "scenes"
ABOUT_OBJECTS = "query:What colour is the {label}?"
COMMANDS = {
    "objects asked about": (
        *("run", str(SCENES), "--limit", "6", "--task", "detect:shape", "--task", "caption:short"),
        *("--then", ABOUT_OBJECTS, "--no-reasoning"),
    ),
    "tiles": ("detect", str(SCENES), "circle", "--limit", "3", "--tile", "378"),
    "points, masks": ("run", str(SCENES), "--limit", "3", "--task", "point:circle", "--task", "segment:circle"),
}
LEAST_TYPER = (0, 26)
ROUNDING = 1e-6  # of a coordinate, a share of a side: devices take its exponential each in its own way


def measure(run: Run) -> None:
    """Each command on the device and on the CPU; on a CPU, in batches and one by one."""
    if tuple(map(int, version("typer").split(".")[:2])) < LEAST_TYPER:
        run.fail(f"typer {version('typer')} is too old for md3's commands (pyproject.toml)")
        return
    for what, words in COMMANDS.items():
        with run.if_it_fits(what), tempfile.TemporaryDirectory(prefix="md3-check-") as folder:
            started = time.perf_counter()
            found = records_of(words, Path(folder), run.device.type)
            seconds = time.perf_counter() - started
            other = () if run.is_cuda else ("--batch-size", "1")
            wanted = records_of((*words, *other), Path(folder) / "cpu", "cpu")
            run.figure(f"records, {what}", len(found), "count")
            different = [number for number, pair in enumerate(zip(found, wanted, strict=True)) if not is_like(*pair)]
            run.figure(f"records that differ from the CPU's, {what}", len(different), "count")
            run.figure(f"command, {what}", seconds, "s")
            if different:
                pair = found[different[0]], wanted[different[0]]
                run.fail(f"{what}: {len(different)} of {len(found)} differ: {json.dumps(pair)[:2000]}")


def records_of(words: tuple[str, ...], folder: Path, device: str) -> list[Any]:
    """Run a command without any settings of this machine's user; return its records."""
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        os.environ[name] = str(folder / "home")
    output = folder / "records.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    given = ("--model", "tiny", "--device", device, "--dtype", "fp32", "--no-cache", "-o", str(output))
    result = CliRunner().invoke(app, [*words, *given], prog_name="md3")
    if result.exit_code != 0:
        raise RuntimeError(f"status {result.exit_code}: {result.output[-1000:]}") from result.exception
    return [json.loads(line) for line in output.read_text().splitlines()]


def is_like(found: Any, wanted: Any, key: str = "") -> bool:
    """Return whether two values are the same: scores within their tolerance, other numbers but for rounding."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return list(found) == list(wanted) and all(is_like(found[name], wanted[name], name) for name in found)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(is_like, found, wanted))
    if isinstance(found, float) and isinstance(wanted, float):
        return abs(found - wanted) <= (SCORE_TOLERANCE if key == "score" else ROUNDING)
    return bool(found == wanted)
