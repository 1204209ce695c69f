"""COCO files as INPUT: their pictures, where those are, and their boxes."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md3cli.config import ColumnOptions, SourceSpec
from md3cli.errors import InputError, UsageError
from md3cli.records import (
    Answer,
    Box,
    Region,
    Request,
    RunIdentity,
    SourceRow,
    Task,
    Tiles,
    compact_json,
    make_record,
    request_id,
)
from md3cli.source import coco
from md3cli.source.coco import NO_BOX, likely_folders, read_coco
from md3cli.source.source import DOUBLED, WITHOUT_BOXES, Source, open_source

COLOR = Request(Task.QUERY, "What colour is the {label}?")
CAPTION = Request(Task.CAPTION)
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 7, "name": "wild dog"}]


def image(number: Any, name: Any, width: Any = 200, height: Any = 100, **more: Any) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": width, "height": height, **more}


def box(number: Any, of: Any, *bbox: Any, category: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": of, "category_id": category, "bbox": list(bbox), "iscrowd": 0, **more}


def document(images: list[Any], annotations: list[Any] = [], **more: Any) -> dict[str, Any]:  # noqa: B006
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES, **more}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, images: list[Any], annotations: list[Any] = [], **more: Any) -> str:  # noqa: B006
    """Write a COCO file, and beside it the pictures that it lists by plain names."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(document(images, annotations, **more)))
    for entry in images:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name and not name.startswith(("/", "..")) and "\0" not in name:
            picture = Path(path).parent / name
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(b"x")
    return path


def source(*inputs: str, asked: tuple[Request, ...] = (CAPTION,), pad: float | None = None, **options: Any) -> Source:
    columns = ColumnOptions(**{name: options.pop(name) for name in ("constants", "is_template") if name in options})
    return open_source(SourceSpec(inputs, columns=replace(columns, region_pad=pad), **options), asked)


def regions(row: SourceRow) -> list[Region]:
    return [request.region for request in row.requests if request.region is not None]


def failures(rows: Source) -> list[tuple[str, str] | None]:
    return [row.failure and (row.failure.type, row.failure.message) for row in rows]


# -- pictures --------------------------------------------------------------------------------------


def test_its_pictures_in_its_order_each_once() -> None:
    write("a.json", [image(9, "b.jpg"), image(2, "sub/a.jpg"), image("x", "b.jpg"), image(4.0, "c.jpg")])
    rows = source("a.json")
    assert [row.image and row.image.name for row in rows] == ["b.jpg", "sub/a.jpg", "c.jpg"]
    assert [row.image and row.image.path for row in rows] == ["b.jpg", "sub/a.jpg", "c.jpg"]
    assert all(row.requests == (CAPTION,) and not row.meta for row in rows)
    assert rows.skipped == {DOUBLED: 1}
    assert rows.root == os.getcwd()
    assert rows.asks_nothing_else
    assert [len(list(source("a.json", limit=1))), len(list(source("a.json", include=("*/a.jpg",))))] == [1, 1]
    assert sum(len(list(source("a.json", shard=(i, 2)))) for i in range(2)) == 3


def test_ids_are_those_of_the_folder() -> None:
    write("pictures/a.json", [image(1, "b.jpg")])
    run = RunIdentity("m@r")
    ids = [request_id(row.id_name, CAPTION, run) for at in ("", "/a.json") for row in source(f"pictures{at}")]
    assert len(ids) == 2
    assert len(set(ids)) == 1


def test_several_inputs_and_braces_keep_names_apart() -> None:
    write("one/a.json", [image(1, "b.jpg")])
    write("two/a.json", [image(1, "b.jpg")])
    assert [row.image and row.image.name for row in source("one/a.json", "two/a.json")] == ["one/b.jpg", "two/b.jpg"]
    assert [row.image and row.image.name for row in source("{one,two}/a.json")] == ["one/b.jpg", "two/b.jpg"]


def test_in_a_folder_it_is_no_picture() -> None:
    write("in/a.json", [image(1, "b.jpg")])
    rows = source("in")
    assert [row.image and row.image.name for row in rows] == ["b.jpg"]
    assert rows.skipped["other suffix"] == 1


