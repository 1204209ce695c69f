"""Redacted pictures: what is covered, to the pixel; which are not written; and what else could give it away."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_runs import CAR, DOG, HEIGHT, WIDTH, Record, Run, failure, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from md3cli.errors import ExportError, UsageError
from md3cli.exporters import ExportOptions, ExportReport, export_records
from md3cli.exporters.redacted import cover
from md3cli.exporters.selected import write_selected
from md3cli.finished.run_json import seal_of
from md3cli.images.rects import PixelRect
from md3cli.refine.collection import Collection
from md3cli.refine.labels import Label, Labels, labels_with
from md3cli.refine.refinement import Refinement
from md3cli.refine.selection import Selection

SECRET = "the covered secret"
FACE = CAR | {"label": "face"}
NUM_PICTURES = 4


def noise(size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0, low: int = 60) -> Image.Image:
    """A picture without a black pixel, each unlike its neighbours."""
    pixels = np.random.default_rng(seed).integers(low, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def of(run: Run, image: str, task: str = "detect", prompt: str | None = "face", **fields: Any) -> Record:
    """A record about a picture as it lies there."""
    path = run.root / image
    with Image.open(path) as picture:
        width, height = picture.size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    result = {"objects": [FACE]} if task == "detect" else {}
    return record(image, task, prompt, **({"width": width, "height": height, "sha256": digest} | result | fields))


@pytest.fixture
def pictures(run: Run) -> Run:
    """A run with four PNGs of noise, `p0.png` to `p3.png`."""
    for number in range(NUM_PICTURES):
        noise(seed=number).save(run.root / f"p{number}.png")
    return run


def everywhere(run: Run, **fields: Any) -> list[Record]:
    return [of(run, f"p{number}.png", **fields) for number in range(NUM_PICTURES)]


def redact(
    run: Run,
    *,
    labels: Iterable[str] = (),
    names: Labels | None = None,
    chosen: Refinement | None = None,
    selection: Selection | None = None,
    sources: Iterable[tuple[str, Path]] = (),
    out: str = "out",
    **options: Any,
) -> tuple[ExportReport, Path]:
    """`md3 export run/ -f redacted`, with `--label` as `labels`."""
    refinement = chosen or Refinement(names or Labels())
    which = replace(selection or Selection(), labels=tuple(labels))
    records = Collection.of([] if sources else [run.records], sources, chosen=refinement, selection=which)
    return export_records(records, "redacted", run.folder / out, ExportOptions(**options)), run.folder / out


def written(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {".md3", "left_out.csv"}


def left_out(out: Path) -> dict[str, str]:
    with (out / "left_out.csv").open(encoding="utf-8", newline="") as file:
        return {row["image"]: row["reason"] for row in csv.DictReader(file)}


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def exact_region(box: dict[str, Any], width: int, height: int, pad: str) -> tuple[int, int, int, int]:
    """The padded pixels, by fractions of what the record says."""
    sides = []
    for low, high, size in (("x_min", "x_max", width), ("y_min", "y_max", height)):
        start, end = Fraction(str(box[low])), Fraction(str(box[high]))
        room = Fraction(pad) * (end - start)
        sides.append((max(0, math.floor((start - room) * size)), min(size, max(0, math.ceil((end + room) * size)))))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


# -- what is covered -------------------------------------------------------------------------------------

hundredths = st.integers(-20, 120).map(lambda number: number / 100)


@st.composite
def boxes(draw: st.DrawFn) -> dict[str, Any]:
    columns = sorted(draw(st.lists(hundredths, min_size=2, max_size=2, unique=True)))
    rows = sorted(draw(st.lists(hundredths, min_size=2, max_size=2, unique=True)))
    corners = {"x_min": columns[0], "y_min": rows[0], "x_max": columns[1], "y_max": rows[1]}
    return {"label": "face", **corners, "score": draw(st.floats(0.001, 0.999))}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.lists(boxes(), max_size=4),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    suffix=st.sampled_from(["png", "jpg", "bmp"]),
    pad=st.sampled_from(["0", "0.1", "0.25", "1"]),
)
def test_the_padded_regions_are_one_colour_and_all_else_is_as_it_was(
    run: Run, found: list[dict[str, Any]], size: tuple[int, int], suffix: str, pad: str
) -> None:
    name = f"x.{suffix}"
    noise(size).save(run.root / name)
    run.write([of(run, name, objects=found)])
    _, out = redact(run, pad=float(pad), overwrite=True)
    made = pixels_of(out / (name if suffix != "bmp" else "x.bmp.png"))
    with Image.open(run.root / name) as image:
        before = np.asarray(image.convert("RGB"))
    outside = np.ones(before.shape[:2], bool)
    block = 16 if suffix == "jpg" else 1
    for box in found:
        left, top, right, bottom = exact_region(box, *size, pad)
        assert (made[top:bottom, left:right] == 0).all()
        if left < right and top < bottom:
            rows = slice(top // block * block, -(-bottom // block) * block)
            outside[rows, left // block * block : -(-right // block) * block] = False
    if suffix == "jpg":
        assert (np.abs(made[outside].astype(int) - before[outside]) <= 32).all()  # encoded anew; of noise 17 was met
    else:
        assert (made[outside] == before[outside]).all()
    assert (made[outside].max(axis=-1, initial=0) > 0).all()


def test_the_blocks_of_a_jpeg_hold_no_colour_of_what_is_covered(run: Run) -> None:
    found = FACE | {"x_min": 0.2, "x_max": 0.3, "y_min": 0.3, "y_max": 0.7}  # 24 to 36, 24 to 56
    made = []
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (WIDTH, HEIGHT), "gray")
        picture.paste(colour, (24, 24, 36, 56))
        picture.save(run.root / "x.jpg", quality=75, subsampling="4:2:0")
        run.write([of(run, "x.jpg", objects=[found])])
        made.append(pixels_of(redact(run, pad=0.0, overwrite=True)[1] / "x.jpg").astype(int))
    assert np.abs(made[0] - made[1]).max() <= 12  # of 255; decoders smooth colour over a pixel of the next block


def test_room_is_ten_percent_unless_it_is_typed(pictures: Run) -> None:
    pictures.write([of(pictures, "p0.png")])
    _, out = redact(pictures)
    black = (pixels_of(out / "p0.png") == 0).all(axis=2)
    assert black[16:64, 7:65].all()  # the box is 12 20 60 60
    assert black.sum() == 48 * 58


def test_every_object_is_covered_whatever_its_score_and_the_thresholds(pictures: Run) -> None:
    sure, unsure, double = FACE | {"score": 0.9}, FACE | {"x_min": 0.7, "x_max": 0.8, "score": 0.001}, FACE
    found = [sure, unsure, double | {"x_max": 0.55, "score": 0.1}]
    pictures.write(everywhere(pictures, objects=found))
    own = Labels((Label(name="face", prompts=("face",), min_score=0.95, nms=0.1),))
    document = json.loads((pictures.folder / "run.json").read_text())
    chosen = Refinement(own, 0.5, 0.3, has_file=True)
    (pictures.folder / "run.json").write_text(json.dumps(document | {"refinement": chosen.to_json()}))
    report, out = redact(pictures, pad=0.0)
    black = (pixels_of(out / "p0.png") == 0).all(axis=2)
    assert black[20:60, 12:66].all()
    assert black[20:60, 84:96].all()
    assert any("whatever its score" in note for note in report.notes)
    assert any("--nms hides nothing" in note for note in report.notes)


@pytest.mark.parametrize(("own", "is_covered"), [(None, False), (0.95, False), (0.1, True)])
def test_a_least_score_typed_in_the_command_leaves_the_unsure_bare(
    pictures: Run, own: float | None, is_covered: bool
) -> None:
    found = [FACE | {"score": 0.5}, FACE | {"x_min": 0.7, "x_max": 0.8, "score": 0.49}]
    pictures.write(everywhere(pictures, objects=found))
    label = Label(name="face", prompts=("face",), min_score=own)
    _, out = redact(pictures, chosen=Refinement(Labels((label,)), 0.5), hides_unsure=True, pad=0.0)
    black = (pixels_of(out / "p0.png") == 0).all(axis=2)
    assert black[20:60, 12:60].all()  # 0.5 itself is below no limit but its own of 0.95, which hides nothing here
    assert black[20:60, 84:96].all() == is_covered


def test_masks_are_covered_where_they_leave_their_box(pictures: Run) -> None:
    box = {"x_min": 0.25, "y_min": 0.25, "x_max": 0.5, "y_max": 0.5}
    segment = {"label": "face", "svg_path": "M 0 0 L 2 0 L 2 1 L 0 1 Z", "bbox": box, "score": 0.5}
    broken = {"label": "face", "svg_path": "", "parse_error": "odd", "bbox": box | {"y_min": 0.75, "y_max": 1.0}}
    pictures.write(everywhere(pictures, task="segment", segments=[segment, broken]))
    report, out = redact(pictures, pad=0.0)
    black = (pixels_of(out / "p0.png") == 0).all(axis=2)
    assert black[20:40, 30:90].all()
    assert black[60:80, 30:60].all()
    assert black.sum() == 20 * 60 + 20 * 30
    assert any("one object a picture" in note for note in report.notes)


@pytest.mark.parametrize("redaction", ["blur", "pixelate"])
def test_looks_change_the_region_only_and_say_what_they_are(pictures: Run, redaction: str) -> None:
    pictures.write(everywhere(pictures))
    report, out = redact(pictures, redaction=redaction, pad=0.0)
    made, before = pixels_of(out / "p0.png").astype(int), pixels_of(pictures.root / "p0.png").astype(int)
    outside = np.ones(made.shape[:2], bool)
    outside[20:60, 12:60] = False
    assert (made[outside] == before[outside]).all()
    assert np.abs(np.diff(made[20:60, 12:60], axis=1)).mean() < 5 < 40 < np.abs(np.diff(before[20:60], axis=1)).mean()
    assert any(f"{redaction} is for looks" in note and "--redact box" in note for note in report.notes)


def test_a_box_says_nothing_of_looks(pictures: Run) -> None:
    pictures.write(everywhere(pictures))
    report, _ = redact(pictures)
    assert report.notes == ()


@given(left=st.integers(0, 39), top=st.integers(0, 39), width=st.integers(1, 40), height=st.integers(1, 40))
def test_any_region_can_be_pixelated_and_blurred(left: int, top: int, width: int, height: int) -> None:
    rect = PixelRect(left, top, min(left + width, 40), min(top + height, 40))
    for redaction in ("blur", "pixelate"):
        image = noise((40, 40))
        before = np.asarray(image)
        cover(image, rect, redaction)  # type: ignore[arg-type]  # two of its words
        after = np.asarray(image).copy()
        after[rect.top : rect.bottom, rect.left : rect.right] = before[rect.top : rect.bottom, rect.left : rect.right]
        assert (after == before).all()


# -- which pictures are written --------------------------------------------------------------------------


def test_pictures_of_which_a_label_was_not_asked_are_listed_and_not_written(pictures: Run) -> None:
    plates = [of(pictures, f"p{n}.png", prompt="plate", objects=[]) for n in range(NUM_PICTURES)]
    pictures.write([of(pictures, "p1.png"), *plates])
    report, out = redact(pictures, labels=["face"])
    assert written(out) == {"p1.png"}
    assert left_out(out) == dict.fromkeys(["p0.png", "p2.png", "p3.png"], "detect 'face' was not asked")
    assert report.num_images == 1
    assert any(note.startswith("3 pictures were not written: a label was not asked (3)") for note in report.notes)
    _, out = redact(pictures, labels=["plate"], out="plates")
    assert written(out) == {f"p{n}.png" for n in range(NUM_PICTURES)}
    assert (pixels_of(out / "p1.png") == pixels_of(pictures.root / "p1.png")).all()  # the face was not chosen
    _, out = redact(pictures, out="all")
    assert written(out) == {"p1.png"}
    _, out = redact(pictures, labels=["plate", "face"], out="both")
    assert written(out) == {"p1.png"}


def test_pictures_without_answers_are_listed(pictures: Run) -> None:
    failed = failure("p0.png", "detect", "face")
    gone = failure("gone.png", "detect", "face")
    odd = failure("odd.png", "caption", None)  # type: ignore[arg-type]  # a caption has no prompt
    pictures.write(
        [
            failed,
            of(pictures, "p1.png"),
            gone,
            odd,
            of(pictures, "p0.png", prompt="plate", objects=[]),
            of(pictures, "p1.png", prompt="plate", objects=[]),
        ]
    )
    report, out = redact(pictures)
    assert written(out) == {"p1.png"}
    assert left_out(out) == {
        "p0.png": "detect 'face' failed (decode: truncated)",
        "gone.png": "decode: truncated",
        "odd.png": "decode: truncated",
    }
    assert any("a request failed (3)" in note and "first: p0.png" in note for note in report.notes)


def test_an_answer_that_was_cut_off_is_none(pictures: Run) -> None:
    cut = of(pictures, "p0.png", finish_reason="length")
    again = of(pictures, "p1.png", finish_reason="length")
    pictures.write([cut, again, of(pictures, "p1.png", id="asked again")])
    _, out = redact(pictures)
    assert written(out) == {"p1.png"}
    assert "cut off" in left_out(out)["p0.png"]
    assert "--max-objects" in left_out(out)["p0.png"]


def test_a_segment_that_was_cut_off_has_its_box(pictures: Run) -> None:
    box = {key: CAR[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    whole = {"label": "face", "svg_path": "", "parse_error": "cut", "bbox": box, "score": 0.5}
    pictures.write(
        [
            of(pictures, "p0.png", "segment", segments=[whole], finish_reason="length"),
            of(pictures, "p1.png", "segment", segments=[], finish_reason="length"),
        ]
    )
    _, out = redact(pictures)
    assert written(out) == {"p0.png"}
    assert "cut off" in left_out(out)["p1.png"]


def test_a_name_is_answered_once_all_its_prompts_are(pictures: Run) -> None:
    heads = [of(pictures, f"p{n}.png", prompt="head") for n in (0, 1)]
    pictures.write(
        [*everywhere(pictures), *heads, failure("p1.png", "detect", "brow"), failure("p0.png", "caption", "x")]
    )
    names = labels_with(["person=face", "person=head"], Labels())
    _, out = redact(pictures, labels=["person"], names=names)
    assert written(out) == {"p0.png", "p1.png"}
    assert left_out(out)["p2.png"] == "detect 'head' was not asked"
    names = labels_with(["person=face", "person=head", "person=brow"], Labels())
    _, out = redact(pictures, labels=["person"], names=names, out="three")
    assert written(out) == set()
    assert left_out(out)["p1.png"] == "detect 'brow' failed (decode: truncated)"
    names = labels_with(["person=face", "person=nobody asked this"], Labels())
    report, out = redact(pictures, labels=["person"], names=names, out="none")
    assert written(out) == set()
    assert left_out(out)["p3.png"] == "detect 'nobody asked this' was not asked"
    assert any(note.startswith("no picture was written: ") for note in report.notes)


def test_a_prompt_stands_for_its_name(pictures: Run) -> None:
    pictures.write(everywhere(pictures))
    names = labels_with(["person=face"], Labels())
    for label in ("face", "person"):
        _, out = redact(pictures, labels=[label], names=names, out=label)
        assert len(written(out)) == NUM_PICTURES
        assert (pixels_of(out / "p0.png")[30, 30] == 0).all()


def test_every_task_that_asks_it_must_have_answered(pictures: Run) -> None:
    pictures.write(
        [*everywhere(pictures), of(pictures, "p0.png", "segment", segments=[]), failure("p1.png", "segment", "face")]
    )
    report, out = redact(pictures)
    assert written(out) == {"p0.png"}
    assert left_out(out)["p1.png"] == "segment 'face' failed (decode: truncated)"
    assert left_out(out)["p2.png"] == "segment 'face' was not asked"
    assert not any("one object a picture" in note for note in report.notes)


def test_points_cover_nothing(pictures: Run) -> None:
    noses = [of(pictures, "p0.png", "point", "nose", points=[{"label": "nose", "x": 0.5, "y": 0.5}])]
    pictures.write([*everywhere(pictures), *noses])
    with pytest.raises(UsageError, match="'nose' is asked with md3 point alone"):
        redact(pictures)
    with pytest.raises(UsageError, match="'nose' is asked with md3 point alone"):
        redact(pictures, labels=["face", "nose"])
    with pytest.raises(UsageError, match="'nose' is asked with md3 point alone"):
        redact(pictures, labels=["face"], names=labels_with(["face", "face=nose"], Labels()))
    _, out = redact(pictures, labels=["face"])
    assert len(written(out)) == NUM_PICTURES


def test_a_label_that_nobody_asks_is_refused(pictures: Run) -> None:
    pictures.write(everywhere(pictures))
    with pytest.raises(UsageError, match="--label fase: no record asks for it; they ask for face"):
        redact(pictures, labels=["fase"])
    assert not (pictures.folder / "out").exists()
    pictures.write([of(pictures, "p0.png", "caption", None, caption="a face", length="short")])
    with pytest.raises(UsageError, match="nothing is asked here that could be covered"):
        redact(pictures)


def test_what_an_interrupted_run_was_to_ask_counts(pictures: Run) -> None:
    pictures.write(everywhere(pictures)[:2])
    document = json.loads((pictures.folder / "run.json").read_text())
    requests: list[Any] = [
        {"task": "detect", "prompt": "face"},
        {"task": "detect", "prompt": "plate"},
        {"task": "caption"},
        None,
    ]
    requests += [{"task": [], "prompt": {}}, {"task": "detect", "prompt": 3}, "detect"]
    identity = {"requests": requests, "background": "none"}
    (pictures.folder / "run.json").write_text(json.dumps(document | {"identity": identity}))
    _, out = redact(pictures)
    assert written(out) == set()
    assert left_out(out) == dict.fromkeys(["p0.png", "p1.png"], "detect 'plate' was not asked")
    _, out = redact(pictures, labels=["face"], out="faces")
    assert written(out) == {"p0.png", "p1.png"}


@pytest.mark.parametrize("identity", [{"requests": []}, {"requests": [{"task": "detect", "prompt": "plate"}]}])
def test_rows_that_may_still_come_prove_nothing(pictures: Run, identity: dict[str, Any]) -> None:
    pictures.write([*everywhere(pictures), *everywhere(pictures, prompt="plate", objects=[])])
    document = json.loads((pictures.folder / "run.json").read_text())
    for starts in ([{"exit_status": 0}, {}], [{"exit_status": 130}]):
        kept = {"identity": identity | {"background": "none"}, "starts": starts}
        (pictures.folder / "run.json").write_text(json.dumps(document | kept))
        with pytest.raises(UsageError, match="the run is not finished, and the rows of its manifest say what is asked"):
            redact(pictures)
        selected = pictures.folder / "selected.jsonl"
        write_selected(Collection.of([pictures.records]), selected, overwrite=True)
        if not identity["requests"]:
            with pytest.raises(UsageError, match="the run is not finished"):
                export_records(Collection.of([selected]), "redacted", pictures.folder / "out", ExportOptions())
        assert len(written(redact(pictures, labels=["face"], overwrite=True)[1])) == NUM_PICTURES
        assert len(written(redact(pictures, is_run_done=True, overwrite=True)[1])) == NUM_PICTURES
        shutil.rmtree(pictures.folder / "out")
        (pictures.folder / "run.json").write_text(json.dumps(document | kept | {"identity": {"template": True}}))
        with pytest.raises(UsageError, match="the run is not finished"):
            redact(pictures, labels=["face"])
    (pictures.folder / "run.json").write_text(json.dumps(document | kept | {"starts": [{"exit_status": 3}]}))
    assert len(written(redact(pictures)[1])) == NUM_PICTURES


def test_what_a_selection_left_out_was_asked_all_the_same(pictures: Run) -> None:
    faces = everywhere(pictures, objects=[FACE | {"score": 0.1}])
    pictures.write([*faces, *everywhere(pictures, prompt="car", objects=[CAR | {"score": 0.9}])])
    document = json.loads((pictures.folder / "run.json").read_text())
    requests = [{"task": "detect", "prompt": prompt} for prompt in ("face", "car")]
    kept = {"identity": {"requests": requests, "background": "none"}, "starts": [{"exit_status": 0}]}
    (pictures.folder / "run.json").write_text(json.dumps(document | kept))
    for selection, num_written in ((Selection(score_from=0.5), 0), (Selection(labels=("car",)), NUM_PICTURES)):
        once, twice = pictures.folder / "once.jsonl", pictures.folder / "twice.jsonl"
        write_selected(Collection.of([pictures.records], selection=selection), once, overwrite=True)
        write_selected(Collection.of([once]), twice, overwrite=True)
        for file in (once, twice):
            export_records(Collection.of([file]), "redacted", pictures.folder / "out", ExportOptions(overwrite=True))
            assert len(written(pictures.folder / "out")) == num_written


def test_a_label_of_the_typed_file_that_nobody_asks_is_refused(pictures: Run) -> None:
    pictures.write(everywhere(pictures))
    names = labels_with(["face", "plate"], Labels())
    with pytest.raises(UsageError, match="no record asks for plate, which the labels file has"):
        redact(pictures, names=names, has_typed_labels=True)
    assert len(written(redact(pictures, names=names, has_typed_labels=True, labels=["face"])[1])) == NUM_PICTURES
    assert len(written(redact(pictures, names=names, out="kept")[1])) == NUM_PICTURES


def test_records_without_their_run_are_told(pictures: Run) -> None:
    pictures.write(everywhere(pictures))
    (pictures.folder / "run.json").unlink()
    report, _ = redact(pictures, root=pictures.root)
    assert any("whether thresholds took something out of it is not known" in note for note in report.notes)


def test_a_prompt_that_was_filled_from_the_row_answers_for_its_template(pictures: Run) -> None:
    person = Label(name="person", prompts=("face",), templates=("{name} of the team",))
    document = json.loads((pictures.folder / "run.json").read_text())
    identity = {"requests": [{"task": "detect", "prompt": "{name} of the team"}], "template": True}
    kept = {"refinement": Refinement(Labels((person,))).to_json(), "identity": identity}
    (pictures.folder / "run.json").write_text(json.dumps(document | kept))
    filled = [of(pictures, f"p{n}.png", prompt=f"p{n} of the team", objects=[]) for n in range(3)]
    pictures.write([*everywhere(pictures), *filled, failure("p2.png", "detect", "q of the team")])
    _, out = redact(pictures)
    assert written(out) == {"p0.png", "p1.png"}
    assert left_out(out)["p2.png"] == "detect 'q of the team' failed (decode: truncated)"
    assert left_out(out)["p3.png"] == "detect '{name} of the team' was not asked"


def test_an_answer_about_a_part_is_covered_and_proves_nothing(pictures: Run) -> None:
    region = {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1, "label": "car", "of": "x", "index": 0}
    part = of(pictures, "p0.png", region=region, objects=[FACE | {"x_min": 0.6, "x_max": 0.8}], id="part")
    pictures.write([of(pictures, "p0.png"), part, of(pictures, "p1.png", region=region)])
    _, out = redact(pictures, pad=0.0)
    assert written(out) == {"p0.png"}
    black = (pixels_of(out / "p0.png") == 0).all(axis=2)
    assert black[20:60, 72:96].all()
    assert left_out(out) == {"p1.png": "detect 'face' was asked about parts of it only"}


def test_what_another_record_calls_by_a_chosen_name_is_covered_too(pictures: Run) -> None:
    others = [DOG | {"label": "people"}, FACE | {"x_min": 0.6, "x_max": 0.8}]
    pictures.write([*everywhere(pictures), of(pictures, "p0.png", prompt="people", objects=others)])
    _, out = redact(pictures, labels=["face"], pad=0.0)
    black = (pixels_of(out / "p0.png") == 0).all(axis=2)
    assert black[20:60, 72:96].all()
    assert not black[10:18, 60:].any()  # the dog


def test_without_a_choice_all_is_covered_whatever_it_is_called(pictures: Run) -> None:
    odd = of(pictures, "p0.png", prompt=None, objects=[FACE | {"x_min": 0.6, "x_max": 0.8, "label": ""}], id="odd")
    pictures.write([*everywhere(pictures), odd])
    _, out = redact(pictures, pad=0.0)
    black = (pixels_of(out / "p0.png") == 0).all(axis=2)
    assert black[20:60, 12:60].all()
    assert black[20:60, 72:96].all()


def test_records_without_what_a_threshold_hides_are_refused(pictures: Run) -> None:
    pictures.write(everywhere(pictures))
    for refinement, is_thinned in (
        (Refinement(min_score=0.95), True),
        (Refinement(nms=0.3), True),
        (Refinement(), False),
    ):
        whole = Collection.of([pictures.records], chosen=refinement)
        for is_refined in (True, False):
            selected = pictures.folder / f"{is_thinned}{is_refined}.jsonl"
            write_selected(whole, selected, is_refined=is_refined, overwrite=True)
            if is_thinned and is_refined:
                write_selected(Collection.of([selected]), pictures.folder / "again.jsonl", overwrite=True)
                for records in (selected, pictures.folder / "again.jsonl"):
                    with pytest.raises(UsageError, match="--refined"):
                        export_records(records, "redacted", pictures.folder / "out", ExportOptions())
                continue
            export_records(selected, "redacted", pictures.folder / "out", ExportOptions(overwrite=True))
            assert (pixels_of(pictures.folder / "out/p0.png")[30, 30] == 0).all()


def test_a_box_without_extent_keeps_a_picture_back(pictures: Run) -> None:
    turned = FACE | {"x_min": 0.5, "x_max": 0.1}
    pictures.write([of(pictures, "p0.png", objects=[turned]), of(pictures, "p1.png")])
    _, out = redact(pictures)
    assert written(out) == {"p1.png"}
    assert "no extent" in left_out(out)["p0.png"]


# -- the file must be the one that the model saw ---------------------------------------------------------


def test_pictures_that_are_not_what_the_model_saw_are_listed(pictures: Run) -> None:
    records = everywhere(pictures)
    nameless = {key: value for key, value in records[3].items() if key != "sha256"}
    noise(seed=99).save(pictures.root / "p0.png")
    (pictures.root / "p1.png").unlink()
    (pictures.root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    bad = records[0] | {"image": "bad.png", "sha256": hashlib.sha256(b"\x89PNG\r\n\x1a\n no more").hexdigest()}
    other = of(pictures, "p2.png", id="other", prompt="face", width=10)
    pictures.write([records[0], records[1], nameless, bad, records[2], other, of(pictures, "empty.png")])
    report, out = redact(pictures)
    assert written(out) == {"empty.png"}
    reasons = left_out(out)
    assert "sha256 differs" in reasons["p0.png"]
    assert reasons["p1.png"] == "the picture is not there"
    assert "no sha256" in reasons["p3.png"]
    assert reasons["bad.png"].startswith("decode: ")
    assert "120 x 80 pixels" in reasons["p2.png"]
    assert any(note.startswith("5 pictures were not written: the picture has changed (3)") for note in report.notes)


def test_none_that_is_there_is_a_wrong_root(pictures: Run, tmp_path: Path) -> None:
    pictures.write(everywhere(pictures))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ExportError, match="--root DIR"):
        redact(pictures, root=tmp_path / "elsewhere")
    assert not (pictures.folder / "out").exists()


def test_twins_are_judged_and_found_each_by_its_bytes(pictures: Run) -> None:
    contents = {}
    with tarfile.open(pictures.root / "x.tar", "w") as tar:
        for seed in range(3):
            file = io.BytesIO()
            noise(seed=seed).save(file, "PNG")
            contents[seed] = file.getvalue()
            member = tarfile.TarInfo("a.png")
            member.size = len(contents[seed])
            tar.addfile(member, io.BytesIO(contents[seed]))
    lines = []
    for seed, content in contents.items():
        shas = {"sha256": hashlib.sha256(content).hexdigest(), "id": str(seed)}
        lines.append(record("x.tar/a.png", "detect", "face", objects=[FACE] if seed == 2 else []) | shas)
        if seed != 1:
            lines.append(record("x.tar/a.png", "detect", "plate", objects=[]) | shas | {"id": f"plate {seed}"})
    pictures.write(lines)
    _, out = redact(pictures)
    assert written(out) == {"x.tar/a.png", "x.tar/a~3.png"}
    assert left_out(out) == {"x.tar/a.png#2": "detect 'plate' was not asked"}
    assert (pixels_of(out / "x.tar/a.png") == np.asarray(noise(seed=0))).all()
    made = pixels_of(out / "x.tar/a~3.png")
    assert (made[30, 30] == 0).all()
    assert (made[70:] == np.asarray(noise(seed=2))[70:]).all()


def test_runs_are_read_as_one_or_kept_apart(pictures: Run, tmp_path: Path) -> None:
    pictures.write(everywhere(pictures))
    root = tmp_path / "others"
    root.mkdir()
    noise(seed=50).save(root / "p0.png")
    other = Run(tmp_path / "other", root)
    other.folder.mkdir()
    sealed = {"schema": "md3-run/1", "root": str(root), "seal": seal_of(str(root))}
    (other.folder / "run.json").write_text(json.dumps(sealed))
    other.write([of(other, "p0.png", objects=[DOG | {"label": "face"}], id="other")])
    for sources in ([("day", pictures.records), ("night", other.records)],):
        _, out = redact(pictures, sources=sources)
        assert written(out) == {*(f"day/p{n}.png" for n in range(NUM_PICTURES)), "night/p0.png"}
    both = Collection.of([pictures.records, other.records])
    export_records(both, "redacted", tmp_path / "both", ExportOptions())
    assert written(tmp_path / "both") == {*(f"p{n}.png" for n in range(NUM_PICTURES)), "p0~2.png"}
    assert (pixels_of(tmp_path / "both/p0~2.png")[70:, :50] == np.asarray(noise(seed=50))[70:, :50]).all()


# -- which pictures are looked at ------------------------------------------------------------------------


def test_a_selection_chooses_pictures_and_never_half_of_one(pictures: Run) -> None:
    lines = [
        of(pictures, f"p{n}.png", prompt=prompt, objects=[box | {"label": prompt}])
        for n in range(NUM_PICTURES)
        for prompt, box in (("face", FACE), ("plate", FACE | {"x_min": 0.6, "x_max": 0.8}))
    ]
    pictures.write([*lines, failure("broken.png", "detect", "face")])
    _, out = redact(pictures, selection=Selection(limit=3), pad=0.0, out="limit")
    assert written(out) == {"p0.png", "p1.png"}
    assert left_out(out) == {}
    for name in written(out):
        black = (pixels_of(out / name) == 0).all(axis=2)
        assert black[20:60, 12:60].all()
        assert black[20:60, 72:96].all()
    _, out = redact(pictures, selection=Selection(images=("p2*", "broken*")), out="image")
    assert written(out) == {"p2.png"}
    assert set(left_out(out)) == {"broken.png"}
    _, out = redact(pictures, selection=Selection(prompts=("face",), images=("p3*",)), out="prompt")
    assert (pixels_of(out / "p3.png")[30, 80] == 0).all()
    _, out = redact(pictures, labels=["plate"], selection=Selection(limit=1), out="label")
    assert written(out) == {"p0.png"}
    made = pixels_of(out / "p0.png")
    assert (made[30, 80] == 0).all()
    assert (made[30, 30] > 0).all()


def test_a_label_of_a_selection_lists_the_pictures_it_was_not_asked_of(pictures: Run) -> None:
    pictures.write([of(pictures, "p0.png"), *(of(pictures, f"p{n}.png", prompt="plate", objects=[]) for n in (1, 2))])
    _, out = redact(pictures, labels=["face"], selection=Selection(images=("p[01]*",)))
    assert written(out) == {"p0.png"}
    assert set(left_out(out)) == {"p1.png"}


# -- names -----------------------------------------------------------------------------------------------


def test_names_are_kept_or_told_apart(pictures: Run) -> None:
    names = [
        "left_out.csv/a.png",
        "=cmd.png",
        "übung/日本 ☃.png",
        "a/x.png",
        "a/x.webp",
        "a/x.webp.png",
        "y.jpeg",
        "z.TIFF",
    ]
    for number, name in enumerate(names):
        (pictures.root / name).parent.mkdir(exist_ok=True)
        noise(seed=number).save(pictures.root / name)
    pictures.write([*(of(pictures, name) for name in names), failure("=gone.png", "detect", "face")])
    _, out = redact(pictures)
    kept = {"=cmd.png", "übung/日本 ☃.png", "a/x.png", "y.jpeg", "a/x.webp.png", "z.TIFF.png"}
    assert kept < written(out)
    assert len(written(out)) == len(names)
    assert left_out(out) == {"'=gone.png": "decode: truncated"}
    for name in written(out):
        assert pixels_of(out / name).shape == (HEIGHT, WIDTH, 3)


def test_a_name_that_climbs_out_is_not_opened(pictures: Run) -> None:
    noise().save(pictures.root.parent / "secret.png")
    pictures.write([of(pictures, "../secret.png"), of(pictures, "p0.png")])
    _, out = redact(pictures)
    assert written(out) == {"p0.png"}
    assert left_out(out) == {"../secret.png": "the picture is not there"}


def test_what_stands_in_out_goes_only_when_asked(pictures: Run) -> None:
    pictures.write(everywhere(pictures))
    _, out = redact(pictures)
    with pytest.raises(UsageError, match="--overwrite"):
        redact(pictures)
    pictures.write(everywhere(pictures)[:1])
    redact(pictures, overwrite=True)
    assert written(out) == {"p0.png"}


# -- what else a file could give away --------------------------------------------------------------------


def thumbnail_exif(picture: Image.Image, orientation: int = 1) -> bytes:
    """EXIF with a thumbnail of the whole picture, GPS and a camera, by hand: Pillow writes no thumbnails."""
    small = io.BytesIO()
    picture.resize((60, 40)).save(small, "JPEG")
    maker = SECRET.encode() + b"\0"
    head = b"MM\0*" + struct.pack(">I", 8)
    first = struct.pack(">H", 2) + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    first += struct.pack(">HHII", 0x010F, 2, len(maker), 100) + struct.pack(">I", 40)
    second = struct.pack(">H", 3) + struct.pack(">HHIHH", 0x0103, 3, 1, 6, 0)
    second += struct.pack(">HHII", 0x0201, 4, 1, 200) + struct.pack(">HHII", 0x0202, 4, 1, len(small.getvalue()))
    body = (head + first).ljust(40, b"\0") + second + struct.pack(">I", 0)
    return b"Exif\0\0" + body.ljust(100, b"\0") + maker.ljust(100, b"\0") + small.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def save_with_secrets(path: Path, picture: Image.Image) -> None:
    """Write a picture whose metadata, further frames and end hold what is to be covered, in every place there is."""
    secret, frame = SECRET.encode(), picture.transpose(Image.Transpose.ROTATE_180)
    exif = thumbnail_exif(picture)
    suffix = path.suffix
    if suffix == ".jpg":
        picture.save(path, exif=exif, comment=secret, xmp=b"<x>" + secret, icc_profile=secret, quality=95)
    elif suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("Comment", SECRET)
        info.add_text("zipped", SECRET, zip=True)
        info.add_itxt("XML:com.adobe.xmp", SECRET)
        info.add(b"prVt", secret, after_idat=True)
        picture.save(path, pnginfo=info, exif=exif, icc_profile=secret, save_all=True, append_images=[frame])
    elif suffix == ".gif":
        picture.quantize(64).save(path, save_all=True, append_images=[frame.quantize(64)], comment=secret, loop=0)
    elif suffix == ".webp":
        picture.save(
            path, save_all=True, append_images=[frame], lossless=True, exif=exif, xmp=secret, icc_profile=secret
        )
    elif suffix == ".tif":
        tags = {270: SECRET, 700: secret, 315: SECRET}
        picture.save(path, save_all=True, append_images=[frame], tiffinfo=tags, icc_profile=secret)
    else:
        picture.save(path, "MPO", save_all=True, append_images=[frame], exif=exif, comment=secret)
    path.write_bytes(path.read_bytes() + secret)  # behind the end


def markers(data: bytes) -> Iterator[int]:
    """The markers of a JPEG up to its pixels."""
    at = 2
    while True:
        assert data[at] == 0xFF
        yield data[at + 1]
        if data[at + 1] == 0xDA:
            return
        at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]


def chunks(data: bytes) -> Iterator[bytes]:
    at = 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8]
        at += 12 + length
    assert at == len(data)


APP0, DQT, SOF0, DHT, SOS = 0xE0, 0xDB, 0xC0, 0xC4, 0xDA


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.tif", "mpo.jpeg"])
def test_a_file_holds_one_frame_of_pixels_and_nothing_else(run: Run, name: str) -> None:
    # Smooth, so that a thumbnail would look like it; a gradient tells turned frames and leaks by eye, too.
    x, y = np.meshgrid(np.linspace(80, 255, WIDTH), np.linspace(80, 255, HEIGHT))
    picture = Image.fromarray(np.stack([x, y, 255 - x / 2], axis=2).astype(np.uint8))
    save_with_secrets(run.root / name, picture)
    run.write([of(run, name)])
    _, out = redact(run)
    (made,) = written(out)
    data = (out / made).read_bytes()
    assert SECRET.encode() not in data
    assert SECRET.encode() in (run.root / name).read_bytes()
    if data.startswith(b"\xff\xd8"):
        assert set(markers(data)) == {APP0, DQT, SOF0, DHT, SOS}
        assert data.count(b"\xff\xd8\xff") == 1  # no second picture
        assert data.index(b"\xff\xd9") == len(data) - 2
        assert len(data[2:20]) == 18
        assert data[18:20] == b"\0\0"  # JFIF without a thumbnail
    else:
        assert set(chunks(data)) == {b"IHDR", b"IDAT", b"IEND"}
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 1
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert (np.asarray(image)[16:64, 8:64] == 0).all()


def test_no_alpha_or_palette_holds_the_covered_colours(run: Run) -> None:
    pixels = np.full((HEIGHT, WIDTH, 4), (10, 200, 30, 0), np.uint8)
    Image.fromarray(pixels).save(run.root / "clear.png")
    flat = noise().quantize(16)
    flat.save(run.root / "palette.png", transparency=3)
    deep = np.full((HEIGHT, WIDTH), 40_000, np.uint16)
    Image.fromarray(deep).save(run.root / "deep.png")
    names = ["clear.png", "palette.png", "deep.png"]
    run.write([of(run, name, objects=[FACE | {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]) for name in names])
    _, out = redact(run)
    for name in names:
        data = (out / name).read_bytes()
        assert set(chunks(data)) == {b"IHDR", b"IDAT", b"IEND"}
        assert (pixels_of(out / name) == 0).all()


def test_what_was_transparent_stays_hidden_as_the_model_saw_it(run: Run) -> None:
    pixels = np.full((HEIGHT, WIDTH, 4), (10, 200, 30, 0), np.uint8)
    Image.fromarray(pixels).save(run.root / "clear.png")
    run.write([of(run, "clear.png", objects=[])])
    document = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(document | {"identity": {"background": "white"}}))
    _, out = redact(run)
    assert left_out(out) == {}
    assert (pixels_of(out / "clear.png") == 255).all()


def test_transparent_pictures_lie_on_nothing_else(run: Run) -> None:
    Image.new("RGBA", (WIDTH, HEIGHT), (10, 200, 30, 0)).save(run.root / "clear.png")
    run.write([of(run, "clear.png", objects=[])])
    document = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(document | {"identity": {"background": "white"}}))
    for colour in ("none", "black"):
        with pytest.raises(UsageError, match="the model saw transparent pictures with --background white"):
            redact(run, background=colour)
    assert written(redact(run, background="#ffffff")[1]) == {"clear.png"}
    (run.folder / "run.json").write_text(json.dumps(document | {"backgrounds": ["white", "black"]}))
    with pytest.raises(UsageError, match="white, black"):
        redact(run, background="white", overwrite=True)


@pytest.mark.parametrize("format", ["redacted", "overlay"])
def test_what_is_too_long_for_a_jpeg_stops_no_other(pictures: Run, format: str) -> None:
    Image.new("RGB", (65_501, 1)).save(pictures.root / "long.jpg", "PNG")
    pictures.write([of(pictures, "long.jpg"), *everywhere(pictures)])
    out = pictures.folder / "out"
    export_records(Collection.of([pictures.records]), format, out, ExportOptions())
    assert written(out) == {f"p{number}.png" for number in range(NUM_PICTURES)}
    if format == "redacted":
        assert left_out(out) == {"long.jpg": "a JPEG has at most 65,500 pixels a side"}


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_covered_upright(run: Run, orientation: int, suffix: str) -> None:
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright, name = noise(), f"turned.{suffix}"
    lying = upright.transpose(turns[orientation]) if orientation > 1 else upright
    lying.save(run.root / name, exif=thumbnail_exif(upright, orientation), quality=95)
    run.write([of(run, name, width=WIDTH, height=HEIGHT)])
    _, out = redact(run)
    made = pixels_of(out / name)
    assert made.shape == (HEIGHT, WIDTH, 3)
    assert (made[16:64, 7:65] == 0).all()
    if suffix == "png":
        before = np.asarray(upright)
        assert (made[64:] == before[64:]).all()
        assert (made[:, 65:] == before[:, 65:]).all()
