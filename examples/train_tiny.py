"""Train the embedded model on scenes of the little world, from nothing.

    python examples/train_tiny.py --state runs/tiny --minutes 120        start, or go on after a break
    python examples/train_tiny.py --state runs/tiny --export OUT         write a checkpoint md3 can load

Runs on CPU and CUDA; `--workers 2` trains in two processes of one thread each that average their
weights every few steps: on two shared cores that is much faster than two threads, which wait for each
other at every operation. The schedule is a share of the whole
training, counted in steps (`--steps`, reproducible from `--seed`) or in seconds spent training
(`--minutes`, when the machine is shared). State is kept in `--state`: `state.safetensors`,
`state.json`, `log.csv`, `curve.png`, and the pool of drawn scenes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_batch import Batch, pack
from tiny_fast_paths import use_fast_paths
from tiny_losses import (
    BALANCE_WEIGHT,
    BIN_SIGMA,
    YOUNG_BIN_SIGMA,
    DenseHeads,
    RouterBalance,
    embed_images,
    sequence_loss,
)
from tiny_optimizer import TinyOptimizer, WeightAverage
from tiny_pool import SHARD_SIZE, Pool, draw_pool
from tiny_tasks import TaskWriter
from tiny_vocabulary import make_config, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes

from md3cli.model.config import ModelConfig
from md3cli.model.moondream import Moondream3
from md3cli.model.vision import normalise_crops

TRAIN_SEED = 1  # scenes of other seeds are never trained on
SAVE_EVERY_S = 180.0
LOG_EVERY = 20
WARMUP_STEPS = 100
DECODER_WARMUP = 0.01  # share of the run
MEET_EVERY = 8  # steps between two averagings of the workers' weights
CLIP_NORM = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides a training run; kept in state.json."""

    seed: int = 1
    steps: int = 0
    minutes: float = 0.0
    batch_size: int = 16  # pictures a step, over all workers
    text_dim: int = 128
    vision_dim: int = 128
    grid: int = 6
    num_shards: int = 160
    muon_lr: float = 4e-3
    adam_lr: float = 3e-3
    dense_only: float = 0.07  # share of the run in which the dense loss alone is trained
    dense_until: float = 0.60  # share at which its weight has fallen to zero
    decay_from: float = 0.40  # share at which the learning rate begins to fall

    def make_config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """config.json of the network this plan trains."""
        return make_config(tokenizer, text_dim=self.text_dim, vision_dim=self.vision_dim, grid=self.grid)

    def share(self, step: int, elapsed_s: float) -> float:
        """How much of the run is over, 0-1."""
        return step / self.steps if self.steps else elapsed_s / (60 * self.minutes)

    def rate(self, step: int, share: float) -> float:
        """Factor of the learning rates: warm-up, again when the decoder joins, plateau, cosine to zero."""
        fall = min(1.0, max(0.0, (share - self.decay_from) / (1 - self.decay_from)))
        rise = min(1.0, (step + 1) / WARMUP_STEPS)
        if share >= self.dense_only:
            rise = min(rise, 0.1 + (share - self.dense_only) / DECODER_WARMUP)
        return rise * (0.5 + 0.5 * math.cos(math.pi * fall))

    def bin_sigma(self, share: float) -> float:
        """Width of the wanted bins: coarse positions first, exact ones from the time the rate begins to fall."""
        return BIN_SIGMA + (YOUNG_BIN_SIGMA - BIN_SIGMA) * max(0.0, 1 - share / self.decay_from)

    def dense_weight(self, share: float) -> float:
        """Weight of the dense loss: 1 alone and for a while after, then falling to 0."""
        fall = (share - self.dense_only) / (self.dense_until - self.dense_only)
        return min(1.0, max(0.0, 1.0 - fall))


def initialise(model: Moondream3, seed: int) -> None:
    """Truncated normal weights, zero biases, unit norms; outputs of residual branches start small."""
    torch.manual_seed(seed)
    depth = {"vision": len(model.vision.blocks), "text": len(model.text.blocks)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "tau.alpha")):
                parameter.zero_()
            elif ".ln" in name or "_ln." in name:
                parameter.fill_(1.0)
            elif name == "region.coord_features":
                parameter.normal_(std=6.0)
            elif name == "region.size_features":
                parameter.normal_(std=3.0)
            else:
                is_table = name in ("text.wte", "vision.pos_emb")
                std = 0.02 if is_table or "tau" in name else parameter.shape[-1] ** -0.5
                if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) and ".blocks." in name:
                    std /= math.sqrt(2 * depth[name.split(".")[0]])
                if name in ("text.lm_head.weight", "region.coord_decoder.weight", "region.size_decoder.weight"):
                    std = 0.01
                nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std)
        model.vision.pos_emb.copy_(_waves(model.config.vision.grid_size, model.config.vision.enc_dim))
        for name, parameter in model.vision.named_parameters():
            if name.endswith("attn.qkv.weight"):
                query, key, _ = parameter.chunk(3)
                key.copy_(query)


