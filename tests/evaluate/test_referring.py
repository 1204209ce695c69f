"""referring: acc50, miou and ciou beside sums over arrays of pixels, as the papers' scripts do them."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from truths import HEIGHT, WIDTH, box, instances, record, sections_of, segment

from md3cli.errors import InputError
from md3cli.evaluate import Metric
from md3cli.evaluate.referring import Overlap, accuracy_at_half, box_overlap, cumulative_iou, mean_iou

TOLERANCE = 1e-6
SQUARE = "M 0 0 H 1 V 1 H 0 Z"
ACC50, MASKS = (Metric.ACC50,), (Metric.MIOU, Metric.CIOU)


@pytest.fixture
def score(tmp_path):
    """Score records against ground truth documents by metrics; sections by name."""
    return lambda records, truth, metrics: sections_of(tmp_path, records, truth, metrics=metrics)


# ---- boxes ------------------------------------------------------------------------------------------


def corners_iou(first, second):
    """IoU of two boxes by their corners, as torchvision's box_iou has it."""
    a, b = (np.array([x, y, x + w, y + h]) for x, y, w, h in (first, second))
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    both = sides.prod()
    return both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both)


SIDES = st.floats(1, 80)
BOXES = st.tuples(st.floats(0, 100), st.floats(0, 100), SIDES, SIDES)


