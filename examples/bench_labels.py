"""Measure what several prompts a name and chosen thresholds are worth, on scenes of the little world.

    python examples/bench_labels.py --scenes 300 --out bench

Draws two collections of held-out scenes, and asks each twice for the eight kinds: with one prompt a kind ("circle"),
and with nine under its name ("circle", "red circle", "yellow circle", ...). Thresholds are chosen on the first
collection (`md3 eval --best-thresholds`) and measured on the second, whose scenes they have not seen. All is done by
`md3` itself, with `--model tiny`. Needs the extra md3cli[eval].
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shapes import write_collection
from world import COLOURS, KINDS

FIRST_HELD_OUT_SEED = 2  # seed 1 is the training collection
CHOSEN, HELD_OUT = "chosen", "held_out"
ROWS = (  # what is asked, and how it is read
    ("one prompt a name", "single", ()),
    ("the same, thresholds of the first", "single", ("--labels", "single.toml")),
    ("nine prompts a name, doubles kept", "several", ("--nms", "1")),
    ("nine prompts a name", "several", ()),
    ("the same, thresholds of the first", "several", ("--labels", "several.toml")),
)
SCORES = ("AP", "AP50", "precision", "recall", "F1")


def md3(out: Path, *arguments: str) -> str:
    """Run a command of md3 in the folder `out`; return what it printed."""
    done = subprocess.run([sys.executable, "-m", "md3cli", *arguments], cwd=out, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def write_labels(path: Path) -> None:
    """Write a labels file with nine prompts for each kind: its name, and its name in each colour."""
    tables = []
    for kind in KINDS:
        prompts = [kind, *(f"{colour} {kind}" for colour in COLOURS)]
        tables.append(f'[[label]]\nname = "{kind}"\nprompts = {json.dumps(prompts)}\n')
    path.write_text("\n".join(tables), encoding="utf-8")


def ask(out: Path, seed: int, num_scenes: int) -> None:
    """Draw both collections, ask about them, and choose thresholds on the first."""
    write_labels(out / "nine.toml")
    for place, name in enumerate((CHOSEN, HELD_OUT)):
        write_collection(seed + place, num_scenes, out / name)
        shared = ("--model", "tiny", "--no-progress", "--overwrite")
        md3(out, "detect", name, *KINDS, "-o", f"{name}_single.jsonl", *shared)
        md3(out, "detect", name, "--labels", "nine.toml", "-o", f"{name}_several.jsonl", *shared)
    for asked in ("single", "several"):
        measure(out, CHOSEN, asked, "--best-thresholds", f"{asked}.toml", "--overwrite")


def measure(out: Path, name: str, asked: str, *options: str) -> dict[str, Any]:
    """Return the scores of the boxes of a collection, as `md3 eval` tells them."""
    truth = f"{name}/instances.json"
    return dict(json.loads(md3(out, "eval", f"{name}_{asked}.jsonl", "--gt", truth, "--json", *options))["sections"][0])


def results(out: Path) -> list[dict[str, Any]]:
    """Return a row of scores on the held-out scenes for each of `ROWS`."""
    return [
        {"what": what, "asked": asked, **measure(out, HELD_OUT, asked, *options)["scores"]}
        for what, asked, options in ROWS
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| held-out scenes | " + " | ".join(SCORES) + " |", "|---|" + "---|" * len(SCORES)]
    lines += [f"| {row['what']} | " + " | ".join(f"{row[score]:.3f}" for score in SCORES) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help="in each of the two collections")
    parser.add_argument("--seed", type=int, default=4000, help="of the first collection; the next is the other's")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    args = parser.parse_args()
    if args.seed < FIRST_HELD_OUT_SEED:
        raise SystemExit("seed 1 is the training collection; choose another")
    args.out.mkdir(parents=True, exist_ok=True)
    ask(args.out, args.seed, args.scenes)
    print(table(results(args.out)))


if __name__ == "__main__":
    main()
