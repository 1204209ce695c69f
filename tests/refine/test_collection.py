"""Records of one run or of several as one: what counts, what is refused, what runs chose, and who needs a pass."""

from __future__ import annotations

import hashlib
import json
import random
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CAR, failure, record, write_records
from hypothesis import given
from hypothesis import strategies as st

from md3cli.errors import InputError, UsageError
from md3cli.refine.collection import Collection, as_collection, read
from md3cli.refine.labels import Labels, labels_with
from md3cli.refine.refinement import Refinement, name_of, refined
from md3cli.refine.selection import Selection

SHA = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(3)]


def line(image: str, prompt: str = "car", sha256: str = SHA[0], **fields: Any) -> dict[str, Any]:
    found = [CAR | {"label": prompt}]
    name = hashlib.sha256(f"{image} {prompt}".encode()).hexdigest()[:32]
    return record(image, "detect", prompt, objects=found, sha256=sha256, id=name, **fields)


def run(folder: Path, lines: list[dict[str, Any]], **info: Any) -> Path:
    write_records(folder / "records.jsonl", lines)
    (folder / "run.json").write_text(json.dumps({"schema": "md3-run/1"} | info))
    return folder


def images(collection: Collection) -> list[str]:
    return [str(one["image"]) for one in read(collection)]


def test_runs_folders_files_and_documents_are_read_one_after_another(tmp_path: Path) -> None:
    first = run(tmp_path / "one", [line("a.png"), line("b.png")])
    second = write_records(tmp_path / "two.jsonl", [line("c.png")])
    write_records(tmp_path / "boxes.json.records.jsonl", [line("d.png")])
    (tmp_path / "boxes.json").write_text("{}")
    assert images(Collection.of([first, second, tmp_path / "boxes.json"])) == ["a.png", "b.png", "c.png", "d.png"]
    assert images(Collection.of([second, first, second])) == ["c.png", "a.png", "b.png"]  # once, however often named
    assert images(as_collection(first)) == ["a.png", "b.png"]


def test_nothing_and_what_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no RECORDS"):
        Collection.of([])
    with pytest.raises(InputError, match=r"no records at .*gone"):
        Collection.of([tmp_path / "gone"])


def test_of_a_request_the_last_line_counts_and_stands_where_the_first_stood(tmp_path: Path) -> None:
    one = run(tmp_path / "one", [line("a.png"), line("b.png", meta={"n": 1})])
    two = run(tmp_path / "two", [line("b.png", meta={"n": 2}), line("c.png")])
    notes: list[str] = []
    found = list(read(Collection.of([one, two]), notes))
    assert [(str(record["image"]), record["meta"]) for record in found] == [
        ("a.png", {}),
        ("b.png", {"n": 2}),
        ("c.png", {}),
    ]
    assert notes == ["1 line repeats a request that is there already; of each request the last line counts"]
    backwards = list(read(Collection.of([two, one])))
    assert [record["meta"] for record in backwards] == [{"n": 1}, {}, {}]


def test_two_pictures_of_one_name_are_refused_and_told_apart(tmp_path: Path) -> None:
    one = run(tmp_path / "one", [line("a.png"), line("b.png")])
    two = run(tmp_path / "two", [line("c.png"), line("a.png", sha256=SHA[1])])
    with pytest.raises(InputError) as refused:
        list(read(Collection.of([one, two])))
    said = str(refused.value)
    assert f"{one / 'records.jsonl'}, line 1" in said
    assert f"{two / 'records.jsonl'}, line 2" in said
    assert "--as NAME=RECORDS" in said
    instead, beside = Collection.of([one], [("night", two)]), Collection.of([one, two], [("night", two)])
    for collection in (instead, beside):
        found = list(read(collection))
        assert [record["image"] for record in found] == ["a.png", "b.png", "night/c.png", "night/a.png"]
        assert len({record["id"] for record in found}) == 4
    both = list(read(Collection.of([], [("day", one), ("night", two)])))
    assert [record["image"] for record in both] == ["day/a.png", "day/b.png", "night/c.png", "night/a.png"]
    with pytest.raises(UsageError, match="has two names by --as"):
        Collection.of([], [("day", one), ("night", one)])
    other = list(read(Collection.of([], [("x", one)])))
    assert not {record["id"] for record in both} & {record["id"] for record in other}  # ids are made of NAME, too
    assert all(len(str(record["id"])) == 32 for record in both)


