"""Single bits of a journal turned over: what breaks a record is found and done again, the rest md3 verify reports."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from program import Program, isolate, make_pictures

from md3cli.run.damage import damaged_path

NUM_PICTURES = 6


@pytest.fixture
def md3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    isolate(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return Program(monkeypatch)


def has_broken(good: bytes, flipped: bytes) -> bool:
    """Whether a line can no more be the record it was: judged by what it parses to, as a reader of JSON would."""
    was: Any = json.loads(good)
    try:
        now: Any = json.loads(flipped.decode(), object_pairs_hook=_unique)
    except ValueError:
        return True
    return _shape(was) != _shape(now) or any(
        was[key] != now[key] for key in ("schema", "id", "image", "task", "prompt")
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def _shape(value: Any) -> Any:
    """Keys and types; a number is a number."""
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shape(item) for item in value]
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def turn_bits(md3: Program, tmp_path: Path, count: int, seed: int) -> tuple[int, int]:
    """Turn `count` bits over, one at a time; how many broke a record, and how many changed a value."""
    pictures, out = make_pictures(tmp_path / "pictures", NUM_PICTURES), tmp_path / "o.jsonl"
    (pictures / "p4.png").write_bytes(b"no picture")
    command = ("detect", pictures, "a", "größer", "-o", out, "--fail-on", "none", "--no-progress")
    assert md3(*command).exit_code == 0
    good, run_info = out.read_bytes(), (tmp_path / "o.jsonl.run.json").read_bytes()
    lines, chooser, num_broken = good.splitlines(keepends=True), random.Random(seed), 0
    for _ in range(count):
        at, bit = chooser.randrange(len(good)), chooser.randrange(8)
        flipped = bytearray(good)
        flipped[at] ^= 1 << bit
        out.write_bytes(flipped)
        (tmp_path / "o.jsonl.run.json").write_bytes(run_info)
        damaged_path(out).unlink(missing_ok=True)
        number = good.count(b"\n", 0, at)
        found = bytes(flipped[sum(map(len, lines[:number])) :])[: len(lines[number])]
        is_broken = at + 1 == sum(map(len, lines[: number + 1])) or has_broken(lines[number], found)
        num_broken += is_broken
        assert md3("verify", out).exit_code == 1, (at, bit)
        again = md3(*command)
        assert again.exit_code == 0, (at, bit, again.output)
        assert "repaired" in again.stderr or "was changed by something else" in again.stderr, (at, bit, again.stderr)
        if is_broken:
            assert md3.num_answered <= 1, "what is not damaged is not asked again"
            assert out.read_bytes() == good, (at, bit, number, found)
            assert md3("verify", out).exit_code == 0, (at, bit)
        else:  # kept, or found after all, as a number out of range is
            after = out.read_bytes()
            assert after in (good, bytes(flipped)), (at, bit)
            assert md3("verify", out).exit_code == (after != good), (at, bit)
    return num_broken, count - num_broken


@pytest.mark.process
def test_200_bits_turned_over(md3: Program, tmp_path: Path) -> None:
    num_broken, num_changed = turn_bits(md3, tmp_path, 200, 7)
    assert num_broken > 50
    assert num_changed > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_5000_bits_turned_over(md3: Program, tmp_path: Path) -> None:
    print(turn_bits(md3, tmp_path, 5000, 5000))
