"""`--missing-only`: what is asked, what is left out and told; another start, another FILE, --add, many processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from program import Program, make_pictures, records_of
from truths import instances

BOX = [2, 2, 9, 9]


def labels(*annotations: tuple[str, str], images: tuple[str, ...] = (), file: str = "gt.json") -> None:
    """Write a ground truth of cars and dogs."""
    objects = [(image, name, BOX) for image, name in annotations]
    Path(file).write_text(json.dumps(instances(objects, images=[*images, *(image for image, _ in annotations)])))


@pytest.fixture
def asked(md3: Program) -> Any:
    """Look for cars and dogs in img/ (p0.png to p3.png) where labels are missing; -o r.jsonl."""
    make_pictures(Path("img"), 4)

    def run(*more: object, objects: tuple[str, ...] = ("car", "dog"), status: int = 0, gt: str = "gt.json") -> str:
        done = md3("detect", "img", *objects, "--missing-only", "--gt", gt, "-o", "r.jsonl", *more)
        assert done.exit_code == status, done.output
        return done.stderr

    return run


def requests_in(file: str) -> list[tuple[str, str]]:
    return [(record["image"], record["prompt"]) for record in records_of(Path(file))]


def test_only_what_has_no_label_is_asked(asked: Any) -> None:
    labels(("p0.png", "car"), ("p0.png", "dog"), ("p1.png", "dog"), ("p1.png", "dog"), images=("p2.png",))
    told = asked()
    expected = [("p1.png", "car"), ("p2.png", "car"), ("p2.png", "dog"), ("p3.png", "car"), ("p3.png", "dog")]
    assert requests_in("r.jsonl") == expected
    assert "3 questions that have labels" in told


def test_a_class_is_known_by_its_name_and_a_picture_as_eval_knows_it(asked: Any) -> None:
    labels(("set/img/p0.png", "car"), ("set/img/p1.png", "car"))
    asked(objects=("Car=red car", "Car=blue car", "cat"))
    assert [pair for pair in requests_in("r.jsonl") if pair[0] in ("p0.png", "p1.png")] == [
        ("p0.png", "cat"),
        ("p1.png", "cat"),
    ]


def test_nothing_to_do_is_no_failure(asked: Any, md3: Program) -> None:
    labels(*((f"p{n}.png", name) for n in range(4) for name in ("car", "dog")))
    told = asked()
    assert "nothing to ask: all that is asked has labels" in told
    assert md3.models[-1].engine is None
    assert Path("r.jsonl").read_bytes() == b""
    asked("--shard-size", 2, "-o", "scaled.jsonl")


def test_a_limit_counts_pictures_that_are_asked_about(asked: Any) -> None:
    labels(("p0.png", "car"), ("p0.png", "dog"), ("p1.png", "dog"))
    asked("--limit", 2)
    assert requests_in("r.jsonl") == [("p1.png", "car"), ("p2.png", "car"), ("p2.png", "dog")]


def test_another_start_with_other_labels_asks_what_is_missing_now_and_keeps_the_rest(asked: Any, md3: Program) -> None:
    labels(("p0.png", "car"), ("p0.png", "dog"), images=("p1.png", "p2.png", "p3.png"))
    asked()
    first = requests_in("r.jsonl")
    asked()
    assert md3.models[-1].engine is None
    labels(("p1.png", "car"), ("p1.png", "dog"), ("p2.png", "dog"), file="now.json")
    asked(gt="now.json")
    assert md3.num_answered == 2
    assert requests_in("r.jsonl")[: len(first)] == first
    assert sorted(requests_in("r.jsonl")) == [(f"p{n}.png", name) for n in range(4) for name in ("car", "dog")]


def test_what_is_added_is_narrowed_as_well(asked: Any) -> None:
    labels(("p0.png", "car"), ("p0.png", "dog"), ("p1.png", "dog"))
    asked(objects=("car",), status=0)
    asked("--add", objects=("dog",))
    assert sorted(requests_in("r.jsonl")) == [
        ("p1.png", "car"), ("p2.png", "car"), ("p2.png", "dog"), ("p3.png", "car"), ("p3.png", "dog"),
    ]  # fmt: skip


def test_many_processes_ask_the_same(asked: Any) -> None:
    labels(("p0.png", "car"), ("p0.png", "dog"), ("p1.png", "dog"))
    asked()
    told = asked("--shard-size", 2, "-o", "scaled.jsonl")
    assert Path("scaled.jsonl").read_bytes() == Path("r.jsonl").read_bytes()
    assert "3 questions that have labels" in told
    asked("--shard-size", 2, "-o", "scaled.jsonl")
    assert Path("scaled.jsonl").read_bytes() == Path("r.jsonl").read_bytes()


def test_ground_truth_of_other_pictures_is_one_error_before_the_model(asked: Any, md3: Program) -> None:
    labels(("x.png", "car"))
    told = asked(status=1)
    assert told == "error: no picture of INPUT is in --gt gt.json; are both about the same folder?\n"
    assert not md3.models
    assert not Path("r.jsonl").exists()


def test_an_estimate_beforehand_counts_what_is_left_and_refuses_the_same(asked: Any, md3: Program) -> None:
    labels(("p0.png", "car"), ("p0.png", "dog"), ("p1.png", "dog"))
    line = ["detect", "img", "car", "dog", "--missing-only", "--gt", "gt.json", "--dry-run"]
    done = md3(*line)
    assert done.exit_code == 0
    assert "questions that have labels" in done.output
    labels(("x.png", "car"))
    assert md3(*line).exit_code == 1
    Path("empty").mkdir()
    labels(("p0.png", "car"))
    done = md3("detect", "empty", "car", "--missing-only", "--gt", "gt.json")
    assert (done.exit_code, "nothing to annotate in empty" in done.stderr) == (1, True)


def test_a_name_that_is_no_class_is_told(asked: Any) -> None:
    labels(("p0.png", "car"))
    told = asked(objects=("automobile", "Car"))
    assert "warning: --gt gt.json has no labels called automobile\n" in told
    assert requests_in("r.jsonl")[:2] == [("p0.png", "automobile"), ("p1.png", "automobile")]


def test_of_stdin_it_is_told_at_the_end(asked: Any, md3: Program) -> None:
    labels(("x.png", "car"))
    done = md3("detect", "-", "car", "--missing-only", "--gt", "gt.json", stdin="img/p0.png\n")
    assert done.exit_code == 0
    assert len(records_of(done.stdout)) == 1
    assert "no picture of INPUT is in --gt gt.json, so nothing was left out" in done.stderr


def test_rows_that_bring_their_questions_are_narrowed_and_failures_stay(asked: Any, md3: Program) -> None:
    labels(("img/p0.png", "car"), ("img/p1.png", "dog"))
    rows = [("img/p0.png", "car"), ("img/p0.png", "cat"), ("img/p1.png", "car"), ("img/gone.png", "dog")]
    Path("rows.csv").write_text("image,task,prompt\n" + "".join(f"{image},detect,{what}\n" for image, what in rows))
    done = md3("detect", "rows.csv", "--missing-only", "--gt", "gt.json")
    assert [(one["image"], one["prompt"]) for one in records_of(done.stdout)] == rows[1:]


@pytest.mark.parametrize("task", ["detect", "point", "segment"])
def test_both_options_belong_together(md3: Program, task: str) -> None:
    make_pictures(Path("img"), 1)
    labels(("p0.png", "car"))
    for more, why in ((["--missing-only"], "give --gt FILE"), (["--gt", "gt.json"], "--gt is for --missing-only")):
        done = md3(task, "img", "car", *more)
        assert (done.exit_code, why in done.stderr) == (2, True), done.stderr
    done = md3(task, "img", "car", "dog", "--missing-only", "--gt", "gt.json")
    assert [one["prompt"] for one in records_of(done.stdout)] == ["dog"]


def test_texts_and_the_output_itself_are_no_labels(asked: Any) -> None:
    captions = {"images": [{"id": 1, "file_name": "p0.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}
    Path("captions.json").write_text(json.dumps(captions))
    assert "captions.json has no boxes" in asked(gt="captions.json", status=2)
    labels(("p0.png", "car"))
    Path("gt.json").rename("r.jsonl")
    assert "r.jsonl" in asked(gt="r.jsonl", status=2)
