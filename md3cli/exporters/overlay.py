"""Overlay: every picture with its boxes, masks and points drawn on it, in a folder of pictures only.

Names and files are those of redrawn.py. Images whose picture is not there any more are left out and counted.

Drawings are legible on any background: every coloured line and dot lies on a wider dark and a light one, every name on
a plate of its colour, with what was said of its thing below it; widths and letters grow with the picture, and shrink
where it is crowded. Where there is no room for all names, each label is named once before any is named twice. The font
is DejaVu Sans Bold (licence beside it), cut down to Latin, Greek, Cyrillic, punctuation, arrows and shapes. Any other
character is shown by its code point, `[6C7D]`, so that two labels never look alike and nothing vanishes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from md3cli.errors import ImageError
from md3cli.exporters import ExportOptions, ExportReport
from md3cli.exporters.at_once import holding, in_order
from md3cli.exporters.files import staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.masks import fill
from md3cli.exporters.objects import NO_TEXTS, PixelBox, PixelPoint, PixelSegment, Ring, Texts
from md3cli.exporters.palette import Colour, Style, palette
from md3cli.exporters.pictures import FoundPicture, Pictures
from md3cli.exporters.plates import Plates, Rect
from md3cli.exporters.redrawn import JPEG_SIDE_PX, encoded, found_pictures, redrawn_names, stays_jpeg
from md3cli.records import printable
from md3cli.refine.collection import Collection
from md3cli.refine.parts import is_of_part, part_text
from md3cli.refine.refinement import FOUND_BY_TASK

FONT_FILE = Path(__file__).with_name("DejaVuSans-Bold.ttf")
_PROBE_SIZE_PX = 12
_UNASSIGNED = "\uffff"  # no font has it: drawn as the glyph for "missing"


@lru_cache(maxsize=64)
def font_of(size_px: int) -> ImageFont.FreeTypeFont:
    """Load the bundled font."""
    return ImageFont.truetype(FONT_FILE, size_px, layout_engine=ImageFont.Layout.BASIC)


def shown(text: str) -> str:
    """Return `text` on one line, every character visible in the bundled font."""
    one_line = printable(" ".join(text.split()))
    return "".join(char if _is_in_font(char) else f"[{ord(char):04X}]" for char in one_line)


@lru_cache(maxsize=4096)
def _is_in_font(char: str) -> bool:
    font = font_of(_PROBE_SIZE_PX)
    return char == " " or bytes(font.getmask(char)) != bytes(font.getmask(_UNASSIGNED))


def fitted(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """Return `text`, its end replaced by an ellipsis where it is wider than `width_px`."""
    if font.getlength(text) <= width_px:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle] + "…") <= width_px:
            low = middle
        else:
            high = middle - 1
    return text[:low] + "…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: float, most_lines: int) -> list[str]:
    """Return `text` in at most `most_lines` lines no wider than `width_px`; an ellipsis says what is cut off."""
    lines, words = list[str](), text.split()
    while words and len(lines) < most_lines:
        num_words = 1
        while num_words < len(words) and font.getlength(" ".join(words[: num_words + 1])) <= width_px:
            num_words += 1
        is_last = len(lines) + 1 == most_lines
        lines.append(fitted(" ".join(words if is_last else words[:num_words]), font, width_px))
        words = words[num_words:]
    return lines


BLACK, WHITE = Colour(0, 0, 0), Colour(255, 255, 255)
MASK_OPACITY = 0.45
# How much of all things a plate may hide, in things: a label's only name is worth more, for it explains the colour.
HIDDEN_BY_PLATE, HIDDEN_BY_ONLY_NAME = 0.4, 1.5
MOST_NAMED = 1000  # things of a picture; more find no room, and the search takes the square of their number
CROWD = 12  # things from which on lines and letters become smaller
LEAST_FONT_PX = 9
# Of what was said of a thing: characters looked at, lines, and its plate's width and height as shares of the picture's.
SAID_CHARS, SAID_LINES, SAID_WIDTH, SAID_HEIGHT = 200, 4, 0.4, 0.25


class Named(NamedTuple):
    """Something that was found, with what its plate may say; `rect` is what the plate should not hide."""

    label: str
    score: float | None
    rect: Rect
    said: Texts = NO_TEXTS

    @property
    def texts(self) -> list[str]:
        """Return what may be written, the most telling first."""
        name = shown(self.label)
        return [name] if self.score is None else [f"{name} {self.score:.2f}", name]

    @property
    def sentences(self) -> list[tuple[str, str]]:
        """Return questions and answers, as far as there may be room; a single answer needs no question."""
        told = islice(self.said.items(), SAID_LINES)
        pairs = [(shown(question[:SAID_CHARS]), shown(text[:SAID_CHARS])) for question, text in told]
        return pairs if len(pairs) > 1 else [("", text) for _, text in pairs]


@dataclass
class Canvas:
    """A picture being drawn upon, and the sizes that suit it and the number of things on it."""

    image: Image.Image
    num_things: int
    draw: ImageDraw.ImageDraw = field(init=False)
    line_px: int = field(init=False)
    font: ImageFont.FreeTypeFont = field(init=False)

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image)
        crowd = min(max(self.num_things / CROWD, 1.0), 4.0) ** 0.5
        scale = (self.image.width * self.image.height) ** 0.5 / crowd
        self.line_px = max(1, round(scale / 200))
        self.font = font_of(max(LEAST_FONT_PX, round(scale / 30)))

    def outline(self, ring: Ring, style: Style) -> None:
        """Draw a closed line: colour within a casing of the opposite brightness, within a thin dark one."""
        closed = [*ring, ring[0], ring[1]]  # past the start, so that the corner there is joined too
        for width, ink in ((3 * self.line_px, BLACK), (2 * self.line_px + 1, _casing(style.colour))):
            self.draw.line(closed, fill=ink, width=width, joint="curve")
        if style.dash is None:
            self.draw.line(closed, fill=style.colour, width=self.line_px, joint="curve")
            return
        for stroke in strokes([*ring, ring[0]], self._lengths(style.dash)):
            self.draw.line(stroke, fill=style.colour, width=self.line_px)

    def _lengths(self, dash: tuple[float, float]) -> tuple[int, int]:
        """Return stroke and gap in pixels; less than two pixels of either would melt into a paler line."""
        stroke, gap = (max(2, round(part * self.line_px)) for part in dash)
        return stroke, gap

    def box(self, box: PixelBox, style: Style) -> None:
        """Draw a rectangle whose lines stay inside the picture."""
        casing = _casing(style.colour)
        left, top = round(box.x), round(box.y)
        right = max(left, min(round(box.x + box.width), self.image.width) - 1)
        bottom = max(top, min(round(box.y + box.height), self.image.height) - 1)
        edge, inner = max(1, self.line_px // 2), self.line_px
        outside = (left - edge, top - edge, right + edge, bottom + edge)
        self.draw.rectangle(outside, outline=casing, width=edge)
        if right - left > 2 * (inner + edge) and bottom - top > 2 * (inner + edge):
            inside = (left + inner, top + inner, right - inner, bottom - inner)
            self.draw.rectangle(inside, outline=casing, width=edge)
        self.draw.rectangle((left, top, right, bottom), outline=style.colour, width=inner)
        if style.dash is not None:
            self._cut_gaps((left, top, right, bottom), self._lengths(style.dash), casing)

    def _cut_gaps(self, sides: tuple[int, int, int, int], lengths: tuple[int, int], casing: Colour) -> None:
        """Cut gaps into the four sides of a box; its corners stay, so that its extent can be read."""
        (left, top, right, bottom), inner, (stroke, gap) = sides, self.line_px, lengths
        for x in range(left + stroke, right - stroke - gap + 2, stroke + gap):
            for y in (top, bottom - inner + 1):
                self.draw.rectangle((x, y, x + gap - 1, y + inner - 1), fill=casing)
        for y in range(top + stroke, bottom - stroke - gap + 2, stroke + gap):
            for x in (left, right - inner + 1):
                self.draw.rectangle((x, y, x + inner - 1, y + gap - 1), fill=casing)

    def mask(self, segment: PixelSegment, style: Style) -> None:
        """Draw a tinted area with its outline."""
        patch = fill(segment.rings, *self.image.size).patch()
        alpha = Image.fromarray((patch.pixels * round(255 * MASK_OPACITY)).astype("uint8"))
        self.image.paste(style.colour, (patch.left, patch.top), alpha)
        for ring in segment.rings:
            self.outline(ring, style)

    def dot(self, point: PixelPoint, colour: Colour) -> None:
        """Draw a dot in a white and a black ring."""
        ring = max(1, round(self.line_px / 2))
        x, y, radius = round(point.x), round(point.y), 2 * self.line_px
        for reach, ink in ((radius + 2 * ring, BLACK), (radius + ring, WHITE), (radius, colour)):
            self.draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=ink)

    def reach(self, point: PixelPoint) -> Rect:
        """Return the square that a dot fills."""
        x, y, reach = round(point.x), round(point.y), 4 * self.line_px
        return Rect(x - reach, y - reach, x + reach, y + reach)

    def name(self, thing: Named, colour: Colour, plates: Plates, *, is_only: bool) -> bool:
        """Write the name of a thing with its score, or the name alone; return whether there was room for either.

        Args:
            is_only: no thing of its label has a name yet, so that it may hide more.
        """
        *longer, bare = thing.texts
        tries = [([text], HIDDEN_BY_PLATE) for text in longer]
        tries.append(([bare], HIDDEN_BY_ONLY_NAME if is_only else HIDDEN_BY_PLATE))
        if thing.said:  # is what the picture is drawn for
            tries = [([thing.texts[0], *lines], HIDDEN_BY_ONLY_NAME) for lines in self._said(thing)] + tries
        return any(self._write(lines, thing.rect, colour, plates, most) for lines, most in tries)

    def _said(self, thing: Named) -> Iterator[list[str]]:
        """Yield what was said of a thing in lines: all of it, then as much as fits on one."""
        sentences, width_px = thing.sentences, SAID_WIDTH * self.image.width
        most = min(max(int(SAID_HEIGHT * self.image.height / self.font.size) - 1, 1), SAID_LINES)
        each = max(most // len(sentences), 1)
        lines = list[str]()
        for question, text in sentences[:most]:
            whole = f"{question} {text}"
            asked = wrapped(whole, self.font, width_px, each)
            lines += asked if " ".join(asked) == whole else wrapped(text, self.font, width_px, each)
        yield lines
        if len(lines) > 1:
            yield [fitted(", ".join(text for _, text in sentences), self.font, width_px)]

    def _write(self, lines: list[str], near: Rect, colour: Colour, plates: Plates, most_hidden: float) -> bool:
        pad = max(1, self.font.size // 6)
        lines = [fitted(line, self.font, self.image.width - 2 * pad - 2) for line in lines]
        # "Ay" reaches as high and as low as most letters do: plates of one picture are of one height.
        _, top, _, bottom = self.font.getbbox("Ay" + "".join(lines))
        step = math.ceil(bottom - top) + 1
        inside = max(math.ceil(self.font.getlength(line)) for line in lines), step * len(lines) - 1
        width, height = (side + 2 * pad + 2 for side in inside)  # the outline is one pixel more
        plate = plates.take(near, width, height, most_hidden)
        if plate is None:
            return False
        ink = _casing(colour)
        self.draw.rectangle((plate.left, plate.top, plate.right - 1, plate.bottom - 1), fill=colour, outline=ink)
        for number, line in enumerate(lines):
            at = (plate.left + pad + 1, plate.top + pad + 1 - top + step * number)
            self.draw.text(at, line, fill=ink, font=self.font)
        return True


def _casing(colour: Colour) -> Colour:
    return WHITE if colour.is_dark else BLACK


def strokes(line: Ring, lengths: tuple[int, int]) -> Iterator[Ring]:
    """Yield the strokes of a dashed line as lines of their own, which bend where it does.

    Args:
        lengths: of a stroke and of a gap, in pixels, both above 0.
    """
    is_stroke, left, stroke = True, float(lengths[0]), [line[0]]
    turns = cycle(((False, lengths[1]), (True, lengths[0])))
    for (x0, y0), (x1, y1) in pairwise(line):
        length = math.hypot(x1 - x0, y1 - y0)
        done = 0.0
        while length - done > left:
            done += left
            share = done / length
            corner = (x0 + (x1 - x0) * share, y0 + (y1 - y0) * share)
            if is_stroke:
                yield [*stroke, corner]
            (is_stroke, left), stroke = next(turns), [corner]
        left -= length - done
        stroke.append((x1, y1))
    if is_stroke:
        yield stroke


def draw_records(image: Image.Image, group: ImageGroup, styles: Mapping[str, Style]) -> None:
    """Draw all that the records of one image found; shapes first, names on top of everything.

    Args:
        image: RGB, drawn upon.
        styles: of all labels of `group`.
    """
    segments, boxes, points = list(group.segments()), list(group.told_boxes()), list(group.points())
    canvas = Canvas(image, len(segments) + len(boxes) + len(points))
    for segment in segments:
        canvas.mask(segment, styles[segment.box.label])
    for box in sorted(boxes, key=lambda box: -box.width * box.height):
        canvas.box(box, styles[box.label])
    for point in points:
        canvas.dot(point, styles[point.label].colour)
    framed = [
        Named(box.label, box.score, Rect(*map(round, (box.x, box.y, box.x + box.width, box.y + box.height))), box.texts)
        for box in (*(segment.box for segment in segments), *boxes)
    ]
    dotted = [Named(point.label, point.score, canvas.reach(point)) for point in points]
    _name_all(canvas, [*framed, *dotted], styles)


def _name_all(canvas: Canvas, things: Sequence[Named], styles: Mapping[str, Style]) -> None:
    """Name the surest thing of each label, then the others from the surest down, as long as there is room."""
    plates = Plates(*canvas.image.size, [thing.rect for thing in things])
    named = set[str]()
    later = list[Named]()
    by_score = sorted(things, key=lambda thing: -(1.0 if thing.score is None else thing.score))
    for thing in by_score[:MOST_NAMED]:
        is_only = thing.label not in named
        if is_only and canvas.name(thing, styles[thing.label].colour, plates, is_only=True):
            named.add(thing.label)
        else:
            later.append(thing)
    for thing in later:
        canvas.name(thing, styles[thing.label].colour, plates, is_only=False)


JPEG_QUALITY = 90


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Draw one picture for each image that has an answered record."""
    pictures = Pictures(records, options)
    pictures.require_root("overlay")
    num_images = 0
    with (
        closing(ImageIndex(records)) as index,
        staged_folder(out, overwrite=options.overwrite, format="overlay") as folder,
    ):
        styles = palette(index.survey.in_order())
        found = found_pictures(index.images(), pictures, out)

        def work(pair: tuple[ImageGroup, FoundPicture]) -> tuple[ImageGroup, bytes | None]:
            return pair[0], _early_or_drawn(*pair, pictures, styles, options)

        for group, content in in_order(work, found):
            if content is None:
                pictures.note_unreadable(group.name)
            else:  # here, in order: of two pictures of one name the first has the plain one
                file, _ = folder.create(redrawn_names(group.file_name))
                with file:
                    file.write(content)
                num_images += 1
        survey = index.survey
        notes = (*survey.notes(), *survey.part_notes(have_place=True), *pictures.notes())
    return ExportReport("overlay", out, survey.num_records, num_images, survey.num_failures, notes)


