"""What training minimises: cross-entropy, policy, teachers, token heads, expert balance.

Every sum over tokens is divided by the batch's total weight, so that the loss does not depend on
how samples fell into steps. Source: docs/training.md; DeepSeek-V3 (arXiv 2412.19437) for MTP with
shared weights, the sequence-wise balance loss and balancing by bias.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aprium.base.config import require_finite
from aprium.base.errors import ConfigError, DataError
from aprium.model.layout import Layout
from aprium.model.model import HybridModel, Routing
from aprium.ops.logprob import kl_divergence, log_normalizers, token_logprobs, weighted_logprob
from aprium.parallel.collectives import total as sum_over
from aprium.parallel.mesh import Axis, Mesh
from aprium.train.batch import Batch
from aprium.train.policy_loss import (
    PolicyLossConfig,
    PolicyTokens,
    k3,
    loss_weights,
    policy_losses,
    top_k_divergence,
)

Teacher = HybridModel | Mapping[str, HybridModel]  # one for all, or by domain


_WEIGHTS = ("ce_weight", "kl_weight", "mtp_weight", "z_weight", "balance_weight")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss.

    `ce_weight` scales the cross-entropy; `policy` is what is made of sampled tokens and teachers.
    `kl_weight` scales the divergence from teachers where `policy.distillation` makes it a term of
    its own; "full" is KL over the whole vocabulary, for which there must be a teacher, and takes
    samples without a `kl_weight` by their `ce_weight`. `mtp_weight` is the total over `mtp_depths`
    recursive applications of the prediction head, on all tokens with a `ce_weight` or `rl_weight`;
    with `mtp_detach` only the head learns from it. `z_weight` scales the square of the logarithm of
    the softmax's denominator (PaLM, arXiv 2204.02311), which keeps logits small. `balance_weight`
    scales the sequence-wise balance loss, `bias_rate` the step of the selection bias after each
    update, which falls with the learning rates.
    """

    ce_weight: float = 1.0
    kl_weight: float = 1.0
    mtp_weight: float = 0.1
    mtp_depths: int = 2
    mtp_detach: bool = False
    z_weight: float = 0.0
    balance_weight: float = 1e-4
    bias_rate: float = 1e-3
    policy: PolicyLossConfig = field(default_factory=PolicyLossConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        require_finite(self, "loss")
        if self.mtp_depths < 1:
            raise ConfigError(
                f"loss.mtp_depths is {self.mtp_depths}: it must be positive; to train no "
                "prediction head set loss.mtp_weight to 0"
            )
        for name in (*_WEIGHTS, "bias_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}: it cannot be negative")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Losses:
    """One step's loss [] with gradients, and its parts as detached figures.

    `total`, `logprobs`, `predicted`, `routing` and `policy` are of this process's share of the
    tokens, the figures of all. `policy` has by domain the sums and counts of `FIGURES`, float64
    [2, figures].
    """

    total: Tensor
    ce: float
    kl: float
    mtp: float
    balance: float
    rl: float = 0.0
    z: float = 0.0
    logprobs: Tensor
    predicted: Tensor
    routing: list[Routing]
    policy: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Whole:
    """What sums are divided by: totals of all parts of a step, on all processes.

    `weight` is that of the cross-entropy, `head` of the prediction head's, `rl` and `kl` of the
    policy's and the divergence from teachers.
    """

    weight: float
    samples: float
    head: float
    rl: float
    kl: float

    @classmethod
    def of(cls, batches: Sequence[Batch], config: LossConfig, mesh: Mesh) -> "Whole":
        """Count `batches`, which are this process's parts of a step."""
        counts = torch.zeros(5, dtype=torch.float64)
        for batch in batches:
            rl = batch.stream("rl_weight", 0.0)
            ids, num = batch.layout.segment_ids, batch.layout.num_segments
            values = (
                *(batch.ce_weight.double().sum(), batch.num_samples),
                *(
                    _head_weights(batch).double().sum(),
                    loss_weights(rl, ids, num, config.policy)[1],
                ),
                _teacher_weights(batch, config.policy).double().sum(),
            )
            counts += torch.tensor([float(value) for value in values], dtype=torch.float64)
        return cls(*sum_over(counts, mesh.dp).tolist())


def _head_weights(batch: Batch) -> Tensor:
    """Return what a token weighs for the prediction head, [T]: all that is learnt in any way."""
    return batch.ce_weight + batch.stream("rl_weight", 0.0)


def _teacher_weights(batch: Batch, config: PolicyLossConfig) -> Tensor:
    """Return what a token weighs in the divergence from teachers, [T]."""
    if config.distillation == "sampled":
        return torch.zeros_like(batch.ce_weight)
    if config.distillation == "full":
        given = batch.stream("kl_weight", math.nan)
        return given.where(~given.isnan(), batch.ce_weight)
    return batch.stream("kl_weight", 0.0)


def compute_losses(
    model: HybridModel,
    batch: Batch,
    config: LossConfig,
    teacher: Teacher | None = None,
    *,
    whole: Whole | None = None,
    recompute: bool = False,
) -> Losses:
    """Run the model over `batch` and return the loss.

    `teacher` is what the full form of distillation asks for. Where `batch` is a part of a step,
    `whole` is the step, and losses of the parts add up to the step's. `recompute` keeps the inputs
    of layers alone and runs each again for its gradient. `logprobs` of the result are those of the
    tokens at indices `predicted` under the backbone. Raises ConfigError for a domain that no
    teacher has, DataError for samples that lack what the form of distillation needs.
    """
    routing: list[Routing] = []
    mesh, rows = model.mesh, model.mesh.rows(batch.layout.num_tokens)
    hidden = model(batch.tokens, batch.layout, routing=routing, recompute=recompute)
    whole = whole or Whole.of([batch], config, mesh)
    learnt = batch.ce_weight.abs() + batch.stream("rl_weight", 0.0).abs()
    if config.policy.distillation == "k3":
        learnt = learnt + batch.stream("kl_weight", 0.0).abs()
    predicted = _own(batch.predicted(1, learnt), 1, rows, mesh)
    own = hidden[predicted - 1 - rows.start]
    weights, wanted = batch.ce_weight[predicted], batch.tokens[predicted]
    apart = bool(whole.rl) or config.policy.distillation == "k3"
    said, logprobs = _said(own, model.head_weight, wanted, weights, apart)
    ce = -said / (whole.weight or 1.0)
    rl, policy = _policy_loss(logprobs, predicted, batch, config.policy, mesh, whole)
    total = config.ce_weight * ce + rl
    kl, mtp, z = torch.zeros(()), torch.zeros(()), torch.zeros(())
    if config.z_weight:
        z = (log_normalizers(own, model.head_weight).square() * weights).sum()
        z = z / (whole.weight or 1.0)
        total = total + config.z_weight * z
    if whole.kl and config.kl_weight:
        reached = _divergence(model, hidden, logprobs, predicted, batch, config.policy, teacher)
        kl = reached / whole.kl
        total = total + config.kl_weight * kl
    if model.config.num_mtp_layers and config.mtp_weight and whole.head:
        mtp = _mtp_loss(model, hidden, batch, config, whole.head, routing, recompute)
        total = total + config.mtp_weight * mtp
    own_tokens = max(0, min(rows.stop, batch.num_tokens) - rows.start)
    routing = [Routing(r.name, r.scores[:own_tokens], r.experts[:own_tokens]) for r in routing]
    balance = sum_balance(routing, batch.layout, mesh, int(whole.samples))
    if config.balance_weight:
        total = total + config.balance_weight * balance
    figures = torch.stack([figure.detach() for figure in (ce, kl, mtp, balance, rl, z)])
    figures = sum_over(figures, mesh.data).tolist()
    return Losses(
        total=total,
        ce=figures[0],
        kl=figures[1],
        mtp=figures[2],
        balance=figures[3],
        rl=figures[4],
        z=figures[5],
        logprobs=logprobs.detach(),
        predicted=predicted,
        routing=routing,  # a copy: what runs again for its gradient notes its routing again
        policy=policy,
    )


def _said(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, apart: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of log-probabilities, and these; with `apart` they have gradients."""
    if not apart:
        return weighted_logprob(hidden, head, targets, weights)
    logprobs = token_logprobs(hidden, head, targets)
    return (logprobs * weights).sum(), logprobs


def _policy_loss(
    logprobs: Tensor,
    predicted: Tensor,
    batch: Batch,
    config: PolicyLossConfig,
    mesh: Mesh,
    whole: Whole,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this process's share of the policy's loss, and its figures by domain."""
    weights = batch.stream("rl_weight", 0.0)
    if not whole.rl or "rl_weight" not in batch.streams:
        return torch.zeros(()), {}
    sequences, num = batch.layout.segment_ids, batch.layout.num_segments
    scaled = loss_weights(weights, sequences, num, config)[0]
    chosen = weights[predicted] != 0
    at = predicted[chosen]
    tokens = PolicyTokens(
        logprobs=logprobs[chosen],
        advantages=batch.stream("advantage", 0.0)[at],
        behaviour=batch.stream("behaviour_logprob", math.nan)[at],
        prox=batch.stream("prox_logprob", math.nan)[at],
        kl_weights=batch.stream("kl_weight", 0.0)[at],
        teacher=batch.stream("teacher_logprob", math.nan)[at],
        sequences=sequences[at],
        num_sequences=num,
    )
    if config.distillation == "sampled" and tokens.teacher[tokens.kl_weights != 0].isnan().any():
        raise DataError(_LACKING.format(what="teacher_logprob", form="sampled"))
    losses, figures = policy_losses(tokens, config, lambda x: sum_over(x, mesh.cp))
    found = {}
    for i, name in enumerate(batch.domain_names):
        mine = figures[batch.domains[at] == i].double()
        found[name] = torch.stack((mine.nansum(0), (~mine.isnan()).double().sum(0)))
    return (losses * scaled[at]).sum() / whole.rl, found


_LACKING = (
    "a sample has a kl_weight and no {what}, which loss.policy.distillation = {form!r} needs: let "
    "its teacher score it"
)


def _divergence(
    model: HybridModel,
    hidden: Tensor,
    logprobs: Tensor,
    predicted: Tensor,
    batch: Batch,
    config: PolicyLossConfig,
    teacher: Teacher | None,
) -> Tensor:
    """Return this process's weighted sum of the divergences from teachers."""
    weights, form = _teacher_weights(batch, config), config.distillation
    if form == "k3":
        chosen = weights[predicted] != 0
        at = predicted[chosen]
        reference = batch.stream("teacher_logprob", math.nan)[at]
        if reference.isnan().any():
            raise DataError(_LACKING.format(what="teacher_logprob", form=form))
        return (k3(logprobs[chosen], reference) * weights[at]).sum()
    rows, reverse = model.mesh.rows(batch.layout.num_tokens), config.direction == "reverse"
    at = _own(batch.predicted(1, weights), 1, rows, model.mesh)
    own = hidden[at - 1 - rows.start]
    if form == "full":
        assert teacher is not None
        found = _full_divergence(own, model.head_weight, at, batch, teacher, reverse)
    else:
        if len(at) and (batch.top is None or (batch.top[1][at, 0] == -math.inf).any()):
            raise DataError(_LACKING.format(what="teacher_top", form=form))
        ids, named = (batch.top[0][at], batch.top[1][at]) if batch.top else (at[:, None],) * 2
        mine = token_logprobs(own, model.head_weight, ids)
        found = top_k_divergence(mine, named, reverse=reverse)
    return (found * weights[at]).sum()


def _full_divergence(
    own: Tensor, head: Tensor, at: Tensor, batch: Batch, teacher: Teacher, reverse: bool
) -> Tensor:
    """Return the divergence of the tokens at indices `at`, [R], each from its domain's teacher."""
    if isinstance(teacher, HybridModel):
        teacher = dict.fromkeys(batch.domain_names, teacher)
    layout, found, places = batch.layout, [own.new_zeros(0)], [at.new_zeros(0)]
    domains = [batch.domain_names[i] for i in batch.domains[list(layout.starts)].tolist()]
    for name in {batch.domain_names[i] for i in batch.domains[at].unique().tolist()}:
        if name not in teacher:
            known = ", ".join(teacher)
            raise ConfigError(f"no teacher has domain {name!r}: there are those of {known}")
    for one in {id(model): model for model in teacher.values()}.values():
        has = torch.tensor([teacher.get(name) is one for name in domains])
        kept = has[layout.segment_ids]
        mine = kept[at].nonzero().squeeze(1)
        if not len(mine):
            continue
        lengths = [n for n, wanted in zip(layout.lengths, has.tolist(), strict=True) if wanted]
        with torch.no_grad():
            hidden = one(batch.tokens[kept], Layout.packed(lengths))
        wanted = hidden[(kept.cumsum(0) - 1)[at[mine] - 1]]
        found.append(kl_divergence(own[mine], head, wanted, one.head_weight, reverse=reverse))
        places.append(mine)
    return torch.cat(found)[torch.cat(places).argsort()]


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
    config: LossConfig,
    norm: float,
    routing: list[Routing],
    recompute: bool,
) -> Tensor:
    """Mean over depths of the cross-entropy of token t + depth + 1 at position t."""
    total, rows = torch.zeros(()), model.mesh.rows(batch.layout.num_tokens)
    weights, depths, head = _head_weights(batch), config.mtp_depths, model.head_weight
    if config.mtp_detach:
        hidden, head = hidden.detach(), head.detach()
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
            detach=config.mtp_detach,
        )
        predicted = _own(batch.predicted(depth + 1, weights), depth + 1, rows, model.mesh)
        own = hidden[predicted - depth - 1 - rows.start]
        wanted = batch.tokens[predicted]
        total = total - weighted_logprob(own, head, wanted, weights[predicted])[0] / norm
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
