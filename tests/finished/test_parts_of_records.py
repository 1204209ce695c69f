"""Records about a part of a picture, and of pictures looked at in tiles: all judges of a line take them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from md3cli.finished.record_shape import WHOLE_LINES, is_record_of, read_record
from md3cli.finished.tidied import put_back, tidied_record
from md3cli.records import (
    Answer,
    Box,
    ImageFacts,
    ImageItem,
    RecordDict,
    Region,
    Request,
    RowFailure,
    RunIdentity,
    Task,
    Tiles,
    make_record,
    request_id,
)
from md3cli.run.journal import encode_record

RUN = RunIdentity("m@1")
CAR = Region(Box(-0.1, 0.2, 0.3, 1.4), "car", "a" * 32, 0, 0.1)
PART = Request(Task.QUERY, "What colour is the car?", region=CAR)
IN_TILES = Request(Task.DETECT, "car", tiles=Tiles("auto", 0.2))


def record_of(request: Request, answer: Answer) -> RecordDict:
    image, facts = ImageItem("a.png", "/a.png"), ImageFacts(3, 4, "0" * 64)
    return make_record(request_id("a.png", request, RUN), image, facts, request, RUN, answer, {})


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (PART, Answer(0, {"answer": "red"})),
        (PART, Answer(0, failure=RowFailure("io", "no"))),
        (IN_TILES, Answer(0, {"objects": []}, num_tiles=4)),
        (replace(IN_TILES, tiles=Tiles(378, 0)), Answer(0, {"objects": []}, num_tiles=1)),
    ],
)
def test_parts_of_pictures_and_tiles_are_whole_for_all_judges(asked: Request, answer: Answer) -> None:
    record = record_of(asked, answer)
    line = encode_record(record)
    found = WHOLE_LINES.match(line)
    assert found is not None
    assert found.end() == len(line)
    assert read_record(line) == tidied_record(line) == put_back(line) == record
    assert is_record_of(line, record["id"], "a.png", asked)


def test_a_region_stands_behind_the_prompt_and_tiles_behind_tokens() -> None:
    part, tiled = record_of(PART, Answer(0, {"answer": "red"})), record_of(IN_TILES, Answer(0, {}, num_tiles=2))
    assert [*part][[*part].index("prompt") + 1] == "region"
    assert [*tiled][[*tiled].index("tokens") + 1] == "tiles"


def test_what_arrow_makes_of_a_record_without_a_region_has_none() -> None:
    nothing = {"region": dict.fromkeys(("x_min", "of", "index")), "tiles": {"size": None}}
    record = record_of(PART, Answer(0, {"answer": "red"})) | nothing
    tidied = tidied_record(json.dumps(record).encode())
    assert "region" not in tidied
    assert "tiles" not in tidied


@pytest.mark.parametrize(
    "other",
    [
        replace(CAR, box=Box(0, 0, 1, 1)),
        replace(CAR, of="b" * 32),
        replace(CAR, index=1),
        replace(CAR, pad=0.2),
        None,
    ],
)
def test_the_id_of_a_region_is_of_its_parent_place_box_and_pad(other: Region | None) -> None:
    ids = {request_id("a.png", replace(PART, region=region), RUN) for region in (CAR, other)}
    assert len(ids) == 2


def test_how_a_region_is_called_is_not_of_its_id() -> None:
    ids = {request_id("a.png", replace(PART, region=replace(CAR, label=label)), RUN) for label in ("car", "auto")}
    assert len(ids) == 1
