"""What an export is told and what it tells: the words shared by every format. Stdlib only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Choices of one export; a format takes what concerns it and ignores the rest.

    `root` is the folder the pictures' names are relative to (else run.json beside the records
    says). `labels` gives the order of categories, the rest follows as first seen. `background` is
    a colour transparent pictures are laid on in overlays. `url_prefix` goes before a picture's
    name in Label Studio tasks. `beside` puts sidecar texts next to the pictures.
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
    background: str | None = None
    max_pixels: int = 2**28
    max_file_size: int = 2**30


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
