"""Records and ground truth made by hand, in pixels of pictures of 200 x 100."""

from __future__ import annotations

import itertools
import json

from md3cli.evaluate import evaluate, load_truth

WIDTH, HEIGHT = 200, 100
_ids = itertools.count()


def record(image, task, prompt=None, **result):
    """A record; an `error` type stands for a failure."""
    head = {"schema": "md3/1", "id": f"r{next(_ids)}", "image": image, "task": task, "prompt": prompt}
    if error := result.pop("error", None):
        return head | {"error": {"type": error, "message": "no", "retry": False}}
    for key in {"objects", "points", "segments"} & result.keys():
        result[key] = [{"label": prompt} | thing for thing in result[key]]
    return head | {"width": WIDTH, "height": HEIGHT} | result | {"finish_reason": "stop", "error": None}


def box(x, y, width, height, score=0.9):
    """A found box, given in pixels."""
    edges = {"x_min": x / WIDTH, "y_min": y / HEIGHT, "x_max": (x + width) / WIDTH, "y_max": (y + height) / HEIGHT}
    return {**edges, "score": score}


def about(finder, index, prompt, **result):
    """A record about an object that `finder` found."""
    thing = finder["objects"][index]
    corners = {key: thing[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    region = {**corners, "label": finder["prompt"], "of": finder["id"], "index": index}
    return record(finder["image"], result.pop("task", "query"), prompt, **result) | {"region": region}


def instances(objects, images=None, categories=("car", "dog")):
    """COCO instances from (image, category, bbox, extras) rows."""
    names = list(dict.fromkeys(images or [image for image, *_ in objects]))
    annotations = []
    for image, category, bbox, *extra in objects:
        ids = {
            "id": len(annotations) + 1,
            "image_id": names.index(image) + 7,
            "category_id": categories.index(category) + 3,
        }
        annotations.append({**ids, "bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": 0} | (extra[0] if extra else {}))
    return {
        "images": [{"id": n + 7, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(names)],
        "categories": [{"id": n + 3, "name": name} for n, name in enumerate(categories)],
        "annotations": annotations,
    }


def segment(svg_path, x, y, width, height, score=0.9):
    edges = box(x, y, width, height)
    bbox = {key: edges[key] for key in ("x_min", "y_min", "x_max", "y_max")}
    return {"svg_path": svg_path, "bbox": bbox, "score": score}


def points(*at):
    return [{"x": x / WIDTH, "y": y / HEIGHT, "score": 0.9} for x, y in at]


def write_records(path, records):
    """Write a records file and return its path."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def sections_of(folder, records, *documents, metrics=()):
    """Score records against ground truth documents, written into `folder`; sections by name."""
    path = write_records(folder / "records.jsonl", records)
    truths = []
    for number, document in enumerate(documents):
        truth = folder / f"truth{number}.json"
        truth.write_text(document if isinstance(document, str) else json.dumps(document))
        truths.append(load_truth(truth))
    return {section.name: section for section in evaluate(path, truths, metrics).sections}
