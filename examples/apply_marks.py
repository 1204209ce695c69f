"""Keep what a person found right: records without those marked wrong in the report.

    md3 report run/records.jsonl -o report.html     # mark with r and w, then "Save marks"
    python examples/apply_marks.py run/records.jsonl run.marks.jsonl > reviewed.jsonl
    md3 export reviewed.jsonl --format coco -o reviewed.json

With --only-right, unmarked records are left out too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("marks", type=Path)
    parser.add_argument("--only-right", action="store_true", help="leave out what nobody looked at")
    args = parser.parse_args()
    marked = (json.loads(line) for line in args.marks.read_text(encoding="utf-8").splitlines())
    marks = {mark["id"]: mark["mark"] for mark in marked}
    with args.records.open(encoding="utf-8") as lines:
        for line in lines:
            mark = marks.get(json.loads(line)["id"])
            if mark == "right" or (mark is None and not args.only_right):
                sys.stdout.write(line)


if __name__ == "__main__":
    main()
