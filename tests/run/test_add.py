"""A run that grows: `--add` in one process, resumed, refused, killed."""

from __future__ import annotations

import json
import random
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked import Forks
from program import Program, clean_environment, make_pictures, records_of
from stub_engine import StubModel

from md3cli.errors import CheckpointError
from md3cli.records import RecordDict
from md3cli.run.journal import Journal

NUM_PICTURES = 5


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", NUM_PICTURES)


def asked_in(records: Path) -> list[tuple[str, str, str | None]]:
    return [(record["image"], record["task"], record["prompt"]) for record in records_of(records)]


def requests_of(run_info: Path) -> list[str]:
    return [
        request["prompt"] or request["task"] for request in json.loads(run_info.read_bytes())["identity"]["requests"]
    ]


@pytest.mark.parametrize("now", [("star",), ("circle", "star"), ("star", "circle")])
def test_a_class_is_added_and_what_is_there_is_kept(md3: Program, pictures: Path, now: tuple[str, ...]) -> None:
    md3("detect", pictures, "circle", "star", "-o", "whole.jsonl")
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    before = Path("o.jsonl").read_bytes().splitlines()
    done = md3("detect", pictures, *now, "-o", "o.jsonl", "--add")
    assert (done.exit_code, md3.num_answered) == (0, NUM_PICTURES), done.output
    assert "OUTPUT has detect circle; now added: detect star" in done.stderr
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert set(before) <= set(Path("o.jsonl").read_bytes().splitlines())
    assert requests_of(Path("o.jsonl.run.json")) == ["circle", "star"]
    assert md3("verify", "o.jsonl").exit_code == 0


def test_questions_captions_and_tasks_join_a_run_folder(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "circle", "-o", "run/", "-f", "coco")
    for words in (
        ("caption", pictures, "--length", "short"),
        ("query", pictures, "-q", "How many?", "-q", "Why?"),
        ("run", pictures, "--task", "point:nose", "--task", "caption:short"),
    ):
        assert md3(*words, "-o", "run/", "-f", "coco", "--add").exit_code == 0
    added = [("caption", None), ("query", "How many?"), ("query", "Why?"), ("point", "nose")]
    whole = [(f"p{i}.png", *what) for i in range(NUM_PICTURES) for what in [("detect", "circle"), *added]]
    assert asked_in(Path("run/records.jsonl")) == whole
    again = md3("detect", pictures, "circle", "-o", "run/", "--add")
    assert (again.exit_code, md3.num_answered) == (0, 0)
    assert "nothing new is asked" in again.stderr


def test_documents_are_made_again_from_the_whole(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "circle", "star", "-o", "whole.json")
    md3("detect", pictures, "circle", "-o", "o.json")
    assert md3("detect", pictures, "star", "-o", "o.json", "--add").exit_code == 0
    whole, grown = (json.loads(Path(name).read_bytes()) for name in ("whole.json", "o.json"))
    assert [category["name"] for category in grown["categories"]] == ["circle", "star"]
    assert {key: value for key, value in grown.items() if key != "info"} == {
        key: value for key, value in whole.items() if key != "info"
    }
    journals = [Path(f"{name}.records.jsonl").read_bytes() for name in ("whole.json", "o.json")]
    assert journals[0] == journals[1]


@pytest.mark.parametrize("many", [(), ("--engine", "local")])
def test_formats_of_before_that_are_not_made_again_are_told(
    md3: Program, pictures: Path, many: tuple[str, ...]
) -> None:
    md3("detect", pictures, "circle", "-o", "run/", "-f", "csv", "-f", "coco", *many)
    if not many:
        Path("run/yolo").mkdir()  # somebody else's
    told = md3("detect", pictures, "star", "-o", "run/", "-f", "csv", "--add", *many)
    assert "without what is new: run/coco.json; the same command with -f coco makes it again" in told.stderr
    again = md3("detect", pictures, "star", "-o", "run/", "-f", "csv", "-f", "coco", "--add", *many)
    assert "without what is new" not in again.stderr
    names = [category["name"] for category in json.loads(Path("run/coco.json").read_bytes())["categories"]]
    assert names == ["circle", "star"]


