"""SQL over a finished run: how many of what, how sure, and on which pictures.

    md3 export run/records.jsonl -o run/records.parquet
    pip install duckdb          # not a dependency of md3
    python examples/duckdb_over_parquet.py run/records.parquet

The same queries run in any engine that reads Parquet with nested lists (Polars, Spark, Athena).
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

LABELS = """
    SELECT label, count(*) AS boxes, count(DISTINCT image) AS images, round(avg(score), 3) AS mean_score
    FROM (SELECT image, unnest(objects, recursive := true) FROM records WHERE task = 'detect')
    GROUP BY label ORDER BY boxes DESC
"""
FAILURES = "SELECT error_type, count(*) AS records FROM records WHERE error_type IS NOT NULL GROUP BY ALL ORDER BY ALL"
ANSWERS = "SELECT prompt, answer, count(*) AS images FROM records WHERE answer IS NOT NULL GROUP BY ALL ORDER BY ALL"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parquet")
    args = parser.parse_args()
    try:
        duckdb = import_module("duckdb")
    except ImportError:
        sys.exit("this example needs DuckDB: pip install duckdb")
    duckdb.read_parquet(args.parquet).create_view("records")
    for query in (LABELS, FAILURES, ANSWERS):
        print(duckdb.sql(query))


if __name__ == "__main__":
    main()
