"""The state of a training run and one step of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_batch import Batch
from tiny_fast_paths import use_fast_paths
from tiny_log import plot
from tiny_losses import BALANCE_WEIGHT, DenseHeads, RouterBalance, embed_images, sequence_loss
from tiny_optimizer import TinyOptimizer, WeightAverage
from tiny_plan import Plan
from tiny_start import initialise
from tiny_vocabulary import train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn

from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3

CLIP_NORM = 2.0


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
    def meet(self, clock_s: float) -> None:
        """Average the weights and the clocks of all workers; between two meetings the schedule stands still."""
        self.elapsed_s = clock_s
        if not distributed.is_initialized():
            return
        weights = [parameter for _, parameter in self._trained()]
        clock = torch.tensor([clock_s], device=self.device)
        flat = torch.cat([*(weight.flatten() for weight in weights), clock])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        self.elapsed_s = flat[-1].item()
        for weight, mean in zip(weights, flat[:-1].split([w.numel() for w in weights]), strict=True):
            weight.copy_(mean.view_as(weight))
