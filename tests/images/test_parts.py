"""Parts of pictures: the same as files cut by hand, cut from one decoding, and results put in their place."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from watched_cutter import WatchedCutter

from md3cli.errors import ImageError
from md3cli.images.crops import CropConfig, ImageLimits, WholeImage
from md3cli.images.cutter import PartCutter
from md3cli.images.parts import KeptImages, part_key, placed
from md3cli.images.pool import PicturePool
from md3cli.images.rects import PixelRect, padded_rect
from md3cli.records import Box, ImageItem, Region

CONFIG = CropConfig(crop_size=28, patch_size=14, overlap_margin=0, max_crops=4)
PATIENCE_S = 60


def picture(path: Path, size: tuple[int, int] = (90, 60)) -> ImageItem:
    pixels = np.random.default_rng(7).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return ImageItem(path.name, str(path))


def region(box: tuple[float, float, float, float], pad: float = 0.0) -> Region:
    return Region(Box(*box), "car", "a" * 32, 0, pad)


@pytest.fixture(params=[0, 2])
def pool(request: pytest.FixtureRequest) -> Iterator[PicturePool]:
    with PicturePool(request.param, CONFIG, ImageLimits()) as made:
        yield made


@pytest.fixture
def cutter(pool: PicturePool) -> Iterator[PartCutter]:
    made = PartCutter(pool)
    yield made
    made.close()


def counted(pool: PicturePool, monkeypatch: pytest.MonkeyPatch) -> list[ImageItem]:
    """The pictures that the pool decodes from now on."""
    decoded: list[ImageItem] = []
    whole = pool.whole
    monkeypatch.setattr(pool, "whole", lambda item: (decoded.append(item), whole(item))[1])
    return decoded


def test_a_part_is_what_a_file_cut_by_hand_is(cutter: PartCutter, pool: PicturePool, tmp_path: Path) -> None:
    item, asked = picture(tmp_path / "a.png"), region((0.2, 0.3, 0.5, 0.6), 0.5)
    part = cutter.cut(item, asked).result(PATIENCE_S)
    assert part.rect == padded_rect(asked.box._asdict(), 90, 60, 0.5)
    data = io.BytesIO()
    Image.open(item.path).crop(part.rect).save(data, "PNG")
    by_hand = pool.submit(ImageItem("b.png", ""), data.getvalue()).result(PATIENCE_S)
    assert np.array_equal(part.picture.crops, by_hand.crops)
    assert (part.picture.tiling, part.picture.width, part.picture.height) == (
        by_hand.tiling,
        by_hand.width,
        by_hand.height,
    )


def test_a_picture_and_its_parts_are_decoded_once(
    cutter: PartCutter, pool: PicturePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = picture(tmp_path / "a.png")
    plain = pool.submit(item).result(PATIENCE_S)
    decoded = counted(pool, monkeypatch)
    whole = cutter.submit(item).result(PATIENCE_S)
    parts = [cutter.cut(item, region((0.1, 0.1, 0.5, 0.5 + 0.01 * at))) for at in range(9)]
    facts = {part.result(PATIENCE_S).facts for part in parts}
    assert decoded == [item]
    assert np.array_equal(plain.crops, whole.crops)
    assert {(fact.width, fact.height, fact.sha256) for fact in facts} == {(90, 60, plain.sha256)}


def test_parts_asked_at_once_share_a_decoding_that_is_not_kept(
    pool: PicturePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, decoded = picture(tmp_path / "a.png"), counted(pool, monkeypatch)
    cutter = PartCutter(pool, kept_bytes=0)
    try:
        parts = [cutter.cut(item, region((0, 0, 0.5, 0.5))) for _ in range(4)]
        assert {part.result(PATIENCE_S).picture.sha256 for part in parts}.__len__() == 1
        assert len(decoded) <= 4
        before = len(decoded)
        cutter.cut(item, region((0, 0, 0.5, 0.5))).result(PATIENCE_S)
        assert len(decoded) == before + 1
    finally:
        cutter.close()


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.9), (1.2, 0.1, 1.4, 0.2), (0.6, 0.1, 0.2, 0.9)])
def test_a_region_without_a_size_or_outside_is_a_bad_request(
    cutter: PartCutter, tmp_path: Path, box: tuple[float, float, float, float]
) -> None:
    with pytest.raises(ImageError) as caught:
        cutter.cut(picture(tmp_path / "a.png"), region(box)).result(PATIENCE_S)
    assert caught.value.type == "bad_request"


def test_what_is_no_picture_fails_as_it_does_in_the_pool(cutter: PartCutter, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    item = ImageItem("a.png", str(tmp_path / "a.png"))
    for future in (cutter.submit(item), cutter.cut(item, region((0, 0, 1, 1)))):
        with pytest.raises(ImageError) as caught:
            future.result(PATIENCE_S)
        assert caught.value.type == "not_an_image"


def test_a_gpu_cuts_parts_that_are_not_too_long(cutter: PartCutter, tmp_path: Path) -> None:
    item, boxes = picture(tmp_path / "a.png"), ((0, 0, 0.5, 0.5), (0, 0, 0.9, 0.5))
    before = [cutter.cut(item, region(box)).result(PATIENCE_S) for box in boxes]
    cutter.serve_gpu(gpu := WatchedCutter(cutter.crop_config, longest_side=50))
    for box, wanted in zip(boxes, before, strict=True):
        found = cutter.cut(item, region(box)).result(PATIENCE_S)
        assert np.array_equal(found.picture.crops, wanted.picture.crops)
        assert found.picture.sha256 == wanted.picture.sha256
    assert gpu.sizes == [(45, 30)]
    assert np.array_equal(gpu.seen[0], np.asarray(Image.open(item.path))[:30, :45])


def test_the_pictures_asked_for_last_are_kept() -> None:
    kept = KeptImages(3 * 300)
    image = WholeImage(np.zeros((10, 10, 3), np.uint8), "0" * 64)
    items = [ImageItem(str(number), "") for number in range(4)]
    for item in items[:3]:
        kept.keep(item, image)
    assert kept.find(items[0]) is image
    kept.keep(items[3], image)
    assert [kept.find(item) is not None for item in items] == [True, False, True, True]


def test_a_part_that_is_the_whole_shares_its_encoding() -> None:
    whole = WholeImage(np.zeros((10, 20, 3), np.uint8), "0" * 64)
    assert part_key(whole, PixelRect(0, 0, 20, 10)) == whole.sha256
    keys = {part_key(whole, PixelRect(*rect)) for rect in ((0, 0, 20, 9), (0, 0, 19, 10), (1, 0, 20, 10))}
    assert len(keys | {whole.sha256}) == 4
    assert all(len(key) == 64 for key in keys)


SIDE = st.integers(1, 5000)


@given(st.data(), SIDE, SIDE)
def test_what_is_found_in_a_part_lies_where_it_is_in_the_whole(data: st.DataObject, width: int, height: int) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    rect = PixelRect(left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))
    x, y = data.draw(st.floats(-1, 2)), data.draw(st.floats(-1, 2))
    box = {"label": "car", "x_min": x, "y_min": y, "x_max": x + 0.5, "y_max": y + 0.25, "score": 0.5}
    grounding = [{"start_idx": 0, "end_idx": 1, "points": [[x, y]]}]
    result: dict[str, Any] = {
        "objects": [box],
        "points": [{"label": "car", "x": x, "y": y, "score": 0.5}],
        "segments": [{"label": "car", "svg_path": "M 0 0 z", "bbox": {key: box[key] for key in Box._fields}}],
        "reasoning": {"text": "t", "grounding": grounding},
        "answer": "red",
    }
    found = placed(result, rect, width, height)
    column, row = rect.left + x * rect.width, rect.top + y * rect.height
    places = [
        (found["objects"][0]["x_min"], found["objects"][0]["y_min"]),
        (found["points"][0]["x"], found["points"][0]["y"]),
        (found["segments"][0]["bbox"]["x_min"], found["segments"][0]["bbox"]["y_min"]),
        tuple(found["reasoning"]["grounding"][0]["points"][0]),
    ]
    for place in places:
        assert (place[0] * width, place[1] * height) == pytest.approx((column, row), abs=1e-6 * max(width, height))
    assert (found["objects"][0]["x_max"] - found["objects"][0]["x_min"]) * width == pytest.approx(
        0.5 * rect.width, abs=1e-6 * width
    )
    assert (found["objects"][0]["score"], found["answer"], found["segments"][0]["svg_path"]) == (0.5, "red", "M 0 0 z")
    assert result["objects"] == [box]
