"""The scene generator: same seed, same bytes; exact ground truth; an unambiguous world; the packed training batch."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

EXAMPLES = Path(__file__).parents[1] / "examples"
SCENES = EXAMPLES / "scenes"
SCENES_SEED, NUM_SCENES = 2201, 12


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Import a module of examples/, as a script there would."""
    sys.path.insert(0, str(EXAMPLES))

    def import_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def pictures(load: Any) -> list[Any]:
    draw = load("world_draw")
    return [draw.make_picture(5, index) for index in range(60)]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.process
def test_same_seed_gives_the_same_bytes_and_another_seed_others(load: Any, tmp_path: Path) -> None:
    shapes = load("shapes")
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        shapes.write_collection(seed, 4, tmp_path / name)
    assert digests(tmp_path / "first") == digests(tmp_path / "again")
    assert digests(tmp_path / "first")["scene_00000.png"] != digests(tmp_path / "other")["scene_00000.png"]


def test_a_longer_collection_begins_with_the_shorter_one(load: Any, tmp_path: Path) -> None:
    shapes = load("shapes")
    shapes.write_collection(5, 2, tmp_path / "short")
    shapes.write_collection(5, 3, tmp_path / "long")
    long = digests(tmp_path / "long")
    assert all(long[name] == digest for name, digest in digests(tmp_path / "short").items() if name.endswith("png"))


def test_the_scenes_in_the_repository_are_the_generators(load: Any) -> None:
    draw = load("world_draw")
    for index in range(NUM_SCENES):
        with Image.open(SCENES / f"scene_{index:05d}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(draw.make_picture(SCENES_SEED, index).image))


@pytest.mark.process
def test_boxes_and_points_are_those_of_the_visible_pixels(pictures: list[Any]) -> None:
    for picture in pictures:
        height, width = picture.owners.shape
        for instance in picture.instances:
            mask = picture.visible_mask(instance)
            rows, cols = np.nonzero(mask)
            box = np.array(instance.box_xyxy) * (width, height, width, height)
            assert box == pytest.approx([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
            assert mask[int(instance.point[1] * height), int(instance.point[0] * width)]
            assert instance.num_pixels == mask.sum()


def test_the_pixels_of_a_shape_have_its_colour(load: Any, pictures: list[Any]) -> None:
    world = load("world")
    for picture in pictures:
        pixels = np.asarray(picture.image)
        for instance in picture.instances:
            colour = np.median(pixels[picture.visible_mask(instance)], axis=0)
            nearest = min(world.COLOURS, key=lambda name: np.abs(colour - world.COLOURS[name]).sum())
            assert nearest == instance.colour


def test_outlines_cover_what_is_seen(load: Any, pictures: list[Any]) -> None:
    draw = load("world_draw")
    for picture in pictures[:20]:
        for instance in picture.instances:
            canvas = Image.new("1", (picture.scene.width, picture.scene.height))
            outline = draw.instance_outline(picture, instance) - 0.5
            ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in outline], fill=1)
            seen = picture.visible_mask(instance)
            assert (seen & np.asarray(canvas)).sum() >= 0.95 * seen.sum()


@pytest.mark.process
def test_the_world_is_as_wide_as_promised_and_never_ambiguous(load: Any) -> None:
    world, draw = load("world"), load("world_draw")
    scenes = [draw.make_picture(5, index) for index in range(300)]
    instances = [instance for picture in scenes for instance in picture.instances]
    assert {instance.kind for instance in instances} == set(world.KINDS)
    assert {instance.colour for instance in instances} == set(world.COLOURS)
    assert {len(picture.instances) for picture in scenes} == set(range(1, 9))
    assert {picture.scene.background.style for picture in scenes} == set(world.BACKGROUNDS)
    sizes = [picture.image.size for picture in scenes]
    assert all(100 <= width <= 900 and 100 <= height <= 600 for width, height in sizes)
    assert max(width / height for width, height in sizes) > 1.6 > 0.6 > min(width / height for width, height in sizes)
    assert any(instance.visible < 0.95 for instance in instances)
    assert all(instance.visible >= draw.MIN_VISIBLE for instance in instances)
    for picture in scenes:
        gaps = [right.centre_x - left.centre_x for left, right in pairwise(picture.instances)]
        assert all(gap >= draw.MIN_ORDER_GAP for gap in gaps)


def test_ground_truth_files_are_read_by_pycocotools_and_agree(load: Any) -> None:
    truth = COCO(str(SCENES / "instances.json"))
    assert len(truth.imgs) == NUM_SCENES
    for annotation in truth.anns.values():
        x, y, width, height = annotation["bbox"]
        image = truth.imgs[annotation["image_id"]]
        assert 0 <= x < x + width <= image["width"]
        assert 0 <= y < y + height <= image["height"]
        assert 0 < annotation["area"] <= width * height
        visible_box = np.array([x, y, x + width, y + height])
        mask = truth.annToMask(annotation)
        rows, cols = np.nonzero(mask)
        outline_box = np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1])
        slack = 2 if annotation["visible"] > 0.999 else image["width"]
        assert np.all(np.abs(visible_box - outline_box) <= slack)


