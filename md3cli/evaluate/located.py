"""Records that locate objects, brought beside the ground truth: (image, category) pairs in pixels.

The ground truth's image size counts where it says one, because its boxes are in those pixels;
record coordinates are 0-1 and fit any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from md3cli.evaluate.asked import coverage_notes
from md3cli.evaluate.truth import Instances, TruthObject
from md3cli.name_matching import match_images, match_labels
from md3cli.records import RecordDict

NO_SIZE = (1, 1)


@dataclass(frozen=True, slots=True)
class Pair:
    """One question "where is CATEGORY in IMAGE?": the record that answers it, and what is there."""

    record: RecordDict
    image: str
    category: str
    size_wh: tuple[int, int]
    objects: tuple[TruthObject, ...]


@dataclass(frozen=True, slots=True)
class Located:
    """All pairs that are scored, and what is not, in sentences."""

    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    @property
    def images(self) -> list[str]:
        """Ground truth names in order."""
        return list(dict.fromkeys(pair.image for pair in self.pairs))

    @property
    def categories(self) -> list[str]:
        """Category names in the order they were asked for."""
        return list(dict.fromkeys(pair.category for pair in self.pairs))


def locate(records: Sequence[RecordDict], truth: Instances) -> Located:
    """Match records of one task to the ground truth.

    Raises:
        InputError: not one image of the records is in the ground truth.
    """
    pictured = [record for record in records if record["image"] is not None]
    names = [record["image"] for record in pictured]
    labels = [str(record.get("prompt") or "") for record in pictured]
    matches, named = match_images(names, truth.images), match_labels(labels, truth.categories)
    images, categories = matches.found, named.found
    sizes = dict(_sizes(pictured, images, truth))
    pairs: dict[tuple[str, str], Pair] = {}
    for record, name, label in zip(pictured, names, labels, strict=True):
        if name in images and label in categories:
            image, category = images[name], categories[label]
            found = truth.objects.get((image, category), ())
            pairs.setdefault((image, category), Pair(record, image, category, sizes.get(image, NO_SIZE), found))
    notes = (
        *coverage_notes("image", names, truth.images, matches),
        *coverage_notes("label", labels, truth.categories, named),
        *_size_notes(pictured, images, truth),
    )
    return Located(tuple(pairs.values()), notes)


def _sizes(
    records: Sequence[RecordDict], images: Mapping[str, str], truth: Instances
) -> Iterator[tuple[str, tuple[int, int]]]:
    for record in records:
        if record["image"] in images:
            known = truth.images[images[record["image"]]]
            width, height = known.width or record.get("width"), known.height or record.get("height")
            if width and height:
                yield known.name, (width, height)


def _size_notes(records: Sequence[RecordDict], images: Mapping[str, str], truth: Instances) -> Iterator[str]:
    """Ground truth drawn on another raster than the upright picture is worth a word: boxes will not fit."""
    different = set()
    for record in records:
        known = truth.images.get(images.get(record["image"], ""))
        if known is None or not (known.width and known.height and record.get("width") and record.get("height")):
            continue
        if abs(known.width / known.height - record["width"] / record["height"]) > 0.01 * known.width / known.height:
            different.add(known.name)
    if different:
        yield f"{len(different):,} images have another shape in the ground truth than the files (turned by EXIF?)"
