"""COCO files as INPUT: the pictures that one lists and, where they are asked about, its boxes.

The file may be anybody's and of gigabytes, nearly all of it outlines that nobody asks about here. So it is read entry
by entry, strictly, and only names and boxes are kept: about 400 bytes a picture and 100 a box, of at most MOST_PICTURES
and MOST_BOXES. What is wrong with one picture is its record; what makes the file as a whole doubtful is an error.
Opens no picture.
"""

from __future__ import annotations

import math
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, NamedTuple

from md3cli.errors import InputError
from md3cli.records import Box, compact_json, printable
from md3cli.remote.address import is_address, shown
from md3cli.source.inputs import existing_path, row_folder
from md3cli.source.json_entries import list_entries, shown_value
from md3cli.source.manifest import DEPTH_LIMIT, depth_of, open_input

MOST_PICTURES, MOST_BOXES = 5_000_000, 30_000_000
MOST_LOOKED_FOR = 100  # pictures, to see which folder they are in
LONGEST_ID_CHARS = 200
LONGEST_LABEL_CHARS = 200
LARGEST_SIDE_PX = 2**31
NO_BOX = Box(0.0, 0.0, 0.0, 0.0)  # of no size, so that asking about it is a `bad_request`
_LISTS = ("images", "annotations", "categories")
_NOTHING: Mapping[str, Any] = {}


class CocoBox(NamedTuple):
    """An annotated box, 0-1 of the picture by the file's own size; `label` None is a category that is not named."""

    of: str
    label: str | None
    box: Box


class CocoPicture(NamedTuple):
    """A picture that the file lists, the `number`-th from 1; `problem` says why it cannot be read.

    `size` is its width and height in pixels, None where the file does not say. `data` is what md3 carries as `meta`.
    """

    number: int
    name: str
    url: str = ""
    size: tuple[int, int] | None = None
    data: Mapping[str, Any] = _NOTHING
    problem: str = ""

    @property
    def where(self) -> str:
        return f"picture {self.number}"


@dataclass(slots=True)
class _Boxes:
    """Annotations in file order as columns, because there may be millions; then by picture."""

    images: list[Any] = field(default_factory=list)  # the ids of their pictures
    categories: list[Any] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    numbers: array[float] = field(default_factory=lambda: array("d"))  # x, y, width, height in pixels
    order: Sequence[int] = ()
    places: Sequence[int] = ()  # of their pictures, sorted as `order` is

    def sort(self, place_of: Mapping[Any, int]) -> int:
        """Put them by their pictures' places; return how many have none, which are left out."""
        places = array("q", (place_of.get(image, -1) for image in self.images))
        self.images = []
        self.order = array("q", sorted(range(len(places)), key=places.__getitem__))
        self.places = array("q", (places[number] for number in self.order))
        return bisect_left(self.places, 0)

    def of_picture(self, place: int) -> Sequence[int]:
        return self.order[bisect_left(self.places, place) : bisect_left(self.places, place + 1)]


