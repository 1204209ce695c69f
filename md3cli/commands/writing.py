"""The options of `md3 export`: what a format is to look like, and which formats an option is for.

`WriteOptions` holds the typed values and makes `ExportOptions` of them. An option that the chosen format does not know
is refused; a general one that changes nothing there, such as --root, is told. Apart from reading.py, whose options five
commands share. Source: product contract, section 9.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from md3cli.commands.parse import (
    EXTENSION,
    MAX_FILE_SIZE,
    MAX_PIXELS,
    checked,
    parse_bytes,
    parse_count,
    parse_extension,
    parse_pad,
    parse_split,
)
from md3cli.commands.shared import OVERWRITES_NOTHING
from md3cli.errors import UsageError
from md3cli.exporters import Existing, ExportOptions, Redaction
from md3cli.exporters.splits import Splits
from md3cli.records import printable

# Formats that look for pictures, always or with an option (`_WITH`); most decode some of them, too.
_DECODE = ("yolo", "hf", "voc", "coco", "labelme", "cvat", "overlay", "crops", "redacted", "parquet", "html")
_FIND = (*_DECODE, "labelstudio", "txt")
# Which formats an option is for, by the option's field; the others are for all.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "beside": ("txt", "labelme"),
    "existing": ("txt", "labelme"),
    **dict.fromkeys(("keep_lines", "prefix", "suffix", "join", "extension"), ("txt",)),
    **dict.fromkeys(("split", "split_by"), ("yolo", "hf", "coco", "voc")),
    "flat": ("yolo", "voc", "coco", "hf"),
    "link": ("yolo", "hf", "voc", "coco", "labelme", "cvat"),
    **dict.fromkeys(("coco_results", "coco_ids_from", "keypoints", "roboflow"), ("coco",)),
    "embed_images": ("parquet",),
    "url_prefix": ("labelstudio",),
    "bom": ("csv",),
    "redact": ("redacted",),
    "pad": ("redacted", "crops"),
    "background": ("overlay", "crops", "redacted"),
}
# Options about pictures, with the formats for which they change something; others take them, too, and a note says so.
# `_WITH` has the option without which a format has no pictures.
_ABOUT_PICTURES = {"root": _FIND, "max_file_size": _FIND, "max_pixels": _DECODE}
_WITH = {"coco": "roboflow", "parquet": "embed_images", "txt": "beside"}

_output = functools.partial(typer.Option, rich_help_panel="Output")
_captions = functools.partial(typer.Option, rich_help_panel="Captions (txt)")
_sets = functools.partial(typer.Option, rich_help_panel="Data sets")
_coco = functools.partial(typer.Option, rich_help_panel="COCO")
_pictures = functools.partial(typer.Option, rich_help_panel="Pictures")


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How what is exported is written."""

    overwrite: Annotated[bool, _output("--overwrite", help="Replace what stands in OUT.")] = False
    beside: Annotated[bool, _output("--beside", help="txt, labelme: each file beside its picture, not under OUT.")] = (
        False
    )
    existing: Annotated[
        Existing | None,
        _output(
            metavar="HOW",
            help="With --beside, a file that is there: refuse, skip, append, prepend or replace. [default: refuse]",
        ),
    ] = None
    embed_images: Annotated[bool, _output("--embed-images", help="parquet: the pictures' bytes too.")] = False
    url_prefix: Annotated[
        str | None, _output(metavar="URL", help="labelstudio: what goes before a picture's name.")
    ] = None
    bom: Annotated[bool, _output("--bom", help="csv: begin with a byte order mark, for LibreOffice and Excel.")] = False

    split: Annotated[
        tuple[tuple[str, float], ...] | None,
        _sets(
            metavar="NAME=SHARE,...",
            parser=checked(parse_split),
            help="yolo, hf, coco, voc: several sets, by a hash of the name: train=0.8,val=0.2.",
        ),
    ] = None
    split_by: Annotated[
        str | None,
        _sets(metavar="folder|COLUMN", help="Keep pictures of one folder, or of one value of a column, together."),
    ] = None
    flat: Annotated[
        bool,
        _sets("--flat", help="yolo, voc, coco, hf: plain names in one folder, and turned pictures upright."),
    ] = False
    roboflow: Annotated[
        bool, _sets("--roboflow", help="coco: _annotations.coco.json beside copies of the pictures.")
    ] = False

    keep_lines: Annotated[bool, _captions("--keep-lines", help="Keep line breaks; else a text is one line.")] = False
    prefix: Annotated[str, _captions(metavar="WORDS", help="What goes before each text, as typed.")] = ""
    suffix: Annotated[str, _captions(metavar="WORDS", help="What goes behind each text, as typed.")] = ""
    join: Annotated[
        str, _captions(metavar="SEP", help="What goes between several texts of a picture.", show_default="', '")
    ] = ", "
    extension: Annotated[
        str, _captions(metavar="EXT", parser=checked(parse_extension), help="How the names of the files end.")
    ] = EXTENSION

    coco_results: Annotated[bool, _coco("--coco-results", help="The bare list of results, for scoring.")] = False
    coco_ids_from: Annotated[Path | None, _coco(metavar="GT.json", help="Use this file's image and category ids.")] = (
        None
    )
    keypoints: Annotated[bool, _coco("--keypoints", help="Points as categories of one keypoint.")] = False

    root: Annotated[
        Path | None, _pictures(metavar="DIR", help="Where the pictures are; by default what run.json says.")
    ] = None
    link: Annotated[
        bool,
        _pictures(
            "--link",
            help="Hard links instead of copies. A program that rewrites one changes your own picture, too.",
        ),
    ] = False
    redact: Annotated[
        Redaction | None,
        _pictures(
            metavar="box|blur|pixelate",
            help="redacted: box is one colour and safe; blur and pixelate are for looks. [default: box]",
        ),
    ] = None
    pad: Annotated[
        float | None,
        _pictures(
            metavar="SHARE",
            parser=checked(parse_pad),
            help="redacted (10%), crops (0%): room around a box, a share of its own width and height.",
        ),
    ] = None
    background: Annotated[
        str | None,
        _pictures(
            metavar="COLOUR",
            help="overlay, crops, redacted: what transparent pictures lie on; by default as in the run.",
        ),
    ] = None
    max_pixels: Annotated[
        int,
        _pictures(metavar="N", parser=checked(parse_count), help="Refuse larger pictures.", show_default="268M"),
    ] = MAX_PIXELS
    max_file_size: Annotated[
        int, _pictures(metavar="SIZE", parser=checked(parse_bytes), help="Refuse larger files.")
    ] = MAX_FILE_SIZE
    typed: frozenset[str] = frozenset()  # names of the fields that stood in the command line

    def for_format(self, format: str, *, typed_reading: frozenset[str]) -> ExportOptions:
        """Return how `format` is written; `typed_reading` are the fields of `ReadOptions` that were typed.

        Raises:
            UsageError: an option is for other formats, or needs another one.
        """
        for name in sorted(self.typed & _ONLY_FOR.keys()):
            if format not in _ONLY_FOR[name]:
                option, formats = _option(name), ", ".join(_ONLY_FOR[name])
                raise UsageError(f"{option} is for {formats}, not for {format}; leave it out, or change --format")
        for name in ("flat", "link"):
            if format == "coco" and name in self.typed and not self.roboflow:
                raise UsageError(
                    f"{_option(name)} is about copies of the pictures, which coco has with --roboflow; add it"
                )
        if self.link and self.beside:
            raise UsageError("--link is about copies of the pictures, and --beside makes none; leave one out")
        if self.split_by is not None and self.split is None:
            raise UsageError("--split-by needs --split; add it: --split train=0.8,val=0.2")
        if self.existing is not None and not self.beside:
            raise UsageError("--existing is about files beside the pictures; add --beside, or use --overwrite")
        if self.overwrite and self.existing not in (None, "replace"):
            raise UsageError(f"--overwrite replaces, and --existing says {self.existing}; leave one out")
        if self.roboflow and self.coco_results:
            raise UsageError("--coco-results is a bare list, and --roboflow is a data set; leave one out")
        if self.split and self.coco_results:
            raise UsageError("--coco-results is one list for scoring; leave --split out")
        check_root(self.root)
        return ExportOptions(
            root=self.root,
            overwrite=self.overwrite,
            coco_results=self.coco_results,
            coco_ids_from=self.coco_ids_from,
            keypoints=self.keypoints,
            embed_images=self.embed_images,
            url_prefix=self.url_prefix,
            beside=self.beside,
            existing=self.existing or ("replace" if self.overwrite else "refuse"),
            is_linked=self.link,
            background=self.background,
            max_pixels=self.max_pixels,
            max_file_size=self.max_file_size,
            splits=None if self.split is None else Splits(self.split, self.split_by),
            is_flat=self.flat,
            is_roboflow=self.roboflow,
            has_bom=self.bom,
            keeps_lines=self.keep_lines,
            prefix=self.prefix,
            suffix=self.suffix,
            join=self.join,
            extension=self.extension,
            redaction=self.redact or "box",
            pad=self.pad,
            hides_unsure="min_score" in typed_reading,
            has_typed_labels="labels" in typed_reading,
        )

    def unused(self, format: str, *, typed_reading: frozenset[str], is_printed: bool) -> list[str]:
        """Return a note about each typed option that changes nothing in `format`, though it contradicts nothing.

        A script may give the same options for all formats. `is_printed`: there is no file that may stand there already.
        """
        needed = _WITH.get(format)
        has_pictures = self.url_prefix is None and (needed is None or bool(getattr(self, needed)))
        known = {name for name, formats in _ABOUT_PICTURES.items() if format in formats and has_pictures}
        known -= {"max_pixels"} if self.beside else set()
        notes = []
        for name in sorted(self.typed & _ABOUT_PICTURES.keys() - known):
            verb = "decodes" if name == "max_pixels" else "looks for"
            notes.append(f"{_option(name)} changes nothing: {format} {verb} no pictures")
        if is_printed and "overwrite" in self.typed:
            notes.append(OVERWRITES_NOTHING)
        if format == "txt" and typed_reading.isdisjoint({"sort", "wrong"}):  # these ask what is shown of objects
            objects = sorted(typed_reading & {"min_score", "nms"})
            notes += [
                f"{_option(name)} changes nothing: txt holds captions and answers, not objects" for name in objects
            ]
        return notes


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def check_root(root: Path | None) -> None:
    """Refuse a --root that is not there."""
    if root is not None and not root.exists():
        raise UsageError(f"--root {printable(str(root))} is not there; name the folder the pictures are in")
