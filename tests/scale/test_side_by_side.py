"""Moments at which processes on one OUTPUT could hurt each other: each is met on purpose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from chaos import wait_until
from program import Program, clean_environment, make_pictures, start
from run_folders import planned, rows_of, run_all

from md3cli.errors import OutputError
from md3cli.files import atomic_publish
from md3cli.scale.finish import Finish
from md3cli.scale.folder import PLAN, RunFolder, find_run_folder
from md3cli.scale.inspect import orphans_of, reopen_damaged
from md3cli.scale.markers import Commit, CommitLog, Exported, read_exported, remove_commit
from md3cli.scale.plan import read_one_plan

SHARDS = ("--shard-size", 4)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", 10)


def whole(md3: Program, pictures: Path, folder: Path, *prompts: str) -> bytes:
    md3("detect", pictures, *prompts, "-o", folder / "whole.jsonl", "--overwrite")
    return (folder / "whole.jsonl").read_bytes()


@pytest.mark.process
def test_what_ranks_add_while_another_exports_is_exported_too(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who add wait for the one that exports less, and it leaves run.json to them."""
    out, log = tmp_path / "o.jsonl", tmp_path / "log"
    ranks = ("-o", out, *SHARDS, "--world-size", 2)
    others: list[Popen[bytes]] = []

    @contextmanager
    def publish_late(path: Path) -> Iterator[Path]:
        with atomic_publish(path) as temp, log.open("ab") as said:
            yield temp
            command = ("detect", pictures, "b", "--add", *ranks)
            others.append(start(*command, stdout=said, stderr=said, env=clean_environment(tmp_path / "home")))
            wait_until(
                lambda: others[0].poll() is not None or b"waiting for another rank's export" in log.read_bytes(),
                "the rank that adds neither ends nor waits",
            )

    with monkeypatch.context() as patched:
        patched.setattr("md3cli.scale.finish.atomic_publish", publish_late)
        done = md3("detect", pictures, "a", *ranks)
    assert (others[0].wait(240), done.exit_code) == (0, 0), done.output + log.read_text()
    assert "other ranks add to this run" in done.stderr
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "a", "b")
    assert len(json.loads(Path(f"{out}.run.json").read_bytes())["identity"]["requests"]) == 2
    assert md3("verify", out).exit_code == 0


def test_documents_that_no_other_rank_makes_are_made(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who add write run.json, and no format that they were not asked for."""
    out, others = tmp_path / "out", []
    asked = ("-o", f"{out}/", *SHARDS, "--world-size", 2)

    @contextmanager
    def add_and_publish(path: Path) -> Iterator[Path]:
        with monkeypatch.context() as patched:
            patched.setattr(Finish, "export", lambda finish: 0)  # it would wait for this one's
            others.append(md3("detect", pictures, "b", "--add", *asked))
        with atomic_publish(path) as temp:
            yield temp

    with monkeypatch.context() as patched:
        patched.setattr("md3cli.scale.finish.atomic_publish", add_and_publish)
        done = md3("detect", pictures, "a", "-f", "coco", *asked)
    assert (done.exit_code, others[0].exit_code) == (0, 0), done.output + others[0].output
    assert "other ranks add to this run" in done.stderr
    assert len(json.loads((out / "coco.json").read_bytes())["images"]) == 10
    again = md3("detect", pictures, "a", "b", *asked)
    assert (again.exit_code, md3.num_answered) == (0, 0), again.output
    assert len(json.loads((out / "run.json").read_bytes())["identity"]["requests"]) == 2


def test_an_export_of_less_takes_the_place_of_none_of_more(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three commands: the first one exports last, while the third one still adds to what the second has exported."""
    out, may_export = tmp_path / "o.jsonl", Finish._may_export
    asked = ("-o", out, *SHARDS, "--world-size", 2)

    def be_last(finish: Finish) -> bool:
        with monkeypatch.context() as patched:
            patched.setattr(Finish, "_may_export", may_export)
            assert md3("detect", pictures, "b", "--add", *asked).exit_code == 0
            patched.setattr(Finish, "export", lambda finish: 0)  # it is not so far
            assert md3("detect", pictures, "c", "--add", *asked).exit_code == 0
        return may_export(finish)

    with monkeypatch.context() as patched:
        patched.setattr(Finish, "_may_export", be_last)
        assert md3("detect", pictures, "a", *asked).exit_code == 0
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "a", "b")


