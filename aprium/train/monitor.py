"""What a run watches: balance and residual stream by layer, gradients by role, divergence.

The figures are those that would have told of the published runs' two divergences early: the worst
MaxVio of each layer, the norm of the residual stream after each layer, and gradient norms by role
of parameter. What is not finite is named. Source: docs/training.md.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aprium.base.config import require_finite
from aprium.base.errors import ConfigError
from aprium.model.model import Block, Gate, HybridModel, MoE, Routing
from aprium.parallel.collectives import total
from aprium.parallel.mesh import Axis
from aprium.train.parallel import local, sum_of_squares
from aprium.train.policy_loss import FIGURES

# Role of a parameter by a part of its name; the first that fits.
_ROLES = (
    ("mtp", r"^mtp\."),
    ("embedding", r"embeddings\."),
    ("head", r"^lm_head\."),
    ("router", r"\.gate\."),
    ("experts", r"\.experts\."),
    ("shared_experts", r"\.shared_experts\."),
    ("latent", r"_latent_proj\."),
    ("attention", r"\.[qkvo]_proj\."),
    ("mamba", r"\.(in_proj|out_proj|conv1d|A_log|D|dt_bias)\b"),
    ("norm", r"norm"),
    ("mlp", r"\.(up|down)_proj\."),
)


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """What counts as a divergence, and what is done about it.

    A loss or gradient that is not finite always does; so does, with `spike_ratio`, a cross-entropy
    above that many times the median of the last `window` steps for `patience` steps in a row.
    "stop" raises; "rollback" goes back to the last checkpoint and on with the data that follow, and
    to the one before it where that diverges again within `patience` steps; "anneal" does so and
    starts the decay of the learning rate there. After `max_rollbacks` the run stops.
    """

    spike_ratio: float | None = None
    patience: int = 3
    window: int = 50
    action: Literal["stop", "rollback", "anneal"] = "stop"
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        """Check ranges."""
        require_finite(self, "stability")
        if self.spike_ratio is not None and self.spike_ratio <= 1:
            raise ConfigError(f"stability.spike_ratio is {self.spike_ratio}: it must be above 1")
        for name in ("patience", "window", "max_rollbacks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stability.{name} is {getattr(self, name)}: it must be positive")


class DivergenceError(Exception):
    """A step that must not be taken; the message says what was seen."""


@dataclass
class Spikes:
    """Watch the training loss for what `StabilityConfig` calls a spike."""

    config: StabilityConfig
    recent: list[float] = field(default_factory=list)
    num_above: int = 0

    def see(self, loss: float) -> None:
        """Take the loss of a step; raise DivergenceError when it was too high for too long."""
        ratio, window = self.config.spike_ratio, self.config.window
        if ratio is None:
            return
        enough = len(self.recent) >= max(1, window // 2)
        usual = statistics.median(self.recent) if enough else math.inf
        if loss > ratio * usual:  # not among what is usual
            self.num_above += 1
            if self.num_above >= self.config.patience:
                raise DivergenceError(
                    f"the loss is {loss:.4g} after {self.num_above} steps above {ratio:g} times "
                    f"its median of {usual:.4g}"
                )
            return
        self.num_above = 0
        self.recent = [*self.recent, loss][-window:]


def role_of(name: str) -> str:
    """Return the role of the parameter called `name`."""
    for role, pattern in _ROLES:
        if re.search(pattern, name):
            return role
    return "other"


@torch.no_grad()
def gradient_norms(model: HybridModel) -> dict[str, float]:
    """Return the gradient's 2-norm by role of parameter, of all processes together."""
    found = sum_of_squares(model, role_of)
    return {role: math.sqrt(float(square)) for role, square in sorted(found.items())}


def first_not_finite(model: nn.Module) -> str:
    """Name the first parameter whose value or gradient is not finite; "" if there is none.

    Where parameters are cut over processes, of what this one holds. Codes of a quantised base,
    which are not trained, are not looked at.
    """
    found = {name: p for name, p in model.named_parameters() if p.element_size() > 1}
    for name, parameter in found.items():
        if not torch.isfinite(local(parameter)).all():
            return f"the weight of {name}"
    for name, parameter in found.items():
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
            return f"the gradient of {name}"
    return ""


def expert_loads(routing: Sequence[Routing], axis: Axis | None = None) -> dict[str, Tensor]:
    """Return by layer how many tokens chose each expert, float32 [E]; all depths of a head add.

    The tokens are those of all processes of `axis`.
    """
    loads: dict[str, Tensor] = {}
    for record in routing:
        count = record.experts.flatten().bincount(minlength=record.scores.shape[1]).float()
        loads[record.name] = loads[record.name] + count if record.name in loads else count
    if loads and axis is not None:
        counted = total(torch.stack(list(loads.values())), axis)
        loads = dict(zip(loads, counted, strict=True))
    return loads


def max_violations(loads: Mapping[str, Tensor]) -> dict[str, float]:
    """Return MaxVio by layer: the largest expert's load over the mean load; 1 is balance."""
    return {name: float(load.max() / load.mean()) for name, load in loads.items()}


def freeze_routers(model: HybridModel) -> None:
    """Let the weights of all routers get no gradient; before optimisers are made.

    Source: Nemotron 3's reinforcement learning, where the router is frozen (docs/training.md).
    """
    for module in model.modules():
        if isinstance(module, Gate):
            module.weight.requires_grad_(False)


@torch.no_grad()
def balance_experts(model: HybridModel, loads: Mapping[str, Tensor], rate: float) -> None:
    """Move each layer's selection bias by `rate` towards its underloaded experts."""
    if not rate:
        return
    for name, load in loads.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, MoE)
        bias = layer.gate.e_score_correction_bias
        bias += rate * torch.sign(load.mean() - load)
        # Only differences matter; centring keeps the values small over a long run.
        bias -= bias.mean()


def policy_figures(
    parts: Sequence[Mapping[str, Tensor]], domains: Sequence[str], axis: Axis
) -> dict[str, dict[str, Any]]:
    """Return means of the policy's figures over the tokens of `parts` of a step: all, by domain.

    `parts` are sums and counts as `Losses.policy` has them; tokens are those of all processes of
    `axis`, and `domains` the ones that any of them has.
    """
    none = torch.zeros(2, len(FIGURES), dtype=torch.float64)
    added = [sum((part.get(name, none) for part in parts), none) for name in domains]
    sums, counts = total(torch.stack(added), axis).unbind(1)
    found: dict[str, dict[str, Any]] = {"policy": {}, "policy_domains": {}}
    for i, name in enumerate(FIGURES):
        if counts[:, i].sum():
            found["policy"][name] = float(sums[:, i].sum() / counts[:, i].sum())
        for domain, value, count in zip(domains, sums[:, i], counts[:, i], strict=True):
            if count:
                found["policy_domains"].setdefault(domain, {})[name] = float(value / count)
    return found


@contextmanager
def residual_norms(model: HybridModel, wanted: bool) -> Iterator[dict[str, float]]:
    """Collect the root-mean-square of the residual stream after each layer of what runs inside."""
    found: dict[str, float] = {}
    if not wanted:
        yield found
        return

    def note(name: str, x: Tensor) -> None:
        found.setdefault(name, float(x.detach().float().square().mean().sqrt()))

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, x: note(name, x)

    hooks = [
        block.register_forward_hook(hook(name))
        for name, block in model.named_modules()
        if isinstance(block, Block)
    ]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()
