"""Ultralytics trains one real epoch on `yolo`: no picture is corrupt to it, it finds every label, originals stay.

The pictures have the names and the bytes that data sets break on. What Ultralytics has made of them is read from its
own scan (`labels.cache`), and compared with the records box by box.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import programs
import pytest
from finished_runs import Record, Run, failure, record, run
from PIL import Image
from typer.testing import CliRunner

from md3cli.cli import app

__all__ = ["run"]
pytestmark = programs.MARKS
VERSIONS = ("ultralytics", "ultralytics_8_3")
OPTIONS = (
    (),
    ("--link",),
    ("--split", "train=0.6,val=0.4"),
    ("--flat", "--link", "--split", "train=0.5,val=0.3,test=0.2", "--split-by", "folder"),
)
LABELS = ("red circle", "Straße ☃")
SIDES = (120, 80)
NAMES = (
    "images/a.jpg",
    "images/a.png",
    "a.jpg",
    "train/images/b.jpg",
    "images/images/c.png",
    "labels/d.jpg",
    "labels/images/e.png",
    "val/images/labels/f.webp",
    "images/turned 6.jpg",
    "turned 8.jpg",
    "übung/日本語 ☃.png",
    "images/empty.jpg",
    "empty.png",
    "line\nbreak.png",
    ".hidden/.h.png",
    "no suffix",
    "UPPER.JPG",
    "moving.gif",
    "a gif in truth.jpg",
    "an avif in truth.jpg",
    "more bytes.jpg",  # behind the JPEG's end: 8.3 writes such a file anew, in place
    "many.jpeg",
    "x.y/z.tiff",
    *(f"rows/{n}.bmp" for n in range(8)),
)
KINDS = {".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tiff": "TIFF"}


def size_of(name: str) -> tuple[int, int]:
    """The upright size."""
    return SIDES[::-1] if "turned" in name else SIDES


def draw(path: Path, number: int) -> None:
    """Write a picture as its name says: turned ones lie on their side, with the EXIF tag that turns them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", SIDES, (7 * number % 256, 120, 200))
    kind = KINDS.get(path.suffix, "JPEG")
    if "in truth" in path.name:
        kind = path.name.split()[1].upper()
    exif = Image.Exif()
    if "turned" in path.name:
        exif[0x0112] = int(path.stem[-1])
    picture.save(path, kind, exif=exif)
    if path.name == "more bytes.jpg":
        path.write_bytes(path.read_bytes() + b"end")


def boxes_of(name: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """What is on a picture, for each label: two corners, in 0-1; some leave the picture."""
    draws, num = random.Random(name), 0 if "empty" in name else 40 if name == "many.jpeg" else 2
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for label in LABELS:
        corners = [(draws.uniform(-0.1, 0.6), draws.uniform(-0.1, 0.6)) for _ in range(num)]
        found[label] = [(x, y, x + draws.uniform(0.2, 0.5), y + draws.uniform(0.2, 0.5)) for x, y in corners]
    return found


def records_of(root: Path, task: str) -> list[Record]:
    """Records of all pictures; of one both questions failed, of another one did."""
    lines = [failure("broken.jpg", task, label) for label in LABELS]
    for name in NAMES:
        width, height = size_of(name)
        facts = {"width": width, "height": height, "sha256": digest_of(root / name)}
        for label, boxes in boxes_of(name).items():
            edges = [dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True)) for box in boxes]
            if task == "detect":
                lines.append(
                    record(name, task, label, **facts, objects=[{"label": label, **e, "score": 0.9} for e in edges])
                )
            else:
                path = "M 0 0 L 1 0 L 1 1 L 0 1 Z"
                inside = [{key: min(max(value, 0.0), 1.0) for key, value in edge.items()} for edge in edges]
                segments = [{"label": label, "svg_path": path, "bbox": e, "score": 0.9} for e in inside]
                lines.append(record(name, task, label, **facts, segments=segments))
    half = next(line for line in lines if line["image"] == "a.jpg" and line["prompt"] == LABELS[1])
    lines[lines.index(half)] = failure("a.jpg", task, LABELS[1])
    return lines


