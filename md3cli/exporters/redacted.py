"""Redacted: copies of the pictures in which what was found is covered, for those who must not show it.

**A picture is written only if every chosen label was asked of it and answered.** All others stand in `left_out.csv`
with the reason: one that was not asked, that failed, whose answer was cut off at `max_objects` (more may be there),
whose bytes are not those that the model saw, or that cannot be read. Chosen are the labels of `--label`, else all that
the records or their runs ask for; coverage.py says what an answer to them is. Other words of the selection choose
pictures: one is looked at if any of its records is taken, and then all its records count.

What was found is covered whatever its score, doubles too; only a least score that is typed in this very command leaves
objects bare. Covered are boxes of detect and of segments, with `--pad` around them (10 %), and a mask where it leaves
its box. `box` makes all pixels of a region black. In a JPEG black goes on to the next multiple of 16 pixels: colour is
coded in blocks of that size, so the original's hold traces of what was beside them (a red coat next to a box of 8 left
124 of 255 levels), and black would run over a border within one.
`blur` and `pixelate` are for looks: what is hidden so can be recognised, or computed back.

Files are those of redrawn.py: one frame, encoded anew from the pixels that the model saw, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image, ImageFilter

from md3cli.errors import ImageError, UsageError
from md3cli.exporters import ExportOptions, ExportReport, Redaction
from md3cli.exporters.at_once import holding, in_order
from md3cli.exporters.coverage import Coverage, Gap
from md3cli.exporters.files import staged_folder
from md3cli.exporters.grouping import ImageGroup, ImageIndex
from md3cli.exporters.pictures import FoundPicture, OtherPictureError, Pictures, backgrounds_of
from md3cli.exporters.redrawn import JPEG_SIDE_PX, encoded, redrawn_names, stays_jpeg
from md3cli.exporters.table import Table
from md3cli.finished.run_json import has_run_info
from md3cli.images.crops import parse_background
from md3cli.images.rects import PixelRect, padded_rect
from md3cli.records import printable
from md3cli.refine.collection import Collection
from md3cli.refine.labels import shown_text
from md3cli.refine.refinement import Refinement
from md3cli.refine.selection import Selection

LEFT_OUT, COLUMNS = "left_out.csv", ("image", "reason")
DEFAULT_PAD = 0.1
BLACK = (0, 0, 0)
JPEG_QUALITY, JPEG_BLOCK_PX = 95, 16
NOT_FOUND, CHANGED = "the picture is not there", "the picture has changed"
UNREADABLE = "the picture cannot be read or written"


class Todo(NamedTuple):
    """A picture with the regions to cover, or why it is left out."""

    group: ImageGroup
    picture: FoundPicture | Gap
    regions: Sequence[PixelRect] = ()


@dataclass
class LeftOut:
    """The pictures that are not written, listed as they come."""

    table: Table
    counts: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, image: str, gap: Gap) -> None:
        """List a picture."""
        self.table.write([image, gap.reason])
        self.counts[gap.kind] += 1
        self.first = self.first or f"{printable(image)}: {printable(gap.reason)}"

    def notes(self, num_written: int) -> Iterator[str]:
        """Yield how many there are of each kind."""
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in self.counts.most_common())
        if self.counts:
            what = f"{self.counts.total():,} pictures were not written" if num_written else "no picture was written"
            yield f"{what}: {kinds}; {LEFT_OUT} says which and why (first: {self.first})"


def export(records: Collection, out: Path, options: ExportOptions) -> ExportReport:
    """Write each picture whose chosen labels are all answered, with what was found covered, and list the others.

    Raises:
        UsageError: what is chosen cannot be covered.
    """
    options = _as_the_model_saw(records, options)
    pictures = Pictures(records, options)
    pictures.require_root("redacted")
    # As the model said it: what names, thresholds and doubles would hide is covered as well.
    whole = replace(records, refinement=Refinement(), selection=Selection())
    num_images = 0
    with (
        closing(Coverage(records, options)) as coverage,
        closing(ImageIndex(whole, coverage.note)) as index,
        staged_folder(out, overwrite=options.overwrite, format="redacted") as folder,
        folder.create([PurePosixPath(LEFT_OUT)])[0] as list_file,
    ):
        coverage.choose()
        left_out = LeftOut(Table(list_file, COLUMNS))
        for group, made in in_order(
            lambda todo: (todo.group, _made(todo, pictures, options.redaction)),
            _todo(index.images(), coverage, pictures, out, DEFAULT_PAD if options.pad is None else options.pad),
            is_quick=lambda todo: isinstance(todo.picture, Gap),
        ):
            if isinstance(made, Gap):
                left_out.add(group.distinct_name, made)
                continue
            file, _ = folder.create(redrawn_names(group.file_name))  # in order: the first of a name has the plain one
            with file:
                file.write(made)
            num_images += 1
        for image, gap in coverage.unanswered():
            left_out.add(image, gap)
        left_out.table.end()
        pictures.notes()  # raises where not one is there
        survey = index.survey
    notes = (*survey.notes(), *left_out.notes(num_images), *_notes(records, coverage, options))
    return ExportReport("redacted", out, survey.num_records, num_images, survey.num_failures, notes)


def _as_the_model_saw(records: Collection, options: ExportOptions) -> ExportOptions:
    """Return options under which transparent pictures lie on what the model saw them on: another shows what it did not.

    Raises:
        UsageError: something else is typed, or the runs saw them on different ones.
    """
    known = backgrounds_of(records)
    shown = ", ".join(map(printable, known))
    if len(known) > 1:
        raise UsageError(f"the runs laid transparent pictures on {shown}, and saw other pixels; export them apart")
    if options.background is not None and known and parse_background(options.background) != parse_background(known[0]):
        raise UsageError(
            f"the model saw transparent pictures with --background {shown}, and on another one something may show that "
            "it did not see; leave --background out"
        )
    return replace(options, background=next(iter(known), options.background))


def _todo(
    groups: Iterable[ImageGroup], coverage: Coverage, pictures: Pictures, out: Path, pad: float
) -> Iterator[Todo]:
    for group in groups:
        if not coverage.is_picked(group):
            continue
        pictures.refuse_inside(out, group)
        gap = coverage.gap(group)
        if gap is None and not group.picture_record.get("sha256"):
            gap = Gap(CHANGED, "the records have no sha256, so the file may be another one than the model saw")
        picture = pictures.find(group.picture_record, has_twins=True) if gap is None else None
        if picture is None:
            yield Todo(group, gap or Gap(NOT_FOUND, NOT_FOUND))
        else:
            yield Todo(group, picture, list(_regions(group, coverage, pad)))


def _regions(group: ImageGroup, coverage: Coverage, pad: float) -> Iterator[PixelRect]:
    size = (group.width, group.height)
    for box, mask in coverage.boxes(group):
        if (rect := padded_rect(box, *size, pad)) is not None:
            yield rect
        if mask is not None and (rect := padded_rect(mask, *size)) is not None:
            yield rect


def _made(todo: Todo, pictures: Pictures, redaction: Redaction) -> bytes | Gap:
    """Return the file of a picture with its regions covered, or why there is none."""
    group, picture, regions = todo
    if isinstance(picture, Gap):
        return picture
    with holding(group.width, group.height):
        try:
            image = pictures.read(picture)
        except OtherPictureError as error:
            return Gap(CHANGED, str(error))
        except ImageError as error:
            return Gap(UNREADABLE, f"{error.type}: {error}")
        if any((record["width"], record["height"]) != image.size for record in group.records):
            width, height = image.size
            return Gap(CHANGED, f"the picture has {width:,} x {height:,} pixels, and the records say otherwise")
        is_jpeg = stays_jpeg(group.file_name)
        if is_jpeg and max(image.size) > JPEG_SIDE_PX:
            return Gap(UNREADABLE, f"a JPEG has at most {JPEG_SIDE_PX:,} pixels a side")
        for rect in regions:
            cover(image, rect, redaction, step=JPEG_BLOCK_PX if is_jpeg else 1)
        return encoded(image, JPEG_QUALITY if is_jpeg else None)


BLURS = 6  # radii of a blur in the longer side of its region: the eyes of a face that fills it melt into one
CELLS = 8  # of pixels, in the longer side
LEAST_PX = 4  # a radius, a cell


def cover(image: Image.Image, rect: PixelRect, redaction: Redaction, step: int = 1) -> None:
    """Cover a region of an RGB picture in place.

    Args:
        step: a black box goes on to the next multiple of so many pixels.
    """
    if redaction == "box":
        image.paste(BLACK, rect.grown_to(step, *image.size))
        return
    region, side = image.crop(rect), max(rect.width, rect.height)
    if redaction == "blur":
        hidden = region.filter(ImageFilter.GaussianBlur(max(side / BLURS, LEAST_PX)))
    else:
        cell = max(side / CELLS, LEAST_PX)
        cells = (max(1, round(rect.width / cell)), max(1, round(rect.height / cell)))
        hidden = region.resize(cells, Image.Resampling.BOX).resize(region.size, Image.Resampling.NEAREST)
    image.paste(hidden, rect)


def _notes(records: Collection, coverage: Coverage, options: ExportOptions) -> Iterator[str]:
    """Yield what a user should know of what stays visible, and of what is covered all the same."""
    if options.redaction != "box":
        yield (
            f"{options.redaction} is for looks: people and texts can be recognised or computed back from it; "
            "--redact box makes them black"
        )
    if names := coverage.questions.segmented_only(coverage.chosen):
        shown = ", ".join(map(shown_text, names[:3]))
        yield f"md3 segment finds one object a picture at most ({shown}); others stay visible, ask md3 detect for them"
    if bare := [printable(str(one.path)) for one in records.sources if not has_run_info(one.path)]:
        yield f"no run.json of md3 is beside {bare[0]}: whether thresholds took something out of it is not known"
    if records.refinement.has_thresholds and not options.hides_unsure:
        yield "what was found is covered whatever its score; type --min-score here to leave the unsure bare"
    if records.refinement.nms is not None:
        yield "--nms hides nothing here: doubles are covered, too"
