"""Choose tokens from logits: greedy, temperature, top-k, top-p, min-p, each row by itself.

Every row has its own parameters, seed and position. The random number of a row is a hash of its
seed and position, and the choice inverts the distribution function, summed in the order of token
ids; so a sequence draws the same tokens whatever it is batched with, and after a preemption. Only
operations that treat rows one by one in a fixed order are used (softmax, cumulative sum, top-k,
comparison), never a sum over the vocabulary that may be split by the number of rows.
Biases and a mask, where a row has them, come before everything else: what a mask bars is not there.
Filters keep ties: a token as probable as the last one kept is kept.
Source: SplitMix64 (Steele, Lea, Flood 2014) for the hash.
Letters: R rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aprium.base.records import SamplingParams, TopLogprobs

_MASK = 2**64 - 1
# Below this temperature every choice is the most probable token, in float32.
_MIN_TEMPERATURE = 1e-5
# Most nuclei end among so many tokens; only rows whose does not are sorted in full.
_NUCLEUS_GUESS = 512


# For each row of logits [R, V]: the first largest token, its logit, the log of the sum of
# e^(logit - largest). A kernel's; without one, PyTorch does the same in `sample` and `score`.
Pick = Callable[[Tensor], Sequence[tuple[int, float, float]]]


class Choice(NamedTuple):
    """A chosen token, its log-probability before temperature and filters, and alternatives."""

    token: int
    logprob: float
    alternatives: TopLogprobs


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) that belongs to `position` of the request with `seed`."""
    # 48 bits, so that the product with a sum of probabilities never rounds up to that sum.
    return (_mix(_mix(seed) + position) >> 16) / 2**48


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of continuation `index` of a request; index 0 keeps the request's own."""
    if index == 0:
        return seed
    return (_mix(_mix(seed) ^ index) >> 1) - 2**62


def _mix(value: int) -> int:
    """Scramble 64 bits (one step of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    pick: Pick | None = None,
    masks: Sequence[bytes | None] = (),
) -> list[Choice]:
    """Choose a token for each row of `logits` float32 [R, V].

    `seeds[i]` and `positions[i]` (of the token to be chosen) fix the random number of row i.
    `masks[i]` says which tokens row i may choose: bit j of it, lowest first, is token j; None, or
    no `masks`, leaves all. Log-probabilities are those before masks and biases.
    """
    if pick is not None:
        return _sample_picked(logits, params, seeds, positions, pick, masks)
    logprobs = F.log_softmax(logits, -1)
    allowed = _masked(logits, params, masks)
    tokens = allowed.argmax(-1)  # ties go to the lowest id
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        numbers = [uniform(seeds[i], positions[i]) for i in drawn]
        rows = allowed if len(drawn) == len(params) else allowed[drawn]
        tokens[drawn] = draw(rows, [params[i] for i in drawn], numbers)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    alternatives: list[TopLogprobs] = [
        top_alternatives(logprobs[i : i + 1], p.logprobs)[0] if p.logprobs else {}
        for i, p in enumerate(params)
    ]
    return [Choice(*c) for c in zip(tokens.tolist(), chosen, alternatives, strict=True)]


def _sample_picked(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    pick: Pick,
    masks: Sequence[bytes | None],
) -> list[Choice]:
    """Do as `sample` does, with the largest token and the mass of each row from a kernel."""
    picked = pick(logits)
    # peak - peak is 0, or NaN where the peak is not finite.
    choices = [Choice(token, peak - peak - log_mass, {}) for token, peak, log_mass in picked]
    masked = {i for i, mask in enumerate(masks) if mask is not None}
    masked |= {i for i, p in enumerate(params) if p.logit_bias}
    allowed = _masked(logits, params, masks)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    tokens = {i: int(allowed[i].argmax()) for i in masked if not params[i].temperature}
    if drawn:
        numbers = [uniform(seeds[i], positions[i]) for i in drawn]
        rows = allowed if len(drawn) == len(params) else allowed[drawn]
        found = draw(rows, [params[i] for i in drawn], numbers)
        tokens |= zip(drawn, found.tolist(), strict=True)
    if tokens:
        norms = torch.tensor([picked[i][1:] for i in tokens])
        chosen = logits[list(tokens), list(tokens.values())] - norms[:, 0] - norms[:, 1]
        for i, logprob in zip(tokens, chosen.tolist(), strict=True):
            choices[i] = Choice(tokens[i], logprob, {})
    for i, p in enumerate(params):
        if p.logprobs:
            _, peak, log_mass = picked[i]
            alternatives = top_alternatives(logits[i : i + 1] - peak - log_mass, p.logprobs)[0]
            choices[i] = choices[i]._replace(alternatives=alternatives)
    return choices


def _masked(
    logits: Tensor, params: Sequence[SamplingParams], masks: Sequence[bytes | None]
) -> Tensor:
    """Return `logits` [R, V] with biases, and minus infinity where a row's mask has no bit."""
    rows = [i for i, mask in enumerate(masks) if mask is not None]
    biased = [i for i, p in enumerate(params) if p.logit_bias]
    if not rows and not biased:
        return logits
    masked = logits.clone()
    for i in biased:
        ids, values = zip(*params[i].logit_bias, strict=True)
        index = torch.tensor(ids, device=logits.device)
        masked[i, index] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
    for i in rows:
        mask = masks[i]
        assert mask is not None
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        barred = torch.from_numpy(bits[: logits.shape[1]]) == 0
        masked[i].masked_fill_(barred.to(logits.device), -torch.inf)
    return masked


