"""Ground truth of COCO with faults planted into it, and how many of them a list of findings has among its first."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from md3cli.evaluate.audit import Finding
from md3cli.refine.refinement import iou

Document = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """What was planted: the kind of the finding that tells it, and the box that this is about, 0-1."""

    kind: str
    image: str
    label: str
    box: tuple[float, float, float, float]

    def is_told_by(self, finding: Finding) -> bool:
        """Return whether a finding names the kind, the picture, the label and the place."""
        told = (finding.kind, finding.image, finding.shown.label)
        return told == (self.kind, self.image, self.label) and iou(finding.shown.box, self.box) >= 0.5


@dataclass
class Planted:
    """A ground truth, and what is wrong in it."""

    document: Document
    faults: list[Fault] = field(default_factory=list)

    def tally(self, findings: Iterable[Finding]) -> tuple[Counter[str], Counter[str]]:
        """Return how many faults of each kind the findings tell, and how many findings of each tell none."""
        left, found, false = list(self.faults), Counter[str](), Counter[str]()
        for finding in findings:
            told = next((fault for fault in left if fault.is_told_by(finding)), None)
            if told is None:
                false[finding.kind] += 1
            else:
                left.remove(told)
                found[told.kind] += 1
        return found, false


def plant(document: Document, *, seed: int, num_each: int) -> Planted:
    """Drop, move, rename and add `num_each` boxes at random.

    A box is moved by a quarter to six tenths of its width and at most four tenths of its height, and stays inside.
    """
    rng, document = random.Random(seed), copy.deepcopy(document)
    images = {image["id"]: image for image in document["images"]}
    names = {category["id"]: category["name"] for category in document["categories"]}
    boxes = document["annotations"]
    rng.shuffle(boxes)
    dropped, kept = boxes[:num_each], boxes[num_each:]
    planted = Planted(document)

    def note(kind: str, box: Document) -> None:
        image, (x, y, width, height) = images[box["image_id"]], box["bbox"]
        sides = (image["width"], image["height"])
        corners = (x / sides[0], y / sides[1], (x + width) / sides[0], (y + height) / sides[1])
        planted.faults.append(Fault(kind, image["file_name"], names[box["category_id"]], corners))

    for box in dropped:
        note("missing", box)
    for box in kept[:num_each]:
        box["bbox"] = _moved(box["bbox"], images[box["image_id"]], rng)
        box.pop("segmentation", None)
        note("moved", box)
    for box in kept[num_each : 2 * num_each]:
        box["category_id"] = rng.choice([number for number in names if number != box["category_id"]])
        note("misnamed", box)
    for number in range(num_each):
        image = rng.choice(document["images"])
        width = rng.uniform(0.15, 0.4) * min(image["width"], image["height"])
        height = width * rng.uniform(0.8, 1.25)
        corner = [rng.uniform(0, image["width"] - width), rng.uniform(0, image["height"] - height)]
        ids = {"id": 1_000_000 + number, "image_id": image["id"], "category_id": rng.choice([*names])}
        kept.append({**ids, "bbox": [*corner, width, height], "area": width * height, "iscrowd": 0})
        note("doubtful", kept[-1])
    document["annotations"] = sorted(kept, key=lambda box: box["id"])
    return planted


def _moved(bbox: list[float], image: Document, rng: random.Random) -> list[float]:
    x, y, width, height = bbox
    tries = [
        (x + rng.uniform(0.25, 0.6) * width * rng.choice((-1, 1)), y + rng.uniform(-0.4, 0.4) * height)
        for _ in range(200)
    ]
    inside = [
        (left, top)
        for left, top in tries
        if 0 <= left <= image["width"] - width and 0 <= top <= image["height"] - height
    ]
    return [*(inside or tries)[0], width, height]
