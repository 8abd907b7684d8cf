"""Losses of reinforcement learning and of distillation on the policy's own tokens, token by token.

Pure functions of flat tensors: one entry a token, in sequences. Three policies meet: the one that
wrote a token (behaviour), the one at the start of the step (prox, which is the current one unless
log-probabilities of its own are given) and the one being trained. Nothing is divided here: the
normaliser is that of a whole step, and so not known to a part of it. Sources: PPO (arXiv
1707.06347), GRPO (2402.03300), DAPO's clip-higher (2503.14476), dual clip (1912.09729), GSPO
(2507.18071), CISPO (2506.13585), Dr. GRPO (2503.20783), IcePop and MOPD (docs/training.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aprium.base.config import require_finite
from aprium.base.errors import ConfigError

# A probability mass of the tail below this counts as this: float32 cannot tell it from none.
_LEAST_TAIL = 1e-6


# What may be inf, which is no bound.
_BOUNDS = (
    *("eps_high", "dual_clip", "mismatch_high"),
    *("sequence_bound", "geometric_band", "advantage_clip"),
)


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """How sampled tokens with an `rl_weight` are learnt, and in what form teachers speak.

    `proximal` is the policy that the trained one is held near: that at the "start" of the step, or
    what wrote the token, its "behaviour", so that ratio and clips are of all that changed since
    (asynchronous PPO). With "start" and one update of a batch the ratio is 1.

    `ratio` of current and proximal policy is of the token, of its whole "sequence" (geometric mean,
    GSPO) or "off": value 1 (REINFORCE). "clip" takes the worse of the surrogate and the one clipped
    to 1 - `eps_low`, 1 + `eps_high` (PPO), for negative advantages no worse than `dual_clip` times
    the advantage; "cispo" clips the ratio as a weight of the log-probability, so that no token
    loses its gradient.

    `mismatch` is what is made of the ratio of the policy at the start and behaviour policy:
    nothing, "truncate" to `mismatch_low`, `mismatch_high`, or "icepop", 0 outside of them; it is no
    weight of its own where `proximal` is "behaviour", since the ratio has it. A sequence is left
    out where the mean of exp |log-ratio| is above `sequence_bound`, or the geometric mean of the
    ratio outside `geometric_band`.

    `normalise` divides by the weights of all "tokens" of the step; by those of "sequences", each
    the mean of its tokens; or by "fixed" lengths of `fixed_length` (Dr. GRPO). Advantages, and the
    teacher's part of them, are clipped to plus or minus `advantage_clip`.

    `distillation`: "sampled" adds `kl_weight` times (teacher - policy at the start) of the sampled
    token to the advantage, the reverse KL by policy gradient; the others are terms of their own,
    scaled by `loss.kl_weight`: "k3" estimates the reverse KL from the sampled token (a penalty to
    stay near a reference), "top_k" compares the teacher's most probable tokens and one bucket of
    all others, "full" the vocabulary of a teacher in this process. `direction` of the last two is
    "reverse", KL(model || teacher), or "forward".
    """

    proximal: Literal["start", "behaviour"] = "start"
    ratio: Literal["token", "sequence", "off"] = "token"
    surrogate: Literal["clip", "cispo"] = "clip"
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None
    mismatch: Literal["none", "truncate", "icepop"] = "truncate"
    mismatch_low: float = 0.2
    mismatch_high: float = 5.0
    sequence_bound: float | None = 2.0
    geometric_band: tuple[float, float] | None = None
    normalise: Literal["tokens", "sequences", "fixed"] = "tokens"
    fixed_length: int | None = None
    advantage_clip: float | None = 20.0
    distillation: Literal["sampled", "k3", "top_k", "full"] = "sampled"
    direction: Literal["reverse", "forward"] = "reverse"

    def __post_init__(self) -> None:
        """Check ranges, and that nothing is asked in vain."""
        where = "loss.policy"
        require_finite(self, where, infinite=_BOUNDS)
        if not 0 <= self.eps_low <= 1:
            raise ConfigError(f"{where}.eps_low is {self.eps_low}: it must be in 0..1")
        if self.eps_high < 0:
            raise ConfigError(f"{where}.eps_high is {self.eps_high}: it cannot be negative")
        if self.dual_clip is not None and self.dual_clip <= 1 + self.eps_high:
            raise ConfigError(
                f"{where}.dual_clip is {self.dual_clip}: it must be above 1 + eps_high, "
                f"{1 + self.eps_high:g}"
            )
        if self.dual_clip is not None and self.surrogate == "cispo":
            raise ConfigError(
                f"{where}.dual_clip is of surrogate 'clip': leave it out with 'cispo'"
            )
        if not 0 <= self.mismatch_low <= 1 <= self.mismatch_high:
            raise ConfigError(
                f"{where}.mismatch_low and mismatch_high are {self.mismatch_low:g} and "
                f"{self.mismatch_high:g}: 1 must lie between them, and none be negative"
            )
        if self.proximal == "behaviour" and self.mismatch == "icepop":
            raise ConfigError(
                f"{where}.mismatch is 'icepop' and proximal 'behaviour', whose ratio has the "
                "mismatch: leave it out and bound the ratio by eps_low and eps_high"
            )
        if self.sequence_bound is not None and self.sequence_bound < 1:
            raise ConfigError(
                f"{where}.sequence_bound is {self.sequence_bound}: the mean it bounds is never "
                "below 1"
            )
        band = self.geometric_band
        if band is not None and not 0 < band[0] <= 1 <= band[1]:
            raise ConfigError(f"{where}.geometric_band is {list(band)}: 1 must lie between them")
        if (self.normalise == "fixed") != (self.fixed_length is not None):
            raise ConfigError(
                f"{where}.normalise is {self.normalise!r} and fixed_length {self.fixed_length}: "
                "give the length with 'fixed', and only with it"
            )
        if self.fixed_length is not None and self.fixed_length < 1:
            raise ConfigError(f"{where}.fixed_length is {self.fixed_length}: it must be positive")
        if self.advantage_clip is not None and self.advantage_clip <= 0:
            raise ConfigError(
                f"{where}.advantage_clip is {self.advantage_clip}: it must be positive; set it to "
                "false for none"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyTokens:
    """Sampled tokens of a step, or of a process's part of it; every tensor [R], all of them flat.

    `logprobs` are the current ones, with gradient. `sequences` int64 numbers each token's sequence,
    of which there are `num_sequences`. `behaviour`, `prox` and `teacher` are NaN where they were
    not given; `kl_weights` weigh the teacher. All tokens have a positive weight in the loss.
    """

    logprobs: Tensor
    advantages: Tensor
    behaviour: Tensor
    prox: Tensor
    kl_weights: Tensor
    teacher: Tensor
    sequences: Tensor
    num_sequences: int


# Figures of `policy_losses`, each the mean over the tokens that it is of.
FIGURES = ("mismatch", "masked", "clipped", "entropy", "advantage", "teacher_gap")


def loss_weights(
    weights: Tensor, sequences: Tensor, num_sequences: int, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Return what each token counts, [R], and float64 [] what the sum over a step is divided by.

    `weights` [R] are the samples' `rl_weight`. A sequence counts as much as the mean of its weights
    that are not 0; one that has none does not count.
    """
    if config.normalise == "tokens":
        return weights, weights.double().sum()
    zeros = weights.new_zeros(num_sequences)
    counts = zeros.index_add(0, sequences, (weights != 0).to(weights.dtype))
    sums = zeros.index_add(0, sequences, weights)
    norm = (sums.double() / counts.clamp(min=1)).sum()
    if config.normalise == "sequences":
        return weights / counts.clamp(min=1)[sequences], norm
    assert config.fixed_length is not None
    return weights / config.fixed_length, norm


