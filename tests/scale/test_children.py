"""Runs of many processes whose records ask more: a parent, then its children, the same bytes as of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program import Program, make_pictures, records_of

from md3cli.scale.attempts import AttemptJournal, note_death
from md3cli.scale.folder import RunFolder, new_attempt, open_run_folder
from md3cli.scale.markers import CommitLog, remove_commit
from md3cli.scale.plan import PlanReader

NUM_PICTURES, ASKED = 8, ("--task", "detect:3 things", "--task", "segment:x")
THEN = ("--then", "query:What colour is the {label}?", "--then", "detect:wheel", "--no-reasoning")
MANY = ("--engine", "local", "--shard-size", 3)
NUM_ANSWERED = (NUM_PICTURES - 1) * (2 + 2 * 4)  # two parents a picture, 3 and 1 objects, two questions each


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = make_pictures(tmp_path / "pictures", NUM_PICTURES)
    (folder / "p3.png").write_bytes(b"no picture")
    return folder


class Runs:
    """The command in one process and in many; `whole` is what one process makes of it undisturbed."""

    def __init__(self, md3: Program, pictures: Path, folder: Path) -> None:
        self.md3, self.pictures, self.out = md3, pictures, folder / "o.jsonl"
        self.whole = self.of_one()

    def of_one(self, *options: object, asked: tuple[str, ...] = ASKED) -> bytes:
        out = self.out.with_name("whole.jsonl")
        self.md3("run", self.pictures, *asked, *THEN, "-o", out, "--overwrite", *options)
        return out.read_bytes()

    def __call__(self, *options: object, asked: tuple[str, ...] = ASKED) -> int:
        """Run into `out`, and return how much the model was asked."""
        done = self.md3("run", self.pictures, *asked, *THEN, "-o", self.out, *options)
        assert done.exit_code in (0, 3), done.output
        return self.md3.num_answered

    @property
    def folder(self) -> RunFolder:
        return open_run_folder(f"{self.out}.md3run")

    def reopen(self, shard: int, lines: list[bytes]) -> None:
        """As if the shard had been under way with these lines in its journal, and its process been killed."""
        folder = self.folder
        folder.store.remove("exported.json")
        if (commit := CommitLog(folder).refresh().get(shard)) is not None:
            remove_commit(folder, shard, commit)
        journal = AttemptJournal(folder, shard, new_attempt())
        journal.finish(lines)
        journal.close()

    def part(self, shard: int) -> list[bytes]:
        commit = CommitLog(self.folder).refresh()[shard]
        return (self.folder.store.read(commit.part) or b"").splitlines(keepends=True)

    def check(self, expected: bytes | None = None) -> None:
        """The bytes of one process, and what `md3 verify` says."""
        assert self.out.read_bytes() == (expected or self.whole)
        found = self.md3("verify", self.out)
        assert found.exit_code == 0, found.output

    def status(self, out: Path | None = None) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.md3("status", out or self.out, "--json").stdout)
        return found


@pytest.fixture
def runs(md3: Program, pictures: Path, tmp_path: Path) -> Runs:
    return Runs(md3, pictures, tmp_path)


def test_many_processes_write_what_one_writes(runs: Runs) -> None:
    assert runs(*MANY) == NUM_ANSWERED
    runs.check()
    assert [record.get("region", {}).get("index") for record in records_of(runs.whole)[:11]] == [
        *(None, 0, 0, 1, 1, 2, 2),
        *(None, 0, 0),
        None,
    ]
    assert runs(*MANY) == 0, "nothing is left to ask"
    commits = CommitLog(runs.folder).refresh()
    assert sum(commit.children for commit in commits.values()) == (NUM_PICTURES - 1) * 8


def test_children_are_counted(runs: Runs) -> None:
    runs(*MANY)
    total, children = len(records_of(runs.whole)), (NUM_PICTURES - 1) * 8
    found = runs.status()
    assert (found["requests"], found["done"], found["children"], found["state"]) == (total, total, children, "finished")
    part = runs.part(1)
    assert len(part) == 22, "one picture of three is bad"
    runs.reopen(1, part[:3])  # the first parent, and two of its six children
    found = runs.status()
    assert (found["children"], found["done"]) == (children - 16 + 6, total - 19)
    assert found["requests"] == 2 * NUM_PICTURES + children - 16 + 6
    runs()
    runs.check()


@pytest.mark.parametrize("num_lines", range(0, 31, 3))
def test_what_an_attempt_finished_is_not_asked_again(runs: Runs, num_lines: int) -> None:
    runs(*MANY)
    part = runs.part(0)
    assert len(part) == 30
    runs.reopen(0, part[:num_lines])
    assert runs() == 30 - num_lines
    runs.check()


@pytest.mark.parametrize("is_told", [True, False])
def test_children_whose_parent_is_damaged_are_not_asked_again(runs: Runs, is_told: bool) -> None:
    runs(*MANY)
    part = runs.part(0)
    part[0] = part[0].replace(b'"task"', b'"tisk"') if is_told else b""
    runs.reopen(0, part)
    assert runs() == 1
    runs.check()


def test_a_child_that_no_parent_has_goes(runs: Runs) -> None:
    runs(*MANY)
    part = runs.part(0)
    stranger = part[2].replace(json.loads(part[2])["id"].encode(), b"ab" * 16)
    runs.reopen(0, [part[0], stranger, *part[1:]])
    assert runs() == 0
    runs.check()
    assert stranger in (runs.folder.wip.read("damaged/00000.jsonl") or b"")


def test_a_stranger_beside_a_missing_parent_goes_once_the_parent_is_there(runs: Runs) -> None:
    runs(*MANY)
    part = runs.part(0)
    stranger = part[2].replace(json.loads(part[2])["id"].encode(), b"ab" * 16)
    runs.reopen(0, [stranger, *part[1:]])
    assert runs() == 1
    runs.check()
    assert stranger in (runs.folder.wip.read("damaged/00000.jsonl") or b"")


def test_a_child_that_kills_its_worker_is_asked_alone_and_then_blamed(runs: Runs) -> None:
    runs(*MANY)
    part = runs.part(0)
    ids = [json.loads(line)["id"] for line in part]
    runs.reopen(0, part[:4])
    for left_open, is_alone in (([*ids[4:7], ids[7]], False), (ids[5:6], True)):
        journal = AttemptJournal(runs.folder, 0, new_attempt())
        for record_id in left_open:
            journal.begin(record_id, is_alone=is_alone)
        journal.close()
        note_death(runs.folder, 0, journal.attempt, 139)
    assert runs() == 30 - 4 - 1
    found, whole = records_of(runs.out), records_of(runs.whole)
    assert found[5]["error"]["message"] == "the worker process died twice on this request"
    assert found[5]["region"] == whole[5]["region"]
    assert found[5]["sha256"] == whole[5]["sha256"]
    assert found[:5] + found[6:] == whole[:5] + whole[6:]
    assert runs("--retry-failed", *MANY) == 1
    runs.check()


# -- other thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_start_that_hides_less_asks_what_is_new(runs: Runs, is_finished: bool) -> None:
    """`3 things` finds three boxes that are doubles of one another."""
    assert runs(*MANY, "--nms", "0.5") == NUM_ANSWERED - (NUM_PICTURES - 1) * 4
    runs.check(runs.of_one("--nms", "0.5"))
    if not is_finished:
        runs.reopen(2, [])
    assert runs(*MANY) == (NUM_PICTURES - 1) * 4 + (0 if is_finished else 2 * 6)
    runs.check()


def test_a_start_that_hides_more_keeps_what_is_there(runs: Runs) -> None:
    runs(*MANY)
    runs.reopen(2, [])
    assert runs(*MANY, "--nms", "0.5") == 2 * 6
    lines = runs.whole.splitlines(keepends=True)
    assert runs.out.read_bytes().startswith(b"".join(lines[: -2 * 10]))
    assert runs.md3("verify", runs.out).exit_code == 0


def test_ranks_do_not_change_what_is_asked(runs: Runs) -> None:
    runs(*MANY, "--nms", "0.5")
    runs.reopen(2, [])
    refused = runs.md3("run", runs.pictures, *ASKED, *THEN, "-o", runs.out, "--world-size", "2")
    assert refused.exit_code == 2
    assert "--min-score, --nms" in refused.output
    assert runs("--world-size", "2", "--nms", "0.5") == 2 * 6
    runs.check(runs.of_one("--nms", "0.5"))


def test_verify_tells_of_objects_that_were_not_asked_about(runs: Runs) -> None:
    runs(*MANY, "--nms", "0.5")
    options = json.loads(runs.folder.store.read("run.json") or b"")
    runs.folder.store.put("run.json", json.dumps(options | {"nms": None}).encode())
    found = runs.md3("verify", runs.out)
    assert found.exit_code == 1
    assert "3 shards other objects were asked about" in found.output


def test_verify_finds_a_child_that_is_missing_or_misplaced(runs: Runs) -> None:
    import hashlib

    runs(*MANY)
    name, part = runs.folder.store.path("commits/00000.json"), runs.part(0)
    commit = json.loads(name.read_bytes())
    for lines, what in (
        (part[:2] + part[3:], "1 missing"),
        ([part[0], part[2], part[1], *part[3:]], "does not have its requests in order"),
        (part + part[2:3], "1 there twice"),
    ):
        data = b"".join(lines)
        runs.folder.store.put(commit["part"], data)
        sha256 = hashlib.sha256(data).hexdigest()
        name.write_text(json.dumps(commit | {"sha256": sha256, "bytes": len(data)}))
        assert what in runs.md3("verify", runs.out).output


# -- from one process to many, and back ------------------------------------------------------------------


@pytest.mark.parametrize("num_lines", [0, 1, 4, 33, 70])
def test_many_processes_go_on_where_one_stopped(runs: Runs, num_lines: int) -> None:
    lines = runs.whole.splitlines(keepends=True)
    runs()
    runs.out.write_bytes(b"".join(lines[:num_lines]))
    num_bad = sum(not line.endswith(b'"error":null}\n') for line in lines[:num_lines])
    assert runs(*MANY) == NUM_ANSWERED - num_lines + num_bad
    runs.check()
    assert runs() == 0
    runs.check()


def test_children_that_are_taken_over_find_their_damaged_parent(runs: Runs) -> None:
    lines = runs.whole.splitlines(keepends=True)
    runs()
    lines[0], lines[17] = lines[0].replace(b'"task"', b'"tisk"'), lines[17].replace(b'"model"', b'"modul"')
    runs.out.write_bytes(b"".join(lines[:40]))
    assert runs(*MANY) == NUM_ANSWERED - 38 + sum(b'"error":null}' not in line for line in lines[:40])
    runs.check()


# -- more to ask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_left", [0, 1])
def test_what_is_added_gets_its_children(runs: Runs, num_left: int) -> None:
    asked = (*ASKED, "--task", "detect:y", "--task", "caption")
    runs(*MANY)
    if num_left:
        runs.reopen(2, [])
    expected = runs.of_one(asked=asked)
    runs(*MANY, "--add", asked=asked)
    runs.check(expected)
    reader = PlanReader(runs.folder)
    assert len(reader.plan.each) == 2
    assert all(row.then for row in reader.rows(0)), "as the plain rows have it"


def test_another_question_about_objects_is_refused_in_words_or_added_by_one_process(runs: Runs) -> None:
    runs(*MANY)
    another = ("--then", "point:lid")
    command = ("run", runs.pictures, *ASKED, *THEN, *another, "-o", runs.out)
    for options in ((), MANY):
        refused = runs.md3(*command, *options)
        assert refused.exit_code == 2
        assert "of each object found: it has query" in refused.output
        assert "you now ask point lid as well" in refused.output
    refused = runs.md3(*command, "--add", *MANY)
    assert refused.exit_code == 2
    assert "not of the objects found (point lid). Finish the earlier command, then add it in one" in refused.output
    expected = runs.of_one(*another)
    runs(*another, "--add")
    runs.check(expected)
    assert runs(*another, *MANY) == 0, "many take over what one has added to"
    runs.check(expected)


# -- names in lists --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_lines", [0, 1, 3])
def test_names_of_lists_are_looked_for_by_many_as_by_one(
    md3: Program, pictures: Path, tmp_path: Path, num_lines: int
) -> None:
    """The stub's answer to a question is no list, its caption is `a picture` and a word of its own."""
    command = ("detect", pictures, "--everything", "--list", "caption:short", "-o")
    assert md3(*command, tmp_path / "one.jsonl").exit_code == 3
    expected, out = (tmp_path / "one.jsonl").read_bytes(), tmp_path / "o.jsonl"
    assert any(record["task"] == "detect" for record in records_of(expected))
    if num_lines:
        assert md3(*command, out).exit_code == 3
        lines = expected.splitlines(keepends=True)
        out.write_bytes(b"".join(lines[1:num_lines]) + lines[num_lines].replace(b'"task"', b'"tisk"'))
    assert md3(*command, out, *MANY).exit_code == 3
    assert out.read_bytes() == expected
    found = md3("verify", out)
    assert found.exit_code == 0, found.output
    num_lists = sum(record["task"] == "caption" for record in records_of(expected))
    status = json.loads(md3("status", out, "--json").stdout)
    assert (status["children"], status["requests"]) == (
        len(records_of(expected)) - num_lists,
        len(records_of(expected)),
    )


