"""evaluate: scores against ground truth made by hand, checked against pycocotools and published formulas."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from truths import HEIGHT, WIDTH, box, instances, points, record, sections_of, segment
from typer.testing import CliRunner

from md3cli.commands.eval import app
from md3cli.errors import InputError, MissingExtraError, OutputError
from md3cli.evaluate import Evaluation, Section, compare, kind_of_change, load_truth
from md3cli.evaluate.answers import judge
from md3cli.evaluate.captions import bleu, cider_d, words
from md3cli.evaluate.matching import match_by_overlap, match_points


@pytest.fixture
def score(tmp_path):
    """Score records (dicts) against ground truth documents; sections by name."""
    return lambda records, *documents: sections_of(tmp_path, records, *documents)


# ---- boxes and masks -----------------------------------------------------------------------------


def test_perfect_boxes_score_one_whatever_the_names(score):
    names = ["ä/ö 😀.jpg", "train/test_a.jpg", "val/test_a.jpg", "empty.png"]
    there = [(name, "car", [10 * n, 5, 40, 30]) for n, name in enumerate(names[:3], start=1)]
    records = [record(name, "detect", " Car", objects=[box(*bbox)]) for name, _, bbox in there]
    records.append(record("empty.png", "detect", " Car", objects=[]))
    boxes = score(records, instances(there, images=names))["boxes"]
    assert boxes.scores["AP"] == boxes.scores["AR"] == boxes.scores["F1"] == 1.0
    assert boxes.counts == {"images": 4, "requests": 4, "failed": 0, "objects": 3, "predictions": 3}
    assert boxes.scores["AP_large"] is None  # no object is that large
    assert all(verdict.is_right for verdict in boxes.verdicts.values())


def noisy_scene(seed, num_images=12):
    """Objects, and records that find most of them, shifted, with some inventions."""
    rng = random.Random(seed)
    there, records = [], []
    for n in range(num_images):
        for category in ("car", "dog"):
            found = []
            for _ in range(rng.randint(0, 4)):
                bbox = [rng.randint(0, 120), rng.randint(0, 50), rng.randint(10, 60), rng.randint(10, 45)]
                there.append((f"{n}.jpg", category, bbox, {"iscrowd": int(rng.random() < 0.1)}))
                if rng.random() < 0.8:
                    moved = [value + rng.gauss(0, 3) for value in bbox]
                    found.append(box(*moved, score=round(rng.random(), 3)))
            if rng.random() < 0.4:
                found.append(box(rng.randint(0, 100), rng.randint(0, 50), 30, 30, score=round(rng.random(), 3)))
            records.append(record(f"{n}.jpg", "detect", category, objects=found))
    return instances(there, images=[f"{n}.jpg" for n in range(num_images)]), records


def pycoco_stats(truth, results, iou_type):
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {"info": {}, **truth}
        known.createIndex()
        evaluated = COCOeval(known, known.loadRes(results), iou_type)
        evaluated.evaluate()
        evaluated.accumulate()
        evaluated.summarize()
    return evaluated.stats


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_box_scores_are_those_of_pycocotools(score, seed):
    truth, records = noisy_scene(seed)
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    results = []
    for one in records:
        for found in one["objects"]:
            x0, x1 = (min(max(found[key], 0), 1) * WIDTH for key in ("x_min", "x_max"))
            y0, y1 = (min(max(found[key], 0), 1) * HEIGHT for key in ("y_min", "y_max"))
            place = {"image_id": ids[one["image"]], "category_id": 3 if one["prompt"] == "car" else 4}
            results.append({**place, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": found["score"]})
    stats = pycoco_stats(truth, results, "bbox")
    boxes = score(records, truth)["boxes"]
    ours = [boxes.scores[name] for name in ("AP", "AP50", "AP75")] + [boxes.scores["AR"]]
    assert ours == pytest.approx([*stats[:3], stats[8]], abs=1e-9)
    mean = (boxes.by_name["car"]["AP"] + boxes.by_name["dog"]["AP"]) / 2
    assert mean == pytest.approx(boxes.scores["AP"], abs=1e-9)


def test_what_failed_is_missed_and_what_was_not_asked_is_not(score):
    there = [("a.jpg", "car", [0, 0, 50, 50]), ("b.jpg", "car", [0, 0, 50, 50]), ("b.jpg", "dog", [50, 0, 50, 50])]
    found = record("a.jpg", "detect", "car", objects=[box(0, 0, 50, 50)])
    failed = record("b.jpg", "detect", "car", error="decode")
    assert score([found], instances(there))["boxes"].scores["recall"] == 1.0  # b.jpg and dogs were not asked about
    boxes = score([found, failed], instances(there))["boxes"]
    assert boxes.scores["recall"] == 0.5
    assert boxes.counts["failed"] == 1
    assert boxes.notes == ("1 label of the ground truth was not asked about: dog",)
    unknown = record("a.jpg", "detect", "zebra", objects=[box(0, 0, 9, 9)])
    boxes = score([found, failed, unknown], instances(there))["boxes"]
    assert boxes.scores["precision"] == 1.0
    assert "1 label of the records is not in the ground truth and not scored: zebra" in boxes.notes


def test_a_box_in_a_crowd_is_neither_right_nor_wrong(score):
    there = [("a.jpg", "car", [0, 0, 40, 40]), ("a.jpg", "car", [100, 0, 100, 100], {"iscrowd": 1})]
    records = [record("a.jpg", "detect", "car", objects=[box(0, 0, 40, 40), box(120, 20, 20, 20, score=0.95)])]
    boxes = score(records, instances(there))["boxes"]
    assert boxes.scores["AP"] == boxes.scores["precision"] == 1.0
    assert boxes.counts["objects"] == 1
    (verdict,) = boxes.verdicts.values()
    assert verdict.objects == (True, None)
    assert verdict.is_right


def test_nothing_found_scores_zero_and_nothing_there_is_no_crash(score):
    empty = record("a.jpg", "detect", "car", objects=[])
    boxes = score([empty], instances([("a.jpg", "car", [0, 0, 50, 50])]))["boxes"]
    assert boxes.scores["AP"] == boxes.scores["recall"] == 0.0
    assert boxes.scores["precision"] is None
    assert next(iter(boxes.verdicts.values())).missed == ((0.0, 0.0, 0.25, 0.5),)
    boxes = score([empty], instances([], images=["a.jpg"]))["boxes"]
    assert boxes.scores["AP"] is None
    only_unknown = record("a.jpg", "detect", "zebra", objects=[box(0, 0, 9, 9)])
    assert score([only_unknown], instances([], images=["a.jpg"]))["boxes"].scores["AP"] is None


def test_images_are_found_by_their_last_part_where_that_is_unique(score):
    there = [("val2017/a.jpg", "car", [0, 0, 50, 50])]
    records = [record("a.jpg", "detect", "car", objects=[box(0, 0, 50, 50)])]
    assert score(records, instances(there))["boxes"].scores["AP"] == 1.0
    ambiguous = instances([*there, ("test2017/a.jpg", "car", [0, 0, 50, 50])])
    with pytest.raises(InputError, match="no image of the records"):
        score(records, ambiguous)


def test_a_turned_ground_truth_is_told(score):
    truth = instances([("a.jpg", "car", [0, 0, 50, 50])])
    truth["images"][0] |= {"width": HEIGHT, "height": WIDTH}
    notes = score([record("a.jpg", "detect", "car", objects=[])], truth)["boxes"].notes
    assert any("another shape" in note for note in notes)


def test_the_last_record_of_an_id_counts_and_repeats_do_not(score):
    truth = instances([("a.jpg", "car", [0, 0, 50, 50])])
    failed = record("a.jpg", "detect", "car", error="io")
    again = record("a.jpg", "detect", "car", objects=[box(0, 0, 50, 50)]) | {"id": failed["id"]}
    repeat = record("a.jpg", "detect", "car", objects=[])
    boxes = score([failed, again, repeat], truth)["boxes"]
    assert boxes.scores["AP"] == 1.0
    assert boxes.counts["requests"] == 1


def test_masks_are_scored_by_their_shape_not_their_box(score):
    triangle = {"segmentation": [[20, 80, 60, 20, 100, 80]], "area": 2400}
    truth = instances([("a.jpg", "car", [20, 20, 80, 60], triangle)])
    good = record("a.jpg", "segment", "car", segments=[segment("M 0 1 L .5 0 L 1 1 Z", 20, 20, 80, 60)])
    masks = score([good], truth)["masks"]
    assert masks.scores["AP"] == 1.0
    box_only = record("a.jpg", "segment", "car", segments=[segment("", 20, 20, 80, 60)])  # invalid path: the box
    assert score([box_only], truth)["masks"].scores["AP"] == pytest.approx(0.1, abs=0.01)  # IoU 0.5 and no more
    outline = {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 10, WIDTH * HEIGHT - 10]}, "area": 10}
    truth = instances([("a.jpg", "car", [0, 0, 1, 10], outline)])  # run lengths, not packed
    column = record("a.jpg", "segment", "car", segments=[segment("M 0 0 H 1 V 1 H 0 Z", 0, 0, 1, 10)])
    assert score([column], truth)["masks"].scores["AP"] == 1.0


def test_reliability_compares_scores_with_what_is_right(score):
    right = [(f"{n}.jpg", "car", [0, 0, 50, 50]) for n in range(8)]
    records = [record(image, "detect", "car", objects=[box(0, 0, 50, 50, score=0.8)]) for image, *_ in right]
    records += [record(f"{n}.jpg", "detect", "car", objects=[box(99, 50, 50, 40, score=0.8)]) for n in (8, 9)]
    truth = instances(right, images=[f"{n}.jpg" for n in range(10)])
    boxes = score(records, truth)["boxes"]
    (only,) = boxes.curves.reliability
    assert (only.mean_score, only.share_right, only.count) == (0.8, 0.8, 10)
    assert boxes.scores["calibration_error"] == pytest.approx(0.0, abs=1e-9)
    assert len(boxes.curves.recall) == len(boxes.curves.precision["all"]) == 101


def test_scores_that_know_better_give_a_higher_average_precision(score):
    there = [(f"{n}.jpg", "car", [0, 0, 50, 50]) for n in range(6)]

    def run(right, wrong):
        return [
            record(image, "detect", "car", objects=[box(120, 40, 30, 30, score=wrong), box(0, 0, 50, 50, score=right)])
            for image, *_ in there
        ]

    sure, blind = (score(run(*scores), instances(there))["boxes"].scores["AP"] for scores in ((0.9, 0.3), (0.5, 0.5)))
    assert sure == 1.0
    assert blind < 0.9


# ---- matching ------------------------------------------------------------------------------------


def test_the_surest_box_chooses_first():
    overlap = np.array([[0.6, 0.9], [0.0, 0.8]])
    assert match_by_overlap(overlap, [0.5, 0.9], [False, False]).is_right == (True, True)
    match = match_by_overlap(overlap, [0.9, 0.5], [False, False])
    assert match.is_right == (True, False)
    assert match.missed == (0,)


def test_points_are_paired_with_as_many_objects_as_possible():
    inside = np.array([[True, True], [True, False]])  # greedily the first point might take what the second needs
    assert match_points(inside, [False, False]).is_right == (True, True)
    two_on_one = match_points(np.array([[True], [True]]), [False])
    assert sorted(two_on_one.is_right) == [False, True]
    crowd = match_points(np.array([[True], [False]]), [True])
    assert crowd.is_right == (None, False)
    assert crowd.missed == ()


# ---- points --------------------------------------------------------------------------------------


def test_points_are_right_on_the_mask_not_only_in_the_box(score):
    triangle = {"segmentation": [[20, 80, 60, 20, 100, 80]]}
    truth = instances([("a.jpg", "car", [20, 20, 80, 60], triangle), ("a.jpg", "car", [150, 10, 40, 40])])
    records = [record("a.jpg", "point", "car", points=points((60, 60), (25, 25), (160, 20)))]
    found = score(records, truth)["points"]
    assert found.scores["hit_rate"] == found.scores["precision"] == pytest.approx(2 / 3)
    assert found.scores["recall"] == 1.0
    assert found.scores["count_error"] == 1.0
    (verdict,) = found.verdicts.values()
    assert verdict.objects == (True, False, True)


def test_a_failed_image_has_no_points(score):
    truth = instances([("a.jpg", "car", [0, 0, 50, 50]), ("b.jpg", "car", [0, 0, 50, 50])])
    records = [record("a.jpg", "point", "car", points=points((9, 9))), record("b.jpg", "point", "car", error="io")]
    scores = score(records, truth)["points"].scores
    assert (scores["hit_rate"], scores["recall"], scores["count_error"], scores["count_exact"]) == (1.0, 0.5, 0.5, 0.5)


# ---- captions ------------------------------------------------------------------------------------

REFERENCES = {
    "1.jpg": ["a red circle on a grey ground", "there is one red circle in the picture"],
    "2.jpg": ["two blue squares side by side", "a pair of blue squares next to each other on white"],
    "3.jpg": ["a green triangle above a red circle", "the green triangle is above the circle", "triangle and circle"],
    "4.jpg": ["nothing but a plain grey ground"],
}
CANDIDATES = ["A red circle on a plain, grey ground.", "two blue blue squares",
              "The green triangle stands above a red circle!", "a dog"]  # fmt: skip


def coco_captions():
    images = [{"id": n, "file_name": name} for n, name in enumerate(REFERENCES)]
    pairs = [(n, text) for n, texts in enumerate(REFERENCES.values()) for text in texts]
    return {"images": images, "annotations": [{"id": k, "image_id": n, "caption": t} for k, (n, t) in enumerate(pairs)]}


def test_caption_scores_are_those_of_the_reference_implementations():
    """Expected values: pycocoevalcap 1.2 (Cider, Bleu) and, for BLEU, sacrebleu 2.6.0, on the same words."""
    candidates = [words(text) for text in CANDIDATES]
    references = [[words(text) for text in texts] for texts in REFERENCES.values()]
    assert cider_d(candidates, references) == pytest.approx([3.10429006, 1.40809967, 2.85799853, 0.0], abs=1e-7)
    assert bleu(candidates, references) == pytest.approx(0.40033567780252, abs=1e-9)
    copied = [texts[0] for texts in references]
    assert cider_d(copied, references) == pytest.approx([5.31021117, 5.33028443, 4.47337492, 10.0], abs=1e-7)
    assert bleu(copied, references) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# @ & = | ** ++", "# @ & = | ** + +"),
        ("a#b #hashtag #1 @mention C++ c#", "a #b #hashtag # 1 @mention c++ c#"),
        ("AT&T R&B rock&roll &amp; b&w", "at&t r&b rock & roll & b & w"),
        ("It's the dogs' ball, don't! can't cannot", "it 's the dogs ball do n't ca n't can not"),
        ("well-known T-shirt - a – b -- c ...", "well-known t-shirt a b c"),
        ("a(b) [c] :)", "a -lrb- b -rrb- -lsb- c -rsb- :-rrb-"),
        ("$5.99 1,000 50% 3:45 10:30am 24/7 -5 ½", "$ 5.99 1,000 50 % 3:45 10:30 am 24/7 -5 1/2"),
        ("U.S. 5 p.m. Mr. Smith no.1 www.a.com a@b.co", "u.s. 5 p.m. mr. smith no. 1 www.a.com a@b.co"),
        ("\"quoted\" ‘single’ O'Brien o'clock café 猫 ± → 😀", "quoted single o'brien o'clock café 猫 ± →"),
        ("what?! no?? yes. a;b a!b", "what ?! no ?? yes a b a!b"),
    ],
)
def test_words_are_those_of_the_usual_tokenizer(text, expected):
    """Expected: PTBTokenizer of pycocoevalcap 1.2."""
    assert " ".join(words(text)) == expected


def test_captions_of_signs_alone_score():
    """Expected values: pycocoevalcap 1.2 (Cider)."""
    texts = [[words(text)] for text in ("# @ & =", "@ @ # #", "= & # @")]
    assert cider_d([known[0] for known in texts], texts) == pytest.approx([10.0, 7.5, 10.0], abs=1e-6)


def test_captions_are_scored_by_length_and_failures_count(score):
    records = [record(name, "caption", length="short", caption=texts[0].title()) for name, texts in REFERENCES.items()]
    records += [record(name, "caption", length="long", caption="a dog") for name in REFERENCES]
    records[3] = record("4.jpg", "caption", error="decode") | {"length": "short"}
    sections = score(records, coco_captions())
    short, long = sections["captions (short)"], sections["captions (long)"]
    assert short.scores["exact"] == 0.75
    assert short.counts["failed"] == 1
    assert short.scores["CIDEr-D"] == pytest.approx((5.31021117 + 5.33028443 + 4.47337492) / 4, abs=1e-7)
    assert long.scores == {"CIDEr-D": pytest.approx(0, abs=0.5), "BLEU-4": 0.0, "exact": 0.0}


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected", "is_exact", "is_right", "is_number_right"),
    [
        ("3", "3", True, True, True),
        ("There are three.", "3", False, False, True),
        ("Three", "3", False, True, True),
        ("1,200", "1200", False, True, True),
        ("about 2.50 metres", "2.5", False, False, True),
        ("-4", "4", False, False, False),
        ("many", "4", False, False, False),
        ("3-4", "3", False, False, True),
        (".5", "0.5", False, True, True),
        ("none", "0", False, True, True),
        ("Yes, it is raining.", "yes", False, True, False),
        ("no", "Yes", False, False, False),
        ("Nothing", "no", False, False, False),
        ("The red car.", "red car", False, True, False),
        ("it's a dog", "It’s a dog", False, False, False),
        (" a dog ", "a dog", True, True, False),
        ("été", "ÉTÉ", False, True, False),
        ("", "yes", False, False, False),
    ],
)
def test_an_answer_is_judged_by_what_it_says(answer, expected, is_exact, is_right, is_number_right):
    one = judge("?", answer, [expected])
    assert (one.is_exact, one.is_right, one.is_number_right) == (is_exact, is_right, is_number_right)


QUESTIONS = [
    {"image": "a.jpg", "question": "How many?", "answer": 2},
    {"image": "b.jpg", "question": "How many?", "answer": ["4", "four or five"]},
    {"image": "a.jpg", "question": "Red?", "answer": True},
    {"image": None, "question": "Two and two?", "answer": "4"},
    {"image": "a.jpg", "question": "never asked", "answer": "x"},
]


@pytest.mark.parametrize("as_lines", [False, True])
def test_answers_are_scored_by_question(score, as_lines):
    records = [
        record("a.jpg", "query", "how  many?", answer="two"),
        record("b.jpg", "query", "How many?", answer="There are 7"),
        record("a.jpg", "query", "Red?", error="model"),
        record(None, "query", "Two and two?", answer="4"),
        record("a.jpg", "query", "not in the truth", answer="4"),
    ]
    truth = "".join(json.dumps(row) + "\n" for row in QUESTIONS) if as_lines else QUESTIONS
    answers = score(records, truth)["answers"]
    assert answers.scores == {"exact": 0.25, "normalised": 0.5, "numeric": pytest.approx(2 / 3), "numeric_error": 1.0}
    assert answers.counts == {"requests": 4, "failed": 1, "not_in_truth": 1, "not_asked": 1}
    assert answers.by_name["Two and two?"]["exact"] == 1.0


# ---- comparing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ({"objects": [box(0, 0, 9, 9, score=0.931)]}, {"objects": [box(0, 0, 9, 9, score=0.929)]}, None),
        ({"objects": [box(0, 0, 9, 9, score=0.931)]}, {"objects": [box(0, 0, 9, 9, score=0.928)]}, "scores"),
        ({"objects": [box(0, 0, 9, 9)]}, {"objects": [box(0, 1, 9, 9)]}, "objects"),
        ({"objects": [box(0, 0, 9, 9)]}, {"objects": []}, "count"),
        ({"answer": "yes"}, {"answer": "no"}, "answer"),
        ({"answer": "yes"}, {"error": "model"}, "broken"),
        ({"error": "model"}, {"answer": "yes"}, "fixed"),
        ({"error": "model"}, {"error": "model"}, None),
        ({"error": "model"}, {"error": "decode"}, "error"),
        ({"caption": "a"}, {"caption": "a"}, None),
    ],
)
def test_a_change_has_a_kind(before, after, kind):
    assert kind_of_change(record("a.jpg", "detect", "car", **before), record("a.jpg", "detect", "car", **after)) == kind


def test_two_runs_are_compared_request_by_request():
    before = [record("a.jpg", "query", "q", answer="1"), record("b.jpg", "query", "q", answer="1")]
    after = [record("a.jpg", "query", "q", answer="2"), record("c.jpg", "query", "q", answer="1")]
    found = compare(before, after)
    assert (found.num_same, found.num_only_before, found.num_only_after, found.kinds) == (0, 1, 1, {"answer": 1})
    assert (found.changes[0].before, found.changes[0].after) == ("1", "2")


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def run_files(tmp_path):
    """A run, an earlier run and their ground truth on disk."""
    there = [("a.jpg", "car", [0, 0, 50, 50]), ("b.jpg", "car", [0, 0, 50, 50])]
    good = [record(image, "detect", "car", objects=[box(0, 0, 50, 50)]) for image, *_ in there]
    bad = [good[0] | {"id": "x"}, record("b.jpg", "detect", "car", objects=[box(90, 0, 50, 50)])]
    for name, records in (("good.jsonl", good), ("bad.jsonl", bad)):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "gt.json").write_text(json.dumps(instances(there)))
    return tmp_path


def run_eval(folder, *arguments):
    with contextlib.chdir(folder):
        return CliRunner().invoke(app, list(arguments))


def test_the_table_says_it_all(run_files):
    result = run_eval(run_files, "good.jsonl", "--gt", "gt.json")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "boxes: 2 images, 2 requests, 0 failed, 2 objects, 2 predictions"
    assert lines[1].split()[:4] == ["AP", "AP50", "AP75", "AR"]
    assert lines[2].split()[:5] == ["all", "1.000", "1.000", "1.000", "1.000"]
    assert "note: 1 label of the ground truth was not asked about: dog" in result.stdout


@pytest.mark.parametrize(
    ("limit", "exit_code"), [("0.9", 1), ("0.4", 0), ("AP50=0.4", 0), ("recall=0.6", 1), ("recall=0.5", 0)]
)
def test_fail_under_decides_the_exit_status(run_files, limit, exit_code):
    result = run_eval(run_files, "bad.jsonl", "--gt", "gt.json", "--fail-under", limit)
    assert result.exit_code == exit_code
    assert ("is below" in result.stderr) == bool(exit_code)


@pytest.mark.process
def test_json_figures_and_comparison(run_files):
    result = run_eval(run_files, "good.jsonl", "--gt", "gt.json", "--compare", "bad.jsonl", "--json", "-o", "out.d")
    document = json.loads(result.stdout)
    assert document == json.loads((run_files / "out.d" / "eval.json").read_text())
    assert document["schema"] == "md3-eval/1"
    assert document["sections"][0]["scores"]["AP"] == 1.0
    comparison = document["comparison"]
    assert (comparison["same"], comparison["kinds"], comparison["verdicts"]) == (1, {"objects": 1}, {"better": 1})
    assert comparison["score_changes"]["boxes"]["recall"] == 0.5
    for name in ("boxes-pr.png", "boxes-reliability.png"):
        with Image.open(run_files / "out.d" / name) as figure:
            assert figure.format == "PNG"
            assert len(figure.convert("RGB").getcolors(1 << 20)) > 10  # drawn, not blank


@pytest.mark.parametrize(("module", "what"), [("faster_coco_eval", "objects"), ("matplotlib.figure", "curves")])
def test_a_missing_extra_is_named(run_files, monkeypatch, module, what):
    monkeypatch.setitem(sys.modules, module, None)
    error = run_eval(run_files, "good.jsonl", "--gt", "gt.json", "-o", "out.d").exception
    assert isinstance(error, MissingExtraError)
    assert what in str(error)
    assert "md3cli[eval]" in str(error)


def test_answers_and_captions_need_no_extra(score, monkeypatch):
    for module in ("faster_coco_eval", "matplotlib", "pycocotools"):
        monkeypatch.setitem(sys.modules, module, None)
    records = [record(name, "caption", length="short", caption=texts[0]) for name, texts in REFERENCES.items()]
    records.append(record("a.jpg", "query", "Red?", answer="Yes."))
    sections = score(records, coco_captions(), QUESTIONS)
    assert sections["captions (short)"].scores["exact"] == sections["answers"].scores["normalised"] == 1.0


def test_a_comparison_needs_no_ground_truth(run_files):
    result = run_eval(run_files, "good.jsonl", "--compare", "bad.jsonl")
    assert result.stdout.splitlines()[0] == "compared: 1 the same, 1 changed (1 objects), 0 only before, 0 only now"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[{}]",
        "{}",
        '{"images": [], "annotations": []}',
        '{"images": 3, "categories": [], "annotations": []}',
        '[{"image": "a", "question": "q"}]',
    ],
)
def test_a_ground_truth_of_no_known_kind_is_told(tmp_path, text):
    path = tmp_path / "gt.json"
    path.write_text(text or "\x00")
    with pytest.raises(InputError, match=r"gt\.json"):
        load_truth(path)


def test_json_of_eval_holds_no_figure_that_is_not_finite():
    section = Section(
        "boxes", "AP", {"AP": float("nan"), "AR": 0.5}, {"images": 1}, by_name={"car": {"AP": float("inf")}}
    )
    document = Evaluation(Path("records.jsonl"), (), (section,)).to_json()["sections"][0]
    assert (document["scores"], document["by_name"]) == ({"AP": None, "AR": 0.5}, {"car": {"AP": None}})


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_told(run_files, tmp_path, name):
    (tmp_path / "file").write_text("somebody's")
    result = run_eval(run_files, "good.jsonl", "--gt", "gt.json", "-o", name)
    assert isinstance(result.exception, OutputError)
    assert "cannot write" in str(result.exception)
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("ours", "theirs"), [("folder/é.jpg", "é.jpg"), ("a\\é.jpg", "a/é.jpg"), ("é.jpg", "e\u0301.jpg")]
)
def test_captions_and_answers_match_names_as_boxes_do(score, ours, theirs):
    images = [{"id": 1, "file_name": theirs}]
    truth = {"images": images, "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
    captions = score([record(ours, "caption", caption="a dog")], truth)
    assert [section.scores["exact"] for section in captions.values()] == [1.0]
    answers = score(
        [record(ours, "query", "Dog?", answer="yes")], [{"image": theirs, "question": "Dog?", "answer": "yes"}]
    )
    assert [section.scores["exact"] for section in answers.values()] == [1.0]
