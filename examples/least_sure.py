"""Print the boxes, points and masks the model was least sure of: the ones worth a look.

python examples/least_sure.py run/records.jsonl --count 20
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterator
from pathlib import Path


def found(records: Path) -> Iterator[tuple[float, str, str]]:
    """(score, image, label) of everything that was found."""
    with records.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            for thing in record.get("objects") or record.get("points") or record.get("segments") or ():
                yield thing["score"], record["image"], thing["label"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    for score, image, label in heapq.nsmallest(args.count, found(args.records)):
        print(f"{score:.3f}  {label}  {image}")


if __name__ == "__main__":
    main()