def test_captions_name_exactly_what_is_there(load: Any, pictures: list[Any]) -> None:
    text = load("world_text")
    for picture in pictures:
        names = sorted(instance.name for instance in picture.instances)
        for length in ("short", "normal"):
            assert sorted(text.caption_objects(text.caption(picture, length))) == names
        assert all(name in text.caption(picture, "long") for name in names)


def test_answers_follow_from_the_instances(load: Any, pictures: list[Any]) -> None:
    text = load("world_text")
    for index, picture in enumerate(pictures):
        for question in text.all_questions(np.random.default_rng(index), picture):
            if question.kind == "count":
                assert int(question.answer) == len(question.counted)
            elif question.kind == "exists":
                name = question.text.removeprefix("Is there a ").rstrip("?")
                assert (question.answer == "yes") == any(name in text.names_of(i) for i in picture.instances)
            elif question.kind == "colour":
                kind = question.text.split("the ")[1].rstrip("?")
                assert [i.colour for i in picture.instances if i.kind == kind] == [question.answer]


def test_questions_file_is_what_eval_reads() -> None:
    rows = json.loads((SCENES / "questions.json").read_text())
    assert {"image", "question", "answer"} <= rows[0].keys()
    assert {row["kind"] for row in rows} >= {"count", "exists", "colour", "which", "where", "relation", "reference"}


@pytest.mark.process
def test_a_packed_batch_computes_what_its_tasks_compute_alone(load: Any) -> None:
    """The same losses whether tasks share rows and a prefix or each has a batch of its own."""
    import torch

    from md3cli.images.crops import cut_crops
    from md3cli.model.network.config import ModelConfig
    from md3cli.model.network.moondream import Moondream3

    batch, losses, tasks = load("tiny_batch"), load("tiny_losses"), load("tiny_tasks")
    vocabulary, pool, draw = load("tiny_vocabulary"), load("tiny_pool"), load("world_draw")
    plan, tokenizer = load("tiny_plan").Plan(text_dim=64, vision_dim=32, grid=4), vocabulary.train_tokenizer()
    config = ModelConfig.from_sections(plan.make_config(tokenizer)["config"])
    model = Moondream3(config)
    load("tiny_start").initialise(model, 0)
    picture = draw.make_picture(5, 0)
    cut = cut_crops(picture.image, config.vision.crop_config)
    sample = pool.Sample(cut.pixels, cut.tiling, picture)
    streams = tasks.TaskWriter(tokenizer).sample(np.random.default_rng(0), picture)

    def text_loss(group: list[Any]) -> tuple[float, float]:
        packed = batch.pack([sample], [group], plan.grid)
        image = losses.embed_images(model, packed.crops, packed.tilings)
        parts = losses.sequence_loss(model, image, packed.rows)
        return float(parts.text), float(packed.rows.weights.sum())

    with torch.no_grad():
        together, total = text_loss(streams)
        alone = [text_loss([stream]) for stream in streams]
    assert together == pytest.approx(sum(loss * weight for loss, weight in alone) / total, rel=1e-4)
