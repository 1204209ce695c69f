"""A small run with pictures on disk, for the tests of the report: every task, a failure, hostile names."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

from PIL import Image, ImageDraw

from md3cli.finished.run_json import seal_of

HOSTILE = [
    '<img src=x onerror="window.pwned=1">',
    "</script><script>window.pwned=1</script>",
    "javascript:window.pwned=1",
    '"><svg onload=window.pwned=1>',
    "{{ 7 * 7 }} {% include 'x' %} ${window.pwned=1}",
    "<!--<script>",
    "]]>\u2028\u202eevil\u0007",
]
_ids = itertools.count()


def record(image: str | None, task: str, prompt: str | None = None, size=(400, 200), **result) -> dict:
    """A record; `error` is a failure's type."""
    head = {"schema": "md3/1", "id": f"{next(_ids):032x}"[::-1], "image": image, "width": size[0], "height": size[1]}
    head |= {"task": task, "prompt": prompt}
    if error := result.pop("error", None):
        failure = {"type": error, "message": "it did not work", "retry": False}
        return head | {"model": "tiny@0", "meta": {}, "error": failure}
    tokens = {"prompt": 10, "output": 4}
    return head | result | {"finish_reason": "stop", "tokens": tokens, "model": "tiny@0", "meta": {}, "error": None}


def found(label: str, box: tuple[float, float, float, float], score: float = 0.9) -> dict:
    """An object; `box` is x_min, y_min, x_max, y_max, 0-1."""
    return {"label": label, **dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True)), "score": score}


def picture(path: Path, box: tuple[float, float, float, float], size=(400, 200)) -> None:
    """A grey picture with a red rectangle at `box`, 0-1."""
    image = Image.new("RGB", size, (128, 128, 128))
    edges = [edge * size[n % 2] for n, edge in enumerate(box)]
    ImageDraw.Draw(image).rectangle((edges[0], edges[1], edges[2] - 1, edges[3] - 1), fill=(255, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


BOXES = [(0.1, 0.2, 0.5, 0.7), (0.6, 0.1, 0.9, 0.9), (0.25, 0.25, 0.75, 0.5)]
SIZES = [(400, 200), (120, 360), (640, 480)]


def write_run(folder: Path) -> Path:
    """The run's folder: pictures, records.jsonl, run.json."""
    records = []
    for n, (box, size) in enumerate(zip(BOXES, SIZES, strict=True)):
        name = f"sub/picture {n}.png"
        picture(folder / "pictures" / name, box, size)
        objects = [found("red", box, score=(0.9, 0.3, 0.6)[n])]
        records.append(record(name, "detect", "red", size, objects=objects + ([found("red", (0, 0, 1, 1), 0.1)] * n)))
        records.append(record(name, "detect", "blue", size, objects=[]))
    grounding = [
        {"start_idx": 4, "end_idx": 12, "points": [[0.3, 0.45], [0.4, 0.5]]},
        {"start_idx": 16, "end_idx": 16, "points": [[0.5, 0.5]]},
    ]
    reasoning = {"text": "The red box is here.", "grounding": grounding, "finish_reason": "stop"}
    records.insert(2, record("sub/picture 0.png", "query", "How many?", reasoning=reasoning, answer="One"))
    records.insert(3, record("sub/picture 0.png", "caption", length="short", caption="A red box\non grey."))
    bbox = {"x_min": 0.25, "y_min": 0.5, "x_max": 0.75, "y_max": 1.0}
    segments = [{"label": "red", "svg_path": "M 0 0 L 1 0 L 1 1 Z", "bbox": bbox, "score": 0.5}]
    records.insert(4, record("sub/picture 0.png", "segment", "red", segments=segments))
    points = [{"label": "red", "x": 0.3, "y": 0.45, "score": 0.8}]
    records.insert(5, record("sub/picture 0.png", "point", "red", points=points))
    records.append(record("gone.png", "detect", "red", error="not_found"))
    records.append(record(None, "query", "What is two and two?", answer="Four"))
    for text in HOSTILE:
        records.append(record(text, "caption", length=text, caption=text))
        records.append(record(text, "query", text, answer=text, reasoning={"text": text, "grounding": []}))
        records.append(record(text, "detect", text, objects=[found(text, (0.1, 0.1, 0.5, 0.5))]))
        damaged = [{"label": text, "svg_path": text, "bbox": bbox, "score": 0.5, "parse_error": text}]
        records.append(record(text, "segment", text, segments=damaged))
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    timeline = [[second, second * second] for second in range(0, 20, 2)]
    root = str(folder / "pictures")
    run = {
        "schema": "md3-run/1",
        "root": root,
        "seal": seal_of(root),
        "timeline": timeline,
        "starts": [{"elapsed_s": 18.0}],
    }
    (folder / "run.json").write_text(json.dumps(run | {"stages": {"decode": 3.0, "generate": 14.0}}))
    return folder


LABELS = ("car", "person", "dog", "bicycle", "traffic light", "bus", "bench", "bird", "cat", "truck", "boat", "sign")


def write_large_run(folder: Path, num_pictures: int) -> Path:
    """A run of many tiny pictures (links to fifty files), each with a detection and a caption; one in 100 fails."""
    draws = random.Random(17)
    root = folder / "pictures"
    for n in range(50):
        picture(folder / "seeds" / f"{n}.png", (0.01 * n, 0.1, 0.01 * n + 0.4, 0.6), (64, 48))
    with (folder / "records.jsonl").open("w") as lines:
        for n in range(num_pictures):
            name = f"day {n // 1000:03d}/IMG_{n:06d}.png"
            if n % 1000 == 0:
                (root / name).parent.mkdir(parents=True)
            os.link(folder / "seeds" / f"{n % 50}.png", root / name)
            lines.writelines(json.dumps(one) + "\n" for one in _large_records(name, n, draws))
    run = {"schema": "md3-run/1", "root": str(root), "seal": seal_of(str(root))}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def _large_records(name: str, n: int, draws: random.Random) -> list[dict]:
    label = LABELS[n % len(LABELS)]
    if n % 100 == 99:
        return [record(name, "detect", label, (64, 48), error="decode")]
    objects = [
        found(label, (x, y, x + 0.3, y + 0.3), round(draws.uniform(0.001, 0.999), 3))
        for x, y in ((draws.uniform(0, 0.7), draws.uniform(0, 0.7)) for _ in range(n % 7))
    ]
    caption = " ".join(draws.choice(LABELS) for _ in range(25)) + f", picture number {n}."
    return [
        record(name, "detect", label, (64, 48), objects=objects),
        record(name, "caption", size=(64, 48), length="normal", caption=caption),
    ]
