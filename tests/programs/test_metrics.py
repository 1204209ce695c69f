"""The packages that others compute with give what md3's metrics give: anls, editdistance, scikit-learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import programs
import pytest
from truths import HEIGHT, WIDTH, instances, record, sections_of, segment

from md3cli.evaluate import Metric
from md3cli.evaluate.answer_metrics import anls, edit_distance, f1_of_yes

pytestmark = programs.MARKS
TOLERANCE = 1e-6
SQUARE = "M 0 0 H 1 V 1 H 0 Z"

# Prints what the packages make of the cases in argv[1].
JUDGE = """
import json, sys
import editdistance
import numpy as np
from anls import anls_score
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

cases = json.load(open(sys.argv[1]))
masks = [[np.array(mask, dtype=bool) for mask in pair] for pair in cases["masks"]]
true, said = zip(*cases["yes"])
print(json.dumps({
    "anls": [anls_score(answer, expected) for answer, expected in cases["answers"]],
    "distances": [editdistance.eval(answer, expected[0]) for answer, expected in cases["answers"]],
    "f1": f1_score(true, said),
    "iou": [jaccard_score(true.ravel(), found.ravel()) for found, true in masks],
    "all": jaccard_score(*(np.concatenate([pair[k].ravel() for pair in masks]) for k in (1, 0))),
}))
"""


def rectangles(rng: random.Random) -> list[tuple[int, int, int, int]]:
    """Two rectangles that overlap more often than not: x, y, width and height."""
    return [(rng.randint(0, 60), rng.randint(0, 30), rng.randint(40, 130), rng.randint(20, 65)) for _ in range(2)]


def filled(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def test_metrics_are_those_of_the_packages(tmp_path: Path) -> None:
    rng = random.Random(11)

    def text() -> str:
        return "".join(rng.choices("abcAB é  \n", k=rng.randint(0, 14)))

    answers = [(text(), [text() for _ in range(rng.randint(1, 3))]) for _ in range(3000)]
    yes = [(rng.random() < 0.4, rng.random() < 0.6) for _ in range(500)]
    places = [rectangles(rng) for _ in range(20)]
    masks = [[filled(*place).tolist() for place in pair] for pair in places]
    (tmp_path / "cases.json").write_text(json.dumps({"answers": answers, "yes": yes, "masks": masks}))
    theirs = programs.program("metrics").run(JUDGE, tmp_path / "cases.json")

    assert [anls(*one) for one in answers] == pytest.approx(theirs["anls"], abs=TOLERANCE)
    assert [edit_distance(answer, expected[0]) for answer, expected in answers] == theirs["distances"]
    assert f1_of_yes(yes) == pytest.approx(theirs["f1"], abs=TOLERANCE)

    there, records = [], []
    for n, (found, true) in enumerate(places):
        x, y, width, height = true
        outline = [x, y, x + width, y, x + width, y + height, x, y + height]
        there.append((f"{n}.jpg", "it", list(true), {"segmentation": [outline]}))
        records.append(record(f"{n}.jpg", "segment", "it", segments=[segment(SQUARE, *found)]))
    truth = instances(there, categories=("it",))
    scores = sections_of(tmp_path, records, truth, metrics=[Metric.MIOU, Metric.CIOU])["masks"].scores
    assert scores["miou"] == pytest.approx(np.mean(theirs["iou"]), abs=TOLERANCE)
    assert scores["ciou"] == pytest.approx(theirs["all"], abs=TOLERANCE)