def policy_losses(
    tokens: PolicyTokens,
    config: PolicyLossConfig,
    gather: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Return each token's loss, [R] with gradient, and its figures, [R, figures].

    `gather` sums a tensor over the processes that hold other tokens of the same sequences. A figure
    that a token has no part in is NaN.
    """
    with torch.no_grad():
        current = tokens.logprobs.detach()
        start = torch.where(tokens.prox.isnan(), current, tokens.prox)
        behaviour = torch.where(tokens.behaviour.isnan(), start, tokens.behaviour)
        advantages = _advantages(tokens, start, config)
        mean = _Mean(tokens, gather)
        weight = _mismatch_weight(start - behaviour, mean, config)
    proximal = behaviour if config.proximal == "behaviour" else start
    difference = tokens.logprobs - (current if config.ratio == "off" else proximal)
    if config.ratio == "sequence":
        # The value is the sequence's, the gradient the token's (GSPO-token).
        own = tokens.logprobs - current
        difference = mean(difference.detach()) + own
    ratio = difference.exp()
    clipped = ratio.detach().clamp(1 - config.eps_low, 1 + config.eps_high)
    if config.surrogate == "cispo":
        losses = -weight * clipped * advantages * tokens.logprobs
        active = clipped != ratio.detach()
    else:
        plain, limited = ratio * advantages, clipped * advantages
        gains = torch.where(plain <= limited, plain, limited)  # of equals the one with gradient
        if config.dual_clip is not None:
            floor = torch.where(advantages < 0, config.dual_clip * advantages, -torch.inf)
            gains = torch.where(gains >= floor, gains, floor)
        losses = -weight * gains
        active = gains.detach() != plain.detach()
    gap = torch.where(tokens.kl_weights != 0, start - tokens.teacher, torch.nan)
    seen = (start - behaviour).abs().exp().where(~tokens.behaviour.isnan(), torch.nan)
    figures = (seen, weight == 0, active, -current, advantages, gap)
    return losses, torch.stack([figure.to(current.dtype) for figure in figures], -1)


def _advantages(tokens: PolicyTokens, start: Tensor, config: PolicyLossConfig) -> Tensor:
    bound = torch.inf if config.advantage_clip is None else config.advantage_clip
    advantages = tokens.advantages.clamp(-bound, bound)
    if config.distillation != "sampled":
        return advantages
    said = (tokens.teacher - start).clamp(-bound, bound)
    return advantages + torch.where(tokens.kl_weights != 0, tokens.kl_weights * said, 0.0)


class _Mean:
    """Means over the tokens of each sequence, for each of its tokens."""

    def __init__(self, tokens: PolicyTokens, gather: Callable[[Tensor], Tensor]) -> None:
        self._sequences, self._gather = tokens.sequences, gather
        self._zeros = tokens.logprobs.detach().new_zeros(tokens.num_sequences)
        self._counts = self._sum(torch.ones_like(tokens.logprobs)).clamp(min=1)

    def _sum(self, values: Tensor) -> Tensor:
        return self._gather(self._zeros.index_add(0, self._sequences, values))

    def __call__(self, values: Tensor) -> Tensor:
        """Return the mean of `values` [R] over each token's sequence, [R]."""
        return (self._sum(values) / self._counts)[self._sequences]


def _mismatch_weight(log_ratio: Tensor, mean: _Mean, config: PolicyLossConfig) -> Tensor:
    """Return m * c: what a token counts, given the log-ratio of policy at start and behaviour."""
    ratio, low, high = log_ratio.exp(), config.mismatch_low, config.mismatch_high
    if config.proximal == "behaviour":  # c is in the ratio that is trained
        weight = torch.ones_like(ratio)
    elif config.mismatch == "truncate":
        weight = ratio.clamp(low, high)
    elif config.mismatch == "icepop":
        weight = ratio.where((ratio >= low) & (ratio <= high), 0.0)
    else:
        weight = torch.ones_like(ratio)
    if config.sequence_bound is not None:
        weight = weight.where(mean(log_ratio.abs().exp()) <= config.sequence_bound, 0.0)
    if config.geometric_band is not None:
        low, high = config.geometric_band
        geometric = mean(log_ratio).exp()
        weight = weight.where((geometric >= low) & (geometric <= high), 0.0)
    return weight


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(model || reference) of each token from the sampled one, [R], never negative.

    Source: http://joschu.net/blog/kl-approx.html, the third estimator.
    """
    difference = reference - logprobs
    return difference.expm1() - difference


def top_k_divergence(logprobs: Tensor, teacher: Tensor, *, reverse: bool) -> Tensor:
    """Return the divergence of each token over the teacher's top tokens and all others as one, [R].

    `logprobs` [R, K] are the model's of those tokens, with gradient; `teacher` [R, K] the
    teacher's, -inf where it named fewer. Never above the divergence over the whole vocabulary.
    `reverse` gives KL(model || teacher).
    """
    named = teacher > -torch.inf
    mine, theirs = (_with_tail(x, named) for x in (logprobs, teacher))
    first, second = (mine, theirs) if reverse else (theirs, mine)
    terms = first.exp() * (first - second)
    return torch.cat((terms[:, :-1].where(named, 0.0), terms[:, -1:]), -1).sum(-1)


def _with_tail(logprobs: Tensor, named: Tensor) -> Tensor:
    """Append the log-probability of all tokens that are not `named`; the others become 0."""
    kept = logprobs.where(named, 0.0)
    mass = kept.exp().where(named, 0.0).sum(-1, keepdim=True)
    return torch.cat((kept, (1 - mass).clamp(min=_LEAST_TAIL).log()), -1)