def test_failed_records_without_a_digest_disagree_with_nobody(tmp_path: Path) -> None:
    failed = failure("a.png", "detect", "car") | {"id": line("a.png")["id"], "sha256": None}
    one, two = run(tmp_path / "one", [failed]), run(tmp_path / "two", [line("a.png")])
    assert [record["error"] for record in read(Collection.of([one, two]))] == [None]


def test_what_runs_chose_is_used_and_what_is_typed_wins(tmp_path: Path) -> None:
    labels = labels_with(["vehicle=car", "dog"], Labels())
    one = run(tmp_path / "one", [line("a.png")], refinement=Refinement(labels, 0.95, None).to_json())
    (kept,) = read(Collection.of([one]))
    assert kept["objects"] == []
    (typed,) = read(Collection.of([one], chosen=Refinement(min_score=0.0)))
    assert [thing["label"] for thing in typed["objects"]] == ["vehicle"]
    (renamed,) = read(Collection.of([one], chosen=Refinement(labels_with(["auto=car"], Labels()), 0.0, has_file=True)))
    assert [thing["label"] for thing in renamed["objects"]] == ["auto"]
    assert Collection.of([one]).classes == ("vehicle", "dog")


def test_how_runs_differ_is_told(tmp_path: Path) -> None:
    info = {"identity": {"model": "tiny@1", "dtype": "bf16"}, "refinement": Refinement(min_score=0.4).to_json()}
    other = {"identity": {"model": "tiny@2", "dtype": "bf16"}, "refinement": Refinement().to_json()}
    one, two = run(tmp_path / "one", [line("a.png")], **info), run(tmp_path / "two", [line("b.png")], **other)
    notes = Collection.of([one, two]).notes
    assert "the runs chose --min-score 0.4, none; the first counts, type --min-score to say otherwise" in notes
    assert "the runs differ in model: tiny@1, tiny@2" in notes
    assert len(notes) == 2
    assert Collection.of([one, two], chosen=Refinement(min_score=0.1)).notes == notes[1:]
    shown = [Collection.of(runs).refinement.min_score for runs in ([one, two], [two, one])]
    assert shown == [0.4, None]  # the first counts, also where it chose nothing


def test_other_names_of_a_prompt_are_told(tmp_path: Path) -> None:
    runs = []
    for number, objects in enumerate((["vehicle=car", "dog"], ["auto=car", "dog"], ["car", "hound=dog"])):
        refinement = Refinement(labels_with(objects, Labels()))
        runs.append(run(tmp_path / str(number), [line(f"{number}.png")], refinement=refinement.to_json()))
    assert Collection.of([runs[0], runs[0]]).notes == ()
    assert Collection.of(runs[:2]).notes == (
        "the runs call 'car' 'vehicle' and 'auto'; the first counts, --labels FILE says otherwise",
    )
    assert "'vehicle' and 'auto' (and 1 more);" in Collection.of(runs).notes[0]
    typed = Refinement(labels_with(["x=car", "y=dog"], Labels()), has_file=True)
    assert Collection.of(runs, chosen=typed).notes == ()
    shown = {thing["label"] for record in read(Collection.of(runs[:2])) for thing in record["objects"]}
    assert shown == {"vehicle"}


