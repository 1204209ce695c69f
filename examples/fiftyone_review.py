"""Look through a run in the FiftyOne app, the least sure pictures first, and keep the records of those you tag.

    pip install fiftyone        # not a dependency of md3
    python examples/fiftyone_review.py run/ -o wrong.jsonl [--gt instances.json]

In the app, tag pictures or single boxes "wrong", then close its page: their pictures' records are in wrong.jsonl, for
`md3 report`, `md3 export --format labelstudio` or other prompts. With ground truth, filter boxes by `eval` to see what
was missed. The data set stays in FiftyOne (`fiftyone datasets delete NAME`); another start goes on with it.
A mask is shown as its box.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SURE = 1.0  # of pictures on which nothing was found


def select(*arguments: object) -> None:
    """`md3 select`; it reads any run, keeps where the pictures are, and names and thresholds where asked to."""
    subprocess.run(["md3", "select", *map(str, arguments)], check=True)


def records_of(path: Path) -> Iterator[Record]:
    """The records of a file that went well."""
    with path.open(encoding="utf-8") as lines:
        yield from (record for record in map(json.loads, lines) if record["image"] and not record["error"])


def picture_of(name: str, roots: list[dict[str, str]]) -> Path | None:
    """Where a picture is; None where it is not below a folder of the run."""
    for known in roots:
        if name.startswith(known["prefix"]):
            root = Path(known["root"]).resolve()
            path = (root / name.removeprefix(known["prefix"])).resolve()
            if path.is_relative_to(root) and path.is_file():
                return path
    return None


def relative(box: dict[str, float]) -> list[float]:
    """A box as FiftyOne has it: left, top, width, height, 0-1."""
    return [box["x_min"], box["y_min"], box["x_max"] - box["x_min"], box["y_max"] - box["y_min"]]


def sample_of(fo: Any, path: Path, records: list[Record]) -> Any:
    """One picture with all that was found, asked and said."""
    boxes, points, scores = [], [], [SURE]
    for record in records:
        for found in (record.get("objects") or []) + (record.get("segments") or []):
            facts = {"label": found["label"], "confidence": found["score"], "record": record["id"]}
            boxes.append(fo.Detection(bounding_box=relative(found.get("bbox", found)), **facts))
            scores.append(found["score"] or SURE)
        for found in record.get("points") or []:
            points.append(fo.Keypoint(label=found["label"], points=[(found["x"], found["y"])], record=record["id"]))
            scores.append(found["score"] or SURE)
    texts = [record["caption"] for record in records if record.get("caption")]
    answers = [f"{record['prompt']} {record['answer']}" for record in records if record.get("answer")]
    return fo.Sample(
        filepath=str(path),
        image=records[0]["image"],
        least_sure=min(scores),
        predictions=fo.Detections(detections=boxes),
        points=fo.Keypoints(keypoints=points),
        captions=texts,
        answers=answers,
    )


def add_truth(fo: Any, dataset: Any, truth: Path) -> None:
    """Add the boxes of a COCO file to the pictures of the same names, and compare."""
    coco = json.loads(truth.read_bytes())
    labels = {category["id"]: category["name"] for category in coco["categories"]}
    images = {image["id"]: image for image in coco["images"]}
    boxes = defaultdict(list)
    for one in coco["annotations"]:
        image, (x, y, width, height) = images[one["image_id"]], one["bbox"]
        box = [x / image["width"], y / image["height"], width / image["width"], height / image["height"]]
        boxes[image["file_name"]].append(fo.Detection(label=labels[one["category_id"]], bounding_box=box))
    for sample in dataset.iter_samples(autosave=True):
        sample["ground_truth"] = fo.Detections(detections=boxes[sample.image])
    dataset.evaluate_detections("predictions", gt_field="ground_truth", eval_key="eval")


def made(fo: Any, name: str, run: Path, folder: Path, truth: Path | None) -> Any:
    """The data set of a run, made of its records as they are shown."""
    shown = folder / "shown.jsonl"
    select(run, "--refined", "-o", shown)
    roots = json.loads(shown.with_name("shown.jsonl.run.json").read_bytes()).get("roots", [])
    pictures = defaultdict(list)
    for record in records_of(shown):
        pictures[record["image"]].append(record)
    found = {image: path for image in pictures if (path := picture_of(image, roots)) is not None}
    if not found:
        sys.exit("none of the run's pictures is where its run.json says")
    print(f"{len(found)} pictures, {len(pictures) - len(found)} are not there")
    dataset = fo.Dataset(name, persistent=True)
    dataset.add_samples([sample_of(fo, path, pictures[image]) for image, path in found.items()])
    if truth is not None:
        add_truth(fo, dataset, truth)
    dataset.info["run"] = str(run.resolve())
    dataset.save()
    return dataset


def known(fo: Any, name: str, run: Path) -> Any:
    """The data set that an earlier start made of this run."""
    dataset = fo.load_dataset(name)
    if dataset.info.get("run") != str(run.resolve()):
        sys.exit(f"FiftyOne has a data set {name} of something else; give another --name")
    print(f"going on with the data set {name}")
    return dataset


def keep(dataset: Any, tag: str, run: Path, folder: Path, out: Path) -> None:
    """Write the records of all pictures that have a tag, or a box or point with one."""
    tagged = {*dataset.match_tags(tag).values("image"), *dataset.match_labels(tags=tag).values("image")}
    whole, some = folder / "whole.jsonl", folder / "some.jsonl"
    select(run, "-o", whole)
    with whole.open("rb") as lines, some.open("wb") as kept:
        kept.writelines(line for line in lines if json.loads(line)["image"] in tagged)
    shutil.copy(f"{whole}.run.json", f"{some}.run.json")  # where the pictures are
    select(some, "-o", out, "--overwrite")
    print(f"{len(tagged)} pictures are tagged {tag}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--gt", type=Path, help="COCO file with the right boxes")
    parser.add_argument("--name", help="of the data set; the run's, without it")
    parser.add_argument("--tag", default="wrong")
    parser.add_argument("--no-app", action="store_true")
    parser.add_argument("-o", "--output", type=Path, help="records of the tagged pictures")
    args = parser.parse_args()
    try:
        fo: Any = import_module("fiftyone")
    except ImportError:
        sys.exit("this example needs FiftyOne: pip install fiftyone")
    name = args.name or args.run.resolve().name
    with tempfile.TemporaryDirectory() as folder:
        if fo.dataset_exists(name):
            dataset = known(fo, name, args.run)
        else:
            dataset = made(fo, name, args.run, Path(folder), args.gt)
        view = dataset.sort_by("least_sure")
        for sample in view.limit(5):
            print(f"{sample.least_sure:.3f}  {sample.image}")
        if not args.no_app:
            fo.launch_app(view=view).wait()
        if args.output is not None:
            keep(dataset, args.tag, args.run, Path(folder), args.output)


if __name__ == "__main__":
    main()
