"""Draw scenes of coloured shapes with exact ground truth: the world the embedded model was trained on.

    python examples/shapes.py --seed 7 --count 100 --out shapes

writes the pictures and, beside them, `instances.json` (COCO; the categories are the kinds),
`captions.json` (COCO captions: short, normal and long) and `questions.json` (a list of image, question
and answer): the files `md3 evaluate` reads. The same seed gives the
same bytes. Seed 1 is the training collection; any other is held out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from world import KINDS, Shape
from world_draw import Instance, Picture, instance_outline, make_picture
from world_text import CAPTION_LENGTHS, Question, all_questions, caption


def file_name(index: int) -> str:
    """Name of a collection's picture."""
    return f"scene_{index:05d}.png"


def pixel_box(instance: Instance, picture: Picture) -> list[int]:
    """COCO's x, y, width, height of the visible part, in whole pixels."""
    width, height = picture.scene.width, picture.scene.height
    left, top, right, bottom = instance.box_xyxy
    return [
        round(left * width),
        round(top * height),
        round((right - left) * width),
        round((bottom - top) * height),
    ]


def annotation(
    number: int, image_id: int, instance: Instance, picture: Picture, kinds: tuple[str, ...] = KINDS
) -> dict[str, Any]:
    """A COCO annotation; `segmentation` is the whole outline, `area` and `bbox` what can be seen of it."""
    shape: Shape = picture.scene.shapes[instance.number]
    outline = np.round(instance_outline(picture, instance), 2)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": kinds.index(instance.kind) + 1,
        "bbox": pixel_box(instance, picture),
        "area": instance.num_pixels,
        "iscrowd": 0,
        "segmentation": [[float(value) for value in outline.ravel()]],
        "colour": instance.colour,
        "point": [instance.point[0] * picture.scene.width, instance.point[1] * picture.scene.height],
        "visible": round(instance.visible, 4),
        "rotation": round(shape.rotation, 2),
    }


def question_entry(index: int, question: Question) -> dict[str, Any]:
    """A row of questions.json; spatial references are 0-1."""
    entry: dict[str, Any] = {"image": file_name(index), "kind": question.kind, "question": question.text}
    if question.point:
        entry["spatial_refs"] = [list(question.point)]
    if question.box_xyxy:
        entry["spatial_refs"] = [list(question.box_xyxy)]
    return {**entry, "answer": question.answer}


def write_collection(seed: int, count: int, out: Path, kinds: tuple[str, ...] = KINDS) -> None:
    """Pictures and ground truth of a collection."""
    out.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for index in range(count):
        picture, image_id = make_picture(seed, index, kinds), index + 1
        picture.image.save(out / file_name(index))
        size = {"width": picture.scene.width, "height": picture.scene.height}
        images.append({"id": image_id, "file_name": file_name(index), **size})
        for instance in picture.instances:
            annotations.append(annotation(len(annotations) + 1, image_id, instance, picture, kinds))
        for length in CAPTION_LENGTHS:
            entry = {"id": len(captions) + 1, "image_id": image_id, "length": length}
            captions.append({**entry, "caption": caption(picture, length)})
        rng = np.random.default_rng([seed, index, 1])
        questions += [question_entry(index, question) for question in all_questions(rng, picture)]
    info = {"description": "Scenes of coloured shapes", "seed": seed, "generator": "examples/shapes.py"}
    categories = [{"id": i + 1, "name": kind} for i, kind in enumerate(kinds)]
    coco = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    _write(out / "instances.json", coco)
    _write(out / "captions.json", {"info": info, "images": images, "annotations": captions})
    _write(out / "questions.json", questions)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_collection(args.seed, args.count, args.out)


if __name__ == "__main__":
    main()
