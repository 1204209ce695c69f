"""Scores of runs that asked about parts of pictures: what is known to be true is of whole pictures."""

from __future__ import annotations

import json

import pytest
from truths import about, box, instances, record, write_records

from md3cli.errors import InputError
from md3cli.evaluate import compare, compare_runs, evaluate, load_truth
from md3cli.evaluate.located import final_records
from md3cli.exporters import ExportOptions, export_records
from md3cli.refine.collection import Collection
from md3cli.refine.selection import Selection

COLOUR = "What colour?"
CAR, OTHER = box(10, 10, 40, 40), box(100, 10, 40, 40)


def truth_of(folder, document):
    path = folder / "truth.json"
    path.write_text(json.dumps(document))
    return load_truth(path)


def cars(*boxes, **fields):
    return record("a.jpg", "detect", "car", objects=list(boxes or (CAR, OTHER))) | fields


def test_an_answer_about_an_object_is_not_that_about_the_picture(tmp_path):
    """The same question is asked of the picture and of its cars."""
    found = cars()
    asked = [about(found, n, COLOUR, answer="blue", meta={"truth": "red"}) for n in (0, 1)]
    whole = record("a.jpg", "query", COLOUR, answer="red", meta={"truth": "red"})
    path = write_records(tmp_path / "records.jsonl", [found, *asked, whole])
    by_column = evaluate(path, [], answer="truth")
    truth = truth_of(tmp_path, [{"image": "a.jpg", "question": COLOUR, "answer": "red"}])
    for scored in (by_column, evaluate(path, [truth])):
        (section,) = scored.sections
        assert section.scores["exact"] == 1
        assert section.counts["requests"] == 1
        assert [note for note in scored.notes if note.startswith("2 texts about parts of pictures")]


def test_a_caption_of_a_part_is_not_scored_as_the_picture_s(tmp_path):
    found = cars()
    part = about(found, 0, None, task="caption", length="short", caption="a wheel")
    whole = record("a.jpg", "caption", length="short", caption="two cars")
    path = write_records(tmp_path / "records.jsonl", [found, part, whole])
    truth = truth_of(
        tmp_path,
        {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"id": 1, "image_id": 1, "caption": "two cars"}],
        },
    )
    (section,) = evaluate(path, [truth]).sections
    assert section.scores["exact"] == 1


def test_texts_about_parts_alone_are_nothing_to_score(tmp_path):
    path = write_records(tmp_path / "records.jsonl", [about(cars(), 0, COLOUR, answer="red")])
    with pytest.raises(InputError, match="only texts about parts of pictures"):
        evaluate(path, [truth_of(tmp_path, [{"image": "a.jpg", "question": COLOUR, "answer": "red"}])])


def test_boxes_found_in_parts_are_scored_together_and_told(tmp_path):
    found = cars()
    wheels = [about(found, n, "dog", task="detect", objects=[box(x, 20, 10, 10)]) for n, x in enumerate((20, 110))]
    path = write_records(tmp_path / "records.jsonl", [found, *wheels])
    truth = instances(
        [
            ("a.jpg", name, at)
            for name, at in (("dog", [20, 20, 10, 10]), ("dog", [110, 20, 10, 10]), ("dog", [180, 80, 10, 10]))
        ]
    )
    (section,) = evaluate(path, [truth_of(tmp_path, truth)]).sections
    assert section.by_name["dog"]["recall"] == pytest.approx(2 / 3)
    assert section.by_name["dog"]["precision"] == 1
    assert any("2 records looked at parts of pictures alone" in note for note in section.notes)


def test_objects_of_one_name_keep_their_answers():
    one, other = cars(), cars() | {"prompt": "automobile"}
    asked = [about(finder, n, COLOUR, answer=str(n)) for finder in (one, other) for n in (0, 1)]
    for answer in asked:
        answer["region"]["label"] = "car"
    assert len(final_records([one, other, *asked])) == 6


def test_runs_are_compared_object_by_object():
    before, after = cars(), cars(OTHER | {"x_min": 0.51}, CAR)
    earlier = [before, about(before, 0, COLOUR, answer="red"), about(before, 1, COLOUR, answer="blue")]
    later = [after, about(after, 0, COLOUR, answer="blue"), about(after, 1, COLOUR, answer="red")]
    compared = compare(earlier, later)
    assert (compared.num_only_before, compared.num_only_after) == (2, 2)  # car 1 is another thing now
    moved = cars(CAR | {"x_min": 0.06}, OTHER)
    later = [moved, about(moved, 0, COLOUR, answer="green"), about(moved, 1, COLOUR, answer="blue")]
    compared = compare(earlier, later)
    assert [change.prompt for change in compared.changes] == ["car", f"car 1: {COLOUR}"]
    assert compared.num_same == 1


def test_runs_of_parts_alone_are_compared(tmp_path):
    found = cars()
    paths = [
        write_records(tmp_path / f"{text}.jsonl", [about(found, 0, COLOUR, answer=text)]) for text in ("red", "blue")
    ]
    comparison = compare_runs(*paths, []).comparison
    assert comparison is not None
    assert [(change.before, change.after) for change in comparison.changes] == [("blue", "red")]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_ours_is_true_of_whole_pictures_alone(tmp_path, suffix):
    found = cars()
    whole = record("a.jpg", "query", COLOUR, answer="red")
    path = write_records(tmp_path / "records.jsonl", [found, about(found, 0, COLOUR, answer="blue"), whole])
    for task, section in (("query", "answers"), ("detect", "boxes")):
        taken = Collection.of([path], selection=Selection(tasks=(task,)))
        export_records(taken, suffix, tmp_path / f"{task}.{suffix}", ExportOptions())
        (scored,) = evaluate(path, [load_truth(tmp_path / f"{task}.{suffix}")]).sections
        assert scored.name == section
        assert scored.scores["exact" if task == "query" else "AP"] == 1
        told = [note for note in scored.notes if "with words about parts of pictures, which are no truth: 1" in note]
        assert len(told) == (task == "query")
