"""`md3 eval --best-thresholds`: a labels file that later commands use, and what it is never written over.

And `--metric` and `--answer`: what they put into tables, JSON, limits and comparisons.
"""

from __future__ import annotations

import contextlib
import json
import shlex

import pytest
from truths import box, instances, record, write_records
from typer.testing import CliRunner

from md3cli.commands.eval import app
from md3cli.errors import InputError, OutputError, UsageError
from md3cli.refine.labels import read_labels

THERE = [("a.jpg", "car", [0, 0, 40, 40]), ("b.jpg", "car", [100, 0, 40, 40])]


@pytest.fixture
def folder(tmp_path):
    """Records of cars with a wrong one among them, their ground truth and a labels file."""
    found = [box(0, 0, 40, 40, 0.9), box(150, 60, 30, 30, 0.3)]
    records = [record("a.jpg", "detect", "car", objects=found)]
    records.append(record("b.jpg", "detect", "car", objects=[box(100, 0, 40, 40, 0.7)]))
    write_records(tmp_path / "run.jsonl", records)
    (tmp_path / "gt.json").write_text(json.dumps(instances(THERE)))
    (tmp_path / "labels.toml").write_text('[[label]]\nname = "vehicle"\nprompts = ["car"]\nmin_score = 0.95\nid = 3\n')
    return tmp_path


def run(folder, line):
    with contextlib.chdir(folder):
        return CliRunner().invoke(app, shlex.split(line))


def test_the_file_written_gives_the_scores_promised(folder):
    result = run(folder, "run.jsonl --gt gt.json --best-thresholds best.toml --json")
    assert result.exit_code == 0
    promised = json.loads(result.stdout)["best_thresholds"]
    car = {"name": "car", "min_score": 0.5, "F1": 1.0, "F1_before": pytest.approx(0.8), "objects": 2}
    assert promised == {"F1": 1.0, "F1_before": pytest.approx(0.8), "labels": [car], "notes": []}
    assert "written: best.toml" in result.stderr
    (label,) = read_labels(folder / "best.toml").labels
    assert (label.name, label.prompts, label.min_score) == ("car", ("car",), 0.5)
    measured = json.loads(run(folder, "run.jsonl --gt gt.json --labels best.toml --json").stdout)
    assert measured["sections"][0]["by_name"]["car"]["F1"] == 1.0
    assert "best_thresholds" not in measured


def test_the_table_tells_what_each_label_wins(folder):
    result = run(folder, "run.jsonl --gt gt.json --best-thresholds best.toml")
    lines = result.stdout.splitlines()
    start = lines.index("best thresholds, by F1 at IoU 0.5: 1 of 1 labels")
    assert [line.split() for line in lines[start + 1 :]] == [
        ["min_score", "F1", "F1", "before"],
        ["all", "-", "1.000", "0.800"],
        ["car", "0.500", "1.000", "0.800"],
    ]


def test_names_are_carried_over_and_what_cannot_be_judged_is_told(folder):
    result = run(folder, "run.jsonl --gt gt.json --labels labels.toml --best-thresholds best.toml")
    assert "note: no new min_score (not in the ground truth): vehicle" in result.stdout
    assert read_labels(folder / "best.toml") == read_labels(folder / "labels.toml")


def test_a_file_that_is_there_is_replaced_on_request_alone(folder):
    (folder / "best.toml").write_text("mine")
    result = run(folder, "run.jsonl --gt gt.json --best-thresholds best.toml")
    assert isinstance(result.exception, UsageError)
    assert "--overwrite" in str(result.exception)
    assert (folder / "best.toml").read_text() == "mine"
    assert run(folder, "run.jsonl --gt gt.json --best-thresholds best.toml --overwrite").exit_code == 0
    assert read_labels(folder / "best.toml").names == ("car",)


@pytest.mark.parametrize("typed", ["", "--labels labels.toml "])
def test_a_labels_file_is_brought_up_to_date(folder, typed):
    before = '[[label]]\nname = "auto"\nprompts = ["car"]\n[[label]]\nname = "ghost"\n'
    (folder / "labels.toml").write_text(before)
    refused = run(folder, f"run.jsonl --gt gt.json {typed}--best-thresholds labels.toml")
    assert isinstance(refused.exception, UsageError)
    assert (folder / "labels.toml").read_text() == before
    done = run(folder, f"run.jsonl --gt gt.json {typed}--best-thresholds labels.toml --overwrite")
    assert done.exit_code == 0
    assert read_labels(folder / "labels.toml").names == ("auto", "ghost")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--gt gt.json --labels labels.toml --best-thresholds link.toml --overwrite", "is an input"),
        ("--gt gt.toml --best-thresholds gt.toml --overwrite", "is an input"),
        ("--gt gt.json --compare other.toml --best-thresholds other.toml --overwrite", "is an input"),
        ("--gt gt.json --best-thresholds picture.toml --overwrite", "is a picture"),
        ("--gt gt.json --best-thresholds folder.toml --overwrite", "there already"),
        ("--gt gt.json --best-thresholds dangling.toml", "there already"),
        ("--gt gt.json --best-thresholds best.json", "ends in .toml"),
        ("--compare run.jsonl --best-thresholds best.toml", "--gt"),
        ("--gt gt.json --overwrite", "--best-thresholds"),
    ],
)
def test_what_it_is_never_written_over(folder, arguments, why):
    (folder / "link.toml").symlink_to("labels.toml")
    (folder / "dangling.toml").symlink_to("nowhere.toml")
    (folder / "gt.toml").write_text((folder / "gt.json").read_text())
    (folder / "other.toml").write_text((folder / "run.jsonl").read_text())
    (folder / "picture.toml").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "folder.toml").mkdir()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = run(folder, f"run.jsonl {arguments}")
    assert isinstance(result.exception, UsageError)
    assert why in str(result.exception)
    assert "another -o" not in str(result.exception)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not (folder / "best.toml").exists()


