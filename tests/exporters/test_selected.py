"""The file of `md3 select`: records as they stand, and a run.json that later commands read what they need from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from finished_runs import CAR, DOG, Run, detect_records, record, write_records

from md3cli.errors import UsageError
from md3cli.exporters.selected import write_selected
from md3cli.finished.run_json import digest_of_file, load_run_info
from md3cli.refine.collection import Collection, read
from md3cli.refine.labels import Labels, labels_with
from md3cli.refine.refinement import Refinement
from md3cli.refine.selection import Selection

LABELS = labels_with(["animal=dog", "car"], Labels())


def collection(run: Run, **words: object) -> Collection:
    whole = Collection.of([run.records], chosen=Refinement(LABELS, min_score=0.5))
    return replace(whole, selection=Selection(**words))  # type: ignore[arg-type]


def test_records_stand_as_the_model_gave_them(detect_run: Run) -> None:
    out = detect_run.folder / "some.jsonl"
    report = write_selected(collection(detect_run, prompts=("dog",)), out)
    wanted = [one for one in detect_records() if one["prompt"] == "dog"]
    assert [json.loads(one) for one in out.read_bytes().splitlines()] == wanted
    assert (report.num_records, report.num_failures) == (len(wanted), 1)


def test_refined_records_have_names_and_thresholds_applied(detect_run: Run) -> None:
    out = detect_run.folder / "some.jsonl"
    write_selected(collection(detect_run), out, is_refined=True)
    found = [thing for one in out.read_bytes().splitlines() for thing in json.loads(one).get("objects", ())]
    assert {(thing["label"], thing["score"]) for thing in found} == {("car", CAR["score"])}
    assert len(out.read_bytes().splitlines()) == len(detect_records())


def test_run_json_says_how_they_are_shown_and_where_the_pictures_are(detect_run: Run) -> None:
    out = detect_run.folder / "some.jsonl"
    write_selected(collection(detect_run, limit=3), out, arguments=("md3", "select", "a\x1b[1m"))
    document = json.loads((detect_run.folder / "some.jsonl.run.json").read_bytes())
    assert document["schema"] == "md3-selection/1"
    assert document["counts"] == {"ok": 1, "failed": 2, "errors": {"decode": 2}}
    assert "\x1b" not in "".join(document["arguments"])
    digest = digest_of_file(out)
    assert document["records"] == {"bytes": digest.bytes, "sha256": digest.sha256}
    (root,) = load_run_info(out).roots
    assert (root.path, root.is_own, root.prefix) == (detect_run.root, True, "")
    again = Collection.of([out])
    assert again.refinement == Refinement(LABELS, min_score=0.5)
    assert list(read(again)) == list(read(collection(detect_run)))[:3]


def test_a_root_that_is_only_claimed_stays_a_claim(detect_run: Run) -> None:
    info = json.loads((detect_run.folder / "run.json").read_bytes())
    (detect_run.folder / "run.json").write_text(json.dumps(info | {"seal": "0" * 64}))
    out = detect_run.folder / "some.jsonl"
    write_selected(Collection.of([detect_run.records]), out)
    assert [root.is_own for root in load_run_info(out).roots] == [False]


def test_prefixes_of_several_runs_are_kept(detect_run: Run, tmp_path: Path) -> None:
    other = write_records(tmp_path / "other.jsonl", [record("a/photo.jpg", "detect", "dog", objects=[DOG])])
    out = tmp_path / "both.jsonl"
    write_selected(Collection.of([], [("day", detect_run.records), ("night", other)]), out)
    assert [root.prefix for root in load_run_info(out).roots] == ["day/"]  # nothing is known of the other's pictures
    names = [one["image"] for one in read(Collection.of([out]))]
    assert names == [f"day/{one['image']}" for one in detect_records()] + ["night/a/photo.jpg"]


def test_what_stands_there_is_replaced_only_when_told(detect_run: Run) -> None:
    out = detect_run.folder / "some.jsonl"
    out.write_text("mine")
    with pytest.raises(UsageError, match=r"some\.jsonl"):
        write_selected(collection(detect_run), out)
    assert out.read_text() == "mine"
    write_selected(collection(detect_run), out, overwrite=True)
    assert len(list(read(Collection.of([out])))) == len(detect_records())


def test_a_file_that_is_read_is_never_written(detect_run: Run) -> None:
    before = detect_run.records.read_bytes()
    link = detect_run.folder / "link.jsonl"
    os.symlink(detect_run.records, link)
    for out in (detect_run.records, link):
        with pytest.raises(UsageError):
            write_selected(collection(detect_run), out, overwrite=True, read=[detect_run.records])
    assert detect_run.records.read_bytes() == before
