"""The frozen plan: rows come back as they were, ids are those of a single process, memory does not grow."""

from __future__ import annotations

import functools
import json
import operator
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import CAPTION, planned, rows_of

from md3cli.config import DEFAULT_PAD
from md3cli.errors import OutputError, OutputMismatchError
from md3cli.records import ImageItem, Request, RowFailure, SourceRow, Task
from md3cli.run.record_index import RequestIds
from md3cli.scale.folder import MANIFEST, PLAN
from md3cli.scale.make_plan import MAX_SHARDS, put_plan, shard_size_for, write_manifest
from md3cli.scale.plan import PlanReader, check_config, columns_of, read_plan, row_of

COLOR = Request(Task.QUERY, "What colour is the {label}?")
QUESTION = Request(Task.QUERY, "Why?", spatial_refs=((0.1, 0.2),), choices=("yes", "no"))

items = st.builds(
    ImageItem,
    st.text(min_size=1).filter(lambda text: text.isprintable()),
    st.binary(min_size=1, max_size=9).map(lambda data: data.replace(b"\0", b"x").decode("utf-8", "surrogateescape")),
    st.none() | st.just("eHg="),
    st.integers(0, 2**40),
    st.none() | st.integers(0, 2**40),
)
source_rows = st.builds(
    SourceRow,
    st.none() | items,
    st.sampled_from([(CAPTION,), (CAPTION, QUESTION), (QUESTION, QUESTION), ()]),
    st.dictionaries(st.text(), st.none() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers())),
    st.none() | st.builds(RowFailure, st.just("bad_row"), st.text()),
    then=st.sampled_from([(), (COLOR,), (COLOR, CAPTION)]),
)


@pytest.mark.process
@given(source_rows, st.sampled_from([(), (COLOR,)]))
def test_a_row_comes_back_as_it_was(row: SourceRow, then: tuple[Request, ...]) -> None:
    assert row_of(columns_of(row, (CAPTION,), then), (CAPTION,), then) == row


def test_a_usual_row_costs_no_more_than_its_name() -> None:
    assert columns_of(SourceRow(ImageItem("a.jpg", "/x/a.jpg"), (CAPTION,)), (CAPTION,)) == ("a.jpg", b"/x/a.jpg", None)


def test_what_the_run_asks_of_every_object_costs_a_row_nothing() -> None:
    asked, item = (Request(Task.DETECT, "car"), CAPTION), ImageItem("a.jpg", "/x/a.jpg")
    usual, own = SourceRow(item, asked, then=(COLOR,)), SourceRow(item, asked)
    assert columns_of(usual, asked, (COLOR,)).more is None
    assert columns_of(own, asked, (COLOR,)).more == '{"then":[]}'
    assert columns_of(SourceRow(item, (CAPTION,)), (CAPTION,), (COLOR,)).more is None, "a caption finds no objects"
    for row in (usual, own):
        assert row_of(columns_of(row, asked, (COLOR,)), asked, (COLOR,)) == row


@pytest.mark.process
@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 7))
def test_ids_are_those_of_a_single_process(tmp_path_factory: pytest.TempPathFactory, names: str, size: int) -> None:
    """The k of every repeat too, whichever shard it falls into."""
    rows = rows_of(Path("/nowhere"), names, (CAPTION, QUESTION, CAPTION))
    folder, plan = planned(str(tmp_path_factory.mktemp("run")), rows, (CAPTION, QUESTION, CAPTION), size)
    reader, ids = PlanReader(folder), RequestIds(plan.identity)
    found = [row for shard in range(plan.shards) for row in reader.shard(shard)]
    assert [row.row for row in found] == rows
    expected = [ids.next_id(row.image.name, request) for row in rows if row.image for request in row.requests]
    assert [record_id for row in found for record_id in row.ids] == expected
    assert len(set(expected)) == plan.requests