def expected(name: str) -> list[tuple[int, float, float, float, float]]:
    """The boxes of a picture in pixels, with their class's number, inside the picture."""
    found = []
    for number, boxes in enumerate(boxes_of(name).values()):
        for box in [] if (name, number) == ("a.jpg", 1) else boxes:
            inside = (min(max(edge, 0.0), 1.0) for edge in box)
            found.append((number, *(edge * side for edge, side in zip(inside, size_of(name) * 2, strict=True))))
    return found


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(params=["detect", "segment"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def drawn(run: Run, task: str) -> Run:
    """The run with its pictures and records."""
    for number, name in enumerate((*NAMES, "broken.jpg")):
        draw(run.root / name, number)
    run.write(records_of(run.root, task))
    return run


TRAIN = """
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from yolo_command import lend_nms
lend_nms()
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset, img2label_paths, load_dataset_cache_file

data, task, runs = sys.argv[2:]
files = [path for path in Path(data).parent.rglob("*") if path.is_file()]
before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
model = YOLO({"detect": "yolo11n.yaml", "segment": "yolo11n-seg.yaml"}[task])
words = dict(data=data, imgsz=64, batch=8, workers=0, device="cpu", plots=False, project=runs, exist_ok=True)
model.train(**words, epochs=1, amp=False)
trained = model.trainer.metrics["metrics/mAP50(B)"]
if "test" in check_det_dataset(data):
    model.val(**words, split="test")
sets = {}
for name in ("train", "val", "test"):
    folder = check_det_dataset(data).get(name)
    if folder is None:
        continue
    folder = Path(folder)
    cache_path = next(path for path in Path(data).parent.rglob("*.cache")
                      if Path(img2label_paths([str(folder / "x.jpg")])[0]).parent == path.with_suffix(""))
    cache = load_dataset_cache_file(cache_path)
    found, missing, empty, corrupt, total = cache["results"]
    pictures = []
    for one in cache["labels"]:
        path = Path(one["im_file"])
        boxes = [[int(c), *map(float, box)] for c, box in zip(one["cls"].flatten().tolist(), one["bboxes"].tolist())]
        pictures.append({"file": str(path.relative_to(Path(data).parent.resolve())), "sha256": before[path],
                         "shape": list(one["shape"]), "boxes": boxes, "num_polygons": len(one["segments"]),
                         "has_label": Path(img2label_paths([str(path)])[0]).is_file()})
    sets[name] = {"found": found, "missing": missing, "empty": empty, "corrupt": corrupt, "total": total,
                  "messages": cache["msgs"], "pictures": pictures}
names = model.names if isinstance(model.names, dict) else dict(enumerate(model.names))
print(json.dumps({"sets": sets, "names": list(names.values()), "map": trained}))
"""


def export(drawn: Run, *options: str) -> Path:
    """`md3 export -f yolo` into the run's folder."""
    out = drawn.folder / "set"
    result = CliRunner().invoke(app, ["export", str(drawn.folder), "-f", "yolo", "-o", str(out), *options])
    assert result.exit_code == 0, result.output
    return out


def train(version: str, out: Path, task: str) -> dict[str, Any]:
    """Train one epoch on `out`; what Ultralytics has found there, for each of its sets."""
    program = programs.program(version, "--no-deps")
    support = Path(programs.__file__).parent
    runs = out.with_name("epochs")
    offline = {"YOLO_OFFLINE": "true", "OMP_NUM_THREADS": "1"}
    told: dict[str, Any] = program.run(TRAIN, support, out / "data.yaml", task, runs, environment=offline)
    return told


def check_pictures(drawn: Run, task: str, pictures: list[dict[str, Any]]) -> None:
    """Each record's picture is there once, upright, with its boxes within a pixel, whatever its file is called."""
    originals = {digest_of(drawn.root / name): name for name in NAMES}
    assert len(originals) == len(NAMES)
    made_anew = {Path(name).stem: name for name in NAMES if "gif" in name or "avif" in name}
    shown = {}
    for picture in pictures:
        name = originals.get(picture["sha256"]) or made_anew[Path(picture["file"]).stem.replace("_", " ")]
        assert picture["has_label"], name
        assert picture["shape"] == list(size_of(name)[::-1]), name
        width, height = size_of(name)
        assert not picture["boxes"] or picture["num_polygons"] == (len(picture["boxes"]) if task == "segment" else 0)
        shown[name] = [
            (number, (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            for number, x, y, w, h in picture["boxes"]
        ]
    assert set(shown) == set(NAMES)
    assert len(shown) == len(pictures)
    for name, boxes in shown.items():
        assert len(boxes) == len(expected(name)), name
        for true in expected(name):  # edges at the picture's border are equal: no order to go by
            assert any(box == pytest.approx(true, abs=0.01) for box in boxes), (name, true)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_one_epoch_and_the_export_again(drawn: Run, task: str, version: str, options: tuple[str, ...]) -> None:
    """And one more over the data set that was made again, beside the caches that Ultralytics has left there."""
    before = {name: digest_of(drawn.root / name) for name in NAMES}
    out = export(drawn, *options)
    for _ in range(2):
        told = train(version, out, task)
        assert told["names"] == list(LABELS)
        sets = told["sets"] if "--split" in options else {"train": told["sets"]["train"]}
        for one in told["sets"].values():
            assert (one["corrupt"], one["missing"]) == (0, 0), one["messages"]
            assert one["total"] > 0
        assert sum(one["total"] for one in sets.values()) == len(NAMES)
        assert sum(one["empty"] for one in sets.values()) == 2
        check_pictures(drawn, task, [picture for one in sets.values() for picture in one["pictures"]])
        assert {name: digest_of(drawn.root / name) for name in NAMES} == before
        assert len(list(out.rglob("*.cache"))) == len(sets)
        export(drawn, *options, "--overwrite")
    assert 0 <= told["map"] <= 1
