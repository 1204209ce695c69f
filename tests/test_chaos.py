"""Whole runs interrupted in every way and resumed; see chaos.py for what is done and what must hold."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos import KINDS, Chaos, run_chaos
from faults import MOMENTS
from forked import Forks
from program import Program, clean_environment, make_pictures, records_of
from record_equality import is_same
from small_disk import has_small_disks

CAN_MOUNT = has_small_disks()
MOST_KINDS = tuple(kind for kind in KINDS if kind != "full-disk")


@pytest.mark.process
def test_an_interruption_of_every_kind(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, seed=3)
    run_chaos(chaos, len(MOST_KINDS), MOST_KINDS)
    assert set(MOST_KINDS) <= set(chaos.report)


@pytest.mark.process
@pytest.mark.skipif(not CAN_MOUNT, reason="a small disk can be mounted by root only")
def test_a_full_disk(tmp_path: Path) -> None:
    run_chaos(Chaos(tmp_path, seed=4, num_pictures=60), 1, ("full-disk",))


@pytest.mark.process
def test_a_document_is_never_half(tmp_path: Path, forks: Forks) -> None:
    """With all records there, what is left to interrupt is the making of the document."""
    chaos = Chaos(tmp_path, format="coco", num_pictures=20, forks=forks)
    chaos.finish()
    at = 7
    while not chaos.interrupt_at_operation("kill", at):
        chaos.output.unlink(missing_ok=True)
        at += 7  # each of them in the slow test
    assert at > 14, "there was nothing to interrupt"


def test_equal_records_are_equal_but_for_a_little_score() -> None:
    def line(score: float, label: str = "a") -> bytes:
        return json.dumps({"id": "1", "objects": [{"label": label, "x_min": 0.1, "score": score}]}).encode()

    assert is_same(line(0.5), line(0.502))
    assert not is_same(line(0.5), line(0.503))
    assert not is_same(line(0.5), line(0.5, "b"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("format", "count"), [("jsonl", 400), ("coco", 60), ("parquet", 40)])
def test_500_interruptions(tmp_path: Path, format: str, count: int) -> None:
    run_chaos(Chaos(tmp_path, seed=count, format=format), count, KINDS if CAN_MOUNT else MOST_KINDS)


@pytest.mark.process
def test_interruptions_while_children_are_asked(tmp_path: Path) -> None:
    kinds = ("kill-group", "kill-at-op", "int", "fail-at-op")
    run_chaos(Chaos(tmp_path, seed=5, num_pictures=80, has_children=True), len(kinds), kinds)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_100_interruptions_while_children_are_asked(tmp_path: Path) -> None:
    run_chaos(Chaos(tmp_path, seed=6, has_children=True), 100, MOST_KINDS)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_50_interruptions_of_a_real_model(tmp_path: Path) -> None:
    run_chaos(Chaos(tmp_path, seed=50, model="tiny"), 50, MOST_KINDS)


def interrupt_absorptions(chaos: Chaos, count: int, most_launches: int) -> None:
    """Interrupt runs between a launch and its absorption, at launches drawn at random, and let the last one finish."""
    moments = [(signum, moment) for moment in MOMENTS for signum in (signal.SIGKILL, signal.SIGINT)]
    while sum(chaos.report.values()) < count:
        signum, moment = moments[sum(chaos.report.values()) % len(moments)]
        chaos.interrupt_at_absorption(signum, moment, chaos.chooser.randrange(1, most_launches))
    chaos.finish()


@pytest.fixture(scope="module")
def real_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Forks of a process that has imported torch too."""
    forks = Forks(tmp_path_factory.mktemp("forks"), "md3cli.model.engine.load")
    yield forks
    forks.close()


