"""A list of samples as the tensors of one training step: packed tokens, weights, layout.

Every process of a run draws the same samples and takes its share, so that a step is made of the
same ones however many processes there are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from aprium.base.records import SAMPLE_STREAMS, Sample
from aprium.model.layout import Layout
from aprium.parallel.mesh import Axis


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Packed samples.

    tokens int64 [T]; ce_weight float32 [T], aligned with the token predicted; domains int64 [T],
    index into `domain_names`. `streams` are the others of the samples that have any, float32 [T],
    NaN where a sample has not. `top` are the teachers' most probable tokens, int64 [T, K], and
    their log-probabilities, float32 [T, K], -inf where there are fewer; None where there are none.
    A segment after the first `num_samples` is a filler, which counts for nothing.
    """

    tokens: Tensor
    ce_weight: Tensor
    domains: Tensor
    domain_names: tuple[str, ...]
    layout: Layout
    num_samples: int
    streams: Mapping[str, Tensor] = field(default_factory=dict)
    top: tuple[Tensor, Tensor] | None = None

    def stream(self, name: str, missing: float) -> Tensor:
        """Return a stream of the samples, [T], with `missing` where there is none."""
        if name not in self.streams:
            return torch.full_like(self.ce_weight, missing)
        stream = self.streams[name]
        return stream.where(~stream.isnan(), missing)

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, without a filler's."""
        return sum(self.layout.lengths[: self.num_samples])

    def predicted(self, ahead: int, weights: Tensor | None = None) -> Tensor:
        """Return the indices of weighted tokens that lie at least `ahead` into their document.

        Hidden state number i - ahead is about predicting token i: `ahead` is 1 for the backbone,
        2 for the first prediction depth. `weights` [T] are by default those of the cross-entropy.
        """
        weights = self.ce_weight if weights is None else weights
        usable = (weights != 0) & (self.layout.positions >= ahead)
        return usable.nonzero().squeeze(1)

    def remaining(self) -> Tensor:
        """Return how many tokens each document has from a token on, itself included, [T]."""
        lengths = torch.tensor(self.layout.lengths, device=self.tokens.device)
        return lengths[self.layout.segment_ids] - self.layout.positions


def collate(samples: Sequence[Sample], least: int = 0) -> Batch:
    """Pack `samples` end to end, each a segment of its own.

    A filler brings the batch to `least` tokens, so that every process has a share of it.
    """
    names = tuple(sorted({sample.domain for sample in samples}))
    lengths = [len(sample.tokens) for sample in samples]
    domains = torch.tensor([names.index(sample.domain) for sample in samples], dtype=torch.int64)
    domains = domains.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    tokens = torch.tensor([t for s in samples for t in s.tokens], dtype=torch.int64)
    weights = torch.tensor([w for s in samples for w in s.ce_weight], dtype=torch.float32)
    missing = max(0, least - len(tokens))
    streams, top = _streams(samples, missing), _top(samples, missing)
    if missing:
        tokens, weights, domains = (F.pad(t, (0, missing)) for t in (tokens, weights, domains))
        lengths.append(missing)
    return Batch(
        tokens=tokens,
        ce_weight=weights,
        domains=domains,
        domain_names=names,
        layout=Layout.packed(lengths),
        num_samples=len(samples),
        streams=streams,
        top=top,
    )


def _streams(samples: Sequence[Sample], missing: int) -> dict[str, Tensor]:
    """Return the streams, but `ce_weight`, that any of `samples` has, with a filler at the end."""
    found: dict[str, Tensor] = {}
    for name in SAMPLE_STREAMS:
        if name == "ce_weight" or not any(getattr(sample, name) for sample in samples):
            continue
        values: list[float] = []
        for sample in samples:
            values += getattr(sample, name) or (math.nan,) * len(sample.tokens)
        stream = torch.tensor(values, dtype=torch.float32)
        found[name] = F.pad(stream, (0, missing), value=math.nan)
    return found


def _top(samples: Sequence[Sample], missing: int) -> tuple[Tensor, Tensor] | None:
    """Return the tokens and log-probabilities of `teacher_top`, with a filler at the end."""
    if not any(sample.teacher_top for sample in samples):
        return None
    rows = [row for s in samples for row in s.teacher_top or ({},) * len(s.tokens)]
    rows += [{}] * missing
    width = max(1, *map(len, rows))
    ids = [[*row, *(0,) * (width - len(row))] for row in rows]
    logs = [[*row.values(), *(-math.inf,) * (width - len(row))] for row in rows]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(logs, dtype=torch.float32)


def share_samples(samples: Sequence[Sample], axis: Axis) -> list[Sample]:
    """Return this process's share of `samples`, which are the same on all of `axis`, in order.

    Longest first, each goes to the process that has the fewest tokens; of equals to the first.
    """
    sizes, mine = [0] * axis.size, []
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens)):
        owner = sizes.index(min(sizes))
        sizes[owner] += len(samples[i].tokens)
        if owner == axis.index:
            mine.append(i)
    return [samples[i] for i in sorted(mine)]
