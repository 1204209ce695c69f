"""A COCO file (someone's, or `md3 export`'s) to a Label Studio project: tasks with boxes to review.

    python examples/coco_to_labelstudio.py instances.json project/
    LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=$PWD/photos label-studio

Import project/tasks.json there and paste project/interface.xml as the labelling interface. It goes by
way of records, so the same few lines lead from COCO to every other format.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from md3cli.exporters import ExportOptions, export_records
from md3cli.refine.collection import Collection
from md3cli.refine.labels import Label, Labels
from md3cli.refine.refinement import Refinement


def records_of(coco: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A detect record for each image and category that has boxes, and one for each image without."""
    names = {category["id"]: category["name"] for category in coco["categories"]}
    boxes = defaultdict(list)
    for annotation in coco["annotations"]:
        boxes[annotation["image_id"], names[annotation["category_id"]]].append(annotation)
    for image in coco["images"]:
        width, height = image["width"], image["height"]
        head = {"schema": "md3/1", "image": image["file_name"], "width": width, "height": height, "task": "detect"}
        labels = [name for name in names.values() if (image["id"], name) in boxes]
        for label in labels or [None]:
            objects = []
            for annotation in boxes[image["id"], label]:
                x, y, w, h = annotation["bbox"]
                corners = {"x_min": x / width, "y_min": y / height, "x_max": (x + w) / width, "y_max": (y + h) / height}
                objects.append({"label": label, **corners, "score": annotation.get("score")})
            yield {**head, "prompt": label, "objects": objects, "error": None}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coco", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    coco = json.loads(args.coco.read_bytes())
    records = args.coco.with_suffix(".records.jsonl")
    records.write_text("".join(f"{json.dumps(record)}\n" for record in records_of(coco)), encoding="utf-8")
    labels = Labels(tuple(Label(name=one["name"], prompts=(one["name"],)) for one in coco["categories"]))
    collection = Collection.of([records], chosen=Refinement(labels, has_file=True))
    report = export_records(collection, "labelstudio", args.out, ExportOptions(overwrite=True))
    print(f"{report.num_images} tasks in {report.out}")


if __name__ == "__main__":
    main()