@pytest.mark.parametrize("text", ["", "\x89PNG", "x"])
def test_what_does_not_begin_as_json_is_a_picture(text: str) -> None:
    Path("a.json").write_text(text)
    assert [row.image and row.image.path for row in source("a.json")] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", r"'\[' where { is expected"),
        ('{"schema":"md3/1"}', "it has no list 'images'"),
        ('{"a":1}\n{"a":2}', "more follows behind its end; .* lines of JSON are called .jsonl"),
        ('{"images":[{"id":1', "its end comes too early"),
        ('{"images":[{"id":1,"id":2}]}', "the key 'id' comes twice"),
        ('{"images":[' + "[" * 50_000, "nested too deep"),
        ('{"images":[{"id":1,"file_name":"a"},{"id":1.0,"file_name":"b"}]}', "picture 2 has the id 1 of another one"),
        ('{"images":[{"id":1,"file_name":"a"},{"id":2,"file_name":"a","width":1,"height":1}]}', "in another size"),
    ],
)
def test_a_file_that_is_none_is_an_error_before_anything_slow(text: str, words: str) -> None:
    Path("a.json").write_text(text)
    with pytest.raises(InputError, match=words):
        source("a.json")


@pytest.mark.parametrize(
    ("categories", "words"),
    [
        ([5], "category 1 has no id, or no name"),
        ([{"id": 1}], "category 1 has no id, or no name"),
        ([{"id": 1, "name": " "}], "category 1 has no id, or no name"),
        ([{"id": 1, "name": "\ud800"}], "the name of category 1 is no text"),
        ([{"id": 1, "name": "x" * 201}], "the name of category 1 is no text of 200 characters"),
        ([{"id": 1, "name": "a"}, {"id": 1.0, "name": "b"}], "category 2 has the id 1 of another one"),
    ],
)
def test_categories_that_are_none(categories: list[Any], words: str) -> None:
    write("a.json", [image(1, "a.jpg")], [box(1, 1, 0, 0, 9, 9)], categories=categories)
    with pytest.raises(InputError, match=words):
        source("a.json", pad=0.1)
    assert len(list(source("a.json"))) == 1, "nobody asks about them"


def test_what_cannot_be_opened() -> None:
    with pytest.raises(InputError, match=r"there is no a\.json"):
        source("a.json", "b.jpg")
    os.mkfifo("pipe.json")
    assert [row.image and row.image.path for row in source("pipe.json")] == ["pipe.json"], "its decoder refuses it"


def test_a_bad_entry_is_one_record() -> None:
    bad = [5, {"id": 1}, image(2, 7), image(3, ""), image(None, "x.jpg"), image(True, "x.jpg"), image(4, "a\0b")]
    write("a.json", [*bad, image(8, "good.jpg")])
    found = failures(source("a.json"))
    assert [failure and failure[0] for failure in found] == ["bad_row"] * 7 + [None]
    assert found[:3] == [
        ("bad_row", "picture 1: it is 5, not an object"),
        ("bad_row", "picture 2: no file_name"),
        ("bad_row", "picture 3: file_name is 7"),
    ]


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "MOST_PICTURES", 2)
    write("a.json", [image(n, f"{n}.jpg") for n in range(3)])
    with pytest.raises(InputError, match="more than 2 pictures"):
        source("a.json")
    monkeypatch.setattr(coco, "MOST_PICTURES", 3)
    monkeypatch.setattr(coco, "MOST_BOXES", 1)
    write("a.json", [image(1, "b.jpg")], [box(n, 1, 0, 0, 1, 1) for n in range(2)])
    with pytest.raises(InputError, match="more than 1 annotations"):
        source("a.json", pad=0.1)


def test_names_may_not_leave_the_root() -> None:
    Path("in").mkdir()
    write("in/a.json", [image(1, "../x.jpg"), image(2, "/etc/passwd"), image(3, "b.jpg")])
    assert [failure and failure[0] for failure in failures(source("in/a.json", root="in"))] == [
        "outside_root", "outside_root", None,
    ]  # fmt: skip
    assert failures(source("in/a.json")) == [None, None, None], "as in a manifest that the user named"


