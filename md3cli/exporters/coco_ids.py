"""Image and category ids of a COCO file: counted from 1, or taken from another COCO file.

Results can only be scored with the ids of the ground truth, so `--coco-ids-from gt.json` reuses
them: images by `file_name`, categories by `name`, matched as `md3 eval` matches them. What the other
file lacks gets fresh ids after its highest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from md3cli.errors import ExportError, InputError
from md3cli.name_matching import NAMES_SHOWN, Matches, ambiguity_notes, match_images, match_labels
from md3cli.records import printable


class CocoIds:
    """Hands out ids; `categories` is the list for the document, in order.

    `images` are the names that will be asked for; they are read only where another file is known.

    Raises:
        InputError: the other file cannot be read, or has not one of `images`.
        ExportError: the other file is no COCO file, or has two images of one name.
    """

    def __init__(self, labels: Iterable[str], known: Path | None, images: Iterable[str] = ()) -> None:
        labels = list(labels)
        document = _load(known) if known else {"images": [], "categories": []}
        by_name = {image["file_name"]: image["id"] for image in document["images"]}
        self._images = match_images(images, by_name) if known else Matches()
        self._known_images = {name: by_name[truth] for name, truth in self._images.found.items()}
        self._last_image = _highest(document["images"])
        self.categories = [{"supercategory": "", **category} for category in document["categories"]]
        ids = {category["name"]: category["id"] for category in reversed(document["categories"])}
        self._labels = match_labels(labels, ids) if known else Matches()
        self._categories = {label: ids[name] for label, name in self._labels.found.items()}
        last = _highest(document["categories"])
        self._new_labels = [label for label in labels if label not in self._categories]
        for number, label in enumerate(self._new_labels, start=last + 1):
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
        """Return the id of a label's category."""
        return self._categories[label]

    def category_name(self, label: str) -> str:
        """Return what the document calls a label's category."""
        return self._labels.found.get(label, label)

    def notes(self, known: Path) -> Iterator[str]:
        """Yield what could not be matched to the other file, in sentences."""
        yield from ambiguity_notes("image", self._images)
        yield from ambiguity_notes("label", self._labels)
        if self._new_labels:
            shown = ", ".join(
                f"{printable(label)} ({self._categories[label]})" for label in self._new_labels[:NAMES_SHOWN]
            )
            more = ", …" if len(self._new_labels) > NAMES_SHOWN else ""
            yield f"{printable(str(known))} has no category for these labels, they got new ids: {shown}{more}"


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
    except (KeyError, TypeError) as error:
        raise ExportError(
            f"{printable(str(path))} (--coco-ids-from) is no COCO file: it needs images with id and file_name, "
            "and categories with id and name"
        ) from error
    counts = Counter(image["file_name"] for image in images)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise ExportError(
            f"{printable(str(path))} (--coco-ids-from) has {len(doubled)} names for several images each (first: "
            f"{printable(doubled[0])}), so their ids cannot be told; make the file names unique"
        )
    return {"images": images, "categories": categories}