def test_names_of_records_that_no_run_json_tells_of_are_read_from_them(tmp_path: Path) -> None:
    cars = [line("a.png") | {"objects": [CAR | {"label": "vehicle"}]}, line("a.png", "truck") | {"objects": []}]
    trucks = [line("b.png", "truck") | {"objects": [CAR | {"label": "vehicle", "score": 0.8}]}]
    same = line("b.png") | {"objects": [CAR | {"label": "vehicle"}]}
    collection = Collection.of([write_records(tmp_path / "r.jsonl", [*cars, *trucks, same])])
    assert collection.refinement.labels.to_json() == [{"name": "vehicle", "prompts": ["car", "truck"]}]
    assert collection.classes == ()  # their order is that in which they are seen
    assert [len(record["objects"]) for record in read(collection)] == [1, 0, 0, 1]  # doubles go across the two prompts


def test_names_that_only_records_tell_stay_beside_a_labels_file(tmp_path: Path) -> None:
    """Of a prompt that is not in the file, also where nothing was found: no class is called by the bare prompt."""
    lines = [line("a.png", "dog") | {"objects": [CAR | {"label": "pet"}]}, line("b.png", "dog") | {"objects": []}]
    foreign = write_records(tmp_path / "r.jsonl", [*lines, line("a.png")])
    typed = Refinement(labels_with(["vehicle=car"], Labels()), has_file=True)
    named_run = run(tmp_path / "run", [line("c.png")], refinement=typed.to_json())
    for collection in (Collection.of([foreign], chosen=typed), Collection.of([named_run, foreign])):
        labels = collection.refinement.labels
        assert {name_of(record, labels) for record in read(collection)} == {"vehicle", "pet"}
        assert collection.classes == ("vehicle", "pet")


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"schema":"md3/1"'])
def test_a_file_without_records_is_an_error_without_its_run_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError):
        list(read(Collection.of([path])))
    (tmp_path / "r.jsonl.run.json").write_text('{"schema": "somebody/1"}')
    with pytest.raises(InputError):
        list(read(Collection.of([path])))
    (tmp_path / "r.jsonl.run.json").write_text('{"schema": "md3-run/1"}')
    if content:
        with pytest.raises(InputError):
            list(read(Collection.of([path])))
    else:
        assert list(read(Collection.of([path]))) == []


pictures = st.lists(st.integers(0, 3), min_size=1, max_size=5)  # how many of three prompts found something


@given(found=pictures, seed=st.integers(0, 99), nms=st.sampled_from([None, 0.5]), limit=st.none() | st.integers(0, 9))
def test_reading_can_go_on_from_any_place(
    tmp_path_factory: pytest.TempPathFactory, found: list[int], seed: int, nms: float | None, limit: int | None
) -> None:
    """The exporters read picture by picture: from each place come the records that come in one go."""
    prompts = ("car", "truck", "bus")
    lines = [
        line(f"{place}.png", prompt) | {"objects": [CAR | {"label": prompt, "score": 0.3 + n / 10}] * (n < num_found)}
        for place, num_found in enumerate(found)
        for n, prompt in enumerate(prompts)
    ]
    random.Random(seed).shuffle(lines)
    path = write_records(tmp_path_factory.getbasetemp() / "places.jsonl", lines)
    labels = labels_with([f"vehicle={prompt}" for prompt in prompts], Labels()) if seed % 2 else Labels()
    whole = Collection.of([path], chosen=Refinement(labels, 0.35, nms))
    collection = replace(whole, selection=Selection(limit=limit))
    with closing(collection.open()) as shown:
        placed = list(shown.placed())
        assert len(placed) == len(lines[:limit])
        for number, (place, _) in enumerate(placed):
            assert list(islice(shown.placed(place), 3)) == placed[number : number + 3]
    plain = {
        one["id"]: one
        for image in {one["image"] for one in lines}
        for one in refined([other for other in lines if other["image"] == image], whole.refinement)
    }
    assert [record for _, record in placed] == [plain[one["id"]] for one in lines[:limit]]