def test_without_an_output_it_is_an_ordinary_run(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "circle", "-o", "whole.jsonl")
    assert md3("detect", pictures, "circle", "-o", "o.jsonl", "--add").exit_code == 0
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert "grown" not in json.loads(Path("o.jsonl.run.json").read_bytes())


def test_questions_without_a_picture_grow_too(md3: Program, pictures: Path) -> None:
    md3("query", "-q", "one?", "-o", "o.jsonl")
    assert md3("query", "-q", "two?", "-o", "o.jsonl", "--add").exit_code == 0
    assert [record["prompt"] for record in records_of(Path("o.jsonl"))] == ["one?", "two?"]


def test_a_part_of_input_is_asked_first_and_the_rest_later(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "circle", "star", "-o", "whole.jsonl")
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    for part in (("--limit", 2), ("--shard", "0/2"), ("--shard", "1/2", "--limit", 1)):
        assert md3("detect", pictures, "star", "-o", "o.jsonl", "--add", *part).exit_code == 0
    assert asked_in(Path("o.jsonl"))[:2] == [("p0.png", "detect", "circle"), ("p0.png", "detect", "star")]
    rest = md3("detect", pictures, "circle", "star", "-o", "o.jsonl")
    assert (rest.exit_code, Path("o.jsonl").read_bytes()) == (0, Path("whole.jsonl").read_bytes())