def _waves(grid: int, dim: int) -> Tensor:
    """Sines and cosines of a patch's row and column, [1, grid², dim].

    With keys that begin as queries do, patches attend to their neighbours from the first step, which
    spares the encoder most of the blind time (compare "Mimetic initialization", Trockman & Kolter, 2023).
    """
    frequency = math.pi / grid * torch.logspace(-1, 2, dim // 4, base=2.0)
    angle_GF = torch.arange(grid)[:, None] * frequency
    wave_GF = torch.cat([angle_GF.sin(), angle_GF.cos()], dim=1)
    rows, cols = wave_GF[:, None].expand(grid, grid, -1), wave_GF[None].expand(grid, grid, -1)
    return 0.3 * torch.cat([rows, cols], dim=-1).reshape(1, grid * grid, dim)


@torch.no_grad()
def whiten_patches(model: Moondream3, pool: Pool) -> None:
    """Make the patch embedding the leading principal components of drawn patches, at equal strength.

    Random filters would mostly pass on a patch's mean colour; whitened ones show edges and corners from
    the first step. They stay fixed (the idea is from fast CIFAR-10 trainers: Page 2019, Jordan 2024).
    """
    crops = np.concatenate([pool[index].crops for index in range(SHARD_SIZE)])
    patches = model.vision.patchify(normalise_crops(torch.from_numpy(crops))).flatten(0, 1).double()
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    leading = vectors[:, -model.config.vision.enc_dim :] * (values[-model.config.vision.enc_dim :] + 0.01).rsqrt()
    weight = 0.5 * leading.T
    model.vision.patch_emb.weight.copy_(weight)
    model.vision.patch_emb.bias.copy_(-weight @ mean)


class Run:
    """One training run: network, heads, optimiser, averages and how far they are."""

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        self.folder, self.plan, self.device = folder, plan, device
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer: Tokenizer = train_tokenizer()
        self.raw_config = plan.make_config(self.tokenizer)
        self.config = ModelConfig.from_sections(self.raw_config["config"])
        self.model = Moondream3(self.config).to(device)
        initialise(self.model, plan.seed)
        if device.type == "cpu":
            use_fast_paths(self.model)
        region = self.model.region
        for fixed in (region.coord_features, region.size_features, *self.model.vision.patch_emb.parameters()):
            fixed.requires_grad_(False)
        self.heads = DenseHeads(self.config.text.dim).to(device)
        self.balance = RouterBalance(self.model)
        self.optimizer = TinyOptimizer(self._trained())
        self.average = WeightAverage(self.model)
        self.step, self.elapsed_s = 0, 0.0

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = [*self.model.named_parameters(), *((f"heads.{n}", p) for n, p in self.heads.named_parameters())]
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    @property
    def state_file(self) -> Path:
        return self.folder / "state.safetensors"

    def save(self) -> None:
        """Write the state beside the old one and swap: a cut power cord costs a few minutes, no more."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.tensors.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.buffers().items()}
        progress = {"step": str(self.step), "elapsed_s": str(self.elapsed_s)}
        partial = self.state_file.with_suffix(".tmp")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata=progress)
        os.replace(partial, self.state_file)

    def load(self) -> None:
        """Take up a saved state."""
        with safe_open(self.state_file, "pt") as file:
            progress = file.metadata()
        self.step, self.elapsed_s = int(progress["step"]), float(progress["elapsed_s"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "heads": {}, "average": {}, "optimizer": {}}
        for name, value in load_file(self.state_file, device=str(self.device)).items():
            part, rest = name.split(".", 1)
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        self.heads.load_state_dict(parts["heads"])
        self.average.tensors = parts["average"]
        self.optimizer.load_buffers(parts["optimizer"])

    def keep(self) -> None:
        """Save, and draw the curve so far."""
        self.save()
        plot(self.folder / "log.csv", self.folder / "curve.png")

    def export(self, folder: Path) -> None:
        """The averaged weights in the original's format: bfloat16, names with `model.`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": v.to("cpu", torch.bfloat16) for name, v in self.average.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.raw_config, indent=1) + "\n")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "model.safetensors").chmod(0o644)

    def losses(self, batch: Batch, share: float) -> tuple[Tensor, dict[str, float]]:
        """The loss of one batch and what to log about it."""
        plan, log = self.plan, {}
        with torch.autocast(self.device.type, torch.bfloat16):
            image = embed_images(self.model, batch.crops, batch.tilings)
            total = torch.zeros((), device=self.device)
            if (weight := plan.dense_weight(share)) > 0:
                dense, log = self.heads(image, batch.dense)
                total = total + weight * dense
                log["dense"] = dense.item()
            if share >= plan.dense_only:
                parts = sequence_loss(self.model, image, batch.rows, plan.bin_sigma(share))
                balance, least = self.balance.pop_loss()
                total = total + 2 * parts.text + parts.coord + parts.size + BALANCE_WEIGHT * balance
                log |= {"text": parts.text.item(), "coord": parts.coord.item(), "size": parts.size.item()}
                log |= {"text_accuracy": parts.text_accuracy, "least_expert": least}
        return total, log

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Forward, backward, update."""
        share = self.plan.share(self.step, self.elapsed_s)
        loss, log = self.losses(batch.to(self.device), share)
        loss.backward()
        # While the dense loss is alone, the decoder has no gradients and stays as it is.
        trained = [parameter for _, parameter in self._trained() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        rate = self.plan.rate(self.step, share)
        self.optimizer.step(rate * self.plan.muon_lr, rate * self.plan.adam_lr)
        self.step += 1
        self.average.update(self.model, self.step)
        return {"loss": loss.item(), "norm": norm.item(), "rate": rate, **log}

    @torch.no_grad()
    def meet(self, now_s: float) -> None:
        """Average the weights of all workers; worker 0's `now_s` becomes everybody's clock."""
        self.elapsed_s = now_s
        if not distributed.is_initialized():
            return
        weights = [parameter for _, parameter in self._trained()]
        clock = torch.tensor([now_s if distributed.get_rank() == 0 else 0.0], device=self.device)
        flat = torch.cat([*(weight.flatten() for weight in weights), clock])
        distributed.all_reduce(flat)
        self.elapsed_s = flat[-1].item()
        means = (flat[:-1] / distributed.get_world_size()).split([weight.numel() for weight in weights])
        for weight, mean in zip(weights, means, strict=True):
            weight.copy_(mean.view_as(weight))


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


class Log:
    """log.csv: means over the last steps, a row every LOG_EVERY steps."""

    FIELDS = (
        *("step", "elapsed_s", "share", "loss", "text", "text_accuracy", "coord", "size"),
        *("dense", "dense_kind", "dense_colour", "dense_rank", "dense_offset"),
        *("least_expert", "norm", "rate", "pictures_per_s"),
    )

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, list[dict[str, float]]()
        if not path.exists():
            path.write_text(",".join(self.FIELDS) + "\n")

    def add(self, values: dict[str, float], header: dict[str, float]) -> None:
        """Note one step; `header` holds the fields that are not averaged."""
        self._rows.append(values)
        if len(self._rows) < LOG_EVERY:
            return
        names = sorted({name for row in self._rows for name in row})
        means = {n: float(np.mean([row[n] for row in self._rows if n in row])) for n in names}
        row = {name: f"{value:.5g}" for name, value in {**means, **header}.items()}
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self.FIELDS, restval="").writerow(row)
        print(" ".join(f"{name} {row[name]}" for name in self.FIELDS if name in row), flush=True)
        self._rows.clear()


def plot(log_file: Path, target: Path) -> None:
    """The curves of log.csv as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with log_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    panels = (("text", "coord", "size", "dense"), ("text_accuracy", "dense_kind", "dense_rank", "dense_offset"))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            points = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
            axis.plot(*zip(*points, strict=True), label=name) if points else None
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def train(run: Run, rank: int, num_workers: int) -> None:
    """Until the plan's share reaches 1. Worker 0 also keeps the log and the state."""
    pool_folder = run.folder / f"pool_{run.config.vision.crop_size}"
    while not (pool := Pool(pool_folder)) or len(pool) < 4 * SHARD_SIZE:
        time.sleep(1)
    if run.step == 0:
        whiten_patches(run.model, pool)
        run.average = WeightAverage(run.model)
    batches, log = BatchSource(run, pool, rank, num_workers), Log(run.folder / "log.csv")
    start, saved = time.monotonic() - run.elapsed_s, time.monotonic()
    while (share := run.plan.share(run.step, run.elapsed_s)) < 1:
        before = time.monotonic()
        values = run.train_step(batches(run.step))
        values["pictures_per_s"] = run.plan.batch_size / (time.monotonic() - before)
        if rank == 0:
            log.add(values, {"step": run.step, "elapsed_s": run.elapsed_s, "share": share})
        if run.step % MEET_EVERY == 0:
            run.meet(time.monotonic() - start)
            if rank == 0 and time.monotonic() - saved > SAVE_EVERY_S:
                saved = time.monotonic()
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