@pytest.mark.parametrize(
    ("rows", "size"), [(0, 64), (100, 64), (6_400, 100), (10**6, 1024), (25_600_000, 1024), (10**8, 4000)]
)
def test_shards_are_neither_too_many_nor_too_few(rows: int, size: int) -> None:
    assert shard_size_for(rows) == size
    assert -(-rows // size) <= MAX_SHARDS


def test_more_rows_than_expected_make_larger_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.scale.make_plan.SHARD_ROWS", 2)
    monkeypatch.setattr("md3cli.scale.make_plan.WANTED_SHARDS", 1)
    monkeypatch.setattr("md3cli.scale.make_plan.FEWEST_SHARD_ROWS", 1)
    monkeypatch.setattr("md3cli.scale.make_plan.MAX_SHARDS", 3)
    rows = rows_of(tmp_path, map(str, range(17)))
    folder, plan = planned(str(tmp_path / "run"), rows)
    assert (plan.shards, plan.shard_size) == (3, 6)
    reader = PlanReader(folder)
    assert [row.row for shard in range(3) for row in reader.shard(shard)] == rows


def test_the_fingerprint_is_of_the_rows_and_not_of_their_grouping(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, map(str, range(20)))
    prints = {write_manifest(tmp_path / "m", rows, (CAPTION,), size).fingerprint for size in (1, 7, 20)}
    assert len(prints) == 1
    assert write_manifest(tmp_path / "m", rows[1:], (CAPTION,), 7).fingerprint not in prints


def test_the_first_plan_stays(tmp_path: Path) -> None:
    folder, first = planned(str(tmp_path), rows_of(tmp_path, "abc"))
    assert put_plan(folder, replace(first, rows=4)) == first
    assert PlanReader(folder).plan == first


def test_a_manifest_of_another_plan_is_refused(tmp_path: Path) -> None:
    folder, _ = planned(str(tmp_path / "a"), rows_of(tmp_path, "abc"))
    other, _ = planned(str(tmp_path / "b"), rows_of(tmp_path, "abd"))
    folder.store.put(MANIFEST, other.store.read(MANIFEST) or b"")
    with pytest.raises(OutputError, match="two plans"):
        PlanReader(folder)


@pytest.mark.parametrize("keep", [0, 40])
def test_a_torn_manifest_is_told_of(tmp_path: Path, keep: int) -> None:
    folder, _ = planned(str(tmp_path), rows_of(tmp_path, "abc"))
    folder.store.put(MANIFEST, (folder.store.read(MANIFEST) or b"")[:keep])
    with pytest.raises(OutputError, match=r"manifest\.parquet cannot be read .*--overwrite"):
        PlanReader(folder)


NAN = float("nan")
TEXTS = ("fingerprint", "config_hash", "made", "config/identity/model", "config/identity/dtype", "config/identity/root")
COUNTS = ("rows", "requests", "shards", "shard_size", "skipped/hidden")
NOT_A_PAD = ("0.1", None, True, [0.1], {}, NAN, float("inf"), -0.1, 10.1, 1e300, 10**400)
CHANGES: list[tuple[str, object]] = [
    *(("config/identity/pad", pad) for pad in NOT_A_PAD),
    *((text, wrong) for text in TEXTS for wrong in (None, 5)),
    *((count, wrong) for count in COUNTS for wrong in ("4", -1, 1.5, True, None)),
    ("shards", 10**9),
    ("shard_size", 0),
    ("has_repeats", "no"),
    ("parts", [1]),
    *((name, wrong) for name in ("config", "config/identity", "skipped") for wrong in (None, 5, [])),
    *(
        (f"config/identity/{key}", wrong)
        for key in ("requests", "then")
        for wrong in ("x", [3], [{"task": "fly"}], None)
    ),
]


@pytest.mark.parametrize(("place", "value"), CHANGES)
@pytest.mark.parametrize("name", ["plan/plan.json", "plan/added-1.json"])
def test_a_plan_that_somebody_changed_is_told_in_one_line(tmp_path: Path, name: str, place: str, value: object) -> None:
    folder, _ = planned(str(tmp_path / "run"), rows_of(tmp_path, "abc"))
    plan = json.loads((tmp_path / "run" / PLAN).read_bytes()) | {"skipped": {"hidden": 2}}
    (tmp_path / "run" / name).write_text(json.dumps(plan))
    assert read_plan(folder) is not None
    *within, key = place.split("/")
    functools.reduce(operator.getitem, within, plan)[key] = value
    (tmp_path / "run" / name).write_text(json.dumps(plan))
    with pytest.raises(OutputError, match=rf"run: {Path(name).name} is damaged; choose another -o, or --overwrite"):
        read_plan(folder)


@pytest.mark.parametrize("pad", [0, 0.5, 10])
def test_a_plan_says_the_room_around_regions(tmp_path: Path, pad: float) -> None:
    folder, plan = planned(str(tmp_path / "run"), rows_of(tmp_path, "abc"))
    assert plan.pad == DEFAULT_PAD
    document = json.loads((tmp_path / "run" / PLAN).read_bytes())
    document["config"]["identity"]["pad"] = pad
    (tmp_path / "run" / PLAN).write_text(json.dumps(document))
    found = read_plan(folder)
    assert found is not None
    assert found.pad == pad


def test_a_manifest_with_damaged_rows_is_told_of(tmp_path: Path) -> None:
    folder, _ = planned(str(tmp_path), rows_of(tmp_path, "abc"))
    data = folder.store.read(MANIFEST) or b""
    folder.store.put(MANIFEST, data[:30] + b"\0" * 60 + data[90:])
    reader = PlanReader(folder)
    with pytest.raises(OutputError, match=r"manifest\.parquet cannot be read"):
        reader.shard(0)


def test_signed_addresses_are_for_their_owner_alone(tmp_path: Path) -> None:
    public, signed = (ImageItem("x", f"https://h/x.png{query}") for query in ("?v=1", "?v=1&X-Amz-Signature=1"))
    for item, mode in ((public, 0o644), (signed, 0o600)):
        path = tmp_path / "manifest.parquet"
        path.touch(mode=0o644)
        path.chmod(0o644)
        write_manifest(path, [SourceRow(item, (CAPTION,))], (CAPTION,))
        assert path.stat().st_mode & 0o777 == mode


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    _, plan = planned(str(tmp_path), rows_of(tmp_path, "a"))
    with pytest.raises(OutputMismatchError, match="dtype auto, now bf16"):
        check_config(plan, {**plan.config, "identity": {**plan.config["identity"], "dtype": "bf16"}})


PLAN_SCRIPT = """
import sys, time, resource
from md3cli.config import RunConfig, SourceSpec
from md3cli.records import Request, Task
from md3cli.scale.folder import open_run_folder
from md3cli.scale.make_plan import make_plan
from md3cli.source.source import open_source
from stub_engine import StubModel
requests = (Request(Task.CAPTION),)
source = open_source(SourceSpec((sys.argv[1],)), requests)
started = time.monotonic()
plan = make_plan(open_run_folder(sys.argv[2]), iter(source), requests, StubModel().identity, {})
print(plan.rows, time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def plan_of(num_rows: int, folder: Path) -> tuple[float, float]:
    """Plan so many rows in a process of its own; seconds and peak MB."""
    manifest = folder / "rows.txt"
    with open(manifest, "w") as file:
        file.writelines(f"photos/{i // 1000:06d}/picture_{i:09d}.jpg\n" for i in range(num_rows))
    environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "support"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", PLAN_SCRIPT, str(manifest), str(folder / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows, seconds, peak_mb = map(float, done.stdout.split())
    assert rows == num_rows
    print(f"{num_rows:,} rows in {seconds:.1f} s, {peak_mb:.0f} MB at most")
    return seconds, peak_mb


@pytest.mark.process
def test_a_plan_in_bounded_memory(tmp_path: Path) -> None:
    _, small_mb = plan_of(20_000, tmp_path)
    _, large_mb = plan_of(300_000, tmp_path)
    assert large_mb - small_mb < 60, "300 bytes a row and more stay in memory"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_plan_of_ten_million_rows(tmp_path: Path) -> None:
    seconds, peak_mb = plan_of(10_000_000, tmp_path)
    assert peak_mb < 300
    assert seconds < 60


THREADS_AFTER = """
import os, sys
from md3cli.scale.folder import open_run_folder
from md3cli.scale.plan import PlanReader

reader = PlanReader(open_run_folder(sys.argv[1]))
repeats = sum(len(set(row.ids)) for shard in range(reader.plan.shards) for row in reader.shard(shard))
others = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in others]
print(repeats, [name for name in names if name != "jemalloc_bg_thd"])  # that one knows no Python
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_reading_a_plan_leaves_no_thread_that_could_meet_the_end_of_the_process(tmp_path: Path) -> None:
    """A thread of Arrow that still holds a Python file then aborts the process, now and then."""
    folder, plan = planned(str(tmp_path), rows_of(Path("/nowhere"), "abab", (CAPTION, CAPTION)), (CAPTION, CAPTION), 1)
    assert plan.each[0].has_repeats
    line = [sys.executable, "-c", THREADS_AFTER, folder.uri]
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == "8 []\n"