def test_addresses_are_fetched_with_remote_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md3cli.source.source.is_installed", lambda module: True)
    url = "https://images.org/val/b.jpg"
    write("a.json", [image(1, "b.jpg", coco_url=url), image(2, "c.jpg", coco_url="file:///etc/passwd")])
    assert [row.image and row.image.path for row in source("a.json")] == ["b.jpg", "c.jpg"]
    assert [row.image and row.image.name for row in source("a.json", remote=True)] == [url, "c.jpg"]
    write("b.json", [image(1, url), image(2, "c.jpg")])
    assert [failure and failure[0] for failure in failures(source("b.json"))] == ["bad_request", None]
    assert failures(source("b.json", remote=True)) == [None, None]


def test_meta_of_files_that_md3_wrote() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    own = image(1, "a.jpg", meta={"site": "north", "seed": 3})
    write("a.json", [own, image(2, "b.jpg", meta={"x": deep}), image(3, "c.jpg", meta=7)])
    asked = (Request(Task.QUERY, "Is it {site}?"),)
    rows = list(source("a.json", asked=asked, is_template=True))
    assert [dict(row.meta) for row in rows] == [{"site": "north", "seed": 3}, {}, {}]
    assert [row.requests[0].prompt for row in rows] == ["Is it north?", "Is it {site}?", "Is it {site}?"]
    assert rows[0].requests[0].seed == 0, "columns that a file brings mean nothing by their names"


# -- where they are --------------------------------------------------------------------------------


def layout(json_path: str, *pictures: str) -> None:
    write(json_path, [image(1, "a.jpg"), image(2, "b.jpg")])
    for path in ("a.jpg", "b.jpg"):
        os.unlink(Path(json_path).parent / path)
    for picture in pictures:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
        Path(picture).write_bytes(b"x")


@pytest.mark.parametrize(
    ("file", "picture"),
    [
        ("d/annotations/instances_val2017.json", "d/val2017/a.jpg"),
        ("d/annotations/person_keypoints_val2017.json", "d/val2017/b.jpg"),
        ("d/annotations/instances_default.json", "d/images/default/a.jpg"),
        ("d/annotations/instances_default.json", "d/images/a.jpg"),
        ("d/labels.json", "d/data/a.jpg"),
        ("d/result.json", "d/images/a.jpg"),
        ("d/val.json", "d/val/a.jpg"),
        ("annotations/instances.json", "a.jpg"),
    ],
)
def test_pictures_are_found_where_data_sets_put_them(file: str, picture: str) -> None:
    layout(file, picture)
    rows = source(file)
    assert rows.root == os.path.realpath(os.path.dirname(picture) or ".")
    assert [row.image and row.image.name for row in rows] == ["a.jpg", "b.jpg"]
    found = os.path.basename(picture)
    assert [os.path.realpath(row.image.path) for row in rows if row.image and row.image.name == found] == [
        os.path.realpath(picture)
    ]
    assert f"the pictures of {file} are in " in rows.first_look()[0]


def test_a_file_of_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout("d/annotations/instances_val.json", "d/val/a.jpg")
    monkeypatch.chdir("d/annotations")
    assert source("instances_val.json").root == str(folder / "d/val")


def test_its_own_folder_comes_first_and_several_others_are_an_error() -> None:
    layout("d/annotations/instances_val.json", "d/val/a.jpg", "d/annotations/b.jpg")
    assert source("d/annotations/instances_val.json").root == os.path.realpath("d/annotations")
    layout("e/annotations/instances_val.json", "e/val/a.jpg", "e/images/b.jpg")
    with pytest.raises(InputError, match=r"are in e/val and e/images; --root DIR"):
        source("e/annotations/instances_val.json")
    assert source("e/annotations/instances_val.json", root="e/val").root == os.path.realpath("e/val")


def test_pictures_that_are_nowhere_are_told_with_a_way_out() -> None:
    layout("d/a.json")
    with pytest.raises(InputError, match=r"no picture of the 2 of d/a\.json .* 'd/a\.jpg' would be; --root DIR"):
        source("d/a.json")
    Path("elsewhere").mkdir()
    assert [row.image and row.image.path for row in source("d/a.json", root="elsewhere")] == [
        "elsewhere/a.jpg", "elsewhere/b.jpg",
    ]  # fmt: skip


