"""Stores: whole files, one winner; the same of a folder and of an object store (fsspec's own in memory)."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from md3cli.errors import MissingExtraError, OutputError
from md3cli.scale.folder import RunFolder, commit_name, find_run_folder, open_run_folder, part_name, shard_of
from md3cli.scale.markers import Commit, put_commit, read_commit
from md3cli.scale.store import LocalStore, ObjectStore, Store, open_store

RACER = """
import sys, time
from pathlib import Path
from md3cli.scale.store import LocalStore
store = LocalStore(Path(sys.argv[1]))
(Path(sys.argv[1]) / f"ready-{sys.argv[2]}").touch()
while not (Path(sys.argv[1]) / "go").exists():
    pass
print(store.put_if_absent("commits/00000.json", sys.argv[2].encode()))
"""


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path)
    memory = ObjectStore(f"memory://{tmp_path.name}")
    memory.remove_all()
    return memory


def test_files_come_and_go(store: Store) -> None:
    assert store.read("a/b.json") is None
    assert store.names("a") == []
    store.put("a/b.json", b"1")
    store.put("a/b.json", b"2")
    with store.put_file("a/c") as path:
        path.write_bytes(b"3")
    assert store.names("a") == ["b.json", "c"]
    assert store.read("a/b.json") == b"2"
    with store.open("a/c") as file:
        assert file.read() == b"3"
    assert store.modified_at("a/c") is not None
    store.remove("a/c")
    store.remove("a/c")
    assert store.names("a") == ["b.json"]
    store.remove_all()
    assert store.read("a/b.json") is None
    store.remove_all()


def test_only_the_first_is_put(store: Store) -> None:
    assert store.put_if_absent("commits/1", b"first")
    assert not store.put_if_absent("commits/1", b"second")
    assert store.read("commits/1") == b"first"
    assert store.names("commits") == ["1"]


def test_a_file_that_fails_half_way_is_none(store: Store) -> None:
    def fail() -> None:
        with store.put_file("a") as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.read("a") is None


@pytest.mark.process
def test_of_eight_racing_processes_one_wins(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(8)]
    while len(list(tmp_path.glob("ready-*"))) < 8:
        assert all(racer.poll() is None for racer in racers)
    (tmp_path / "go").touch()
    said = [racer.communicate(timeout=240)[0].strip() for racer in racers]
    assert said.count("True") == 1
    assert (tmp_path / "commits/00000.json").read_text() == str(said.index("True"))
    assert len(list((tmp_path / "commits").iterdir())) == 1, "the losers clean up"


def test_without_hard_links_the_first_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    store = LocalStore(tmp_path)
    assert store.put_if_absent("a", b"1")
    assert not store.put_if_absent("a", b"2")
    assert store.read("a") == b"1"


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        LocalStore(tmp_path / "file").put("a", b"1")


PART = part_name(3, "vm-1-ab")


def commit(**changes: object) -> Commit:
    facts = {"part": PART, "rows": 1, "images": 1, "ok": 1, "errors": 0, "sha256": "", "bytes": 0, "attempt": "a"}
    return Commit(**{**facts, "host": "h", "seconds": 1.0, "ended": 2.0, **changes})  # type: ignore[arg-type]


def test_half_a_marker_is_none_and_gives_way(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    folder.store.put(commit_name(3), b'{"part": "p')
    assert read_commit(folder, 3) is None
    assert put_commit(folder, 3, commit())
    assert read_commit(folder, 3) == commit()
    assert put_commit(folder, 3, commit()), "the answer may be lost, the marker is ours"
    assert not put_commit(folder, 3, commit(part=part_name(3, "another"), attempt="b"))


@pytest.mark.parametrize(
    "changes",
    [
        {"part": "/etc/passwd"},
        {"part": "../../o.jsonl"},
        {"part": "parts/../../part-00003-a.jsonl"},
        {"part": "parts/part-00003-a/../../x.jsonl"},
        {"part": 5},
        {"rows": None},
        {"ended": "now"},
        {"ended": float("nan")},
        {"error_types": 5},
        {"error_types": {"io": "many"}},
    ],
)
def test_a_marker_that_makes_no_sense_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    """What a marker names is read, and removed where its shard is done again: nothing but a part may be."""
    folder = open_run_folder(str(tmp_path))
    folder.store.put(commit_name(3), json.dumps(asdict(commit()) | changes).encode())
    assert read_commit(folder, 3) is None


def test_the_self_test_tells_stores_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(f"memory://{tmp_path.name}")
    assert store.has_put_if_absent()
    assert store.names("selftest") == []
    monkeypatch.setattr(store, "put_if_absent", lambda name, data: True)
    assert not store.has_put_if_absent()


def test_an_object_store_keeps_journals_on_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = open_run_folder("memory://bucket/run")
    assert isinstance(folder.wip, LocalStore)
    assert folder.wip.root.is_relative_to(tmp_path)
    assert open_run_folder("memory://bucket/other").wip.root != folder.wip.root


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(MissingExtraError, match=r"md3cli\[remote\]"):
        open_store("s3://bucket/run")


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("00012.json", 12),
        ("part-00012-vm-1-ab.jsonl", 12),
        ("123456.vm-1-a.jsonl", 123456),
        (".lock", None),
        ("12", None),
    ],
)
def test_the_shard_of_a_name(name: str, shard: int | None) -> None:
    assert shard_of(name) == shard


def test_a_run_folder_is_found_by_what_it_belongs_to(tmp_path: Path) -> None:
    for uri in ("out/.md3run", "o.jsonl.md3run"):
        RunFolder(LocalStore(tmp_path / uri), LocalStore(tmp_path / uri)).store.put("plan/plan.json", b"{}")
    for typed in ("out", "out/", "out/.md3run", "out/records.jsonl"):
        assert find_run_folder(f"{tmp_path}/{typed}").uri == str(tmp_path / "out/.md3run")
    assert find_run_folder(f"{tmp_path}/o.jsonl").uri == str(tmp_path / "o.jsonl.md3run")
