"""What is told of INPUT's columns before anything slow: what is not there, what may be misspelled, what is asked."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md3cli.config import ColumnOptions, SourceSpec
from md3cli.errors import ImageError, InputError, UsageError
from md3cli.records import Request, Task
from md3cli.source.look import MOST_NAMED, MOST_ROWS
from md3cli.source.source import Source, open_source

CIRCLE = (Request(Task.DETECT, "circle"),)
FILLED = (Request(Task.DETECT, "{color} circle"), Request(Task.DETECT, "{stem}"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / name).touch()
    return tmp_path


def source(typed: str, asked: tuple[Request, ...] = CIRCLE, *, stdin: bytes = b"", **columns: Any) -> Source:
    return open_source(SourceSpec((typed,), columns=ColumnOptions(**columns)), asked, stdin=io.BytesIO(stdin))


def csv(text: str) -> str:
    Path("m.csv").write_text(text)
    return "m.csv"


def jsonl(*rows: object) -> str:
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "m.jsonl"


def parquet(columns: dict[str, list[Any]]) -> str:
    pq.write_table(pa.table(columns), "m.parquet")
    return "m.parquet"


def prompts(rows: Source) -> list[list[str | None]]:
    return [[request.prompt for request in row.requests] for row in rows]


# -- told --------------------------------------------------------------------------------------------


def test_a_misspelled_column_is_told() -> None:
    rows = source(csv("image,promt,lenght,class\na.jpg,x,y,z\n"))
    assert rows.first_look() == [
        "column 'promt' is carried to meta; did you mean prompt?",
        "column 'lenght' is carried to meta; did you mean length?",
    ]
    assert [dict(row.meta) for row in rows] == [{"promt": "x", "lenght": "y", "class": "z"}]


def test_what_is_there_as_well_is_not_misspelled() -> None:
    assert source(csv("image,prompt,promt\na.jpg,,x\n")).first_look() == []
    assert (
        source(csv("image,promt\na.jpg,x\n"), (Request(Task.DETECT, "{promt}"),), is_template=True).first_look() == []
    )
    assert source(csv("image\na.jpg\n"), constants=(("promt", "x"),)).first_look() == [
        "column 'promt' is carried to meta; did you mean prompt?"
    ]


def test_an_unknown_task_is_told_with_its_line() -> None:
    rows = source(jsonl({"image": "a.jpg"}, {"image": "b.jpg", "task": "detct"}, {"image": "b.jpg", "task": "dance"}))
    assert rows.first_look() == [
        "m.jsonl, line 2: unknown task 'detct', so such rows fail; did you mean detect?",
        "m.jsonl, line 3: unknown task 'dance', so such rows fail; tasks are: caption, query, detect, point, segment.",
    ]
    assert [row.failure and row.failure.type for row in rows] == [None, "bad_request", "bad_request"]


def test_rows_that_ask_something_else_are_told_in_one_line() -> None:
    rows = [{"image": "a"}, {"image": "a", "task": "caption"}, {"image": "b", "prompt": "dog"}, {"task": "detect"}]
    assert source(jsonl(*rows)).first_look() == [
        "2 of the first 4 rows of m.jsonl bring a task or prompt of their own (caption 1, prompt 1), asked instead of "
        "what you typed"
    ]
    assert source(jsonl(*rows), ()).first_look() == []  # nothing was typed


def test_a_template_without_placeholders_is_told() -> None:
    assert source("photos", is_template=True).first_look() == [
        "--template: no prompt that you typed has a {column}; prompts that rows bring are asked as they stand"
    ]


def test_a_column_that_the_pictures_own_name_hides_is_told() -> None:
    typed = csv("image,stem,name\nx/a.jpg,s,n\n")
    rows = source(typed, (Request(Task.DETECT, "{stem}"),), is_template=True)
    assert rows.first_look() == ["{stem} is the picture's own; --map x=stem lets {x} be the column 'stem'"]
    assert prompts(rows) == [["a"]]
    assert prompts(source(typed, (Request(Task.DETECT, "{x}"),), is_template=True, renamed=(("x", "stem"),))) == [["s"]]


# -- refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "columns", "message"),
    [
        ("photos", {"is_template": True}, "{color} in a prompt: photos has no column 'color' (it has: stem, name, fo"),
        ("photos/*.jpg", {"is_template": True}, "has no column 'color'"),
        ("photos/a.jpg", {"is_template": True}, "has no column 'color'"),
        ("photos", {"renamed": (("prompt", "q"),)}, "--map prompt=q: photos has no column 'q'"),
    ],
)
def test_pictures_have_no_columns(typed: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        source(typed, FILLED, **columns).first_look()
    assert message in str(error.value)


@pytest.mark.parametrize("make", [csv, jsonl, parquet])
def test_a_column_that_is_not_there_is_refused(make: Any) -> None:
    made = {
        csv: "image,colour\na.jpg,red\n",
        jsonl: {"image": "a.jpg", "colour": "red"},
        parquet: {"image": ["a.jpg"], "colour": ["red"]},
    }
    with pytest.raises(UsageError, match=r"has no column .color.; did you mean .colour.\?"):
        source(make(made[make]), FILLED, is_template=True).first_look()
    with pytest.raises(UsageError, match=r"--map prompt=question: .* has no column 'question'"):
        source(make(made[make]), renamed=(("prompt", "question"),)).first_look()


def test_a_column_goes_by_its_new_name() -> None:
    rows = source(csv("img,color\na.jpg,red\n"), FILLED, is_template=True, renamed=(("image", "img"), ("hue", "color")))
    with pytest.raises(UsageError, match="has no column 'color'; --map calls it 'hue'"):
        rows.first_look()


def test_any_number_of_columns_of_any_length_is_looked_at_soon() -> None:
    began = time.process_time()  # what else the machine does is left out
    rows = source(jsonl({"image": "a.jpg", "x" * 10**6: 1} | {f"prompt{number}": 1 for number in range(50_000)}))
    assert rows.first_look()[0] == "column 'prompt0' is carried to meta; did you mean prompt?"
    assert len(rows.first_look()) == MOST_NAMED
    with pytest.raises(UsageError, match="no column 'color'"):
        source("m.jsonl", FILLED, is_template=True).first_look()
    assert time.process_time() - began < 10


def test_a_constant_is_a_column() -> None:
    rows = source("photos", FILLED, is_template=True, constants=(("color", "red"),))
    assert rows.first_look() == []
    assert prompts(rows) == [["red circle", "a"], ["red circle", "b"]]
    assert [dict(row.meta) for row in rows] == [{"color": "red"}] * 2


def test_lines_of_json_need_a_column_in_some_row() -> None:
    rows = source(jsonl({"image": "a.jpg"}, {"image": "b.jpg", "color": "red"}), FILLED, is_template=True)
    assert rows.first_look() == []
    assert [row.refused for row in rows] == [{"{color} circle": "line 1: no column 'color' for {color}"}, None]
    assert prompts(rows) == [["{color} circle", "a"], ["red circle", "b"]]


def test_only_the_first_rows_are_looked_at() -> None:
    many = [{"image": "a.jpg"}] * MOST_ROWS
    with pytest.raises(UsageError, match="no column 'color'"):
        source(jsonl(*many, {"image": "b.jpg", "color": "red"}), FILLED, is_template=True).first_look()


def test_a_manifest_without_readable_rows_says_nothing() -> None:
    Path("m.jsonl").write_text("{broken\n")
    assert source("m.jsonl", FILLED, is_template=True).first_look() == []
    assert source(csv("image,x\n"), FILLED, is_template=True).first_look() == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((Request(Task.QUERY),), "no question: m.csv has no column 'prompt'; did you mean 'promt'?; type one with -q"),
        ((Request(Task.DETECT),), "no OBJECT: m.csv has no column 'prompt'"),
        ((), "nothing to do: m.csv has no column 'task'"),
    ],
)
def test_rows_that_say_nothing_either(asked: tuple[Request, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        source(csv("image,promt\na.jpg,x\n"), asked).first_look()
    assert message in str(error.value)
    assert source(csv("image,promt,task\na.jpg,x,caption\n"), asked).first_look()  # a task can do
    assert prompts(source(csv("image,promt\na.jpg,x\n"), asked or CIRCLE, renamed=(("prompt", "promt"),))) == [["x"]]


def test_stdin_is_judged_by_its_first_row() -> None:
    lines = b'{"image":"a.jpg","color":"red"}\n{"image":"b.jpg"}\n'
    rows = source("-", FILLED, stdin=lines, is_template=True)
    assert rows.first_look() == []
    assert [row.refused for row in rows] == [None, {"{color} circle": "line 2: no column 'color' for {color}"}]
    with pytest.raises(UsageError, match="stdin, line 1, has no column 'color'"):
        list(source("-", FILLED, stdin=b"a.jpg\n", is_template=True))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            (Request(Task.QUERY),),
            "no question: stdin, line 2, has no column 'prompt' (it has: image); type one",
        ),
        ((), "nothing to do: stdin, line 2, has no column 'task'"),
    ],
)
def test_nothing_is_asked_of_the_lines_of_stdin(asked: tuple[Request, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        list(source("-", asked, stdin=b"# pictures\na.jpg\n"))
    assert message in str(error.value)
    rows = b'# pictures\n{"image":"a.jpg","prompt":"why","task":"query"}\nb.jpg\n'
    assert len(list(source("-", asked, stdin=rows))) == 2


def test_without_input_there_is_nothing_to_fill_from() -> None:
    with pytest.raises(UsageError, match="there is no INPUT"):
        open_source(SourceSpec((), columns=ColumnOptions(is_template=True)), (Request(Task.QUERY, "{stem}"),))


# -- rows under other names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        lambda: csv("img;question;max\na.jpg;why;5\n"),
        lambda: jsonl({"img": "a.jpg", "question": "why", "max": 5}),
        lambda: parquet({"img": ["a.jpg"], "question": ["why"], "max": [5]}),
    ],
)
def test_columns_under_other_names(typed: Any) -> None:
    renamed = (("image", "img"), ("prompt", "question"), ("max_tokens", "max"))
    (row,) = source(typed(), (Request(Task.QUERY),), renamed=renamed)
    assert row.image is not None
    assert (row.image.name, row.requests, row.meta) == ("a.jpg", (Request(Task.QUERY, "why", max_tokens=5),), {})


def test_lines_of_stdin_under_other_names() -> None:
    rows = source("-", stdin=b'{"img":"a.jpg","prompt":"dog"}\nb.jpg\n', renamed=(("image", "img"),))
    assert [(row.image and row.image.name, row.requests[0].prompt) for row in rows] == [
        ("a.jpg", "dog"),
        ("b.jpg", "circle"),
    ]


def test_pictures_inside_parquet_under_another_name() -> None:
    from md3cli.source.manifest import open_input
    from md3cli.source.parquet import CellReader

    cells = pa.array([{"bytes": b"one", "path": "x.jpg"}, {"bytes": b"two", "path": None}])
    pq.write_table(pa.table({"img": cells, "label": ["a", "b"]}), "m.parquet")
    with pytest.raises(InputError, match="has no column 'image'; it has: img, label; --map image=NAME says which"):
        source("m.parquet")
    rows = list(source("m.parquet", renamed=(("image", "img"),)))
    items = [row.image for row in rows if row.image is not None]
    assert [item.name for item in items] == ["0000001-x.jpg", "0000002"]
    assert [dict(row.meta) for row in rows] == [{"label": "a"}, {"label": "b"}]
    reader = CellReader(open_input)
    assert [reader.read(item, 99) for item in items] == [b"one", b"two"]
    reader.close()


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])])
@pytest.mark.parametrize("others", [{}, {"label": ["a", "b", "c"]}])
def test_pictures_as_plain_bytes(kind: pa.DataType, others: dict[str, list[str]]) -> None:
    from md3cli.source.manifest import open_input
    from md3cli.source.parquet import CellReader

    cells: list[Any] = [b"one", None, b"three" * 1000]
    if pa.types.is_struct(kind):
        cells = [cell and {"bytes": cell} for cell in cells]
    pq.write_table(pa.table({"jpg": pa.array(cells, kind), **others}), "m.parquet")
    with pytest.raises(InputError, match=r"has no column 'image'; .* \(by its look 'jpg': --map image=jpg\)"):
        source("m.parquet")
    items = [row.image for row in source("m.parquet", renamed=(("image", "jpg"),)) if row.image is not None]
    assert [item.name for item in items if item.offset != 1] == ["0000001", "0000003"]
    reader = CellReader(open_input)
    assert [reader.read(item, 9999) for item in items if item.offset != 1] == [b"one", b"three" * 1000]
    for item in items:
        if item.offset == 1:
            with pytest.raises(ImageError, match="holds no picture"):
                reader.read(item, 99)
    reader.close()


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: csv("img,label\na.jpg,x\n"), "by its look 'img': --map image=img"),
        (lambda: csv("label,file_name\nx,a.jpg\n"), "by its look 'file_name': --map image=file_name"),
        (lambda: jsonl({"photo": "a.jpg", "x": 1}), "by its look 'photo': --map image=photo"),
        (lambda: jsonl({"id": 1, "Image_Path": "a.jpg"}), "by its look 'Image_Path': --map image=Image_Path"),
        (lambda: parquet({"jpg": [b"x"], "mask": [b"x"], "url": ["x"]}), "by its look 'jpg', 'mask': --map image=jpg"),
        (lambda: parquet({"label": ["a"], "imgs": ["b"]}), "by its look 'imgs': --map image=imgs"),
        (lambda: csv("imagine,profile,pathology\na,b,c\n"), ""),
    ],
)
def test_images_under_another_name_are_named(make: Any, hint: str) -> None:
    with pytest.raises(InputError, match=r"no column 'image'.*--map image=NAME") as caught:
        source(make()).first_look()
    assert ("(" + hint + ")" in str(caught.value)) if hint else ("by its look" not in str(caught.value))


def test_lines_of_json_that_are_about_no_image_stay_bad_rows() -> None:
    rows = source(jsonl({"prompt": "why?"}, {"image": None, "prompt": "how?"}), (Request(Task.QUERY),))
    assert rows.first_look() == []
    assert [row.failure and row.failure.type for row in rows] == ["bad_row", None]


@pytest.mark.parametrize(
    "typed", [lambda: csv("image,q,prompt\na,b,c\n"), lambda: parquet({"image": ["a"], "q": ["b"], "prompt": ["c"]})]
)
def test_a_new_name_that_is_taken_is_refused(typed: Any) -> None:
    with pytest.raises(UsageError, match=r"--map prompt=q, and there is a column 'prompt', too.* --map other=prompt"):
        source(typed(), renamed=(("prompt", "q"),))
    rows = source(typed(), renamed=(("prompt", "q"), ("other", "prompt")))
    assert [(row.requests[0].prompt, dict(row.meta)) for row in rows] == [("b", {"other": "c"})]


def test_a_line_with_a_name_that_is_taken_is_one_bad_row() -> None:
    rows = source(jsonl({"image": "a", "q": "b"}, {"image": "a", "q": "b", "prompt": "c"}), renamed=(("prompt", "q"),))
    assert [row.failure and row.failure.type for row in rows] == [None, "bad_row"]


def test_a_header_without_image_says_how_to_name_one() -> None:
    with pytest.raises(InputError, match=r"has no column .image. .*or say which one has the images: --map image=NAME"):
        source(csv("img,x\na,b\n"))
    with pytest.raises(InputError, match="has no column 'pic'"):
        source(csv("img,x\na,b\n"), renamed=(("image", "pic"),))


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (lambda: Path("m.tsv").write_text("image\tcolor\nx/a.jpg\tred\n"), "m.tsv"),
        (lambda: parquet({"image": ["x/a.jpg"], "color": ["red"]}), "m.parquet"),
        (lambda: parquet({"image": ["x/a.jpg"], "color": ["red"]}), "*.parquet"),
    ],
)
def test_templates_over_manifests_of_every_kind(make: Any, suffix: str) -> None:
    make()
    asked = (Request(Task.DETECT, "{color} thing in {folder}"), Request(Task.CAPTION), Request(Task.QUERY, "{{"))
    rows = source(suffix, asked, is_template=True)
    assert rows.first_look() == []
    (row,) = rows
    assert [request.prompt for request in row.requests] == ["red thing in x", None, "{"]
    assert row.typed == {"red thing in x": "{color} thing in {folder}"}


def test_a_template_over_a_tar(tmp_path: Path) -> None:
    with tarfile.open("t.tar", "w") as tar:
        tar.add("photos", "photos")
    rows = source("t.tar", (Request(Task.QUERY, "{folder}/{stem}"),), is_template=True)
    assert (rows.first_look(), prompts(rows)) == ([], [["photos/a"], ["photos/b"]])
    with pytest.raises(UsageError, match="no column 'color'"):
        source("t.tar", FILLED, is_template=True).first_look()


# -- constants ---------------------------------------------------------------------------------------


def test_constants_fill_what_rows_leave_empty() -> None:
    constants = (("max_objects", "3"), ("split", "train"))
    rows = source(csv("image,max_objects,split\na,5,test\nb,,\n"), constants=constants)
    assert [(row.requests[0].max_objects, dict(row.meta)) for row in rows] == [
        (5, {"split": "test"}),
        (3, {"split": "train"}),
    ]
    captions = source("photos", constants=(("task", "caption"), ("length", "long")))
    assert {row.requests for row in captions} == {(Request(Task.CAPTION, length="long"),)}
    assert not source("photos", constants=constants).asks_nothing_else
    assert source("photos").asks_nothing_else


def test_rows_without_these_options_are_as_they_were() -> None:
    """The same objects, so that nothing is checked or made for each picture."""
    rows = list(source("photos"))
    assert all(row.requests is CIRCLE for row in rows)
    assert all(row.requests is CIRCLE for row in source(csv("image\na.jpg\n")))