@given(BOXES, BOXES)
def test_the_overlap_of_boxes(first, second):
    overlap = box_overlap(first, second)
    assert overlap.iou == pytest.approx(corners_iou(first, second), abs=TOLERANCE)
    assert overlap == pytest.approx(box_overlap(second, first))
    assert box_overlap(first, first).iou == pytest.approx(1.0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_acc50_is_the_share_of_surest_boxes_that_fit(score, seed):
    rng = random.Random(seed)
    there, records, is_right = [], [], []
    for n in range(60):
        true = [rng.randint(0, 100), rng.randint(0, 40), rng.randint(20, 60), rng.randint(20, 50)]
        found = [[side + rng.gauss(0, 8) for side in true] for _ in range(rng.randint(0, 3))]
        scores = rng.sample(range(1, 1000), k=len(found))
        there.append((f"{n}.jpg", "the left one", true))
        objects = [box(*one, score=s / 1000) for one, s in zip(found, scores, strict=True)]
        records.append(record(f"{n}.jpg", "detect", "the left one", objects=objects))
        inside = [_clamped(one) for one in found]
        surest = max(zip(scores, inside, strict=True), default=None)
        is_right.append(surest is not None and corners_iou(surest[1], true) >= 0.5)
    section = score(records, instances(there, categories=("the left one",)), ACC50)["boxes"]
    assert section.scores["acc50"] == pytest.approx(np.mean(is_right), abs=TOLERANCE)
    assert 0.2 < section.scores["acc50"] < 0.9
    assert next(iter(section.scores)) == section.main == "acc50"
    assert "AP" not in section.scores


def _clamped(found):
    """A box cut at the edges of the picture, as a found one is."""
    x, y, w, h = found
    left, top = min(max(x, 0), WIDTH), min(max(y, 0), HEIGHT)
    return [left, top, min(max(x + w, 0), WIDTH) - left, min(max(y + h, 0), HEIGHT) - top]


def test_a_box_that_fits_by_half_is_right_and_of_equal_ones_the_first_counts(score):
    truth = instances([("a.jpg", "car", [0, 0, 40, 40])])
    half, off = box(0, 0, 40, 20, score=0.5), box(100, 0, 40, 40, score=0.5)
    for objects, expected in (([half], 1.0), ([box(0, 0, 40, 19)], 0.0), ([half, off], 1.0), ([off, half], 0.0)):
        boxes = score([record("a.jpg", "detect", "car", objects=objects)], truth, ACC50)["boxes"]
        assert boxes.scores["acc50"] == expected


def test_what_refers_to_no_one_thing_is_left_out_and_what_failed_is_wrong(score):
    there = [("a.jpg", "car", [0, 0, 40, 40]), ("b.jpg", "car", [0, 0, 9, 9]), ("b.jpg", "car", [50, 0, 9, 9])]
    crowd = ("a.jpg", "car", [100, 0, 90, 90], {"iscrowd": 1})
    records = [record("a.jpg", "detect", "car", objects=[box(0, 0, 40, 40)])]
    records += [record("b.jpg", "detect", "car", objects=[box(0, 0, 9, 9)])]
    records += [record("c.jpg", "detect", "car", objects=[]), record("d.jpg", "detect", "car", error="io")]
    images = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    truth = instances([*there, crowd, ("d.jpg", "car", [0, 0, 9, 9])], images=images)
    section = score(records, truth, ACC50)["boxes"]
    assert section.scores["acc50"] == 0.5
    assert "acc50: 2 of 4 samples are left out: they have not one true box" in section.notes
    assert section.by_name["car"]["acc50"] == 0.5
    assert section.scores["F1"] is not None


# ---- masks ------------------------------------------------------------------------------------------


def rectangle(x, y, width, height):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def run_lengths(mask):
    """COCO's run lengths of a mask, unpacked: column by column, zeros first."""
    flat = mask.T.ravel()
    borders = np.flatnonzero(np.diff(flat)) + 1
    ends = [0, *borders.tolist(), flat.size]
    counts = [b - a for a, b in pairwise(ends)]
    return {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if flat[0] else counts}


def random_rectangle(rng):
    width, height = rng.randint(10, 90), rng.randint(10, 60)
    return rng.randint(0, WIDTH - width), rng.randint(0, HEIGHT - height), width, height


def random_scene(seed, num_samples=120):
    """Ground truth, records, and the sums of the papers' scripts: (intersection, union) of each sample."""
    rng = random.Random(seed)
    there, records, areas = [], [], []
    for n in range(num_samples):
        name, found, true, ignored = f"{n}.jpg", *(np.zeros((HEIGHT, WIDTH), dtype=bool) for _ in range(3))
        segments = []
        for _ in range(rng.choice([0, 1, 1, 2])):
            place = random_rectangle(rng)
            found |= rectangle(*place)
            segments.append(segment(SQUARE, *place))
        for is_crowd in (False,) * rng.choice([0, 1, 1, 2]) + (True,) * rng.choice([0, 0, 1]):
            mask = rectangle(*random_rectangle(rng))
            if is_crowd:
                ignored |= mask
            else:
                true |= mask
            shape = {"segmentation": run_lengths(mask), "iscrowd": int(is_crowd), "area": int(mask.sum())}
            there.append((name, "it", [0, 0, 9, 9], shape))
        records.append(record(name, "segment", "it", segments=segments))
        found &= ~(ignored & ~true)  # LISA: pixels of 255 count for neither
        areas.append((int((found & true).sum()), int((found | true).sum())))
    return instances(there, images=[f"{n}.jpg" for n in range(num_samples)], categories=("it",)), records, areas


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_masks_are_scored_as_lisa_does(score, seed):
    truth, records, areas = random_scene(seed)
    section = score(records, truth, MASKS)["masks"]
    ious = [both / either if either else 1.0 for both, either in areas]
    assert 0 in [either for _, either in areas], "a sample without a target is among them"
    assert section.scores["miou"] == pytest.approx(np.mean(ious), abs=TOLERANCE)
    total = np.sum(areas, axis=0)
    assert section.scores["ciou"] == pytest.approx(total[0] / total[1], abs=TOLERANCE)
    assert section.main == "miou"
    assert section.by_name["it"]["ciou"] == section.scores["ciou"]


def test_a_sample_that_failed_has_no_overlap(score):
    shape = {"segmentation": run_lengths(rectangle(0, 0, 50, 40)), "area": 2000}
    truth = instances([("a.jpg", "it", [0, 0, 50, 40], shape)], images=["a.jpg", "b.jpg"], categories=("it",))
    for image in truth["images"]:
        del image["width"], image["height"]
    found = record("a.jpg", "segment", "it", segments=[segment(SQUARE, 0, 0, 50, 40)])
    nothing = record("b.jpg", "segment", "it", segments=[])
    assert score([found, nothing], truth, MASKS)["masks"].scores["miou"] == 1.0
    failed = [record(name, "segment", "it", error="io") for name in ("a.jpg", "b.jpg")]
    scores = score([failed[0], nothing], truth, MASKS)["masks"].scores
    assert (scores["miou"], scores["ciou"]) == (0.5, 0.0)
    assert score([found, failed[1]], truth, MASKS)["masks"].scores["miou"] == 0.5


def test_a_truth_of_boxes_has_no_masks(score):
    shape = {"segmentation": [[0, 0, 50, 0, 50, 40, 0, 40]]}
    truth = instances([("a.jpg", "it", [0, 0, 50, 40]), ("b.jpg", "it", [0, 0, 50, 40], shape)], categories=("it",))
    records = [record(name, "segment", "it", segments=[segment(SQUARE, 0, 0, 50, 40)]) for name in ("a.jpg", "b.jpg")]
    section = score(records, truth, MASKS)["masks"]
    assert section.scores["miou"] == 1.0
    assert "miou, ciou: 1 of 2 samples are left out: their truth has no masks" in section.notes


def test_a_mask_of_another_size_than_its_picture_is_an_error(score):
    shape = {"segmentation": {"size": [50, 50], "counts": [0, 2500]}}
    truth = instances([("a.jpg", "it", [0, 0, 50, 50], shape)], categories=("it",))
    with pytest.raises(InputError, match=r"another size than its picture a\.jpg"):
        score([record("a.jpg", "segment", "it", segments=[segment(SQUARE, 0, 0, 50, 40)])], truth, MASKS)


AREAS = st.tuples(st.integers(0, 100), st.integers(0, 100)).map(lambda pair: Overlap.of(min(pair), max(pair)))


@given(st.lists(AREAS, max_size=20))
def test_sums_over_samples(overlaps):
    scores = [score(overlaps) for score in (accuracy_at_half, mean_iou, cumulative_iou)]
    assert all(value is None or 0 <= value <= 1 for value in scores)
    assert (scores[1] is None) == (not overlaps)
    assert (scores[2] is None) == (not sum(one.union for one in overlaps))
    if len({one.union for one in overlaps}) == 1 and overlaps[0].union:
        assert scores[1] == pytest.approx(scores[2])  # of equal unions both are the mean
