"""Score a run against COCO ground truth with pycocotools, the reference everyone quotes.

python examples/score_with_pycocotools.py run/records.jsonl instances.json

The ground truth's file names must be those of the records: paths below the folder that was annotated.
(`md3 eval` does this and more, with the faster engine of its extra `eval`.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from md3cli.exporters import ExportOptions, export_records


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("truth", type=Path)
    parser.add_argument("--kind", choices=["bbox", "segm"], default="bbox")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        options = ExportOptions(coco_results=True, coco_ids_from=args.truth)
        for note in export_records(args.records, "coco", results, options).notes:
            print(f"note: {note}", file=sys.stderr)
        truth = COCO(str(args.truth))
        scoring = COCOeval(truth, truth.loadRes(str(results)), args.kind)
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()


if __name__ == "__main__":
    main()