def test_likely_folders_need_no_folder() -> None:
    assert list(likely_folders("instances_val.json")) == [".", "val", "images", "images/val", "data"]


# -- boxes -----------------------------------------------------------------------------------------


def test_each_box_is_asked_each_question() -> None:
    annotations = [
        box(11, 2, 20, 10, 100, 50),
        box("z", 1, 0, 0, 1, 1, category=7),
        box(13, 2, 0, 0, 200, 100, category=7, iscrowd=1),
    ]
    write("a.json", [image(1, "a.jpg"), image(2, "b.jpg"), image(3, "c.jpg")], annotations)
    rows = source("a.json", asked=(COLOR, CAPTION), pad=0.1)
    first, second = list(rows)
    assert regions(first) == [Region(Box(0.0, 0.0, 0.005, 0.01), "wild dog", "z", 0, 0.1)] * 2
    cat, dog = Region(Box(0.1, 0.1, 0.6, 0.6), "cat", "11", 0, 0.1), Region(Box(0, 0, 1, 1), "wild dog", "13", 0, 0.1)
    assert second.requests == (
        replace(COLOR, prompt="What colour is the cat?", region=cat), replace(CAPTION, region=cat),
        replace(COLOR, prompt="What colour is the wild dog?", region=dog), replace(CAPTION, region=dog),
    )  # fmt: skip
    assert rows.skipped == {WITHOUT_BOXES: 1}
    assert not rows.asks_nothing_else
    assert len(list(source("a.json", pad=0.1, limit=1))) == 1, "a limit counts pictures"
    assert rows.count(60) == (2, 6)


def test_names_of_what_is_found_in_boxes_follow_the_template() -> None:
    write("a.json", [image(1, "a.jpg")], [box(1, 1, 0, 0, 9, 9), box(2, 1, 0, 0, 9, 9, category=7)])
    (row,) = source("a.json", asked=(Request(Task.DETECT, "{label} wheel"),), pad=0)
    assert row.typed == {"cat wheel": "{label} wheel", "wild dog wheel": "{label} wheel"}


def test_a_template_fills_the_label_beside_columns() -> None:
    write("a.json", [image(1, "sub/a.jpg", meta={"site": "the {label}", "label": "mine"})], [box(1, 1, 0, 0, 9, 9)])
    asked = (Request(Task.QUERY, "{label} of {site} in {folder}?"),)
    (row,) = source("a.json", asked=asked, pad=0, is_template=True)
    assert row.requests[0].prompt == "cat of the {label} in sub?"
    assert row.meta == {"site": "the {label}", "label": "mine"}


def test_boxes_of_no_size_are_asked_about_so_that_each_is_a_record() -> None:
    """The feed refuses them, one by one, where the picture is cut."""
    bad: list[Any] = [[0, 0, 0, 5], [0, 0, -5, 5], [500, 0, 5, 5], [0, 0, 5], "x", None, [0, 0, "5", 5], [1e308] * 4]
    annotations = [{**box(n, 1), "bbox": bbox} for n, bbox in enumerate(bad)]
    annotations += [{"id": 99, "image_id": 1, "category_id": 1, "segmentation": {"counts": "abc", "size": [1, 1]}}]
    annotations += [box(100, 1, 0, 0, 9, 9)]
    write("a.json", [image(1, "a.jpg")], annotations)
    text = Path("a.json").read_text().replace("[1e+308, 1e+308, 1e+308, 1e+308]", "[NaN, 0, Infinity, 1]")
    Path("a.json").write_text(text)
    (row,) = source("a.json", pad=0.1)
    found = regions(row)
    assert [region.of for region in found] == [*map(str, range(8)), "99", "100"]
    assert [region.box for region in found[3:-1]] == [NO_BOX] * 6
    assert all(region.box.x_min >= region.box.x_max for region in (found[0], found[1]))
    assert found[2].box.x_min > 1
    assert row.failure is None