class CocoFile:
    """What a COCO file lists.

    Attributes:
        pictures: in the file's order, each name once.
        num_doubled: further entries of pictures with a name that is listed already; their boxes are that picture's.
        num_lost: annotations that point to no picture of the file, or cannot be read.
        has_boxes: whether annotations were read and any has a box.
    """

    def __init__(self, name: str) -> None:
        self.pictures: list[CocoPicture] = []
        self.num_doubled = self.num_lost = 0
        self.has_boxes = False
        self._name = name
        self._boxes = _Boxes()
        self._place_of: dict[Any, int] = {}  # by the picture's id
        self._labels: dict[Any, str] = {}
        self._same: dict[Any, Any] = {}  # ids, so that equal ones are one object

    def boxes_of(self, place: int) -> Iterator[CocoBox]:
        """Yield the boxes of `pictures[place]` in the file's order; NO_BOX where there is no sound one."""
        size, boxes = self.pictures[place].size, self._boxes
        for number in boxes.of_picture(place):
            box = _box_of(boxes.numbers[4 * number : 4 * number + 4], size) if size is not None else NO_BOX
            yield CocoBox(str(boxes.ids[number]), self._labels.get(boxes.categories[number]), box)

    def take(self, file: IO[bytes], *, with_boxes: bool) -> None:
        """Take in a file; raises ValueError, which says what is wrong, and RecursionError."""
        found, names, counts = set[str](), dict[str, int](), dict.fromkeys(_LISTS, 0)
        for key, entry in list_entries(file, _LISTS, found):
            counts[key] += 1
            if key == "images":
                self._take_picture(entry, counts[key], names)
            elif with_boxes and key == "categories":
                self._take_category(entry, counts[key])
            elif with_boxes:
                self._take_annotation(entry, counts[key])
        if "images" not in found:
            raise ValueError("it has no list 'images'")
        self.num_lost += self._boxes.sort(self._place_of)

    def _take_picture(self, entry: Any, number: int, names: dict[str, int]) -> None:
        if number > MOST_PICTURES:
            raise ValueError(f"it lists more than {MOST_PICTURES:,} pictures, which is more than md3 reads")
        picture, known = _picture_of(entry, number), _id_of(entry)
        place = len(self.pictures)
        if not picture.problem and (place := names.setdefault(picture.name, place)) < len(self.pictures):
            if picture.size != self.pictures[place].size:
                raise ValueError(f"{picture.where} is {shown_value(picture.name)} again, in another size")
            self.num_doubled += 1
        else:
            self.pictures.append(picture)
        if known is not None:
            if known in self._place_of:
                raise ValueError(f"{picture.where} has the id {shown_value(known)} of another one")
            self._place_of[self._one(known)] = place

    def _take_category(self, entry: Any, number: int) -> None:
        known, label = _id_of(entry), entry.get("name") if isinstance(entry, dict) else None
        if known is None or not isinstance(label, str) or not label.strip():
            raise ValueError(f"category {number} has no id, or no name")
        if known in self._labels:
            raise ValueError(f"category {number} has the id {shown_value(known)} of another one")
        if len(label) > LONGEST_LABEL_CHARS or not _is_text(label):
            raise ValueError(f"the name of category {number} is no text of {LONGEST_LABEL_CHARS} characters at most")
        self._labels[known] = label

    def _take_annotation(self, entry: Any, number: int) -> None:
        if number > MOST_BOXES:
            raise ValueError(f"it has more than {MOST_BOXES:,} annotations, which is more than md3 reads")
        image = _id_of(entry, "image_id")
        if image is None:
            self.num_lost += 1
            return
        if (known := _id_of(entry)) is None:
            raise ValueError(f"annotation {number} has no id")
        box = _pixels_of(entry.get("bbox"))
        self.has_boxes = self.has_boxes or box is not None
        self._boxes.ids.append(known)
        self._boxes.images.append(self._one(image))
        self._boxes.categories.append(self._one(_id_of(entry, "category_id")))
        self._boxes.numbers.extend(box or NO_BOX)

    def _one(self, known: Any) -> Any:
        return self._same.setdefault(known, known)


def read_coco(path: str, *, with_boxes: bool) -> CocoFile:
    """Read the COCO file at `path`, which may be an address; without boxes all but its pictures is read over.

    Raises:
        InputError: it cannot be opened or is no COCO file; or its boxes are asked about, and it has none.
    """
    name = printable(shown(path))
    found = CocoFile(name)
    try:
        with open_input(path) as file:
            found.take(file, with_boxes=with_boxes)
    except RecursionError:
        raise InputError(f"{name} is no COCO file: its JSON is nested too deep") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no COCO file: it is not UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or printable(str(error))}") from error
    except ValueError as error:
        raise InputError(
            f"{name} is no COCO file: {printable(str(error))[:200]}; INPUT in JSON is one (images, annotations, "
            "categories), and lines of JSON are called .jsonl"
        ) from error
    if with_boxes and not found.has_boxes:
        raise InputError(f"{name} has no boxes, and --regions asks about each; leave --regions out, or name another")
    return found


