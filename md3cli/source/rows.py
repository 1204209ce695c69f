"""One row of INPUT: a picture, or a line of a manifest, with all that is asked of it. Opens no picture.

Apart from source.py, which finds the pictures and knows nothing of what is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from md3cli.errors import RowError
from md3cli.records import ImageItem, Region, Request, RowFailure, SourceRow
from md3cli.remote.address import is_address
from md3cli.source.coco import CocoBox, CocoPicture
from md3cli.source.columns import ColumnRules, Filled
from md3cli.source.inputs import Confinement, RowPlaces, is_of_windows
from md3cli.source.manifest import ManifestRow
from md3cli.source.requests import (
    ROW_COLUMNS,
    are_fit_for_pictures,
    is_given,
    refuse_address,
    refused_request,
    row_image,
    row_requests,
    row_then,
)
from md3cli.source.specs import LABEL, are_followed
from md3cli.source.webdataset import NOTHING


class Asked(NamedTuple):
    """What a command asks: of every picture, then of each object found, and the settings of rows that ask themselves.

    The prompts of `then` are templates with `{label}`. `defaults` is the first of `requests` where there is one.
    """

    requests: tuple[Request, ...]
    then: tuple[Request, ...]
    defaults: Request


class RowMaker:
    """Makes rows as one run asks them, its columns read by `rules`, its pictures confined to a folder."""

    def __init__(self, asked: Asked, rules: ColumnRules, confinement: Confinement) -> None:
        self._asked, self._rules, self._outside = asked, rules, confinement.failure_of
        is_asked_alike = bool(asked.requests) and not rules.changes_pictures
        self._is_fit_for_pictures = is_asked_alike and are_fit_for_pictures(asked.requests)
        self._usual = Filled(asked.requests, then=asked.then if are_followed(asked.requests) else ())

    def of_picture(
        self, image: ImageItem, data: Mapping[str, Any] = NOTHING, boxes: Iterable[CocoBox] | None = None
    ) -> SourceRow:
        """Return the row of a picture that no manifest names, with the columns of its sidecars, if any.

        Those mean nothing by their names: a set of generated pictures has a `prompt` and a `seed` that are not ours.
        Only --map makes them known columns. With `boxes` those are asked about instead of the picture.
        """
        failure = self._outside(image.path)
        if boxes is None and not (self._rules.changes_pictures or (data and self._rules.renamed)):
            return SourceRow(image, self._usual.requests, data, failure, then=self._usual.then)
        known, others, problem = self._rules.of_sidecars(data)
        known["image"] = image.name
        try:
            if problem:
                raise RowError("bad_row", problem)
            if boxes is None:
                asked = self._filled(known, image, others=others)
            else:
                asked = self._filled_of_boxes(known, image, others, boxes)
        except RowError as error:
            asked = Filled((refused_request(known, self._asked.defaults),))
            failure = RowFailure(error.type, str(error))
        return SourceRow(image, asked.requests, others, failure, asked.typed, asked.refused, asked.then)

    def of_listed(
        self, picture: CocoPicture, boxes: Iterable[CocoBox], places: RowPlaces, *, from_addresses: bool
    ) -> SourceRow:
        """Return the row of a picture that a COCO file lists; where regions are asked about, those are its `boxes`.

        With `from_addresses` it is fetched from its address, where the file has one.
        """
        image: ImageItem | None = None
        try:
            if picture.problem:
                raise RowError("bad_row", picture.problem)
            name = row_image({"image": picture.url if from_addresses and picture.url else picture.name})
            assert isinstance(name, str)
            image = places.item_of(name)
            refuse_address(name, may_fetch=places.may_fetch)
        except RowError as error:
            failure = RowFailure(error.type, f"{picture.where}: {error}")
            return SourceRow(image, (refused_request({}, self._asked.defaults),), failure=failure)
        if self._rules.region_pad is None:
            return self.of_picture(image, picture.data)
        row = self.of_picture(image, picture.data, boxes)
        if picture.size is None and row.failure is None:
            why = f"{picture.where}: no width and height, by which its boxes are read"
            row = replace(row, failure=RowFailure("bad_row", why))
        return row

    def _filled_of_boxes(
        self, columns: Mapping[str, Any], image: ImageItem, others: Mapping[str, Any], boxes: Iterable[CocoBox]
    ) -> Filled:
        """Return what is asked about each box in turn, `{label}` what it is called; raises RowError.

        A box without extent is asked about as others are, and refused where its picture is cut.
        """
        by_label, requests = dict[str, Filled](), list[Request]()
        for of, label, box in boxes:
            label = label or ""
            if label not in by_label:
                by_label[label] = self._filled(columns, image, others={**others, LABEL: label})
            region = Region(box, label, of, 0, self._rules.region_pad or 0.0)
            requests += (replace(request, region=region) for request in by_label[label].requests)
        typed = {prompt: text for asked in by_label.values() for prompt, text in (asked.typed or {}).items()}
        refused = {prompt: why for asked in by_label.values() for prompt, why in (asked.refused or {}).items()}
        return Filled(tuple(requests), typed or None, refused or None)

    def of_manifest(self, entry: ManifestRow, places: RowPlaces) -> SourceRow:
        """Return what a manifest's row asks; a failure keeps as much of the row as could be read."""
        columns = self._rules.with_constants(entry.columns or {})
        image: ImageItem | None = None
        asked, is_bare = self._usual, False
        try:
            if entry.columns is None:
                raise RowError("bad_row", entry.problem)
            if name := row_image(columns):
                image = places.item_of(name)
                if isinstance(name, str):
                    refuse_address(name, may_fetch=places.may_fetch)
            is_bare = image is not None and len(columns) == 1
            if not (is_bare and self._is_fit_for_pictures):
                asked = self._filled(columns, image, entry.where)
            failure = self._outside(image.path) if image else None
            if image and is_of_windows(image.name) and not is_address(image.path) and not os.path.lexists(image.path):
                raise RowError(
                    "not_found", "a drive or server of Windows; make the paths relative to the list or --root"
                )
        except RowError as error:
            asked = Filled((refused_request(columns, self._asked.defaults),))
            failure = RowFailure(error.type, f"{entry.where}: {error}")
        meta = {} if is_bare else _meta_of(columns)
        return SourceRow(image, asked.requests, meta, failure, asked.typed, asked.refused, asked.then)

    def _filled(
        self, columns: Mapping[str, Any], image: ImageItem | None, where: str = "", others: Mapping[str, Any] = NOTHING
    ) -> Filled:
        """Return what a row asks; raises RowError. `where` begins the messages of what it cannot ask.

        A prompt that the row brings stays as it is; `others` are columns that only fill prompts.
        """
        requests = row_requests(columns, self._asked.requests, self._asked.defaults)
        then = row_then(columns, requests, self._asked.then)
        if is_given(columns, "prompt"):
            return Filled(requests, then=then)
        asked = self._rules.filled(requests, {**others, **columns} if others else columns, image)
        if where and asked.refused:
            refused = {prompt: f"{where}: {why}" for prompt, why in asked.refused.items()}
            asked = asked._replace(refused=refused)
        return asked._replace(then=then)


def _meta_of(columns: Mapping[str, Any]) -> dict[str, Any]:
    return {column: value for column, value in columns.items() if column not in ROW_COLUMNS}
