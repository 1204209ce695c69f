"""What runs show of what was found: on stdout, in formats, on resume, from one process and from many."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from program import Program, beside_pictures, records_of
from terminal import terminal

MANY = ("--engine", "local", "--shard-size", "2")
LOCAL = ()


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """With three pictures in `img`; the stub finds one box for each prompt, all at one place, with score 0.9."""
    return beside_pictures(monkeypatch, tmp_path)


def labels_in(path: str) -> list[str]:
    document = json.loads(Path(path).read_bytes())
    names = {one["id"]: one["name"] for one in document["categories"]}
    return [names[one["category_id"]] for one in document["annotations"]]


def categories(path: str) -> list[str]:
    return [one["name"] for one in json.loads(Path(path).read_bytes())["categories"]]


def chosen(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_bytes())["refinement"]
    return found


def test_json_lines_on_stdout_are_refined(md3: Program) -> None:
    found = records_of(md3("detect", "img", "vehicle=car", "vehicle=truck", "dog", "--min-score", "0.9").stdout)
    assert [[thing["label"] for thing in one["objects"]] for one in found] == [["vehicle"], [], ["dog"]] * 3
    hidden = records_of(md3("detect", "img", "vehicle=car", "vehicle=truck", "--min-score", "0.901").stdout)
    assert [one["objects"] for one in hidden] == [[]] * 6
    off = records_of(md3("detect", "img", "vehicle=car", "vehicle=truck", "--nms", "1").stdout)
    assert [len(one["objects"]) for one in off] == [1] * 6
    on = records_of(md3("run", "img", "--task", "detect:car,=car", "--nms", "0.5").stdout)
    assert [len(one["objects"]) for one in on] == [1, 0] * 3
    assert [
        one["score"]
        for record in records_of(md3("point", "img", "a=nose", "--min-score", "0.9").stdout)
        for one in record["points"]
    ] == []


def test_a_table_is_refined(md3: Program) -> None:
    """On a terminal: one row shows the box, the prompt whose box is a double shows none."""
    with terminal() as screen:
        from md3cli.cli import app

        app(["detect", "img", "vehicle=car", "vehicle=truck", "--no-progress"], standalone_mode=False)
    shown = screen.getvalue()
    assert "vehicle" in shown
    assert shown.count("0.9") == 3  # three pictures, one box each


@pytest.mark.parametrize("many", [LOCAL, MANY], ids=["local", "many"])
def test_the_journal_keeps_all_under_the_name_when_it_was_asked(md3: Program, many: tuple[str, ...]) -> None:
    done = md3("detect", "img", "vehicle=car", "vehicle=truck", "--min-score", "0.95", "-o", "o/", "-f", "coco", *many)
    assert done.exit_code == 0, done.output
    found = [(one["objects"][0]["label"], one["objects"][0]["score"]) for one in records_of(Path("o/records.jsonl"))]
    assert found == [("vehicle", 0.9)] * 6
    assert labels_in("o/coco.json") == []
    assert categories("o/coco.json") == ["vehicle"]
    kept = chosen("o/run.json")
    assert (kept["min_score"], kept["nms"]) == (0.95, None)
    assert kept["labels"] == [{"name": "vehicle", "prompts": ["car", "truck"]}]
    assert md3("stats", "o", "--json").exit_code == 0
    assert json.loads(md3("stats", "o", "--json").stdout)["labels"] == {"vehicle": 0}
    assert json.loads(md3("stats", "o", "--json", "--min-score", "0").stdout)["labels"] == {"vehicle": 3}


def test_many_processes_write_what_one_writes(md3: Program) -> None:
    Path("l.toml").write_text(
        "[[label]]\nname='ghost'\nid=7\n[[label]]\nname='vehicle'\nprompts=['car','truck']\nid=3\n"
        "[[label]]\nname='dog'\nmin_score=0.95\nid=5\n"
    )
    for out, many in (("one", LOCAL), ("many", MANY)):
        assert (
            md3("detect", "img", "--labels", "l.toml", "-o", f"{out}/", "-f", "coco", "-f", "csv", *many).exit_code == 0
        )
    for name in ("records.jsonl", "records.csv"):
        assert Path("one", name).read_bytes() == Path("many", name).read_bytes()
    documents = [json.loads(Path(out, "coco.json").read_bytes()) | {"info": None} for out in ("one", "many")]
    assert documents[0] == documents[1]
    assert [(one["id"], one["name"]) for one in documents[0]["categories"]] == [
        (7, "ghost"),
        (3, "vehicle"),
        (5, "dog"),
    ]
    assert labels_in("many/coco.json") == ["ghost", "vehicle"] * 3
    assert chosen("one/run.json") == chosen("many/run.json")


@pytest.mark.parametrize("many", [LOCAL, MANY], ids=["local", "many"])
def test_a_start_that_differs_in_names_and_thresholds_makes_the_formats_again(
    md3: Program, many: tuple[str, ...]
) -> None:
    command = ("detect", "img", "-o", "o/", "-f", "coco", *many)
    assert md3(*command, "car", "dog").exit_code == 0
    journal = Path("o/records.jsonl").read_bytes()
    assert labels_in("o/coco.json") == ["car", "dog"] * 3

    def again(*words: str) -> None:
        num_models = len(md3.models)
        result = md3(*command, *words)
        assert result.exit_code == 0, result.output
        assert all(model.engine is None or model.engine.num_answered == 0 for model in md3.models[num_models:])
        assert Path("o/records.jsonl").read_bytes() == journal

    again("vehicle=car", "dog")
    assert labels_in("o/coco.json") == ["vehicle", "dog"] * 3
    assert categories("o/coco.json") == ["vehicle", "dog"]
    again("vehicle=car", "dog", "--min-score", "0.95")
    assert (labels_in("o/coco.json"), chosen("o/run.json")["min_score"]) == ([], 0.95)
    Path("l.toml").write_text("[[label]]\nname = 'dog'\n[[label]]\nname = 'auto'\nprompts = ['car']\nmin_score = 0.5\n")
    again("--labels", "l.toml", "--add")  # in another order, which alone would be refused
    assert labels_in("o/coco.json") == ["auto"] * 3  # the label's own limit; the option's of before hides the dogs
    assert categories("o/coco.json") == ["dog", "auto"]
    again("--labels", "l.toml", "--min-score", "0", "--nms", "0.5", "--add")
    assert sorted(labels_in("o/coco.json")) == ["auto"] * 3 + ["dog"] * 3
    assert chosen("o/run.json")["nms"] == 0.5


def test_a_document_is_made_again_too(md3: Program) -> None:
    assert md3("detect", "img", "car", "-o", "o.json").exit_code == 0
    assert md3("detect", "img", "vehicle=car", "-o", "o.json").exit_code == 0
    assert labels_in("o.json") == ["vehicle"] * 3
    assert chosen("o.json.run.json")["labels"] == [{"name": "vehicle", "prompts": ["car"]}]
    assert records_of(Path("o.json.records.jsonl"))[0]["objects"][0]["label"] == "car"  # as it was asked


def test_names_can_be_given_later_and_unlisted_prompts_come_last(md3: Program) -> None:
    assert md3("detect", "img", "dog", "car", "truck", "-o", "o/").exit_code == 0
    before = {path: path.read_bytes() for path in Path("o").iterdir()}
    Path("l.txt").write_text("bus\nvehicle=car\nvehicle=truck\n")
    assert md3("export", "o", "--labels", "l.txt", "-o", "o.json").exit_code == 0
    assert categories("o.json") == ["bus", "vehicle", "dog"]
    assert labels_in("o.json") == ["dog", "vehicle"] * 3  # doubles go where names come later, too
    assert md3("export", "o", "--labels", "l.txt", "-f", "yolo", "-o", "yolo").exit_code == 0
    assert Path("yolo/labels/p0.txt").read_text().splitlines()[0].startswith("2 ")
    assert {path: path.read_bytes() for path in Path("o").iterdir()} == before


@pytest.mark.parametrize("many", [LOCAL, MANY], ids=["local", "many"])
def test_later_commands_show_what_the_run_chose(md3: Program, many: tuple[str, ...]) -> None:
    words = ("vehicle=car", "dog", "--min-score", "0.95")
    assert md3("detect", "img", *words, "-o", "o/", *many).exit_code == 0
    truth = {
        "images": [{"id": n, "file_name": f"p{n}.png", "width": 24 + n, "height": 24} for n in range(3)],
        "categories": [{"id": 1, "name": "vehicle"}],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "iscrowd": 0, "area": 100}
            | {"bbox": [0.1 * (24 + n), 0.2 * 24, 0.4 * (24 + n), 0.55 * 24]}
            for n in range(3)
        ],
    }
    Path("gt.json").write_text(json.dumps(truth))
    for typed, num_shown in (((), 0), (("--min-score", "0.9"), 1)):
        assert md3("export", "o", "-o", "o.json", "--overwrite", *typed).exit_code == 0
        assert labels_in("o.json") == ["vehicle", "dog"] * 3 * num_shown
        assert categories("o.json") == ["vehicle", "dog"]
        rows = md3("export", "o", "-f", "csv", *typed).stdout.splitlines()[1:]
        assert sum(",vehicle," in row for row in rows) == 3 * num_shown
        refined = records_of(md3("select", "o", "--refined", *typed).stdout)
        assert [len(one["objects"]) for one in refined] == [num_shown] * 6
        scores = json.loads(md3("eval", "o", "--gt", "gt.json", "--json", *typed).stdout)["sections"][0]["scores"]
        assert scores["recall"] == num_shown
        assert md3("report", "o", "-o", "o.html", "--overwrite", *typed).exit_code == 0
        page = re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', Path("o.html").read_text(), re.DOTALL)
        assert page is not None
        records = [one for piece in json.loads(page[1])["cards"] for card in piece for one in card["records"]]
        assert [len(one.get("shapes") or ()) for one in records] == [num_shown] * 6
    raw = records_of(md3("select", "o").stdout)
    assert [one["objects"][0]["label"] for one in raw] == ["vehicle", "dog"] * 3


def test_numbers_of_classes_are_as_given_in_coco_and_from_0_in_yolo(md3: Program) -> None:
    assert md3("detect", "img", "cat", "dog", "car", "-o", "o/").exit_code == 0
    tables = "[[label]]\nname='{}'\nid={}\n[[label]]\nname='{}'\nid={}\n"
    for names, ids, expected in (
        (("dog", "ghost"), (7, 0), [(7, "dog"), (0, "ghost"), (8, "cat"), (9, "car")]),
        (("dog", "ghost"), (2**31 - 1, 4), None),
    ):
        Path("l.toml").write_text(tables.format(names[0], ids[0], names[1], ids[1]))
        assert md3("export", "o", "--labels", "l.toml", "-o", "o.json", "--overwrite").exit_code == 0
        document = json.loads(Path("o.json").read_bytes())
        found = [(one["id"], one["name"]) for one in document["categories"]]
        assert found[:2] == [(ids[0], names[0]), (ids[1], names[1])]
        assert len({number for number, _ in found}) == 4
        assert expected is None or found == expected
        assert sorted(labels_in("o.json")) == sorted(["cat", "dog", "car"] * 3)
    assert md3("export", "o", "--labels", "l.toml", "-f", "yolo", "-o", "yolo").exit_code == 0
    classes = re.findall(r'(\d+): "(\w+)"', Path("yolo/data.yaml").read_text())
    assert classes == [("0", "dog"), ("1", "ghost"), ("2", "cat"), ("3", "car")]


def test_names_may_be_each_others_prompts(md3: Program) -> None:
    assert md3("detect", "img", "dog=cat", "cat=dog", "-o", "o.jsonl").exit_code == 0
    found = [(one["prompt"], one["objects"][0]["label"]) for one in records_of(Path("o.jsonl"))]
    assert found == [("cat", "dog"), ("dog", "cat")] * 3
    for path in ("o.jsonl", "alone.jsonl"):  # the second without a run.json
        assert md3("export", path, "-o", f"{path}.coco.json").exit_code == 0
        assert (categories(f"{path}.coco.json"), labels_in(f"{path}.coco.json")) == (["dog", "cat"], ["dog", "cat"] * 3)
        Path("alone.jsonl").write_bytes(Path("o.jsonl").read_bytes())


@pytest.mark.parametrize("many", [LOCAL, MANY], ids=["local", "many"])
def test_names_are_for_what_the_rows_of_a_manifest_ask_too(md3: Program, many: tuple[str, ...]) -> None:
    rows = [("p0", "detect", "car"), ("p1", "point", "car"), ("p0", "detect", "truck"), ("p2", "detect", "dog")]
    lines = [f"img/{image}.png,{task},{prompt}" for image, task, prompt in rows]
    Path("m.csv").write_text("\n".join(["image,task,prompt", *lines]) + "\n")
    Path("l.txt").write_text("bus\nvehicle=car\nvehicle=truck\n")
    assert md3("run", "m.csv", "--labels", "l.txt", "-o", "o/", "-f", "coco", *many).exit_code == 0
    records = records_of(Path("o/records.jsonl"))
    assert [(one["objects"] if "objects" in one else one["points"])[0]["label"] for one in records] == [
        *("vehicle", "vehicle", "vehicle", "dog")
    ]
    assert categories("o/coco.json") == ["bus", "vehicle", "dog"]
    assert labels_in("o/coco.json") == ["vehicle", "dog"]  # the truck is the car, though the rows stand apart


@pytest.mark.parametrize("many", [LOCAL, MANY])
def test_a_file_that_lists_the_same_otherwise_orders_the_exports(md3: Program, many: tuple[str, ...]) -> None:
    Path("one.txt").write_text("v=car\ndog\n")
    Path("other.txt").write_text("dog\nv=car\n")
    assert md3("detect", "img", "--labels", "one.txt", "-o", "run/", "-f", "coco", *many).exit_code == 0
    before = Path("run/records.jsonl").read_bytes()
    assert md3("detect", "img", "--labels", "other.txt", "-o", "run/", "-f", "coco", *many).exit_code == 0
    assert categories("run/coco.json") == ["dog", "v"]
    assert Path("run/records.jsonl").read_bytes() == before
    assert md3("detect", "img", "dog", "v=car", "-o", "run/").exit_code == 2, "what is typed is an order of requests"
