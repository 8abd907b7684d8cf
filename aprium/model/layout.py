"""The one token layout: packed segments, one a sequence, for training, prefill and decode alike.

Tokens of all sequences lie end to end in one dimension T; a `Layout` says where each segment
begins, how many tokens its sequence already has in the state, and where that state lives. Python
integers and tensors of the same facts sit side by side: loops on the host and native kernels use
the integers, vector operations the tensors, which are made when first asked for.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Segments of a packed step; see `packed` and `build` for how to make one.

    lengths, starts, context: per sequence, new tokens, offset of the first in T, tokens already
    in the state. slot_ids: per sequence its recurrent slot, page_ids its KV pages in order of
    position; None without a state. replay: how many of the context's last tokens are in the state's
    ring and not in its slot yet; hold: whether this step's tokens, which may be taken back, go into
    the ring and not into the slot (see `HybridState`).
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    context: tuple[int, ...]
    slot_ids: tuple[int, ...] | None = None
    page_ids: tuple[tuple[int, ...], ...] | None = None
    replay: tuple[int, ...] = ()
    hold: tuple[bool, ...] = ()
    page_size: int = 0
    device: torch.device | str = "cpu"

    @functools.cached_property
    def segment_ids(self) -> Tensor:
        """Each token's segment, int64 [T]."""
        sizes = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(self.device)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Each token's index in its segment, int64 [T]."""
        starts = torch.tensor(self.starts, dtype=torch.int64, device=self.device)
        return torch.arange(self.num_tokens, device=self.device) - starts[self.segment_ids]

    @functools.cached_property
    def has_context(self) -> Tensor:
        """Whether each sequence has tokens in its slot, bool [S]."""
        replay = self.replay or (0,) * len(self.context)
        pairs = zip(self.context, replay, strict=True)
        return torch.tensor([done > late for done, late in pairs], device=self.device)

    @functools.cached_property
    def slots(self) -> Tensor | None:
        """Recurrent slot of each sequence, int64 [S]."""
        if self.slot_ids is None:
            return None
        return torch.tensor(self.slot_ids, dtype=torch.int64, device=self.device)

    @functools.cached_property
    def pages(self) -> tuple[Tensor, ...] | None:
        """KV pages of each sequence, int64."""
        if self.page_ids is None:
            return None
        return tuple(
            torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in self.page_ids
        )

    @property
    def num_tokens(self) -> int:
        """Packed tokens T."""
        return self.starts[-1] + self.lengths[-1] if self.lengths else 0

    @property
    def num_segments(self) -> int:
        """Sequences S."""
        return len(self.lengths)

    def read_slots(self, buffer: Tensor) -> Tensor:
        """Return each sequence's row of `buffer` [slots, ...]; zeros where no token is in it.

        What a recycled slot held before, be it NaN, is not read.
        """
        assert self.slots is not None
        shape = (-1,) + (1,) * (buffer.dim() - 1)
        return torch.where(self.has_context.view(shape), buffer[self.slots], 0)

    def alone(self, index: int, length: int, context: int) -> "Layout":
        """Lay out `length` tokens of sequence `index` alone, after `context` in its slot."""
        assert self.slot_ids is not None and self.page_ids is not None
        return Layout.build(
            lengths=[length],
            context=[context],
            slots=[self.slot_ids[index]],
            pages=[self.page_ids[index]],
            page_size=self.page_size,
            device=self.device,
        )

    def after(self, indices: Sequence[int], count: int) -> "Layout":
        """Lay out one token for each sequence of `indices`, `count` tokens after these."""
        assert self.slot_ids is not None and self.page_ids is not None
        return Layout.build(
            lengths=[1] * len(indices),
            context=[self.context[i] + self.lengths[i] + count for i in indices],
            slots=[self.slot_ids[i] for i in indices],
            pages=[self.page_ids[i] for i in indices],
            page_size=self.page_size,
            device=self.device,
        )

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device | str = "cpu") -> "Layout":
        """Lay out whole documents of the given lengths, with no state before or after them."""
        return _layout(lengths, (0,) * len(lengths), device=device)

    @staticmethod
    def build(
        *,
        lengths: Sequence[int],
        context: Sequence[int],
        slots: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        replay: Sequence[int] | None = None,
        hold: Sequence[bool] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Layout":
        """Lay out one engine step.

        Sequence i brings `lengths[i]` new tokens after the `context[i]` that its state at slot
        `slots[i]` and its KV pages `pages[i]` (enough for context + length) already hold.
        """
        assert len(lengths) == len(context) == len(slots) == len(pages)
        for length, done, held in zip(lengths, context, pages, strict=True):
            assert len(held) * page_size >= length + done, "a sequence lacks pages"
        return _layout(
            lengths,
            context,
            slot_ids=tuple(slots),
            page_ids=tuple(tuple(p) for p in pages),
            replay=tuple(replay or (0,) * len(lengths)),
            hold=tuple(hold or (False,) * len(lengths)),
            page_size=page_size,
            device=device,
        )


def _layout(lengths: Sequence[int], context: Sequence[int], **rest: Any) -> Layout:
    assert lengths and all(n > 0 for n in lengths), "a segment must bring at least one token"
    starts = itertools.accumulate(lengths[:-1], initial=0)
    return Layout(lengths=tuple(lengths), starts=tuple(starts), context=tuple(context), **rest)


class Drafting(NamedTuple):
    """What the prediction head reads and drafts in one go.

    It reads `rows` of a step's hidden states and the tokens `next_tokens` after them; `layout`
    places them in its own KV pages. Then it drafts up to `counts[i]` tokens for sequence i, as long
    as their probabilities multiply to at least `least`.
    """

    rows: Sequence[int]
    next_tokens: Sequence[int]
    layout: Layout
    counts: Sequence[int]
    least: float = 0.0
