"""`--dry-run`: what a run would do, without a model: images, requests, crops by bucket, bad files."""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from md3cli.config import RunConfig
from md3cli.console import RunConsole
from md3cli.errors import ImageError
from md3cli.images.crops import PreparedImage
from md3cli.run.feed import make_pool, rows_ahead
from md3cli.run.model_handle import crop_config_without_network
from md3cli.source.source import Source, check_found


@dataclass(slots=True)
class DryRun:
    """Counts; `crops` is images by number of crops, the global one included, `bad` is rows by error type."""

    num_images: int = 0
    num_requests: int = 0
    crops: Counter[int] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """For programs: one object."""
        return {
            "images": self.num_images,
            "requests": self.num_requests,
            "crops": {str(crops): count for crops, count in sorted(self.crops.items())},
            "bad": dict(sorted(self.bad.items())),
            "skipped": dict(sorted(self.skipped.items())),
        }

    def lines(self) -> list[str]:
        """For people: a line each."""
        crops = ", ".join(f"{count:,} of {crops} crops" for crops, count in sorted(self.crops.items()))
        bad = ", ".join(f"{name} {count:,}" for name, count in sorted(self.bad.items()))
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
        return [
            f"images     {self.num_images:,}",
            f"requests   {self.num_requests:,}",
            f"crops      {sum(crops * count for crops, count in self.crops.items()):,}{f': {crops}' if crops else ''}",
            f"bad files  {self.bad.total():,}{f': {bad}' if bad else ''}",
            f"not taken  {self.skipped.total():,}{f': {skipped}' if skipped else ''}",
        ]


def dry_run(config: RunConfig, source: Source, console: RunConsole) -> int:
    """Count and print; returns the exit status, 0.

    Raises:
        InputError: there is nothing to annotate in INPUT, and that is not allowed; the counts are printed.
    """
    counts = DryRun()
    for future in _decoded(config, source, counts):
        try:
            counts.crops[len(future.result().crops)] += 1
        except ImageError as error:
            counts.bad[error.type] += 1
    counts.skipped = source.skipped
    text = "\n".join(counts.lines()) if console.is_stdout_terminal else json.dumps(counts.as_json())
    sys.stdout.write(text + "\n")
    if not counts.num_requests:
        check_found(source, config.source, is_allowed=config.allow_empty)
    return 0


def _decoded(config: RunConfig, source: Source, counts: DryRun) -> Iterator[Future[PreparedImage]]:
    """The pictures in order, a bounded number of them in decoding; rows are counted on the way."""
    crop_config = crop_config_without_network(config.model)
    ahead: deque[Future[PreparedImage]] = deque()
    with make_pool(config, crop_config) as pool:
        for row in source:
            counts.num_requests += len(row.requests)
            counts.num_images += row.image is not None
            if row.failure is not None:
                counts.bad[row.failure.type] += 1
            elif row.image is not None:
                ahead.append(pool.submit(row.image))
            while len(ahead) >= rows_ahead(crop_config):
                yield ahead.popleft()
        yield from ahead
