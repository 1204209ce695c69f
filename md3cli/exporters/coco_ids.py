"""Image and category ids of a COCO file: counted from 1, or taken from another COCO file.

Results can only be scored with the ids of the ground truth, so `--coco-ids-from gt.json` reuses
them: images by `file_name`, categories by `name`. What the other file lacks gets fresh ids after
its highest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from md3cli.errors import ExportError, InputError
from md3cli.records import printable


class CocoIds:
    """Hands out ids; `categories` is the list for the document, in order."""

    def __init__(self, labels: Iterable[str], known: Path | None) -> None:
        document = _load(known) if known else {"images": [], "categories": []}
        self._known_images = {image["file_name"]: image["id"] for image in document["images"]}
        self._last_image = _highest(document["images"])
        self.categories = [{"supercategory": "", **category} for category in document["categories"]]
        self._categories = {category["name"]: category["id"] for category in document["categories"]}
        last = _highest(document["categories"])
        for number, label in enumerate((label for label in labels if label not in self._categories), start=last + 1):
            self._categories[label] = number
            self.categories.append({"id": number, "name": label, "supercategory": ""})

    def known_image(self, name: str) -> Any:
        """The other file's id of an image, None where it has none."""
        return self._known_images.get(name)

    def image(self, name: str) -> Any:
        """The id of an image, each asked for once: known, else the next number."""
        known = self._known_images.get(name)
        if known is not None:
            return known
        self._last_image += 1
        return self._last_image

    def category(self, label: str) -> Any:
        return self._categories[label]


def _highest(entries: list[dict[str, Any]]) -> int:
    return max((entry["id"] for entry in entries if isinstance(entry["id"], int)), default=0)


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {printable(str(path))} (--coco-ids-from): {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{printable(str(path))} (--coco-ids-from) is not JSON: {error}") from error
    try:
        images = [{"file_name": str(image["file_name"]), "id": image["id"]} for image in document["images"]]
        categories = [{**entry, "name": str(entry["name"]), "id": entry["id"]} for entry in document["categories"]]
        return {"images": images, "categories": categories}
    except (KeyError, TypeError) as error:
        raise ExportError(
            f"{printable(str(path))} (--coco-ids-from) is no COCO file: it needs images with id and file_name, "
            "and categories with id and name"
        ) from error
