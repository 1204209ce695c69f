"""What shards cost over the bare work: the same requests as one long shard, and as many, with the stub as the model.

python tests/support/scale_overhead.py [--shards 8] [--rows 120] [--step-seconds 0.1]

A step takes so long that a shard has `rows / 4 * step` seconds of model time. Prints the seconds a shard that are
not the model's: what is left of a shard's wall time, and what that would be of a shard of one minute.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from program import make_pictures
from run_folders import planned, rows_of
from stub_engine import StubModel

from md3cli.config import DecodeOptions, ModelOptions
from md3cli.scale.markers import RunOptions
from md3cli.scale.shard_runner import ShardRunner

BATCH_SIZE = 4
SHARD_S = 60.0


def overhead_s(folder: Path, num_shards: int, num_rows: int, step_s: float) -> float:
    """Seconds a shard beside the model's, with a warm model and warm decode workers."""
    pictures = make_pictures(folder / "pictures", num_rows)
    rows = rows_of(pictures, [f"p{i}.png" for i in range(num_rows)] * (num_shards + 1))
    run, plan = planned(str(folder / "run"), rows, shard_size=num_rows)
    options = RunOptions(ModelOptions(batch_size=BATCH_SIZE), DecodeOptions(workers=1))
    model = StubModel(options.model, step_s)
    with ShardRunner(run.uri, finder=lambda _: model, options=options) as runner:
        runner.run(0)
        started = time.monotonic()
        for shard in range(1, plan.shards):
            runner.run(shard)
        elapsed_s = time.monotonic() - started
    model_s = num_shards * -(-num_rows // BATCH_SIZE) * step_s
    return (elapsed_s - model_s) / num_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--step-seconds", type=float, default=0.1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cost_s = overhead_s(Path(folder), arguments.shards, arguments.rows, arguments.step_seconds)
    print(
        f"{cost_s * 1000:.0f} ms a shard of {arguments.rows} images beside the model: "
        f"{cost_s / SHARD_S:.2%} of a shard of {SHARD_S:.0f} s"
    )


if __name__ == "__main__":
    main()
