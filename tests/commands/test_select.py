"""`md3 select` and the words of selection by the real commands, over finished runs; no model is looked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finished_runs import CAR, DOG, Run, detect_records, record, run
from program import Program, isolate, records_of

__all__ = ["run"]
NONE_COMMANDS = [
    ["export", "-f", "csv"],
    ["export", "-o", "x.json"],
    ["export", "-o", "x.jsonl"],
    ["export", "-o", "x.parquet"],
    ["export", "-f", "yolo", "-o", "x"],
    ["report", "-o", "x.html"],
    ["stats", "--json"],
    ["select"],
    ["select", "-o", "y.jsonl"],
    ["eval", "--gt", "gt.json"],
]


@pytest.fixture
def md3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    isolate(monkeypatch, tmp_path / "home")
    return Program(monkeypatch)


@pytest.fixture
def folder(run: Run) -> Path:
    lines = [one | {"id": f"{n:032x}", "sha256": f"{n // 2:064x}"} for n, one in enumerate(detect_records())]
    run.write(lines)
    return run.folder


def of(text: str | Path) -> list[tuple[str, str]]:
    return [(one["image"], one["prompt"]) for one in records_of(text)]


def test_records_are_printed_as_they_stand(md3: Program, folder: Path) -> None:
    result = md3("select", folder, "--prompt", "dog", "--min-score", "0.5")
    assert result.exit_code == 0
    wanted = [one for one in records_of(folder / "records.jsonl") if one["prompt"] == "dog"]
    assert records_of(result.stdout) == wanted
    refined = md3("select", folder, "--prompt", "dog", "--min-score", "0.5", "--refined", "--ok")
    assert [one["objects"] for one in records_of(refined.stdout)] == [[]] * (len(wanted) - 1)


def test_the_same_words_select_in_every_command(md3: Program, folder: Path) -> None:
    words = ["--label", "dog", "--image", "a/*", "--sort", "input", "--limit", "1"]
    assert of(md3("select", folder, *words).stdout) == [("a/photo.jpg", "dog")]
    assert of_csv(md3("export", folder, "-f", "csv", *words).stdout) == [("a/photo.jpg", "dog")]
    assert json.loads(md3("stats", folder, "--json", *words).stdout)["labels"] == {"dog": 1}
    assert md3("report", folder, "-o", "r.html", *words).exit_code == 0
    assert "b/photo.jpg" not in Path("r.html").read_text()
    truth = write_truth(Path("gt.json"), [("a/photo.jpg", "dog", DOG), ("b/photo.jpg", "dog", DOG)])
    scores = json.loads(md3("eval", folder, "--gt", truth, "--json", *words).stdout)
    assert scores["sections"][0]["counts"]["images"] == 1


def of_csv(text: str) -> list[tuple[str, str]]:
    return [(row.split(",")[0], row.split(",")[4]) for row in text.splitlines()[1:]]


def write_truth(path: Path, found: list[tuple[str, str, dict[str, Any]]]) -> Path:
    """COCO instances of pictures of 120 x 80; boxes cut to the picture."""
    names, labels = ([*dict.fromkeys(column)] for column in (*zip(*found, strict=True),)[:2])
    annotations = []
    for number, (image, label, box) in enumerate(found, 1):
        x, y = box["x_min"] * 120, box["y_min"] * 80
        size = [min(box["x_max"], 1) * 120 - x, min(box["y_max"], 1) * 80 - y]
        ids = {"id": number, "image_id": names.index(image), "category_id": labels.index(label)}
        annotations.append({**ids, "bbox": [x, y, *size], "area": size[0] * size[1], "iscrowd": 0})
    images = [{"id": n, "file_name": name, "width": 120, "height": 80} for n, name in enumerate(names)]
    categories = [{"id": n, "name": name} for n, name in enumerate(labels)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_label_selects_and_does_not_order(md3: Program, folder: Path) -> None:
    assert md3("export", folder, "--label", "car", "--label", "dog", "-o", "o.json").exit_code == 0
    assert [one["name"] for one in json.loads(Path("o.json").read_bytes())["categories"]] == ["dog", "car"]
    Path("l.txt").write_text("car\ndog\n")
    words = ("--labels", "l.txt", "--label", "dog", "--label", "car")
    assert md3("export", folder, *words, "-o", "o.json", "--overwrite").exit_code == 0
    assert [one["name"] for one in json.loads(Path("o.json").read_bytes())["categories"]] == ["car", "dog"]


def test_wrong_is_what_the_truth_says(md3: Program, folder: Path) -> None:
    truth = write_truth(
        Path("gt.json"),
        [
            ("a/photo.jpg", "dog", DOG),
            ("a/photo.jpg", "car", DOG),
            ("b/photo.jpg", "dog", CAR),
            ("b/photo.jpg", "car", CAR),
        ],
    )
    result = md3("select", folder, "--wrong", "--gt", truth, "--ok")
    wrong = {("a/photo.jpg", "car"), ("b/photo.jpg", "dog")}
    assert {one for one in of(result.stdout) if one[0] in ("a/photo.jpg", "b/photo.jpg")} == wrong
    table = md3("export", folder, "-f", "csv", "--wrong", "--gt", truth, "--ok", "--image", "b/*").stdout
    assert of_csv(table) == [("b/photo.jpg", "dog")]
    hidden = md3("select", folder, "--wrong", "--gt", truth, "--ok", "--min-score", "0.5")  # what is shown is judged
    assert ("a/photo.jpg", "dog") in of(hidden.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wrong"], "--wrong needs a ground truth"),
        (["--gt", "gt.json"], "--gt is for --wrong here"),
        (["--ok", "--failed"], "--ok and --failed leave nothing"),
        (["--quality", "bad"], "'bad' is not one of: loop, refusal, cut"),
        (["--task", "detec"], "detec"),
        (["--score-from", "2"], "Invalid value for '--score-from'"),
        (["--limit", "-1"], "Invalid value for '--limit'"),
        (["--sort", "best"], "best"),
        (["--as", "night"], "'night' is not NAME=RECORDS"),
        (["--as", "=run"], "'=run' is not NAME=RECORDS"),
        (["--as", "../day=run"], "'../day=run' is not NAME=RECORDS"),
        (["--labels", "l.txt"], "no such file"),
        (["-o", "out.csv"], "records are JSON Lines; end it in .jsonl, or use md3 export"),
    ],
)
def test_words_that_say_nothing_are_usage_errors(
    md3: Program, folder: Path, arguments: list[str], message: str
) -> None:
    result = md3("select", folder, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_what_changes_no_record_that_is_printed(md3: Program, folder: Path) -> None:
    done = md3("select", folder, "--overwrite")
    assert (done.exit_code, "note: --overwrite changes nothing" in done.stderr) == (0, True)
    done = md3("select", folder, "--seed", "4")
    assert (done.exit_code, "note: --seed changes nothing" in done.stderr) == (0, True)


def test_no_records_is_a_usage_error(md3: Program) -> None:
    assert md3("select").exit_code == 2


def test_no_file_that_is_read_is_written(md3: Program, folder: Path) -> None:
    before = (folder / "records.jsonl").read_bytes()
    assert md3("select", folder, "-o", folder / "records.jsonl", "--overwrite").exit_code == 2
    truth = write_truth(Path("gt.jsonl"), [("a/photo.jpg", "dog", DOG)])
    assert md3("select", folder, "--wrong", "--gt", truth, "-o", truth, "--overwrite").exit_code == 2
    assert (folder / "records.jsonl").read_bytes() == before


def test_records_on_disk_stay_untouched(md3: Program, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    Path("l.toml").write_text("[[label]]\nname = 'animal'\nprompts = ['dog', 'car']\nmin_score = 0.6\n")
    for words in (
        ["select", "--refined", "-o", "s.jsonl"],
        ["stats"],
        ["report", "-o", "r.html"],
        ["export", "-o", "c.json"],
    ):
        assert md3(words[0], folder, *words[1:], "--labels", "l.toml", "--nms", "0.3").exit_code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# -- nothing is selected ---------------------------------------------------------------------------------


@pytest.mark.parametrize("words", NONE_COMMANDS, ids=" ".join)
def test_an_empty_selection_is_no_error(md3: Program, folder: Path, words: list[str]) -> None:
    write_truth(Path("gt.json"), [("a/photo.jpg", "dog", DOG)])
    result = md3(words[0], folder, *words[1:], "--prompt", "nobody")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("words", NONE_COMMANDS, ids=" ".join)
def test_the_file_of_an_empty_selection_is_read_again(md3: Program, folder: Path, words: list[str]) -> None:
    write_truth(Path("gt.json"), [("a/photo.jpg", "dog", DOG)])
    assert md3("select", folder, "--prompt", "nobody", "-o", "none.jsonl").exit_code == 0
    assert Path("none.jsonl").read_bytes() == b""
    assert json.loads(Path("none.jsonl.run.json").read_bytes())["schema"] == "md3-selection/1"
    result = md3(words[0], "none.jsonl", *words[1:])
    assert result.exit_code == 0, result.output
    Path("none.jsonl.run.json").unlink()
    result = md3(words[0], "none.jsonl", *words[1:], *(["--overwrite"] if "-o" in words else []))
    assert (result.exit_code, "holds no records of md3" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["export", "-f", "csv"], "labels.toml"),
        (["export", "-f", "csv"], "gt.json"),
        (["export", "-f", "jsonl"], "labels.toml"),
        (["export", "-f", "jsonl"], "gt.json"),
        (["eval", "--best-thresholds"], "gt.json"),  # the labels file itself may be brought up to date
    ],
)
def test_labels_and_truth_are_never_written(md3: Program, folder: Path, words: list[str], read: str) -> None:
    truth = write_truth(Path("gt.json"), [("a/photo.jpg", "dog", DOG)])
    Path("labels.toml").write_text("[[label]]\nname = 'dog'\n")
    before = Path(read).read_bytes()
    wrong = ["--wrong"] if words[0] == "export" else []
    out = [read] if words[0] == "eval" else ["-o", read]
    result = md3(*words, *out, folder, "--labels", "labels.toml", *wrong, "--gt", truth, "--overwrite")
    assert result.exit_code == 2, result.output
    assert Path(read).read_bytes() == before


def test_a_selection_may_be_a_run_folder_and_spares_anothers(md3: Program, folder: Path) -> None:
    Path("some").mkdir()
    assert md3("select", folder, "--prompt", "nobody", "-o", "some/records.jsonl").exit_code == 0
    assert md3("stats", "some").exit_code == 0
    assert md3("select", folder, "--min-score", "0.5", "-o", "some/records.jsonl", "--overwrite").exit_code == 0
    assert json.loads(md3("stats", "some", "--json").stdout)["scores"]["min"] == CAR["score"]
    (folder / "records.jsonl").rename("moved.jsonl")
    before = (folder / "run.json").read_bytes()
    result = md3("select", "moved.jsonl", "-o", folder / "records.jsonl")
    assert (result.exit_code, "run.json" in result.stderr) == (2, True)
    assert (folder / "run.json").read_bytes() == before
    (folder / "run.json").rename("boxes.json.run.json")
    result = md3("select", "moved.jsonl", "-o", "boxes.json.records.jsonl")  # the journal's name of a document
    assert (result.exit_code, "boxes.json.run.json" in result.stderr) == (2, True)


@pytest.mark.parametrize("format", ["csv", "jsonl", "coco"])
def test_no_export_goes_over_another_run(md3: Program, folder: Path, format: str) -> None:
    md3("select", folder, "-o", "some.jsonl")
    for name, run_info in (("one.jsonl", "one.jsonl.run.json"), ("a.json.records.jsonl", "a.json.run.json")):
        Path(name).write_bytes((folder / "records.jsonl").read_bytes())
        Path(run_info).write_bytes((folder / "run.json").read_bytes())
        before = [Path(path).read_bytes() for path in (name, run_info)]
        for out in (name, run_info):
            result = md3("export", "some.jsonl", "-f", format, "-o", out, "--overwrite")
            assert (result.exit_code, "of a run" in result.stderr) == (2, True)
        assert [Path(path).read_bytes() for path in (name, run_info)] == before
    assert md3("export", "one.jsonl", "-f", format, "-o", "some.jsonl", "--overwrite").exit_code == 0


# -- several runs ----------------------------------------------------------------------------------------


def test_several_runs_become_one_file_that_exports_like_them(md3: Program, run: Run, tmp_path: Path) -> None:
    names = ["a/photo.jpg", "b/photo.jpg"]
    parts = []
    for number, name in enumerate(names):
        folder = tmp_path / f"part{number}"
        folder.mkdir()
        (folder / "run.json").write_bytes((run.folder / "run.json").read_bytes())
        lines = [record(name, "detect", prompt, objects=[thing]) for prompt, thing in (("dog", DOG), ("car", CAR))]
        (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        parts.append(folder)
    assert md3("select", *parts, "-o", "both.jsonl").exit_code == 0
    assert of(Path("both.jsonl")) == [(name, prompt) for name in names for prompt in ("dog", "car")]
    for arguments, shown in (((*parts,), "runs"), (("both.jsonl",), "file")):
        assert md3("export", *arguments, "-f", "yolo", "-o", f"yolo-{shown}").exit_code == 0
        assert md3("export", *arguments, "-f", "csv", "-o", f"{shown}.csv").exit_code == 0
    assert Path("runs.csv").read_bytes() == Path("file.csv").read_bytes()
    written = [
        {path.relative_to(out): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
        for out in ("yolo-runs", "yolo-file")
    ]
    assert len(written[0]) > 4  # the pictures are found, too
    for file in written[0].keys() - {Path(".md3")}:
        assert written[0][file] == written[1][file], file


def test_two_pictures_of_one_name_name_both_files_and_as_tells_them_apart(
    md3: Program, run: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    one = record("a/photo.jpg", "detect", "dog", objects=[DOG], sha256="1" * 64)
    run.write([one])
    (other / "records.jsonl").write_text(json.dumps(one | {"sha256": "2" * 64}) + "\n")
    (other / "run.json").write_bytes((run.folder / "run.json").read_bytes())
    for words in (["select"], ["stats"], ["export", "-f", "csv"], ["report", "-o", "r.html"]):
        result = md3(words[0], run.folder, other, *words[1:])
        said = "".join(result.stderr.split())
        assert result.exit_code == 1
        assert f"{run.records},line1" in said
        assert f"{other / 'records.jsonl'},line1" in said
        assert "--asNAME=RECORDS" in said
        assert md3(words[0], run.folder, "--as", f"night={other}", *words[1:]).exit_code == 0
    result = md3("select", run.folder, other, "--as", f"night/={other}", "-o", "both.jsonl")  # beside the same
    assert of(Path("both.jsonl")) == [("a/photo.jpg", "dog"), ("night/a/photo.jpg", "dog")]
    assert md3("export", "both.jsonl", "-f", "yolo", "-o", "both").exit_code == 0
    assert {path.as_posix() for path in Path("both/images").rglob("*.jpg")} == {
        "both/images/a/photo.jpg",
        "both/images/night/a/photo.jpg",
    }


def test_stdout_is_the_records_alone(md3: Program, folder: Path) -> None:
    text = (folder / "records.jsonl").read_text()
    (folder / "records.jsonl").write_text(text + text.splitlines()[0] + "\n" + '{"schema":"md3/1","id"')
    result = md3("select", folder)
    assert len(records_of(result.stdout)) == len(text.splitlines())
    assert "1 line repeats a request" in result.stderr
    assert "the last, is cut off and was left out" in result.stderr


def test_lines_of_text_stay_short_and_json_has_all(md3: Program, run: Run) -> None:
    names = ["n" * 10_000, *(f"name {n}" for n in range(150))]
    lines = [record("a.jpg", "detect", name, objects=[CAR | {"label": name}]) for name in names]
    run.write([one | {"id": f"{n:032x}"} for n, one in enumerate(lines)])
    (labels,) = [line for line in md3("stats", run.folder).stdout.splitlines() if line.startswith("objects")]
    assert len(labels) < 3000
    assert labels.endswith("and 51 more (--json has all)")
    assert [*json.loads(md3("stats", run.folder, "--json").stdout)["labels"]] == names
