"""What training minimises: cross-entropy, divergence from a teacher, token heads, expert balance.

Every sum over tokens is divided by the batch's total weight, so that the loss does not depend on
how samples fell into steps. Source: docs/training.md; DeepSeek-V3 (arXiv 2412.19437) for MTP with
shared weights, the sequence-wise balance loss and balancing by bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aprium.base.errors import ConfigError
from aprium.model.layout import Layout
from aprium.model.model import HybridModel, Routing
from aprium.ops.logprob import kl_divergence, token_logprobs
from aprium.train.batch import Batch


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss.

    `ce_weight` scales the cross-entropy, and `kl_weight` the divergence KL(teacher || model) over
    the whole vocabulary, for which there must be a teacher. `mtp_weight` is the total over
    `mtp_depths` recursive applications of the prediction head.
    `balance_weight` scales the sequence-wise balance loss, `bias_rate` the step of the selection
    bias after each update.
    """

    ce_weight: float = 1.0
    kl_weight: float = 0.0
    mtp_weight: float = 0.1
    mtp_depths: int = 2
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.mtp_depths < 1:
            raise ConfigError(
                f"loss.mtp_depths is {self.mtp_depths}: it must be positive; to train no "
                "prediction head set loss.mtp_weight to 0"
            )
        for name in ("ce_weight", "kl_weight", "mtp_weight", "balance_weight", "bias_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}: it cannot be negative")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Losses:
    """One step's loss [] with gradients, and its parts as detached figures."""

    total: Tensor
    ce: float
    kl: float
    mtp: float
    balance: float
    logprobs: Tensor
    predicted: Tensor
    routing: list[Routing]


@dataclass(frozen=True, slots=True)
class Whole:
    """What sums are divided by: the total weight and number of samples of all parts of a step."""

    weight: float
    samples: int


def compute_losses(
    model: HybridModel,
    batch: Batch,
    config: LossConfig,
    teacher: HybridModel | None = None,
    *,
    whole: Whole | None = None,
    recompute: bool = False,
) -> Losses:
    """Run the model over `batch` and return the loss.

    `teacher` is what `kl_weight` asks for. Where `batch` is a part of a step, `whole` is the step,
    and losses of the parts add up to the step's. `recompute` keeps the inputs of layers alone and
    runs each again for its gradient. `logprobs` of the result are those of the tokens at indices
    `predicted` under the backbone.
    """
    routing: list[Routing] = []
    hidden = model(batch.tokens, batch.layout, routing=routing, recompute=recompute)
    head = model.head_weight
    predicted = batch.predicted(1)
    weights = batch.ce_weight[predicted]
    norm = weights.sum() if whole is None else whole.weight
    logprobs = token_logprobs(hidden[predicted - 1], head, batch.tokens[predicted])
    ce = -(logprobs * weights).sum() / norm
    total, kl, mtp = config.ce_weight * ce, torch.zeros(()), torch.zeros(())
    if config.kl_weight:
        assert teacher is not None
        with torch.no_grad():
            wanted = teacher(batch.tokens, batch.layout)[predicted - 1]
        found = kl_divergence(hidden[predicted - 1], head, wanted, teacher.head_weight)
        kl = (found * weights).sum() / norm
        total = total + config.kl_weight * kl
    if model.config.num_mtp_layers and config.mtp_weight:
        mtp = _mtp_loss(model, hidden, batch, config.mtp_depths, norm, routing, recompute)
        total = total + config.mtp_weight * mtp
    balance = sum_balance(routing, batch.layout)
    if whole is not None:
        balance = balance * (batch.layout.num_segments / whole.samples)
    if config.balance_weight:
        total = total + config.balance_weight * balance
    return Losses(
        total=total,
        ce=float(ce.detach()),
        kl=float(kl.detach()),
        mtp=float(mtp.detach()),
        balance=float(balance.detach()),
        logprobs=logprobs.detach(),
        predicted=predicted,
        routing=list(routing),  # what runs again for its gradient notes its routing again
    )


def _mtp_loss(
    model: HybridModel,
    hidden: Tensor,
    batch: Batch,
    depths: int,
    norm: Tensor | float,
    routing: list[Routing],
    recompute: bool,
) -> Tensor:
    """Mean over depths of the cross-entropy of token t + depth + 1 at position t."""
    total = torch.zeros(())
    for depth in range(1, depths + 1):
        # Rows whose next tokens lie beyond their document are never weighted; they read token 0,
        # so that their routing does not depend on what was packed behind them.
        next_tokens = batch.tokens.roll(-depth).where(batch.remaining() > depth, 0)
        hidden = model.predict(
            hidden,
            next_tokens,
            batch.layout,
            routing=routing,
            depth=depth - 1,
            recompute=recompute,
        )
        predicted = batch.predicted(depth + 1)
        rows, targets = hidden[predicted - depth - 1], batch.tokens[predicted]
        logprobs = token_logprobs(rows, model.head_weight, targets)
        total = total - (logprobs * batch.ce_weight[predicted]).sum() / norm
    return total / depths


def sum_balance(routing: Sequence[Routing], layout: Layout) -> Tensor:
    """Return the sequence-wise balance loss summed over MoE layers (1 per layer at balance)."""
    return torch.stack([_balance(r, layout) for r in routing]).sum() if routing else torch.zeros(())


def _balance(routing: Routing, layout: Layout) -> Tensor:
    """sum_e f_e P_e of each sequence, averaged: f counts choices, P averages shares of score."""
    scores, experts = routing.scores, routing.experts
    num_experts, num_active = scores.shape[1], experts.shape[1]
    lengths = torch.tensor(layout.lengths, device=scores.device).unsqueeze(1)
    shape = (layout.num_segments, num_experts)
    chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0)
    counts = scores.new_zeros(shape).index_add_(0, layout.segment_ids, chosen)
    shares = scores / scores.sum(-1, keepdim=True)
    means = scores.new_zeros(shape).index_add(0, layout.segment_ids, shares) / lengths
    return (counts * num_experts / (num_active * lengths) * means).sum(-1).mean()
