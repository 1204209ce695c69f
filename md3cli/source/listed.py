"""COCO files among INPUTs: read once, the folders of their pictures found, and what goes with `--regions` checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from md3cli.config import SourceSpec
from md3cli.errors import UsageError
from md3cli.records import Request, counted, printable
from md3cli.remote.address import shown
from md3cli.source.coco import CocoFile, folder_of_pictures, read_coco
from md3cli.source.columns import ColumnRules
from md3cli.source.inputs import Input
from md3cli.source.requests import THEN
from md3cli.source.walk import Kind

Files = Mapping[str, CocoFile]  # by INPUT as it was typed


def check_regions(
    inputs: Sequence[Input], rules: ColumnRules, requests: Sequence[Request], then: Sequence[Request]
) -> None:
    """Raise UsageError where boxes are to be asked about, and INPUT has none, or something else is asked with them."""
    if rules.region_pad is None:
        return
    for given in inputs:
        if given.kind is not Kind.COCO:
            where = "stdin" if given.kind is Kind.STDIN else printable(shown(given.typed))
            raise UsageError(f"--regions asks about the boxes of a COCO file (.json), and {where} is none")
    set_by_rows = rules.constants.keys() | rules.renamed.values()
    if then or THEN in set_by_rows:
        raise UsageError("--regions asks about boxes, and what is found in them is not asked about: leave out --then")
    if "spatial_refs" in set_by_rows or any(request.spatial_refs for request in requests):
        raise UsageError("--spatial-ref is a place in the whole picture, and --regions asks about its parts; use one")
    if any(request.tiles is not None for request in requests):
        raise UsageError("--tile is about whole pictures, and --regions asks about their parts; use one")


def with_files(inputs: Sequence[Input], spec: SourceSpec, rules: ColumnRules) -> tuple[tuple[Input, ...], Files]:
    """Return INPUTs with the folders that the pictures of COCO files are in, and those files.

    Raises:
        InputError: one is no COCO file, or its pictures are nowhere and --root does not say where.
    """
    files = dict[str, CocoFile]()
    for given in inputs:
        if given.kind is Kind.COCO and given.typed not in files:
            files[given.typed] = read_coco(given.typed, with_boxes=rules.region_pad is not None)
    if spec.root is not None:
        return tuple(inputs), files
    return tuple(_with_pictures(given, files, spec) for given in inputs), files


def _with_pictures(given: Input, files: Files, spec: SourceSpec) -> Input:
    if given.kind is not Kind.COCO:
        return given
    found = folder_of_pictures(given.typed, files[given.typed], from_addresses=spec.remote)
    return given._replace(pictures=found)


def notes_on_files(inputs: Sequence[Input], files: Files) -> Iterator[str]:
    """Yield what a user should know of COCO files before the run begins, a line each."""
    for given in inputs:
        if given.kind is not Kind.COCO:
            continue
        name = printable(shown(given.typed))
        if given.pictures is not None:
            yield f"the pictures of {name} are in {printable(given.pictures)}; --root names another folder"
        if num_lost := files[given.typed].num_lost:
            are = counted(num_lost, "annotation is", "annotations are")
            yield f"{name}: {are} of no picture that it lists, and left out"