def test_parts_that_others_put_while_a_rank_clears_away_stay(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their markers are not among those that the rank has read before."""
    out, others = tmp_path / "o.jsonl", []
    asked = ("-o", out, *SHARDS, "--world-size", 2)

    def add_and_look(folder: RunFolder, commits: Mapping[int, Commit]) -> list[str]:
        with monkeypatch.context() as patched:
            patched.setattr(Finish, "export", lambda finish: 0)  # it would wait for this one's
            others.append(md3("detect", pictures, "b", "--add", *asked))
        return orphans_of(folder, commits)

    with monkeypatch.context() as patched:
        patched.setattr("md3cli.scale.inspect.orphans_of", add_and_look)
        assert md3("detect", pictures, "a", *asked).exit_code == 0
    assert [other.exit_code for other in others] == [0], others[0].output
    again = md3("detect", pictures, "a", "b", *asked)
    assert (again.exit_code, md3.num_answered, "missing" in again.stderr) == (0, 0, False), again.stderr
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "a", "b")


def no_locks(fd: int, flags: int) -> None:
    raise OSError(38, "Function not implemented")


def test_without_locks_no_rank_removes_what_another_writes(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, others = tmp_path / "o.jsonl", []
    asked = ("detect", pictures, "a", "-o", out, *SHARDS, "--world-size", 2)

    @contextmanager
    def meet_another(path: Path) -> Iterator[Path]:
        with atomic_publish(path) as temp:
            yield temp
            if not others:
                others.append(None)
                others.append(md3(*asked, "--worker-rank", 1))

    monkeypatch.setattr("md3cli.system.fcntl.flock", no_locks)
    monkeypatch.setattr("md3cli.scale.finish.EXPORT_WAIT_S", -1e9)  # it waits for this one in vain
    monkeypatch.setattr("md3cli.scale.finish.atomic_publish", meet_another)
    done = md3(*asked)
    assert (done.exit_code, others[1].exit_code) == (0, 0), done.output + others[1].output
    assert out.read_bytes() == whole(md3, pictures, tmp_path, "a")


def test_without_locks_ranks_wait_for_the_first_one(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, others = tmp_path / "o.jsonl", []
    asked = ("detect", pictures, "a", "-o", out, *SHARDS, "--world-size", 2)

    def let_the_first_export(seconds: float) -> None:
        others.append(md3(*asked))

    monkeypatch.setattr("md3cli.system.fcntl.flock", no_locks)
    assert md3(*asked).exit_code == 0
    Path(f"{out}.md3run/exported.json").unlink()
    monkeypatch.setattr("md3cli.scale.finish.time.sleep", let_the_first_export)
    done = md3(*asked, "--worker-rank", 1)
    assert (done.exit_code, len(others), others[0].exit_code) == (0, 1, 0), done.output
    assert "another rank exports the records" in done.stderr


def test_an_export_that_ends_while_it_is_verified_is_no_damage(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.jsonl"
    exported = Path(f"{out}.md3run/exported.json")
    md3("detect", pictures, "a", "-o", out, "--engine", "local")
    before = exported.read_bytes()
    md3("detect", pictures, "b", "-o", out, "--add", "--engine", "local")
    after = exported.read_bytes()

    def read_before(folder: RunFolder) -> Exported | None:
        found = read_exported(folder)
        exported.write_bytes(after)
        return found

    exported.write_bytes(before)
    monkeypatch.setattr("md3cli.scale.inspect.read_exported", read_before)
    assert "not what was exported" not in md3("verify", out).output
    assert md3("verify", out).exit_code == 0


def test_a_part_that_another_rank_has_done_anew_is_not_told_of(pictures: Path, tmp_path: Path) -> None:
    folder, plan = planned(str(tmp_path / "run"), rows_of(pictures, ["p0.png", "p1.png"]), shard_size=1)
    run_all(folder, plan)
    seen: dict[int, Any] = dict(CommitLog(folder).refresh())
    remove_commit(folder, 1, seen[1])
    run_all(folder, plan)
    now = dict(CommitLog(folder).refresh())
    assert now[1] != seen[1]
    assert list(reopen_damaged(folder, plan, seen)) == []
    assert list(seen) == [0], "so that its marker is read again"
    assert dict(CommitLog(folder).refresh()) == now


def test_half_a_plan_may_become_a_whole_one(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without hard links shows what a rank is writing."""
    folder, plan = planned(str(tmp_path / "run"), rows_of(pictures, ["p0.png"]))
    path = tmp_path / "run" / PLAN
    whole_plan = path.read_bytes()
    path.write_bytes(whole_plan[:100])
    with pytest.raises(OutputError, match=r"plan\.json is damaged"):
        read_one_plan(folder, 0)
    monkeypatch.setattr("md3cli.scale.plan.time.sleep", lambda seconds: path.write_bytes(whole_plan))
    assert read_one_plan(folder, 0) == plan


@pytest.mark.parametrize("part", ["plan.json", "manifest.parquet"])
def test_status_of_a_run_that_another_takes_the_place_of(
    md3: Program, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    out, find = tmp_path / "o.jsonl", find_run_folder
    md3("detect", pictures, "a", "-o", out, "--engine", "local")
    path, aside = Path(f"{out}.md3run/plan/{part}"), tmp_path / "aside"

    def find_too_early(typed: str) -> RunFolder:
        if aside.exists():
            aside.rename(path)
            return find(typed)
        found = find(typed)
        path.rename(aside)
        return found

    monkeypatch.setattr("md3cli.scale.folder.find_run_folder", find_too_early)
    done = md3("status", out, "--json")
    assert (done.exit_code, json.loads(done.stdout)["state"]) == (0, "finished")