def draw(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[float]) -> Tensor:
    """Choose by filtered, tempered probability; `numbers` in [0, 1), one a row.

    `logits` [R, V]; every temperature is positive. Returns int64 [R].
    """
    weights = filtered(logits, params)
    totals = weights.cumsum(-1, dtype=torch.float64)  # [R, V]
    goal = torch.tensor(numbers, dtype=torch.float64, device=logits.device).unsqueeze(1)
    # The first token whose running total exceeds the goal has a positive weight.
    found = torch.searchsorted(totals, goal * totals[:, -1:], right=True).squeeze(1)
    # Logits that are not numbers have no such token; the caller sees it by the log-probability.
    return found.clamp(max=logits.shape[1] - 1)


def filtered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return weights [R, V], proportional to the distribution that is sampled from.

    Applies temperature, top-k, top-p, min-p in this order to `logits` [R, V].
    """
    peak = logits.amax(-1, keepdim=True)
    weights = F.softmax((logits - peak) / _column(logits, params, "temperature"), -1)
    vocab_size = logits.shape[1]
    rows = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if rows:
        chosen = [params[i] for i in rows]
        weights[rows] = _keep_top_k(logits[rows], weights[rows], [p.top_k for p in chosen])
    rows = [i for i, p in enumerate(params) if p.top_p < 1]
    if rows:
        share = _column(logits, [params[i] for i in rows], "top_p").double()
        weights[rows] = _keep_top_p(weights[rows], share)
    rows = [i for i, p in enumerate(params) if p.min_p > 0]
    if rows:
        some = weights[rows]
        floor = some.amax(-1, keepdim=True) * _column(logits, [params[i] for i in rows], "min_p")
        weights[rows] = some * (some >= floor)
    return weights


def top_alternatives(logprobs: Tensor, count: int) -> list[TopLogprobs]:
    """Return the `count` most probable tokens of each row of `logprobs` [R, V], best first."""
    best = logprobs.topk(min(count, logprobs.shape[1]), -1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [dict(zip(ids, values, strict=True)) for ids, values in pairs]


def score(
    logits: Tensor, targets: Sequence[int], num_alternatives: int, pick: Pick | None = None
) -> tuple[list[float], list[TopLogprobs]]:
    """Return the log-probability of `targets[i]` under row i of `logits` [R, V], and alternatives.

    The second is a list of empty mappings when `num_alternatives` is 0.
    """
    if pick is None:
        logprobs = F.log_softmax(logits, -1)
    else:
        norms = torch.tensor([found[1:] for found in pick(logits)])
        logprobs = logits - norms[:, :1] - norms[:, 1:]
    index = torch.tensor(targets, dtype=torch.int64, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, index).squeeze(1).tolist()
    if not num_alternatives:
        return chosen, [{} for _ in chosen]
    return chosen, top_alternatives(logprobs, num_alternatives)


def _column(like: Tensor, params: Sequence[SamplingParams], name: str) -> Tensor:
    values = [getattr(p, name) for p in params]
    if name == "temperature":
        values = [max(v, _MIN_TEMPERATURE) for v in values]
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def _keep_top_k(logits: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Zero the weights of all but the `counts[i]` largest logits of row i."""
    best = logits.topk(max(counts), -1).values
    last = torch.tensor(counts, device=logits.device).unsqueeze(1) - 1
    return weights * (logits >= best.gather(1, last))


def _keep_top_p(weights: Tensor, share: Tensor) -> Tensor:
    """Zero all but the largest weights that together reach `share` [R, 1] of their row's sum."""
    goal = weights.cumsum(-1, dtype=torch.float64)[:, -1:] * share
    size = min(_NUCLEUS_GUESS, weights.shape[1])
    ordered = weights.topk(size, -1).values
    totals = ordered.cumsum(-1, dtype=torch.float64)
    if bool((totals[:, -1:] < goal).any()):
        ordered = weights.sort(-1, descending=True).values
        totals = ordered.cumsum(-1, dtype=torch.float64)
    last = (totals < goal).sum(-1, keepdim=True).clamp(max=ordered.shape[1] - 1)
    return weights * (weights >= ordered.gather(1, last))