def test_rows_that_ask_for_names_themselves_have_their_own_records(
    md3: Program, pictures: Path, tmp_path: Path
) -> None:
    rows = [{"image": "p0.png"}, {"image": "p0.png", "task": "query", "prompt": "say: car, tree"}]
    (pictures / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("detect", pictures / "rows.jsonl", "--everything", "--list", "query:say: car, dog", "-o")
    assert md3(*command, tmp_path / "one.jsonl").exit_code == 0
    assert md3(*command, tmp_path / "o.jsonl", *MANY).exit_code == 0
    assert (tmp_path / "o.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    found = records_of((tmp_path / "o.jsonl").read_bytes())
    assert len({record["id"] for record in found}) == len(found) == 6
    assert md3("verify", tmp_path / "o.jsonl").exit_code == 0


# -- rows that say what to ask ---------------------------------------------------------------------------


def test_a_manifest_says_what_is_asked_of_its_objects(md3: Program, pictures: Path, tmp_path: Path) -> None:
    manifest, out = tmp_path / "rows.jsonl", tmp_path / "o.jsonl"
    rows = [
        {"image": f"pictures/p{number}.png", "task": "detect", "prompt": f"{number % 3} things"}
        | ({"then": ["query:Is the {label} red?", f"point:knob {number}"]} if number % 2 else {})
        for number in range(NUM_PICTURES)
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("run", manifest, "--no-reasoning", "-o")
    assert md3(*command, tmp_path / "one.jsonl").exit_code == 3
    expected = (tmp_path / "one.jsonl").read_bytes()
    assert sum("region" in record for record in records_of(expected)) == 2 * (1 + 2 + 1)
    assert md3(*command, out, *MANY).exit_code == 3
    assert out.read_bytes() == expected
    assert md3("verify", out).exit_code == 0


def test_boxes_of_a_coco_file_are_no_children(md3: Program, pictures: Path, tmp_path: Path) -> None:
    document = {
        "images": [{"id": n, "file_name": f"p{n}.png", "width": 24, "height": 24} for n in range(4)],
        "annotations": [
            {"id": 10 * n + k, "image_id": n, "category_id": 1, "bbox": [k, 2, 9, 9]}
            for n in range(4)
            for k in range(3)
        ],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (pictures / "boxes.json").write_text(json.dumps(document))
    out, asked = tmp_path / "o.jsonl", ("--task", "detect:2 things", "--then", "query:What {label}?", "--no-reasoning")
    for options in (("--regions",), ()):
        command = ("run", pictures / "boxes.json", *(asked if not options else asked[:2]), *options, "-o")
        assert md3(*command, tmp_path / "one.jsonl", "--overwrite").exit_code == 3
        assert md3(*command, out, *MANY, "--overwrite").exit_code == 3
        assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
        assert md3("verify", out).exit_code == 0
        children = [
            json.loads(md3("status", run, "--json").stdout)["children"] for run in (out, tmp_path / "one.jsonl")
        ]
        assert children == ([0, 0] if options else [6, 6])