@pytest.mark.process
@pytest.mark.parametrize("delay", [1, 2])
def test_death_between_a_launch_and_its_absorption(tmp_path: Path, real_forks: Forks, delay: int) -> None:
    """Nothing is lost and nothing comes twice: a launch that nobody has read has never been."""
    chaos = Chaos(tmp_path, seed=delay, model="tiny", delay=delay, num_pictures=12, forks=real_forks)
    interrupt_absorptions(chaos, 4, 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("delay", [1, 2])
def test_death_between_many_launches_and_their_absorptions(tmp_path: Path, delay: int) -> None:
    interrupt_absorptions(Chaos(tmp_path, seed=10 + delay, model="tiny", delay=delay, num_pictures=40), 48, 60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("action", ["kill", "fail"])
@pytest.mark.parametrize("format", ["jsonl", "coco", "parquet"])
def test_death_before_each_of_the_first_200_operations(tmp_path: Path, action: str, format: str) -> None:
    chaos = Chaos(tmp_path, format=format, num_pictures=120)
    for at in range(1, 201):
        chaos.interrupt_at_operation(action, at)


@pytest.mark.process
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 17])
def test_death_while_failures_are_done_again(md3: Program, forks: Forks, tmp_path: Path, step: int) -> None:
    """Before every `step`-th operation of a --retry-failed, and then the same command again."""
    isolated = clean_environment(tmp_path / "home")
    pictures, out = make_pictures(tmp_path / "pictures", 12), tmp_path / "out/o.jsonl"
    good = {path: path.read_bytes() for path in sorted(pictures.iterdir())[::3]}

    asked = ("caption", pictures, "-o", out, "--batch-size", 2)
    assert md3(*asked).exit_code == 0
    whole = out.read_bytes()
    for path in good:
        path.write_bytes(b"no picture")
    assert md3(*asked, "--overwrite").exit_code == 3
    failed = out.read_bytes()
    for path, content in good.items():
        path.write_bytes(content)
    for at in range(step, 1000, step):
        out.write_bytes(failed)
        fault = ("--fault", f"kill:{at}:{out.parent}")
        done = forks(*fault, *asked, "--retry-failed", "--workers", 1, env=isolated)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(records_of(out)) >= 12, "no record is lost meanwhile"
        assert md3(*asked, "--retry-failed").exit_code == 0
        assert out.read_bytes() == whole
    assert at > step, "there was nothing to interrupt"
    assert out.read_bytes() == whole


@pytest.mark.process
@pytest.mark.parametrize(
    ("count", "step"), [pytest.param(200, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]), (6, 23)]
)
def test_death_while_a_damaged_journal_is_mended(
    md3: Program, forks: Forks, tmp_path: Path, count: int, step: int
) -> None:
    """Kills before file operations in turn, each of a run that mends four kinds of damage; then the same command."""
    isolated = clean_environment(tmp_path / "home")
    pictures, out = make_pictures(tmp_path / "pictures", 12), tmp_path / "out/o.jsonl"

    asked = ("detect", pictures, "a", "b", "-o", out, "--batch-size", 2)
    assert md3(*asked).exit_code == 0
    whole, told = out.read_bytes(), out.with_name("o.jsonl.run.json").read_bytes()
    lines = whole.splitlines(keepends=True)
    bad = {
        1: lines[1].replace(b'"width"', b'"widtX"'),
        5: lines[5].replace(b'"image":"p', b'"image":"q'),
        9: lines[9][:24] + bytes([lines[9][24] ^ 1]) + lines[9][25:],
        14: b"\n",
    }
    damaged = b"".join(bad.get(number, line) for number, line in enumerate(lines))
    untouched = {line for number, line in enumerate(lines) if number not in bad}
    num_killed, at = 0, 0
    while num_killed < count:
        at += step
        out.write_bytes(damaged)
        out.with_name("o.jsonl.run.json").write_bytes(told)
        out.with_name("o.jsonl.damaged").unlink(missing_ok=True)
        done = forks("--fault", f"kill:{at}:{out.parent}", *asked, "--workers", 1, env=isolated)
        if done.returncode == 0:  # through it; once more from the first operation
            assert at > step, "there was nothing to interrupt"
            at = 0
        else:
            assert done.returncode == -signal.SIGKILL, done.stderr
            num_killed += 1
            assert untouched <= set(out.read_bytes().splitlines(keepends=True)), "a good record was lost"
            assert md3(*asked).exit_code == 0
        assert out.read_bytes() == whole
        copies = out.with_name("o.jsonl.damaged").read_bytes().splitlines(keepends=True)
        assert sorted(copies) == sorted(bad.values()), "each copied once"
