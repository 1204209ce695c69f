"""Muon for the matrices, AdamW for everything else, and a running average of the weights.

Muon (Jordan et al., 2024; update scaled as in "Muon is scalable for LLM training", Liu et al., 2025)
moves a matrix by the orthogonalised momentum of its gradient: on this little network it needs about
half of AdamW's steps. Matrices of one shape, experts among them, are orthogonalised as one batch.
All state is tensors under names, so that it fits into a safetensors file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

MUON_MOMENTUM = 0.95
WEIGHT_DECAY = 0.02
ADAM_BETAS = (0.9, 0.98)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MATRIX_PARTS = (".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight")


def is_muon_matrix(name: str) -> bool:
    """True for the matrices inside blocks and the projection; embeddings and heads stay with AdamW."""
    return name.endswith(_MATRIX_PARTS)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, of a batch [N, rows, cols] by Newton-Schulz in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices
    x: Tensor = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if is_tall else x).float()


class TinyOptimizer:
    """One step for all parameters; state under `buffers` by name."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        named = dict(parameters)
        self._groups: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named.items():
            if is_muon_matrix(name):
                self._groups.setdefault(tuple(parameter.shape[-2:]), []).append((name, parameter))
        self._others = {name: p for name, p in named.items() if not is_muon_matrix(name)}
        decayed = [p for p in self._others.values() if p.ndim >= 2]
        plain = [p for p in self._others.values() if p.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
            betas=ADAM_BETAS,
            fused=True,
        )
        self._momentum = {name: torch.zeros_like(p) for name, p in named.items() if is_muon_matrix(name)}

    @torch.no_grad()
    def step(self, muon_lr: float, adam_lr: float) -> None:
        """Update every parameter that has a gradient and clear the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = adam_lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        for (rows, cols), members in self._groups.items():
            moving = [(name, parameter) for name, parameter in members if parameter.grad is not None]
            if moving:
                self._muon_step(moving, muon_lr * 0.2 * max(rows, cols) ** 0.5, muon_lr)

    def _muon_step(self, members: list[tuple[str, nn.Parameter]], step_size: float, lr: float) -> None:
        updates = []
        for name, parameter in members:
            gradient, momentum = parameter.grad, self._momentum[name]
            assert gradient is not None, name
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            nesterov = gradient.lerp(momentum, MUON_MOMENTUM)
            updates.append(nesterov.reshape(-1, *parameter.shape[-2:]))
            parameter.grad = None
        directions = orthogonalise(torch.cat(updates)).split([len(update) for update in updates])
        for (_, parameter), direction in zip(members, directions, strict=True):
            parameter.mul_(1 - lr * WEIGHT_DECAY).sub_(direction.view_as(parameter), alpha=step_size)

    def buffers(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""
        tensors = {f"momentum.{name}": value for name, value in self._momentum.items()}
        for name, parameter in self._others.items():
            for key, value in self._adam.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = torch.as_tensor(value)
        return tensors

    def load_buffers(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state that `buffers` gave."""
        for name, value in self._momentum.items():
            value.copy_(tensors[f"momentum.{name}"])
        for name, parameter in self._others.items():
            if f"adam.step.{name}" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self._adam.state[parameter] = {key: tensors[f"adam.{key}.{name}"].clone() for key in keys}


class WeightAverage:
    """Exponential average of the weights: what ships."""

    def __init__(self, model: nn.Module, horizon: float = 400.0) -> None:
        self.tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._horizon = horizon

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average over the last `horizon` steps, or over all of them while they are fewer."""
        share = max(1 / self._horizon, 1 / (1 + step / 4))
        for name, value in model.state_dict().items():
            self.tensors[name].lerp_(value, share)
