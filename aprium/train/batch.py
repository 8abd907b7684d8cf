"""A list of samples as the tensors of one training step: packed tokens, weights, layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aprium.base.records import Sample
from aprium.model.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Packed samples.

    tokens int64 [T]; ce_weight float32 [T], aligned with the token predicted; domains int64 [T],
    index into `domain_names`.
    """

    tokens: Tensor
    ce_weight: Tensor
    domains: Tensor
    domain_names: tuple[str, ...]
    layout: Layout

    def predicted(self, ahead: int) -> Tensor:
        """Return the indices of weighted tokens that lie at least `ahead` into their document.

        Hidden state number i - ahead is about predicting token i: `ahead` is 1 for the backbone,
        2 for the first prediction depth.
        """
        usable = (self.ce_weight != 0) & (self.layout.positions >= ahead)
        return usable.nonzero().squeeze(1)

    def remaining(self) -> Tensor:
        """Return how many tokens each document has from a token on, itself included, [T]."""
        lengths = torch.tensor(self.layout.lengths, device=self.tokens.device)
        return lengths[self.layout.segment_ids] - self.layout.positions


def collate(samples: Sequence[Sample]) -> Batch:
    """Pack `samples` end to end, each a segment of its own."""
    names = tuple(sorted({sample.domain for sample in samples}))
    lengths = [len(sample.tokens) for sample in samples]
    domains = torch.tensor([names.index(sample.domain) for sample in samples])
    return Batch(
        tokens=torch.tensor([t for sample in samples for t in sample.tokens]),
        ce_weight=torch.tensor([w for sample in samples for w in sample.ce_weight]),
        domains=domains.repeat_interleave(torch.tensor(lengths)),
        domain_names=names,
        layout=Layout.packed(lengths),
    )