def _early_or_drawn(
    group: ImageGroup, picture: FoundPicture, pictures: Pictures, styles: Mapping[str, Style], options: ExportOptions
) -> bytes | None:
    """Return the drawing that a run made early, else a new one; None where the picture cannot be read."""
    name = drawing_name(group, picture, styles, options.background) if options.early is not None else None
    if options.early is not None and name is not None:
        with suppress(OSError):
            content = (options.early / name).read_bytes()
            (options.early / name).unlink()  # else the disk would hold all drawings twice
            return content
    return drawn_file(group, picture, pictures, styles)


def drawing_name(
    group: ImageGroup, picture: FoundPicture, styles: Mapping[str, Style], background: str | None
) -> str | None:
    """Return a digest of all that a drawing depends on, to find one that was made early.

    That is what the records found, the styles of its labels, the picture's file (path, place in it, size, time of
    change, inode), its kind, and what transparent pictures are laid on. None: a label has no style yet, or the file
    is not there.
    """
    found = [[record.get(key) for key in ("task", "prompt", *FOUND_BY_TASK.values())] for record in group.records]
    found += [[record["region"], part_text(record)] for record in group.records if is_of_part(record)]
    things: list[PixelBox | PixelPoint] = [*group.told_boxes(), *(segment.box for segment in group.segments())]
    labels = sorted({thing.label for thing in (*things, *group.points())})
    try:
        stat = os.stat(picture.path)
    except OSError:
        return None
    if any(label not in styles for label in labels):
        return None
    file = [picture.path, picture.offset, picture.size, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
    shown = [group.width, group.height, background, picture.sha256, stays_jpeg(group.file_name)]
    facts = json.dumps([found, [[label, *styles[label]] for label in labels], file, shown], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=24).hexdigest()


def drawn_file(
    group: ImageGroup, picture: FoundPicture, pictures: Pictures, styles: Mapping[str, Style]
) -> bytes | None:
    """Return the file of a picture with all that was found on it; None where it cannot be read or written."""
    with holding(group.width, group.height):
        try:
            image = pictures.read(picture)
        except ImageError:
            return None
        if image.size != (group.width, group.height):  # another file stands there now: boxes scale with it
            group = group._replace(width=image.width, height=image.height)
        is_jpeg = stays_jpeg(group.file_name)
        if is_jpeg and max(image.size) > JPEG_SIDE_PX:
            return None
        draw_records(image, group, styles)
        return encoded(image, JPEG_QUALITY if is_jpeg else None)