def test_what_was_not_finished_is_finished(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "circle", "star", "-o", "whole.jsonl")
    md3("detect", pictures, "circle", "-o", "o.jsonl", "--limit", 2)
    assert md3("detect", pictures, "star", "-o", "o.jsonl", "--add").exit_code == 0
    assert md3.num_answered == 2 * NUM_PICTURES - 2
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_run_json_knows_before_the_first_new_record(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    append, seen = Journal.append, []

    def look_and_append(journal: Journal, records: Sequence[RecordDict]) -> None:
        seen.append(requests_of(Path("o.jsonl.run.json")))
        append(journal, records)

    monkeypatch.setattr(Journal, "append", look_and_append)
    assert md3("detect", pictures, "star", "-o", "o.jsonl", "--add").exit_code == 0
    assert seen
    assert all(asked == ["circle", "star"] for asked in seen)


def test_what_was_misspelled_is_forgotten_before_its_first_record(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(StubModel, "load", lambda model: _raise(CheckpointError("stopped while it is loaded")))
        assert md3("detect", pictures, "stra", "-o", "o.jsonl", "--add").exit_code == 1
    assert requests_of(Path("o.jsonl.run.json")) == ["circle"]
    assert md3("detect", pictures, "star", "-o", "o.jsonl", "--add").exit_code == 0
    assert requests_of(Path("o.jsonl.run.json")) == ["circle", "star"]
    assert md3("verify", "o.jsonl").exit_code == 0


def _raise(error: Exception) -> None:
    raise error


def test_failures_are_done_again_while_it_grows(md3: Program, pictures: Path) -> None:
    good = (pictures / "p2.png").read_bytes()
    (pictures / "p2.png").write_bytes(b"no picture")
    assert md3("detect", pictures, "circle", "-o", "o.jsonl").exit_code == 3
    (pictures / "p2.png").write_bytes(good)
    kept = md3("detect", pictures, "star", "-o", "kept.jsonl")
    assert kept.exit_code == 0
    assert md3("detect", pictures, "star", "-o", "o.jsonl", "--add", "--retry-failed").exit_code == 0
    assert md3.num_answered == NUM_PICTURES + 1
    md3("detect", pictures, "circle", "star", "-o", "whole.jsonl")
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_failures_stay_where_they_are_not_asked_again(md3: Program, pictures: Path) -> None:
    (pictures / "p2.png").write_bytes(b"no picture")
    assert md3("detect", pictures, "circle", "-o", "o.jsonl").exit_code == 3
    assert md3("detect", pictures, "star", "-o", "o.jsonl", "--add").exit_code == 3
    failed = [(record["image"], record["prompt"]) for record in records_of(Path("o.jsonl")) if record["error"]]
    assert failed == [("p2.png", "circle"), ("p2.png", "star")]


def test_names_that_were_given_stay(md3: Program, pictures: Path) -> None:
    """Also of requests that were still open when more was added; and two prompts of a name are one class."""
    md3("detect", pictures, "mark=circle", "-o", "o.json", "--limit", 2)
    assert md3("detect", pictures, "star", "mark=disc", "-o", "o.json", "--add").exit_code == 0
    found = [record["objects"][0]["label"] for record in records_of(Path("o.json.records.jsonl"))]
    assert found == ["mark", "star", "mark"] * NUM_PICTURES
    assert [category["name"] for category in json.loads(Path("o.json").read_bytes())["categories"]] == ["mark", "star"]


# -- manifests -------------------------------------------------------------------------------------------


def test_rows_with_their_own_requests_stay_as_they_are(md3: Program, pictures: Path) -> None:
    rows = [
        {"image": "p0.png"},
        {"image": "p1.png", "task": "query", "prompt": "Why?"},
        {"image": "p2.png", "max_objects": 7, "tag": 1},
        {"image": "p0.png"},
    ]
    (pictures / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    md3("detect", pictures / "rows.jsonl", "circle", "-o", "o.jsonl")
    before = Path("o.jsonl").read_bytes().splitlines()
    assert md3("detect", pictures / "rows.jsonl", "star", "-o", "o.jsonl", "--add").exit_code == 0
    assert md3.num_answered == 3
    assert [prompt for _, _, prompt in asked_in(Path("o.jsonl"))] == ["circle", "star", "Why?", *["circle", "star"] * 2]
    assert set(before) <= set(Path("o.jsonl").read_bytes().splitlines())
    md3("detect", pictures / "rows.jsonl", "circle", "star", "-o", "whole.jsonl")
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("many", [(), ("--engine", "local", "--shard-size", 2)])
def test_templates_grow_too(md3: Program, pictures: Path, many: tuple[object, ...]) -> None:
    lines = [f"p{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(4)]
    (pictures / "rows.csv").write_text("image,kind\n" + "".join(lines))
    command = ("query", pictures / "rows.csv", "--template", "-q")
    for name, words in (
        ("whole.jsonl", ("Is it a {kind}?", "-q", "Is {stem} {kind}?")),
        ("o.jsonl", ("Is it a {kind}?",)),
    ):
        assert md3(*command, *words, "-o", name, *many).exit_code == 0
    assert md3(*command, "Is {stem} {kind}?", "-o", "o.jsonl", "--add", *many).exit_code == 0
    assert md3.num_answered == 4
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    plain = md3("query", pictures / "rows.csv", "-q", "Why?", "-o", "o.jsonl", "--add", *many)
    assert (plain.exit_code, "template on, now none" in plain.stderr) == (2, True), plain.stderr


# -- what is asked about objects -------------------------------------------------------------------------

OF_OBJECTS = ("caption:short", "query:Is the {label} red?", "detect:wheel")


@pytest.mark.parametrize("seed", range(4))
def test_any_way_to_more_about_objects_gives_the_records_of_all(md3: Program, pictures: Path, seed: int) -> None:
    chooser = random.Random(seed)
    tasks, then, num_answered = ["detect:2 things"], list[str](), 0
    assert md3("run", pictures, "--task", tasks[0], "-o", "o.jsonl").exit_code == 0
    num_answered += md3.num_answered
    for more in chooser.sample(OF_OBJECTS, len(OF_OBJECTS)):
        words = ["--then", more] if chooser.random() < 0.5 else typed(tasks, [*then, more])
        part = chooser.choice([(), ("--limit", 3), ("--shard", "1/2")])
        assert md3("run", pictures, *words, "-o", "o.jsonl", "--add", *part).exit_code == 0
        then.append(more)
        num_answered += md3.num_answered
        if chooser.random() < 0.5:  # a kill, before the file is in order
            lines = Path("o.jsonl").read_bytes().splitlines(keepends=True)
            chooser.shuffle(lines)
            Path("o.jsonl").write_bytes(b"".join(lines[:-3]))
            num_answered -= 3
    tasks.append("segment:x")
    assert md3("run", pictures, "--task", "segment:x", "-o", "o.jsonl", "--add").exit_code == 0
    num_answered += md3.num_answered
    assert md3("verify", "o.jsonl").exit_code == 0
    assert md3("run", pictures, *typed(tasks, then), "-o", "whole.jsonl").exit_code == 0
    assert num_answered == md3.num_answered, "each was asked once"
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert md3("run", pictures, *typed(tasks, then), "-o", "o.jsonl").exit_code == 0
    assert md3.num_answered == 0


def typed(tasks: Sequence[str], then: Sequence[str]) -> list[str]:
    return [word for name, some in (("--task", tasks), ("--then", then)) for spec in some for word in (name, spec)]


def test_the_way_to_ask_about_objects_is_told(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    words = ("run", pictures, "--task", "detect:circle", "--then", "caption:short", "-o", "o.jsonl")
    refused = md3(*words)
    assert refused.exit_code == 2
    assert "of each object found: it has nothing; you now ask caption short. To keep what is there" in refused.stderr
    done = md3(*words, "--add", "--pad", "20%")
    assert "OUTPUT has detect circle; now added: of each object found: caption short" in done.stderr, done.output
    refused = md3("detect", pictures, "circle", "-o", "o.jsonl")
    assert "you now ask nothing" in refused.stderr
    assert "`md3 select o.jsonl --task detect --prompt circle -o PART.jsonl`" in refused.stderr
    refused = md3("run", pictures, "--then", "caption:long", "-o", "o.jsonl", "--add")
    assert (refused.exit_code, "pad 0.2, now 0.1" in refused.stderr) == (2, True)
    done = md3("detect", pictures, "star", "-o", "o.jsonl", "--add")
    assert done.exit_code == 0, "with the room of before"


@pytest.mark.parametrize(
    ("held", "options", "said"),
    [
        ("detect:a", ("--shard-size", "2"), "Finish the earlier command, then add it in one process"),
        ("point:a", (), "OUTPUT has point a; add --task detect:OBJECT"),
        ("detect:a", ("--dry-run",), "nothing to do"),
        ("", (), "say what with --task"),
    ],
)
def test_objects_that_cannot_be_asked_about(
    md3: Program, pictures: Path, held: str, options: tuple[str, ...], said: str
) -> None:
    if held:
        assert md3("run", pictures, "--task", held, "-o", "o.jsonl").exit_code == 0
    before = {path: path.read_bytes() for path in Path().glob("o.jsonl*")}
    refused = md3("run", pictures, "--then", "caption:short", "-o", "o.jsonl", "--add", *options)
    assert (refused.exit_code, said in refused.stderr) == (2, True), refused.stderr
    assert {path: path.read_bytes() for path in Path().glob("o.jsonl*")} == before


def test_rows_that_ask_for_themselves_cannot_be_added_to(md3: Program, pictures: Path) -> None:
    (pictures / "rows.jsonl").write_text(json.dumps({"image": "p0.png", "task": "detect", "prompt": "circle"}) + "\n")
    md3("run", pictures / "rows.jsonl", "-o", "o.jsonl")
    refused = md3("run", pictures / "rows.jsonl", "-o", "o.jsonl", "--add")
    assert (refused.exit_code, "write new rows into the manifest" in refused.stderr) == (2, True)
    refused = md3("detect", pictures / "rows.jsonl", "star", "-o", "o.jsonl", "--add")
    assert (refused.exit_code, "--add cannot add to rows" in refused.stderr) == (2, True)
    assert len(records_of(Path("o.jsonl"))) == 1
    (pictures / "asked.jsonl").write_text(json.dumps({"image": "p0.png", "prompt": "Why?"}) + "\n")
    md3("query", pictures / "asked.jsonl", "-o", "q.jsonl")
    for more in ([], ["-q", "How many?"]):
        assert md3("query", pictures / "asked.jsonl", *more, "-o", "q.jsonl", "--add").exit_code == 2
    assert [record["error"] for record in records_of(Path("q.jsonl"))] == [None]


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-o", "o.jsonl", "--add", "--overwrite"), "leave one of them out"),
        (("--add",), "name the file or folder with -o"),
        (("-o", "o.jsonl", "--add", "-m", "other"), "model stub@moondream3, now stub@other"),
        (("-o", "o.jsonl", "--add", "--dtype", "bf16"), "dtype auto, now bf16"),
        (("-o", "o.jsonl", "--add", "--max-tokens", "5"), "detect circle with other settings: max-tokens 768, now 5"),
        (("-o", "o.jsonl"), "it has detect circle; you now ask detect star as well. To keep what is there and ask"),
    ],
)
def test_what_cannot_be_added_is_refused(md3: Program, pictures: Path, options: tuple[str, ...], said: str) -> None:
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    before = {path: path.read_bytes() for path in Path().glob("o.jsonl*")}
    refused = md3("detect", pictures, "circle", "star", *options)
    assert (refused.exit_code, said in refused.stderr) == (2, True), refused.stderr
    assert {path: path.read_bytes() for path in Path().glob("o.jsonl*")} == before


def test_who_asks_less_is_shown_the_way_to_a_part(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md3("detect", pictures, "circle", "star", "-o", "run/")
    refused = md3("detect", pictures, "star", "-o", "run/")
    assert refused.exit_code == 2
    assert "it has detect circle and detect star; you now ask only detect star" in refused.stderr
    assert "`md3 select run --prompt star -o PART.jsonl`" in refused.stderr


def test_the_command_that_is_offered_can_be_typed(
    md3: Program, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    typed = ("detect", str(pictures), "two words", "-o", "o.jsonl")
    monkeypatch.setattr(sys, "argv", ["md3", *typed])
    offered = md3(*typed).stderr.partition("type `md3 ")[2].partition("`")[0]
    assert md3(*shlex.split(offered)).exit_code == 0
    assert [prompt for _, _, prompt in asked_in(Path("o.jsonl"))] == ["circle", "two words"] * NUM_PICTURES


def test_records_alone_do_not_say_what_was_asked(md3: Program, pictures: Path) -> None:
    md3("detect", pictures, "circle", "-o", "o.jsonl")
    Path("o.jsonl.run.json").unlink()
    refused = md3("detect", pictures, "star", "-o", "o.jsonl", "--add")
    assert (refused.exit_code, "no run.json beside o.jsonl tells what was asked" in refused.stderr) == (2, True)
    assert md3("detect", pictures, "circle", "-o", "o.jsonl").exit_code == 0, "as the message says"
    assert md3("detect", pictures, "star", "-o", "o.jsonl", "--add").exit_code == 0


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('"max_tokens": 768', '"max_tokens": "many"'),
        *(('"pad": 0.1', f'"pad": {pad}') for pad in ('"wide"', "null", "true", "[0.1]", "-1", "10.1", "1e400")),
    ],
)
def test_a_run_json_that_somebody_changed_is_told(md3: Program, pictures: Path, was: str, now: str) -> None:
    md3("run", pictures, "--task", "detect:circle", "--then", "caption:short", "-o", "o.jsonl")
    path = Path("o.jsonl.run.json")
    path.write_text(path.read_text().replace(was, now))
    refused = md3("detect", pictures, "star", "-o", "o.jsonl", "--add")
    assert (refused.exit_code, "OUTPUT was begun by another run" in refused.stderr) == (2, True)


# -- however it comes about ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_any_way_to_a_union_gives_its_records(md3: Program, pictures: Path, seed: int) -> None:
    """Of runs that grow by parts, in any steps: what was asked first comes first, and no request is asked twice."""
    chooser = random.Random(seed)
    wanted, num_answered = list("abcdef"), 0
    chooser.shuffle(wanted)
    union: list[str] = []
    while set(union) != set(wanted):
        some = chooser.sample(wanted, chooser.randrange(1, 4))
        union += [prompt for prompt in some if prompt not in union]
        part = chooser.choice([(), ("--limit", 3), ("--shard", "1/2")])
        assert md3("detect", pictures, *some, "-o", "o.jsonl", "--add", *part).exit_code == 0
        num_answered += md3.num_answered
    assert md3("detect", pictures, *union, "-o", "o.jsonl").exit_code == 0
    num_answered += md3.num_answered
    assert num_answered == NUM_PICTURES * len(union), "each was asked once"
    md3("detect", pictures, *union, "-o", "whole.jsonl")
    assert Path("o.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def _content(folder: Path) -> dict[str, bytes]:
    """What stands in a folder by name; of what tells of starts the names alone."""
    is_told = (".lock", ".run.json")
    return {path.name: b"" if path.name.endswith(is_told) else path.read_bytes() for path in folder.iterdir()}


@pytest.mark.process
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["o.jsonl", pytest.param("o.json", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("count", "steps"), [(20, (1, 6)), pytest.param(200, (1, 2), marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_kills_while_it_grows(
    md3: Program, forks: Forks, tmp_path: Path, name: str, count: int, steps: tuple[int, int]
) -> None:
    """Kills before file operations, some in a row; then the same command, or the whole union, goes on to the end."""
    pictures, out = make_pictures(tmp_path / "pictures", 8), tmp_path / "out" / name
    (pictures / "p3.png").write_bytes(b"no picture")
    journal = out if name == "o.jsonl" else out.with_name("o.json.records.jsonl")
    isolated = clean_environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}

    def detect(out: Path, *words: str) -> tuple[object, ...]:
        return "detect", pictures, *words, "-o", out, "--batch-size", 2

    assert md3(*detect(out, "b", "a")).exit_code == 3
    first = {path: path.read_bytes() for path in out.parent.iterdir()}
    before = set(journal.read_bytes().splitlines())
    whole = tmp_path / "whole" / name
    assert md3(*detect(whole, "b", "a", "c", "0")).exit_code == 3
    expected = _content(whole.parent)
    chooser, num_killed, at, num_rounds = random.Random(count), 0, 0, 0
    while num_killed < count:
        at += chooser.randrange(*steps)
        for path in out.parent.iterdir():
            path.unlink()
        for path, content in first.items():
            path.write_bytes(content)
        for _ in range(chooser.randrange(1, 4)):
            fault = ("--fault", f"kill:{at}:{out.parent}")
            done = forks(*fault, *detect(out, "c", "0", "--add"), "--workers", 1, env=isolated)
            assert done.returncode in (3, -signal.SIGKILL), done.stderr
            num_killed += done.returncode != 3
            assert before <= set(journal.read_bytes().splitlines()), "a record was lost"
            if done.returncode == 3:
                assert at > steps[0], "there was nothing to interrupt"
                at = 0
                break
        words = chooser.choice([("c", "0", "--add"), ("b", "a", "c", "0", "--add"), ("b", "a", "c", "0")])
        asked = requests_of(out.with_name(f"{name}.run.json"))
        words = words if asked == ["b", "a", "c", "0"] else ("c", "0", "--add")
        again = md3(*detect(out, *words))
        assert again.exit_code == 3, again.output
        assert _content(out.parent) == expected
        num_rounds += 1
    assert num_rounds > 1


def test_settings_of_rows_that_ask_everything_count_too(md3: Program, pictures: Path) -> None:
    Path("rows.csv").write_text(f"image,task,prompt\n{pictures / 'p0.png'},query,Why?\n")
    for many in ((), ("--engine", "local")):
        output = f"{len(many)}.jsonl"
        assert md3("run", "rows.csv", "-o", output).exit_code == 0
        for option, words in (
            ("--temperature=0.5", "temperature 0, now 0.5"),
            ("--no-reasoning", "reasoning on, now off"),
        ):
            other = md3("run", "rows.csv", "-o", output, option, *many)
            assert (other.exit_code, words in other.stderr) == (2, True), other.output
        run_info = Path(f"{output}.run.json")
        document = json.loads(run_info.read_bytes())
        del document["identity"]["defaults"]  # as an earlier version wrote it
        run_info.write_text(json.dumps(document))
        assert md3("run", "rows.csv", "-o", output).exit_code == 0
        assert len(records_of(Path(output))) == 1


def test_run_thinks_or_is_fast(md3: Program, pictures: Path) -> None:
    Path("rows.csv").write_text(f"image,task,prompt\n{pictures / 'p0.png'},query,Why?\n{pictures / 'p1.png'},,\n")

    def ids(*line: object) -> list[str]:
        return [json.loads(record)["id"] for record in md3(*line).stdout.splitlines()]

    fast = ids("query", "rows.csv", "-q", "How?", "--no-reasoning")
    assert ids("run", "rows.csv", "--task", "query:How?", "--no-reasoning") == fast
    assert ids("run", "rows.csv", "--task", "detect:a", "--no-reasoning")[0] == fast[0]
    assert ids("run", "rows.csv", "--no-reasoning")[0] == fast[0]
    assert ids("run", "rows.csv", "--task", "query:How?") == ids("query", "rows.csv", "-q", "How?") != fast
    md3("detect", pictures, "a", "-o", "o.jsonl")
    md3("run", pictures, "--task", "query:How?", "--no-reasoning", "-o", "o.jsonl", "--add")
    whole = md3("run", pictures, "--task", "detect:a", "--task", "query:How?", "--no-reasoning", "-o", "o.jsonl")
    assert (whole.exit_code, md3.num_answered) == (0, 0), whole.output


@pytest.mark.parametrize("many", [(), ("--engine", "local", "--shard-size", 1)])
@pytest.mark.parametrize("more", [("--then", "caption:short"), ("--task", "detect:ring")])
def test_objects_that_rows_ask_about_keep_their_room(
    md3: Program, pictures: Path, more: tuple[str, ...], many: tuple[str | int, ...]
) -> None:
    """Else one question about an object would be asked again with another room around it, or its answer would go."""
    rows = [{"image": str(path), "then": "query:Which {label}?"} for path in sorted(pictures.iterdir())]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("run", "own.jsonl", "--task", "detect:circle", "-o", "o.jsonl", *many)
    assert md3(*words).exit_code in (0, 3)
    before = Path("o.jsonl").read_bytes()
    refused = md3(*words, *more, "--pad", "50%", "--add")
    assert refused.exit_code == 2
    assert "pad 0.1, now 0.5" in refused.stderr or "adds to what is asked of pictures" in refused.stderr
    assert Path("o.jsonl").read_bytes() == before
    if not many:
        assert md3(*words, *more, "--add").exit_code in (0, 3)
        assert set(before.splitlines()) <= set(Path("o.jsonl").read_bytes().splitlines())
        refused = md3("run", "own.jsonl", "--task", "detect:star", "-o", "o.jsonl", "--pad", "50%", "--add")
        assert (refused.exit_code, "pad 0.1, now 0.5" in refused.stderr) == (2, True)