def folder_of_pictures(typed: str, found: CocoFile, *, from_addresses: bool) -> str | None:
    """Return the folder that a file's pictures are in where it is not its own: the one place where data sets put them.

    `typed` is the file. Pictures that are fetched from their addresses are in no folder.

    Raises:
        InputError: none of the pictures that are looked for is in any such place, or they are in several.
    """
    own = row_folder(typed, None)
    names = [p.name for p in found.pictures if not (p.problem or is_address(p.name) or (from_addresses and p.url))]
    looked_for = names[:: -(-len(names) // MOST_LOOKED_FOR)] if names else []
    if is_address(typed) or not names or _holds(own, looked_for):
        return None
    places = list(dict.fromkeys(filter(partial(_holds, names=looked_for), likely_folders(typed))))
    if len(places) == 1:
        return places[0]
    advice = "--root DIR names the folder that they are in"
    if places:
        both = " and ".join(map(printable, places[:2]))
        raise InputError(f"pictures of the names in {printable(typed)} are in {both}; {advice}")
    what = f"no picture of the {len(looked_for):,} of {printable(typed)} that were looked for is beside it"
    raise InputError(f"{what}, where {shown_value(os.path.join(own, looked_for[0]))} would be; {advice}")


def likely_folders(typed: str) -> Iterator[str]:
    """Yield where the pictures of a COCO file may be: for `annotations/instances_val.json` it may be `val`, beside."""
    own = os.path.dirname(typed)
    is_in_annotations = os.path.basename(os.path.abspath(own)).lower() == "annotations"
    split = os.path.splitext(os.path.basename(typed))[0].rpartition("_")[2]
    for folder in (own, os.path.join(own, os.pardir)) if is_in_annotations else (own,):
        for name in ("", split, "images", os.path.join("images", split), "data"):
            yield os.path.normpath(os.path.join(folder, name))


def _holds(folder: str, names: Sequence[str]) -> bool:
    return any(os.path.lexists(existing_path(folder, name)) for name in names)


# -- entries ---------------------------------------------------------------------------------------


def _picture_of(entry: Any, number: int) -> CocoPicture:
    if not isinstance(entry, dict):
        return CocoPicture(number, "", problem=f"it is {shown_value(entry)}, not an object")
    name, url = entry.get("file_name"), entry.get("coco_url")
    if not isinstance(name, str) or not name:
        return CocoPicture(number, "", problem="no file_name" if name is None else f"file_name is {shown_value(name)}")
    if not _is_text(name):
        return CocoPicture(number, "", problem="file_name holds half a character")
    if _id_of(entry) is None:
        return CocoPicture(number, name, problem="no id that is a number or a text")
    url = url if isinstance(url, str) and is_address(url) else ""
    return CocoPicture(number, name, url, _size_of(entry), _data_of(entry))


def _is_text(value: str) -> bool:
    """Return whether a text has no half characters, which JSON can say."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _data_of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what md3's own files have as `meta`; nothing where it could not be written again."""
    data = entry.get("meta")
    if not isinstance(data, dict) or depth_of(data) > DEPTH_LIMIT:
        return _NOTHING
    try:
        compact_json(data)
    except ValueError:
        return _NOTHING
    return data


def _size_of(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = (_side_of(entry.get(side)) for side in ("width", "height"))
    return None if width is None or height is None else (width, height)


def _side_of(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < LARGEST_SIDE_PX:
        return None
    return int(value) if float(value).is_integer() else None


def _id_of(entry: Any, key: str = "id") -> int | str | None:
    """Return an id, a text or a whole number; None where there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value if len(value) <= LONGEST_ID_CHARS and _is_text(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _pixels_of(value: Any) -> Sequence[float] | None:
    """Return x, y, width and height; None where they are no four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    try:
        numbers = [float(n) for n in value if isinstance(n, int | float) and not isinstance(n, bool)]
    except OverflowError:
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def _box_of(numbers: Sequence[float], size: tuple[int, int]) -> Box:
    x, y, width, height = numbers
    box = Box(x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1])
    return box if all(map(math.isfinite, box)) else NO_BOX
