"""Optimisers by parameter role, gradient clipping, and learning-rate schedules.

Matrices inside blocks (stacked experts as many matrices) take Muon, everything else AdamW:
embeddings and head, router, convolution, vectors. Source: Muon (Jordan 2024; arXiv 2502.16982
for the scale that matches AdamW's updates); AdamW (arXiv 1711.05101); WSD with minus-sqrt decay
(arXiv 2405.18392).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aprium.base.config import require_finite
from aprium.base.errors import ConfigError
from aprium.model.model import HybridModel
from aprium.train.parallel import Matrices, cut_alike, local, matrices_of

# Coefficients of the quintic iteration that drives singular values towards 1.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Learning rates and schedule.

    `lr` is AdamW's peak rate, `muon_lr` Muon's (None: AdamW for everything); both follow the
    schedule: linear warm-up, then "wsd" (constant, then a minus-sqrt decay over the last
    `decay_fraction` of the steps) or "cosine", down to `final_fraction` of the peak. Gradients
    above the norm `max_grad_norm` are scaled down to it; inf leaves them as they are.
    """

    lr: float = 1e-3
    muon_lr: float | None = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    muon_momentum: float = 0.95
    max_grad_norm: float = 1.0
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.25
    final_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Check ranges."""
        require_finite(self, "optim", infinite=("max_grad_norm",))
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: it must be in 0..1")
        shares = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        for name, value in (shares | {"muon_momentum": self.muon_momentum}).items():
            if not 0 <= value < 1:
                raise ConfigError(f"optim.{name} is {value}: it must be in 0..1, without 1")
        for name in ("weight_decay", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: it cannot be negative")
        for name in ("lr", "muon_lr", "eps", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"optim.{name} is {value}: it must be positive")


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices [..., rows, columns].

    Leading dimensions are batches of independent matrices; `whole` says of parameters that are cut
    over processes how to make their matrices whole, which every process then updates. The update
    has the root-mean-square of 0.2 that AdamW's typically has, so one learning rate scale serves
    both.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        whole: Mapping[nn.Parameter, Matrices] | None = None,
    ) -> None:
        self.whole = whole or {}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                if parameter in self.whole:
                    update = self.whole[parameter].join(update)
                shape = tuple(update.shape[-2:])
                by_shape[shape].append((parameter, update.reshape(-1, *shape)))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalise(torch.cat([update for _, update in pairs]))
                scale = 0.2 * math.sqrt(max(rows, columns))
                parts = updates.split([update.shape[0] for _, update in pairs])
                for (parameter, _), part in zip(pairs, parts, strict=True):
                    own = local(parameter)
                    if parameter in self.whole:
                        lead = own.shape[:-2]
                        part = self.whole[parameter].cut(part.view(*lead, rows, columns))
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(part.view_as(own), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return matrices [B, M, N] with their singular values driven to about 1.

    The iteration corrects itself and its target is loose, so it runs in bfloat16.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).to(matrices.dtype)


def uses_muon(name: str, parameter: Tensor) -> bool:
    """Tell whether a parameter is a matrix inside a block."""
    outside = any(part in name for part in ("embeddings", "lm_head", "gate.", "conv1d"))
    return parameter.dim() >= 2 and not outside


def build_optimisers(model: HybridModel, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Make the optimisers over the model's trainable parameters, grouped by role."""
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.muon_lr is not None and uses_muon(name, parameter):
            matrices.append(parameter)
        elif parameter.dim() >= 2 and "conv1d" not in name:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": part, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
        for part in cut_alike(params)
    ]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
    ]
    if matrices and config.muon_lr is not None:
        momentum, decay = config.muon_momentum, config.weight_decay
        names = {p: name for name, p in model.named_parameters()}
        found = {p: matrices_of(names[p], p, model.plan) for p in matrices}
        whole = {p: joined for p, joined in found.items() if joined is not None}
        optimisers.append(Muon(matrices, config.muon_lr, momentum, decay, whole))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak_lr"] = group["lr"]
    return optimisers


def schedule_factor(
    step: int, total: int, config: OptimConfig, decay_from: int | None = None
) -> float:
    """Return the fraction of the peak learning rate at `step` (0-based) of `total`.

    `decay_from` begins the decay of "wsd" there, as long as it would have been: see `last_step`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low = config.final_fraction
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    length = total * config.decay_fraction
    begin = total - length if decay_from is None else min(decay_from, total - length)
    if step < begin:
        return 1.0
    progress = min(1.0, (step - begin) / max(1.0, length))
    return low + (1 - low) * (1 - math.sqrt(progress))


def last_step(total: int, config: OptimConfig, decay_from: int | None) -> int:
    """Return at how many steps a run ends whose decay begins at `decay_from`, if not before."""
    if decay_from is None or config.schedule != "wsd":
        return total
    return min(total, decay_from + max(1, round(total * config.decay_fraction)))


def set_learning_rates(optimisers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` of its peak."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * factor
