"""What `-o` and `-f` mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from md3cli.config import OutputOptions
from md3cli.errors import MissingExtraError, OutputMismatchError, UsageError
from md3cli.run.output import OutputPlan, check_replaceable, plan_output, written_paths


def plan(path: str | None, *formats: str, is_terminal: bool = False) -> OutputPlan:
    is_folder = path is not None and path.endswith("/")
    options = OutputOptions(None if path is None else Path(path), is_folder, formats)
    return plan_output(options, is_terminal=is_terminal)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("formats", "is_terminal", "printed"),
    [((), True, "table"), ((), False, "jsonl"), (("jsonl",), True, "jsonl"), (("coco",), True, "coco")],
)
def test_without_an_output(formats: tuple[str, ...], is_terminal: bool, printed: str) -> None:
    assert plan(None, *formats, is_terminal=is_terminal) == OutputPlan(None, stdout=printed)


@pytest.mark.parametrize(
    ("path", "formats", "format"),
    [
        ("o.json", (), "coco"),
        ("o.JSON", (), "coco"),
        ("o.parquet", (), "parquet"),
        ("o.csv", (), "csv"),
        ("o.html", (), "html"),
        ("o.json", ("csv",), "csv"),
        ("o", ("coco",), "coco"),
        ("o.xyz", ("parquet",), "parquet"),
    ],
)
def test_a_file(path: str, formats: tuple[str, ...], format: str) -> None:
    found = plan(path, *formats)
    assert [(d.format, str(d.path)) for d in found.documents] == [(format, path)]
    assert found.files is not None
    assert [str(p) for p in (found.files.journal, found.files.run_info, found.files.lock)] == [
        f"{path}.records.jsonl",
        f"{path}.run.json",
        f"{path}.lock",
    ]


@pytest.mark.parametrize(("path", "formats"), [("o.jsonl", ()), ("o.jsonl", ("jsonl",)), ("o.txt", ("jsonl",))])
def test_a_file_of_records_is_its_own_journal(path: str, formats: tuple[str, ...]) -> None:
    found = plan(path, *formats)
    assert found.documents == ()
    assert found.files is not None
    assert [str(p) for p in (found.files.journal, found.files.run_info, found.files.lock)] == [
        path,
        f"{path}.run.json",
        f"{path}.lock",
    ]


@pytest.mark.parametrize(
    ("path", "formats", "documents"),
    [
        ("run", (), []),
        ("run/", ("coco",), ["run/coco.json"]),
        ("run.v2/", ("jsonl",), []),
        ("run.v2", ("coco", "parquet", "coco"), ["run.v2/coco.json", "run.v2/records.parquet"]),
        ("run.v2", ("yolo",), ["run.v2/yolo"]),
        ("run", ("html", "jsonl"), ["run/report.html"]),
    ],
)
def test_a_run_folder(path: str, formats: tuple[str, ...], documents: list[str]) -> None:
    found = plan(path, *formats)
    assert [str(d.path) for d in found.documents] == documents
    assert found.files is not None
    assert found.files.journal == Path(path) / "records.jsonl"
    assert found.files.run_info == Path(path) / "run.json"


def test_an_existing_folder_is_a_run_folder_whatever_its_name() -> None:
    Path("out.d").mkdir()
    found = plan("out.d")
    assert found.files is not None
    assert found.files.journal == Path("out.d/records.jsonl")


@pytest.mark.parametrize(
    ("path", "formats", "message"),
    [
        (None, ("yolo",), "yolo cannot be printed; name a file or folder with -o"),
        (None, ("parquet",), "parquet cannot be printed"),
        (None, ("coco", "jsonl"), "coco and jsonl cannot share stdout; name a folder with -o"),
        ("o.xyz", (), "no format has the suffix .xyz; use .jsonl .json .parquet .csv or .html"),
        ("a-file", ("yolo",), "a-file is a file; yolo needs a folder"),
    ],
)
def test_what_makes_no_sense(path: str | None, formats: tuple[str, ...], message: str) -> None:
    Path("a-file").write_text("x")
    with pytest.raises(UsageError) as error:
        plan(path, *formats)
    assert message in str(error.value)


def test_a_report_without_jinja_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for path, formats in (("o.html", ()), (None, ("html",)), ("run/", ("coco", "html"))):
        with pytest.raises(MissingExtraError, match=r"pip install 'md3cli\[report\]'"):
            plan(path, *formats)


def test_documents_of_somebody_else_are_left_alone() -> None:
    Path("o.json").write_text("{}")
    with pytest.raises(OutputMismatchError, match=r"o\.json is there already"):
        check_replaceable(plan("o.json"), may_overwrite=False)
    check_replaceable(plan("o.json"), may_overwrite=True)
    Path("o.json.records.jsonl").write_text("")
    check_replaceable(plan("o.json"), may_overwrite=False)
    Path("run/yolo").mkdir(parents=True)
    check_replaceable(plan("run", "yolo"), may_overwrite=False)
    Path("run/yolo/mine.txt").write_text("x")
    for may_overwrite in (False, True):
        with pytest.raises(UsageError, match=r"run/yolo was not made by md3"):
            check_replaceable(plan("run", "yolo"), may_overwrite=may_overwrite)


def test_documents_that_a_rank_puts_there_just_now_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    found, exists = plan("o.json"), Path.exists

    def look_too_early(path: Path, **more: bool) -> bool:
        is_there = exists(path, **more)
        if path.name == "o.json.records.jsonl":
            Path("o.json.records.jsonl").touch()
            Path("o.json").touch()
        return is_there

    monkeypatch.setattr(Path, "exists", look_too_early)
    check_replaceable(found, may_overwrite=False)


def test_only_what_is_there_is_told_as_written() -> None:
    found = plan("run/", "txt", "coco")
    Path("run").mkdir()
    for name in ("coco.json", "records.jsonl"):
        Path("run", name).touch()
    assert written_paths(found) == ["run/coco.json", "run/records.jsonl"]


@pytest.mark.parametrize(("formats", "words"), [((), "a run folder needs"), (("yolo",), "yolo needs")])
def test_a_file_in_the_place_of_a_folder_is_named(formats: tuple[str, ...], words: str) -> None:
    Path("afile").write_text("mine")
    with pytest.raises(UsageError, match=f"afile is a file; {words} a folder; name another -o"):
        plan("afile/", *formats)


def test_a_run_json_too_large_for_any_run_is_not_read() -> None:
    Path("out").mkdir()
    with Path("out/run.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(OutputMismatchError, match="more than 64 MiB"):
        check_replaceable(plan("out/", "coco"), may_overwrite=True)
