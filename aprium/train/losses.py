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
from aprium.parallel.collectives import total as sum_over
from aprium.parallel.mesh import Axis, Mesh
from aprium.train.batch import Batch


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss.

    `ce_weight` scales the cross-entropy, and `kl_weight` the divergence KL(teacher || model) over
    the whole vocabulary, for which there must be a teacher. `mtp_weight` is the total over
    `mtp_depths` recursive applications of the prediction head.
    `balance_weight` scales the sequence-wise balance loss, `bias_rate` the step of the selection
    bias after each update, which falls with the learning rates.
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
    """One step's loss [] with gradients, and its parts as detached figures.

    `total`, `logprobs`, `predicted` and `routing` are of this process's share of the tokens, the
    figures of all.
    """

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
    mesh, rows = model.mesh, model.mesh.rows(batch.layout.num_tokens)
    hidden = model(batch.tokens, batch.layout, routing=routing, recompute=recompute)
    head = model.head_weight
    whole = whole or _whole(batch, mesh)
    norm = whole.weight
    predicted = _own(batch.predicted(1), 1, rows, mesh)
    weights = batch.ce_weight[predicted]
    own = hidden[predicted - 1 - rows.start]
    logprobs = token_logprobs(own, head, batch.tokens[predicted])
    ce = -(logprobs * weights).sum() / norm
    total, kl, mtp = config.ce_weight * ce, torch.zeros(()), torch.zeros(())
    if config.kl_weight:
        assert teacher is not None
        with torch.no_grad():
            wanted = teacher(batch.tokens, batch.layout)[predicted - 1]
        found = kl_divergence(own, head, wanted, teacher.head_weight)
        kl = (found * weights).sum() / norm
        total = total + config.kl_weight * kl
    if model.config.num_mtp_layers and config.mtp_weight:
        mtp = _mtp_loss(model, hidden, batch, config.mtp_depths, norm, routing, recompute)
        total = total + config.mtp_weight * mtp
    own_tokens = max(0, min(rows.stop, batch.num_tokens) - rows.start)
    routing = [Routing(r.name, r.scores[:own_tokens], r.experts[:own_tokens]) for r in routing]
    balance = sum_balance(routing, batch.layout, mesh, whole.samples)
    if config.balance_weight:
        total = total + config.balance_weight * balance
    figures = torch.stack([figure.detach() for figure in (ce, kl, mtp, balance)])
    figures = sum_over(figures, mesh.data).tolist()
    return Losses(
        total=total,
        ce=figures[0],
        kl=figures[1],
        mtp=figures[2],
        balance=figures[3],
        logprobs=logprobs.detach(),
        predicted=predicted,
        routing=routing,  # a copy: what runs again for its gradient notes its routing again
    )


def _whole(batch: Batch, mesh: Mesh) -> Whole:
    """Return the weight and the number of the samples of all processes."""
    weight = batch.ce_weight[batch.predicted(1)].sum()
    counts = sum_over(torch.stack((weight, weight.new_tensor(batch.num_samples))), mesh.dp)
    return Whole(float(counts[0]), int(counts[1]))


def _own(predicted: Tensor, ahead: int, rows: slice, mesh: Mesh) -> Tensor:
    """Return those of `predicted` whose hidden state, `ahead` before them, is one of `rows`."""
    if mesh.cp.size == 1:
        return predicted
    index = predicted - ahead
    return predicted[(index >= rows.start) & (index < rows.stop)]


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
    total, rows = torch.zeros(()), model.mesh.rows(batch.layout.num_tokens)
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
        predicted = _own(batch.predicted(depth + 1), depth + 1, rows, model.mesh)
        own = hidden[predicted - depth - 1 - rows.start]
        logprobs = token_logprobs(own, model.head_weight, batch.tokens[predicted])
        total = total - (logprobs * batch.ce_weight[predicted]).sum() / norm
    return total / depths


def sum_balance(
    routing: Sequence[Routing],
    layout: Layout,
    mesh: Mesh | None = None,
    num_samples: int | None = None,
) -> Tensor:
    """Return the sequence-wise balance loss summed over MoE layers (1 per layer at balance).

    On a `mesh` it is this process's share, and `num_samples` the sequences of all processes.
    """
    if not routing:
        return torch.zeros(())
    mesh = mesh or Mesh()
    first = mesh.rows(layout.num_tokens).start
    count = num_samples or layout.num_segments
    return torch.stack([_balance(r, layout, first, mesh.cp) / count for r in routing]).sum()


def _balance(routing: Routing, layout: Layout, first: int, axis: Axis) -> Tensor:
    """sum_e f_e P_e of each sequence, summed: f counts choices, P averages shares of score.

    The process has the tokens from `first` on; those of one sequence may lie on several of `axis`.
    """
    scores, experts = routing.scores, routing.experts
    num_experts, num_active = scores.shape[1], experts.shape[1]
    lengths = torch.tensor(layout.lengths, device=scores.device).unsqueeze(1)
    shape, ids = (layout.num_segments, num_experts), layout.segment_ids[first:][: len(scores)]
    chosen = torch.zeros_like(scores).scatter_(1, experts, 1.0)
    counts = sum_over(scores.new_zeros(shape).index_add_(0, ids, chosen), axis)
    shares = scores / scores.sum(-1, keepdim=True)
    means = scores.new_zeros(shape).index_add(0, ids, shares) / lengths
    return (counts * num_experts / (num_active * lengths) * means).sum(-1).sum()
