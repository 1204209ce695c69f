"""Train the embedded model on scenes of the little world, from nothing.

    python examples/train_tiny.py --state runs/tiny --minutes 120        start, or go on after a break
    python examples/train_tiny.py --state runs/tiny --export OUT         write a checkpoint md3 can load

Runs on CPU and CUDA; `--workers 2` trains in two processes of one thread each that average their
weights every few steps: on two shared cores that is much faster than two threads, which wait for each
other at every operation. The schedule is a share of the whole training, counted in steps (`--steps`,
reproducible from `--seed`) or in seconds spent training (`--minutes`, when the machine is shared).
State is kept in `--state`: `state.safetensors`, `state.json`, `log.csv`, `curve.png` and the pool of
drawn scenes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_batch import Batch, pack
from tiny_log import Log
from tiny_optimizer import WeightAverage
from tiny_plan import Plan
from tiny_pool import SHARD_SIZE, Pool, draw_pool
from tiny_run import Run
from tiny_start import whiten_patches
from tiny_tasks import TaskWriter
from tiny_vocabulary import train_tokenizer
from torch import distributed
from torch.multiprocessing.spawn import start_processes

from md3cli.model.network.config import ModelConfig

TRAIN_SEED = 1  # scenes of other seeds are never trained on
SAVE_EVERY_S = 180.0
LONGEST_STEP_S = 20.0
MEET_EVERY = 8  # steps between two averagings of the workers' weights


class BatchSource:
    """A worker's part of batch `step`: the same pictures and tasks whenever it is asked for, once the pool is drawn."""

    def __init__(self, run: Run, pool: Pool, rank: int, num_workers: int) -> None:
        self._run, self._pool, self._rank = run, pool, rank
        self._size = run.plan.batch_size // num_workers
        self._writer = TaskWriter(run.tokenizer)

    def __call__(self, step: int) -> Batch:
        plan = self._run.plan
        rng = np.random.default_rng([plan.seed, step, self._rank])
        if len(self._pool) < plan.num_shards * SHARD_SIZE:
            self._pool.refresh()
        samples = [self._pool[int(i)] for i in rng.integers(len(self._pool), size=self._size)]
        tasks = [self._writer.sample(rng, sample.picture) for sample in samples]
        return pack(samples, tasks, plan.grid)


def train(run: Run, rank: int, num_workers: int) -> None:
    """Until the plan's share reaches 1. Worker 0 also keeps the log and the state."""
    pool_folder = run.folder / f"pool_{run.config.vision.crop_size}"
    while not (pool := Pool(pool_folder)) or len(pool) < 4 * SHARD_SIZE:
        time.sleep(1)
    if run.step == 0:
        whiten_patches(run.model, pool)
        run.average = WeightAverage(run.model)
    batches, log = BatchSource(run, pool, rank, num_workers), Log(run.folder / "log.csv")
    clock = run.elapsed_s
    last = saved = time.monotonic()
    while (share := run.plan.share(run.step, run.elapsed_s)) < 1:
        values = run.train_step(batches(run.step))
        now = time.monotonic()
        clock += min(now - last, LONGEST_STEP_S)  # a paused run's clock stands still
        values["pictures_per_s"] = run.plan.batch_size / (now - last)
        last = now
        if rank == 0:
            log.add(values, {"step": run.step, "elapsed_s": run.elapsed_s, "share": share})
        if run.step % MEET_EVERY == 0:
            run.meet(clock)
            clock = run.elapsed_s
            if rank == 0 and now - saved > SAVE_EVERY_S:
                saved = now
                run.keep()
    if rank == 0:
        run.keep()


def _work(rank: int, args: argparse.Namespace, plan: Plan) -> None:
    """One worker process."""
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // args.workers))
    torch.set_flush_denormal(True)
    if args.workers > 1:
        rendezvous = (args.state / "rendezvous").resolve().as_uri()
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.workers)
    run = Run(args.state, plan, torch.device(args.device))
    if run.state_file.exists():
        run.load()
    train(run, rank, args.workers)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="folder that keeps the run")
    parser.add_argument("--export", type=Path, help="write a checkpoint from the state and stop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share every batch")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads a worker; 0 shares out the cores")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}")
    return parser.parse_args()


def _plan(folder: Path, args: argparse.Namespace) -> Plan:
    """The plan of a run begun earlier, or the defaults; options given now win and are written down."""
    path = folder / "state.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else asdict(Plan())
    values |= {name: value for name in asdict(Plan()) if (value := getattr(args, name)) is not None}
    plan = Plan(**values)
    if not args.export and not plan.steps and not plan.minutes:
        raise SystemExit("give --steps or --minutes")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(plan), indent=1) + "\n")
    return plan


def main() -> None:
    """Train, or export."""
    args = _parse()
    plan = _plan(args.state, args)
    if args.export:
        run = Run(args.state, plan, torch.device("cpu"))
        run.load()
        run.export(args.export)
        return
    (args.state / "rendezvous").unlink(missing_ok=True)
    config = ModelConfig.from_sections(plan.make_config(train_tokenizer())["config"])
    crop_config = config.vision.crop_config
    pool_folder = args.state / f"pool_{crop_config.crop_size}"
    context = multiprocessing.get_context("spawn")
    drawer = context.Process(target=draw_pool, args=(pool_folder, TRAIN_SEED, plan.num_shards, crop_config))
    drawer.start()
    if args.workers > 1:
        start_processes(_work, (args, plan), nprocs=args.workers)
    else:
        _work(0, args, plan)
    drawer.join()


if __name__ == "__main__":
    main()