def test_nothing_is_written_where_nothing_can_be_judged_or_there_is_no_folder(folder):
    (folder / "captions.json").write_text('{"images": [], "annotations": [{"caption": "a"}]}')
    with pytest.raises(InputError):
        raise run(folder, "run.jsonl --gt captions.json --best-thresholds best.toml").exception
    result = run(folder, "run.jsonl --gt gt.json --best-thresholds no/such/best.toml")
    assert isinstance(result.exception, OutputError)
    assert sorted(path.suffix for path in folder.iterdir() if path.name.startswith("best")) == []


def test_the_other_run_is_read_under_the_same_names_and_thresholds(folder):
    records = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    records[0]["objects"].pop()
    write_records(folder / "older.jsonl", [one | {"id": one["id"] + "o"} for one in records])
    plain = run(folder, "run.jsonl --compare older.jsonl")
    assert plain.stdout.splitlines()[0].startswith("compared: 1 the same, 1 changed (1 count)")
    refined = run(folder, "run.jsonl --compare older.jsonl --min-score 0.5")
    assert refined.stdout.splitlines()[0].startswith("compared: 2 the same, 0 changed")
    selected = run(folder, "run.jsonl --compare older.jsonl --image a.jpg")
    assert selected.stdout.splitlines()[0] == "compared: 0 the same, 1 changed (1 count), 0 only before, 0 only now"


def test_an_empty_selection_is_no_error(folder):
    result = run(folder, "run.jsonl --gt gt.json --label zebra")
    assert (result.exit_code, result.stdout.strip()) == (0, "")
    assert "note: nothing is selected, so nothing is scored" in result.stderr


def test_the_names_of_the_other_run_are_no_change(folder):
    refinement = {"labels": [{"name": "auto", "prompts": ["car"]}], "min_score": 0.8, "nms": None}
    records = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    for one in records:
        one["objects"] = [found | {"label": "auto"} for found in one["objects"]]
    write_records(folder / "older.jsonl", records)
    (folder / "older.jsonl.run.json").write_text(json.dumps({"schema": "md3-run/1", "refinement": refinement}))
    named = {"labels": [{"name": "vehicle", "prompts": ["car"]}], "min_score": None, "nms": None}
    (folder / "run.jsonl.run.json").write_text(json.dumps({"schema": "md3-run/1", "refinement": named}))
    result = run(folder, "run.jsonl --compare older.jsonl")
    assert result.stdout.splitlines()[0].startswith("compared: 2 the same, 0 changed")


def test_a_score_that_is_not_there_is_refused_before_anything_is_written(folder):
    result = run(folder, "run.jsonl --gt gt.json --best-thresholds best.toml -o scores --fail-under NO=1")
    assert isinstance(result.exception, UsageError)
    assert "no score NO here" in str(result.exception)
    assert not result.stdout
    assert not [path for path in folder.iterdir() if path.stem in ("best", "scores")]


@pytest.fixture
def asked(tmp_path):
    """Answers with the true ones in their own rows, an older run of them, and the same truth as tables."""
    rows = [("a.jpg", "105", "100"), ("b.jpg", "Hello wrld", "hello world"), ("c.jpg", "yes", None)]
    records = [record(image, "query", "Q?", answer=said) | {"meta": {"truth": true}} for image, said, true in rows]
    write_records(tmp_path / "run.jsonl", records)
    older = [one | {"answer": "nothing", "id": one["id"] + "o"} for one in records[:1]] + records[1:]
    write_records(tmp_path / "older.jsonl", older)
    (tmp_path / "gt.csv").write_text("image,question,answer\na.jpg,q?,100\nb.jpg,q?,hello world\n")
    (tmp_path / "gt.tsv").write_text("image\tquestion\tanswer\na.jpg\tq?\t100\nb.jpg\tq?\thello world\n")
    return tmp_path