def test_a_picture_without_a_size_is_a_row_that_cannot_be_read() -> None:
    for width in (None, 0, -1, "200", True, 1.5, float("inf"), 2**40):
        write("a.json", [image(1, "a.jpg", width), image(2, "b.jpg")], [box(1, 1, 0, 0, 9, 9), box(2, 2, 0, 0, 9, 9)])
        bad, good = source("a.json", pad=0.1, asked=(COLOR, CAPTION))
        assert bad.failure
        assert (bad.failure.type, good.failure) == ("bad_row", None)
        assert len(bad.requests) == 2, "a record for each question"
        assert len(list(source("a.json"))) == 2, "pictures need no size"


def test_annotations_of_no_picture_are_told() -> None:
    lost: list[Any] = [box(1, 5, 0, 0, 9, 9), box(2, None, 0, 0, 9, 9), 5, {"id": 4}]
    write("a.json", [image(1, "a.jpg")], [*lost, box(5, 1, 0, 0, 9, 9)])
    rows = source("a.json", pad=0.1)
    assert [len(row.requests) for row in rows] == [1]
    assert rows.first_look() == ["a.json: 4 annotations are of no picture that it lists, and left out"]
    assert source("a.json").first_look() == [], "nobody asks about them"
    write("a.json", [image(1, "a.jpg")], [lost[0], box(5, 1, 0, 0, 9, 9)])
    told = source("a.json", pad=0.1).first_look()
    assert told == ["a.json: 1 annotation is of no picture that it lists, and left out"]


def test_a_box_of_no_category_fails_where_its_name_is_needed() -> None:
    write("a.json", [image(1, "a.jpg")], [box(1, 1, 0, 0, 9, 9, category=5), box(2, 1, 0, 0, 9, 9)])
    (row,) = source("a.json", asked=(COLOR, CAPTION), pad=0.1)
    assert [region.label for region in regions(row)] == ["", "", "cat", "cat"]
    assert row.refused
    assert list(row.refused) == ["What colour is the {label}?"]
    assert len(row.fit_requests) == 3


def test_an_annotation_without_an_id_is_an_error() -> None:
    write("a.json", [image(1, "a.jpg")], [box(None, 1, 0, 0, 9, 9)])
    with pytest.raises(InputError, match="annotation 1 has no id"):
        source("a.json", pad=0.1)


def test_a_file_without_boxes_has_no_regions() -> None:
    captions = [{"id": 1, "image_id": 1, "caption": "A cat."}]
    write("a.json", [image(1, "a.jpg")], captions)
    with pytest.raises(InputError, match=r"a\.json has no boxes, and --regions asks about each"):
        source("a.json", pad=0.1)
    assert len(list(source("a.json"))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"asked": (replace(COLOR, prompt="What is {this}?"),)}, "{this} is filled by nothing"),
        ({"asked": (replace(COLOR, prompt="What is {"),)}, "has a lone '{'"),
        ({"asked": (replace(COLOR, spatial_refs=((0.5, 0.5),)),)}, "--spatial-ref is a place in the whole picture"),
        ({"constants": (("spatial_refs", "[[0, 0]]"),)}, "--spatial-ref is a place"),
        ({"asked": (Request(Task.DETECT, "car", tiles=Tiles("auto", 0.2)),)}, "--tile is about whole pictures"),
        ({"constants": (("then", "caption"),)}, "leave out --then"),
    ],
)
def test_what_does_not_go_with_regions(options: dict[str, Any], words: str) -> None:
    write("a.json", [image(1, "a.jpg")], [box(1, 1, 0, 0, 9, 9)])
    with pytest.raises(UsageError, match=words):
        source("a.json", pad=0.1, **options)
    with pytest.raises(UsageError, match="leave out --then"):
        open_source(SourceSpec(("a.json",), columns=ColumnOptions(region_pad=0.1)), (CAPTION,), then=(COLOR,))


@pytest.mark.parametrize("typed", ["in", "in/*.jpg", "in/a.jpg", "list.txt", "-"])
def test_regions_of_anything_else_are_refused(typed: str) -> None:
    Path("in").mkdir()
    Path("in/a.jpg").write_bytes(b"x")
    Path("list.txt").write_text("in/a.jpg\n")
    with pytest.raises(UsageError, match=r"--regions asks about the boxes of a COCO file \(\.json\), and .* is none"):
        source(typed, pad=0.1)
    with pytest.raises(UsageError, match="there is no INPUT"):
        source(pad=0.1)


