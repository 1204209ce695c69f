"""Questions about what was found, in one process: stopped anywhere, damaged, failed, with other thresholds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from program import Program, make_pictures, records_of

NUM_PICTURES, NUM_A_PICTURE = 6, 1 + 3 * 2 + 1 + 2  # two parents; three objects and one, two questions each
COMMAND = ("run", "pictures", "--task", "detect:3 things", "--task", "segment:x", "--no-reasoning")
THEN = ("--then", "query:What colour is the {label}?", "--then", "detect:wheel")


@pytest.fixture
def md3(md3: Program, tmp_path: Path) -> Program:
    make_pictures(tmp_path / "pictures", NUM_PICTURES)
    return md3


@pytest.fixture
def whole(md3: Program) -> bytes:
    """What an undisturbed run writes; it stands in `o.jsonl`, with its run.json."""
    assert md3(*COMMAND, *THEN, "-o", "o.jsonl").exit_code == 0
    assert md3.num_answered == NUM_PICTURES * NUM_A_PICTURE
    return Path("o.jsonl").read_bytes()


def again(md3: Program, lines: list[bytes], *options: str) -> int:
    """Run on with these lines in OUTPUT; return how much was asked."""
    Path("o.jsonl").write_bytes(b"".join(lines))
    result = md3(*COMMAND, *THEN, "-o", "o.jsonl", *options)
    assert result.exit_code == 0, result.output
    assert md3("verify", "o.jsonl").exit_code == 0
    return md3.num_answered


@pytest.mark.parametrize("num_lines", [*range(11), 23, 59])
def test_a_run_goes_on_from_any_record(md3: Program, whole: bytes, num_lines: int) -> None:
    lines = whole.splitlines(keepends=True)
    assert again(md3, lines[:num_lines]) == len(lines) - num_lines
    assert Path("o.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b'"task"', b'"tisk"'),
        lambda line: line.replace(b'"image":"p', b'"image":"q'),
        lambda line: b"\n",
        lambda line: b"",
    ],
    ids=["key", "name", "gone", "never written"],
)
def test_a_damaged_parent_is_asked_again_and_its_children_are_not(
    md3: Program, whole: bytes, damage: Callable[[bytes], bytes]
) -> None:
    lines = whole.splitlines(keepends=True)
    lines[0], lines[20] = damage(lines[0]), damage(lines[20])
    assert again(md3, lines) == 2
    assert Path("o.jsonl").read_bytes() == whole


def test_a_parent_whose_box_was_changed_has_children_of_its_box(md3: Program, whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    lines[0] = lines[0].replace(b'"x_min":0.1', b'"x_min":0.2')
    assert again(md3, lines) == 6
    found = records_of(Path("o.jsonl"))
    assert len(found) == len(lines) + 6, "records that nobody asks for stay"
    assert [record["region"]["x_min"] for record in found[1:13]] == [0.1] * 6 + [0.2] * 6
    assert again(md3, Path("o.jsonl").read_bytes().splitlines(keepends=True)) == 0


def test_children_that_failed_are_asked_again(md3: Program, whole: bytes) -> None:
    lines = whole.splitlines(keepends=True)
    for number in (2, 8, 10):  # of the first picture a child of each parent, of the second the first parent
        record = json.loads(lines[number])
        kept = {
            key: value for key, value in record.items() if key not in ("objects", "answer", "finish_reason", "tokens")
        }
        kept["error"] = {"type": "model", "message": "asked to fail", "retry": True}
        lines[number] = json.dumps(kept, separators=(",", ":")).encode() + b"\n"
    del lines[11:17]  # what failed has no children
    Path("o.jsonl").write_bytes(b"".join(lines))
    failed = md3(*COMMAND, *THEN, "-o", "o.jsonl")
    assert (failed.exit_code, md3.num_answered) == (3, 0)
    assert again(md3, lines, "--retry-failed") == 3 + 6
    assert Path("o.jsonl").read_bytes() == whole


def test_other_thresholds_ask_what_is_new(md3: Program, whole: bytes) -> None:
    """`3 things` finds three boxes that are doubles of one another."""
    Path("o.jsonl").unlink()
    assert again(md3, [], "--nms", "0.5") == NUM_PICTURES * (NUM_A_PICTURE - 4)
    hidden = Path("o.jsonl").read_bytes().splitlines(keepends=True)
    assert again(md3, hidden) == NUM_PICTURES * 4
    assert Path("o.jsonl").read_bytes() == whole
    assert again(md3, whole.splitlines(keepends=True), "--min-score", "0.99") == 0
    assert Path("o.jsonl").read_bytes() == whole, "what is hidden now stays"
    lines = whole.splitlines(keepends=True)
    assert again(md3, lines[:23], "--min-score", "0.99") == 2 * 4 - 1
    assert Path("o.jsonl").read_bytes().startswith(b"".join(lines[:23]))


def test_answers_that_waited_are_not_asked_again(md3: Program, whole: bytes, tmp_path: Path) -> None:
    from md3cli.run.order import WaitingRecords

    lines = whole.splitlines(keepends=True)
    out = tmp_path / "o.jsonl"
    out.write_bytes(lines[0])
    waiting = WaitingRecords(out, is_done=lambda record_id: False)
    kept = [json.loads(line) for line in [*lines[2:7:2], lines[10], *lines[12:14]]]  # children, a parent and its own
    waiting.keep(kept, lambda: kept)
    waiting.close()
    left = out.with_name("o.jsonl.early")
    shutil.copy(left, tmp_path / "copy")
    assert again(md3, lines[:1]) == len(lines) - 1 - len(kept)
    assert out.read_bytes() == whole
    assert not left.exists()


def test_a_run_without_a_journal_writes_the_same(md3: Program, whole: bytes) -> None:
    printed = md3(*COMMAND, *THEN)
    assert printed.exit_code == 0
    assert printed.stdout.encode() == whole


def test_the_same_question_in_two_words_is_asked_once(md3: Program) -> None:
    same = ("--then", "query:Is the {label} red?", "--then", "query:Is the x red?")
    command = ("run", "pictures", "--task", "segment:x", "--no-reasoning", *same, "-o", "twice.jsonl")
    assert md3(*command).exit_code == 0
    found = records_of(Path("twice.jsonl"))
    assert len(found) == len({record["id"] for record in found}) == 2 * NUM_PICTURES
    assert md3(*command).exit_code == 0
    assert md3.num_answered == 0


@pytest.mark.parametrize("given", ["shards", "shards/*.parquet", "shards/a.parquet"])
def test_rows_of_parquet_files_say_what_is_asked_then_wherever_the_files_stand(
    md3: Program, tmp_path: Path, given: str
) -> None:
    image = {"bytes": next((tmp_path / "pictures").iterdir()).read_bytes(), "path": "a.jpg"}
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"image": [image] * 2, "then": [THEN[1], ""]}), tmp_path / "shards/a.parquet")
    result = md3("run", given, "--task", "detect:car", "-o", "o.jsonl")
    assert result.exit_code == 0, result.stderr
    assert [record["prompt"] for record in records_of(Path("o.jsonl"))] == ["car", "What colour is the car?", "car"]


def test_what_is_added_asks_about_its_objects(md3: Program, whole: bytes) -> None:
    more = ("--task", "detect:y", "--task", "caption")
    assert md3(*COMMAND, *more, *THEN, "-o", "all.jsonl").exit_code == 0
    added = md3("run", "pictures", *more, *THEN, "--no-reasoning", "-o", "o.jsonl", "--add")
    assert added.exit_code == 0, added.output
    assert md3.num_answered == NUM_PICTURES * 4
    assert Path("o.jsonl").read_bytes() == Path("all.jsonl").read_bytes()


def test_children_of_crowded_pictures_fill_the_batch(md3: Program, tmp_path: Path) -> None:
    """What is written first is asked first, whatever was answered first: else the buffer of what waits fills up."""
    make_pictures(tmp_path / "crowd", 12)
    assert md3("run", "crowd", "--task", "detect:60 things", *THEN, "--batch-size", "4", "-o", "c.jsonl").exit_code == 0
    assert md3.num_answered == 12 * (1 + 60 * 2)
    engine = md3.models[-1].engine
    assert engine is not None
    assert engine.num_steps < 1.5 * md3.num_answered / 4
