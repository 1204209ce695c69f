"""What an export is told and what it tells: the words shared by every format. Stdlib only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Choices of one export; a format takes what concerns it and ignores the rest.

    Attributes:
        root: the folder (or tar) the pictures' names are relative to; None: run.json beside the
            records says it.
        is_confined: no picture outside `root` is opened, whatever the records say; to be switched
            off only for records that this very process made.
        labels: the order of categories; the rest follows as first seen.
        url_prefix: what goes before a picture's name in Label Studio tasks.
        beside: sidecar texts stand next to the pictures.
        is_linked: pictures in `yolo` and `hf` are hard links, not copies.
        background: a colour that transparent pictures are laid on in overlays.
        max_pixels, max_file_size: what is refused unread, as everywhere.
    """

    root: Path | None = None
    overwrite: bool = False
    labels: tuple[str, ...] = ()
    coco_results: bool = False
    coco_ids_from: Path | None = None
    keypoints: bool = False
    embed_images: bool = False
    url_prefix: str | None = None
    beside: bool = False
    is_linked: bool = False
    background: str | None = None
    is_confined: bool = True
    max_pixels: int = 2**28
    max_file_size: int = 2**30


def compact_json(value: Any) -> bytes:
    """Return `value` as JSON in UTF-8, without blanks.

    Raises:
        ValueError: it holds NaN or infinity, which JSON does not have.
    """
    return _ENCODER.encode(value).encode()


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written. `num_images` is 0 for formats that know records only.

    `num_failures` counts failed records that were left out; `notes` are sentences for the user
    about anything else that is not in the output.
    """

    format: str
    out: Path
    num_records: int
    num_images: int = 0
    num_failures: int = 0
    notes: tuple[str, ...] = ()