@pytest.mark.parametrize("truth", ["--answer truth", "--gt gt.csv", "--gt gt.tsv"])
def test_a_metric_stands_first_in_table_and_json(asked, truth):
    lines = run(asked, f"run.jsonl {truth} --metric anls --metric relaxed --metric anls").stdout.splitlines()
    assert lines[0] == "answers: 2 requests, 0 failed, 1 not in truth, 0 not asked"
    assert lines[1].split()[:3] == ["anls", "relaxed", "exact"]
    assert lines[2].split()[:3] == ["all", "0.788", "0.500"]
    document = json.loads(run(asked, f"run.jsonl {truth} --metric anls --json").stdout)
    (section,) = document["sections"]
    assert (section["main"], section["scores"]["anls"]) == ("anls", pytest.approx((2 / 3 + 10 / 11) / 2))
    assert document["ground_truth"] == ["meta.truth" if "--answer" in truth else truth.split()[1]]


@pytest.mark.parametrize("truth", ["--answer truth", "--gt gt.csv"])
def test_what_is_wrong_is_selected_by_either_truth(asked, truth):
    lines = run(asked, f"run.jsonl {truth} --wrong").stdout.splitlines()
    assert lines[0].startswith("answers: 2 requests")
    records = (asked / "run.jsonl").read_text()
    (asked / "run.jsonl").write_text(records.replace("Hello wrld", "hello world"))
    assert run(asked, f"run.jsonl {truth} --wrong").stdout.startswith("answers: 1 request")
    refused = run(asked, "run.jsonl --wrong --compare older.jsonl").exception
    assert "give --gt FILE (or --answer COLUMN to md3 eval)" in str(refused)


@pytest.mark.parametrize(
    ("limits", "exit_code"),
    [("0.5", 0), ("0.51", 1), ("relaxed=0.5", 0), ("relaxed=0.51", 1), ("anls=0.7 --fail-under exact=0.1", 1)],
)
def test_a_metric_decides_the_exit_status(asked, limits, exit_code):
    result = run(asked, f"run.jsonl --answer truth --metric relaxed --metric anls --fail-under {limits}")
    assert result.exit_code == exit_code
    assert ("is below" in result.stderr) == bool(exit_code)


def test_a_metric_tells_what_became_better(asked):
    lines = run(asked, "run.jsonl --compare older.jsonl --answer truth --metric relaxed").stdout.splitlines()
    assert "compared: 2 the same, 1 changed (1 answer), 0 only before, 0 only now" in lines
    assert "  by the ground truth: 1 better" in lines
    assert any(line.startswith("  answers: relaxed +0.500, exact +0.000") for line in lines)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("run.jsonl --metric anls", "--metric anls needs a ground truth; give --gt FILE, or --answer COLUMN"),
        ("run.jsonl --compare older.jsonl --metric anls", "needs a ground truth"),
        ("run.jsonl --answer truht", "did you mean truth?"),
        ("run.jsonl --answer truth --metric miou", "needs segment records"),
        ("run.jsonl --answer truth --metric anls --fail-under acc50=1", "no score acc50 here; there are: anls, exact"),
        (
            "run.jsonl --answer truth --fail-under anls=1",
            "numeric, numeric_error; --metric anls adds it",
        ),
        ("run.jsonl", "--answer COLUMN"),
    ],
)
def test_a_metric_that_cannot_be_is_a_usage_error(asked, line, why):
    result = run(asked, line)
    assert isinstance(result.exception, UsageError)
    assert why in str(result.exception)
    assert not result.stdout


def test_a_metric_of_another_name_is_refused_with_all_names(asked):
    result = run(asked, "run.jsonl --answer truth --metric bleu")
    assert result.exit_code == 2
    names = ["anls", "relaxed", "vqa", "f1", "accuracy", "exact", "numeric", "acc50", "miou", "ciou"]
    assert [name for name in names if f"'{name}'" not in result.stderr] == []


def test_a_selection_takes_its_own_truth(asked):
    result = run(asked, "run.jsonl --answer truth --image a.jpg --metric relaxed")
    assert result.stdout.splitlines()[0] == "answers: 1 requests, 0 failed, 0 not in truth, 0 not asked"
    empty = run(asked, "run.jsonl --answer truth --image zebra.jpg --metric relaxed")
    assert (empty.exit_code, empty.stdout.strip()) == (0, "")


def test_boxes_of_expressions_in_a_table(folder):
    (folder / "refs.csv").write_text("image,label,x,y,w,h\na.jpg,car,0,0,40,40\nb.jpg,car,100,0,40,20\n")
    result = run(folder, "run.jsonl --gt refs.csv --metric acc50 -o scores --json")
    (section,) = json.loads(result.stdout)["sections"]
    assert (section["main"], section["scores"]["acc50"]) == ("acc50", 1.0)
    assert [path.name for path in sorted((folder / "scores").iterdir())] == ["boxes-reliability.png", "eval.json"]