def test_without_regions_a_label_in_braces_is_asked_as_it_stands() -> None:
    write("a.json", [image(1, "a.jpg")])
    assert [row.requests for row in source("a.json", asked=(COLOR,))] == [(COLOR,)]


lists = st.permutations(["images", "annotations", "categories"])
boxes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(1, 9)), max_size=12)


@given(lists, boxes)
def test_boxes_are_those_of_their_pictures_whatever_the_order_of_the_lists(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], drawn: list[tuple[int, int, int]]
) -> None:
    images = [image(n, f"{n % 4}.jpg") for n in range(6)]  # 4 and 5 are doubles
    annotations = [box(k, of, 0, 0, size, size, category=kind) for k, (of, kind, size) in enumerate(drawn)]
    whole = document(images, annotations)
    path = tmp_path_factory.mktemp("coco") / "a.json"
    path.write_text(json.dumps({key: whole[key] for key in order}))
    if not drawn:
        return
    found = read_coco(str(path), with_boxes=True)
    assert [picture.name for picture in found.pictures] == [f"{n}.jpg" for n in range(4)]
    assert found.num_lost == sum(of == 6 for of, _, _ in drawn)
    for place in range(4):
        plain = [
            (str(k), "cat" if kind == 1 else None, Box(0, 0, size / 200, size / 100))
            for k, (of, kind, size) in enumerate(drawn)
            if of < 6 and of % 4 == place
        ]
        assert list(found.boxes_of(place)) == plain


numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 1e308, 2**53, True])
anything = st.none() | numbers | st.text(max_size=3) | st.lists(numbers, min_size=4, max_size=4) | st.just({"a": [1]})
keys = st.sampled_from(["id", "file_name", "width", "height", "meta", "image_id", "category_id", "bbox", "name"])
changes = st.lists(st.tuples(st.integers(0, 7), keys, anything), max_size=4)


def changed(drawn: list[tuple[int, str, Any]]) -> dict[str, Any]:
    """A sound file in which some values are others."""
    images, boxes = [image(n, f"{n}.jpg") for n in range(3)], [box(n, n % 2, n, 0, 9, 9) for n in range(4)]
    entries = [*images, *boxes, {"id": 1, "name": "cat"}]
    for place, key, value in drawn:
        entries[place][key] = value
    return document(images, boxes, categories=entries[-1:])


@given(changes, st.sampled_from([None, 0.0, 0.1]))
def test_whatever_a_file_holds_is_an_error_or_rows_with_records(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, str, Any]], pad: float | None
) -> None:
    folder = tmp_path_factory.mktemp("coco")
    (folder / "a.json").write_text(json.dumps(changed(drawn)))
    spec = SourceSpec((str(folder / "a.json"),), root=folder, columns=ColumnOptions(region_pad=pad))
    try:
        rows = open_source(spec, (COLOR, CAPTION))
    except InputError:
        return
    run = RunIdentity("m@r")
    for row in rows:
        assert row.requests
        for request in row.requests:
            record = make_record(
                request_id(row.id_name, request, run), row.image, None, request, run, Answer(0), row.meta
            )
            assert json.loads(compact_json(record))["error"]["type"] == "model"


def many(num_pictures: int, num_boxes: int) -> Iterator[str]:
    yield '{"categories": [{"id": 1, "name": "cat"}], "images": ['
    yield ",".join(json.dumps(image(n, f"{n:012}.jpg")) for n in range(num_pictures))
    yield '], "annotations": ['
    outline = [[float(n) for n in range(100)]]
    for n in range(num_boxes):
        yield ("," if n else "") + json.dumps(box(n, n * 7 % num_pictures, 1.5, 2.5, 3.5, 4.5, segmentation=outline))
    yield "]}"


def test_memory_is_bounded_by_pictures_and_boxes_and_not_by_outlines() -> None:
    with open("a.json", "w") as file:
        file.writelines(many(1000, 10_000))
    size = os.path.getsize("a.json")
    tracemalloc.start()
    found = read_coco("a.json", with_boxes=True)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(1 for place in range(1000) for _ in found.boxes_of(place)) == 10_000
    assert held < 2_500_000
    assert peak < held + 8_000_000 < size + 8_000_000
