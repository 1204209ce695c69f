"""run.json: whether OUTPUT is this command's to resume, and the timeline."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from md3cli.errors import OutputMismatchError
from md3cli.records import Answer, ImageItem, Request, RunIdentity, Task, make_record, request_id
from md3cli.run.run_info import (
    MAX_POINTS,
    RunCounts,
    RunDocument,
    Timeline,
    check_first_record,
    identity_of,
    output_paths,
)

RUN = RunIdentity(model="tiny@0")
DETECT = Request(Task.DETECT, "car", spatial_refs=((0.5, 0.5),))
CAPTION = Request(Task.CAPTION, length="long")


def begin(path: Path, requests: list[Request], run: RunIdentity = RUN, *, is_resume: bool = True) -> RunDocument:
    return RunDocument.begin(
        path,
        identity=identity_of(requests, run, "/data"),
        arguments=["md3", "detect", "/data", "car\x1b[31m"],
        root="/data",
        is_resume=is_resume,
    )


def test_it_tells_how_each_start_went(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    begin(path, [DETECT])  # killed
    begin(path, [DETECT]).finish(RunCounts(5, 1, {"decode": 1}), {"decode": 1.25, "generate": 2.0}, 3)
    begin(path, [DETECT]).finish(RunCounts(9, 1, {"decode": 1}), {"decode": 1.0}, 0)
    document = json.loads(path.read_text())
    assert document["root"] == "/data"
    assert document["model"] == "tiny@0"
    assert document["arguments"] == ["md3", "detect", "/data", "car\\x1b[31m"]
    assert document["counts"] == {"ok": 9, "failed": 1, "errors": {"decode": 1}}
    assert document["stages"] == {"decode": 2.25, "generate": 2.0}
    assert [start["exit_status"] for start in document["starts"]] == [None, 3, 0]
    assert {"python", "torch", "pyarrow"} <= document["versions"].keys()


def test_the_root_can_be_opened_again(tmp_path: Path) -> None:
    root = "/data/👩\u200d🚀 \x1b"
    RunDocument.begin(tmp_path / "run.json", identity={}, arguments=[], root=root, is_resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["root"] == root
    RunDocument.begin(tmp_path / "run.json", identity={}, arguments=[], root="/caf\udce9", is_resume=False)
    assert json.loads((tmp_path / "run.json").read_text())["root"] == "/caf\\xe9"


def test_overwrite_forgets_the_earlier_run(tmp_path: Path) -> None:
    begin(tmp_path / "run.json", [DETECT])
    begin(tmp_path / "run.json", [CAPTION], is_resume=False)
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


@pytest.mark.parametrize(
    ("requests", "run", "difference"),
    [
        ([replace(DETECT, temperature=0.3)], RUN, "temperature 0, now 0.3"),
        ([replace(DETECT, prompt="bus")], RUN, "it has detect car; you now ask detect bus"),
        ([DETECT], replace(RUN, dtype="bf16"), "dtype auto, now bf16"),
        ([DETECT], RunIdentity("other@1"), "model tiny@0, now other@1"),
        ([CAPTION], RUN, "it has detect car; you now ask caption long"),
    ],
)
def test_another_run_is_refused_and_named(
    tmp_path: Path, requests: list[Request], run: RunIdentity, difference: str
) -> None:
    path = tmp_path / "run.json"
    begin(path, [DETECT])
    before = path.read_bytes()
    with pytest.raises(OutputMismatchError, match=difference) as caught:
        begin(path, requests, run)
    assert "--overwrite" in str(caught.value)
    assert path.read_bytes() == before


def test_a_renamed_checkpoint_is_refused_with_a_way_out(tmp_path: Path) -> None:
    begin(tmp_path / "run.json", [DETECT], RunIdentity("step-1000@7ef7"))
    with pytest.raises(OutputMismatchError, match="If it is the same checkpoint, give it its earlier name, step-1000"):
        begin(tmp_path / "run.json", [DETECT], RunIdentity("step-2000@7ef7"))
    with pytest.raises(OutputMismatchError) as caught:
        begin(tmp_path / "run.json", [DETECT], RunIdentity("step-1000@0000"))
    assert "earlier name" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema":"other"}', '{"schema":"md3-run/1","identity":3}'])
def test_a_damaged_run_json_is_written_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    begin(tmp_path / "run.json", [DETECT])
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["model"] == "tiny@0"


def test_records_alone_tell_whether_they_are_ours() -> None:
    request = replace(DETECT, temperature=0.5)
    answered = Answer(0, {"objects": []}, "stop", 1, 1)
    record = make_record(
        request_id("a.jpg", request, RUN), ImageItem("a.jpg", "a.jpg"), None, request, RUN, answered, {}
    )
    check_first_record(record, [CAPTION, request], RUN)
    check_first_record(record, [], RUN)  # a manifest may have asked anything
    with pytest.raises(OutputMismatchError, match="model tiny@0, now big@1"):
        check_first_record(record, [], RunIdentity("big@1"))
    with pytest.raises(OutputMismatchError, match="it has detect car; you now ask caption long"):
        check_first_record(record, [CAPTION], RUN)
    with pytest.raises(OutputMismatchError, match="the settings of detect car"):
        check_first_record(record, [DETECT], RUN)
    with pytest.raises(OutputMismatchError, match="the settings of detect car"):
        check_first_record(record, [request], replace(RUN, quant="int8"))


def test_where_the_files_of_a_run_stand() -> None:
    single = output_paths(Path("d/out.jsonl"), is_folder=False, is_journal=True)
    assert [str(path) for path in (single.journal, single.run_info, single.lock)] == [
        "d/out.jsonl",
        "d/out.jsonl.run.json",
        "d/out.jsonl.lock",
    ]
    document = output_paths(Path("d/out.json"), is_folder=False, is_journal=False)
    assert str(document.journal) == "d/out.json.records.jsonl"
    assert str(document.lock) == "d/out.json.lock"
    folder = output_paths(Path("d"), is_folder=True, is_journal=False)
    assert [str(path) for path in (folder.journal, folder.run_info)] == ["d/records.jsonl", "d/run.json"]


# ---- the timeline has few points, whatever the run's length --------------------------------------


@pytest.mark.parametrize("num_notes", [0, 10, 10_000])
def test_a_timeline_is_short_even_and_ends_with_the_run(num_notes):
    timeline = Timeline()
    for number in range(1, num_notes + 1):
        timeline.note(number, 3 * number, is_last=number == num_notes)
    points = timeline.points
    assert len(points) == min(num_notes, len(points)) <= MAX_POINTS
    assert all(earlier < later for earlier, later in pairwise(points))
    assert all(done == 3 * at_s for at_s, done in points)
    if points:
        assert points[-1] == (num_notes, 3 * num_notes)
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(points[:-1])]
    assert not gaps or max(gaps) <= 2.1 * min(gaps)


def test_points_closer_than_the_spacing_are_left_out():
    timeline = Timeline()
    for number in range(100):
        timeline.note(number / 100, number)
    assert timeline.points == [(0.0, 0), (0.5, 50)]


def test_what_comes_after_the_last_record_does_not_count():
    timeline = Timeline()
    timeline.note(1.0, 10)
    timeline.note(1.1, 12, is_last=True)
    timeline.note(60.0, 12, is_last=True)
    assert timeline.points == [(1.0, 10), (1.1, 12)]


def test_a_later_start_goes_on_where_the_earlier_ended():
    timeline = Timeline([(0.0, 0), (10.0, 40)])
    timeline.note(5.0, 20)
    assert timeline.points[-1] == (15.0, 60)


@pytest.mark.parametrize("damage", [None, "x", [[1]], [["a", 2]]])
def test_run_json_hands_the_timeline_on_to_the_next_start(tmp_path, damage):
    path = tmp_path / "run.json"

    def begin():
        return RunDocument.begin(path, identity={"model": "m"}, arguments=[], root=".", is_resume=True)

    run = begin()
    assert run.timeline == []
    run.finish(RunCounts(ok=3), {"decode": 1.0}, None, [(1.5, 3)])
    assert begin().timeline == [(1.5, 3)]
    if damage is not None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"timeline": damage}))
        assert begin().timeline == []
