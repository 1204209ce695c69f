"""Tickets of requests that no feed has made."""

from __future__ import annotations

from md3cli.records import ImageFacts, ImageItem, Request, SourceRow, Task
from md3cli.run.feed import Place, Ticket

CAPTION = Request(Task.CAPTION)


def ticket(key: int) -> Ticket:
    item = ImageItem(f"{key}.png", f"/x/{key}.png")
    return Ticket(
        key,
        Place(key),
        f"{key:032x}",
        item,
        CAPTION,
        SourceRow(item, (CAPTION,), {"n": key}),
        True,
        ImageFacts(4, 3, "0" * 64),
    )
