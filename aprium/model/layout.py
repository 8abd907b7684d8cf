"""The one token layout: packed segments, one a sequence, for training, prefill and decode alike.

Tokens of all sequences lie end to end in one dimension T; a `Layout` says where each segment
begins, how many tokens its sequence already has in the state, and where that state lives. Python
integers and tensors of the same facts sit side by side: loops on the host use the integers,
vector operations the tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Segments of a packed step; see `packed` and `build` for how to make one.

    lengths, starts, context: per sequence, new tokens, offset of the first in T, tokens already
    in the state. segment_ids, positions: int64 [T], each token's segment and its index in it.
    slots: int64 [S] recurrent slot, or None without a state. pages: per sequence, int64 tensor of
    KV page ids in order of position, or None.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    context: tuple[int, ...]
    segment_ids: Tensor
    positions: Tensor
    has_context: Tensor
    slots: Tensor | None = None
    pages: tuple[Tensor, ...] | None = None
    page_size: int = 0

    @property
    def num_tokens(self) -> int:
        """Packed tokens T."""
        return self.starts[-1] + self.lengths[-1] if self.lengths else 0

    @property
    def num_segments(self) -> int:
        """Sequences S."""
        return len(self.lengths)

    def read_slots(self, buffer: Tensor) -> Tensor:
        """Return each sequence's row of `buffer` [slots, ...]; zeros where it has no context.

        What a recycled slot held before, be it NaN, is not read.
        """
        assert self.slots is not None
        shape = (-1,) + (1,) * (buffer.dim() - 1)
        return torch.where(self.has_context.view(shape), buffer[self.slots], 0)

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device | str = "cpu") -> "Layout":
        """Lay out whole documents of the given lengths, with no state before or after them."""
        return _layout(lengths, (0,) * len(lengths), device)

    @staticmethod
    def build(
        *,
        lengths: Sequence[int],
        context: Sequence[int],
        slots: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
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
            device,
            slots=torch.tensor(list(slots), dtype=torch.int64, device=device),
            pages=tuple(torch.tensor(list(p), dtype=torch.int64, device=device) for p in pages),
            page_size=page_size,
        )


def _layout(
    lengths: Sequence[int],
    context: Sequence[int],
    device: torch.device | str,
    slots: Tensor | None = None,
    pages: tuple[Tensor, ...] | None = None,
    page_size: int = 0,
) -> Layout:
    assert lengths and all(n > 0 for n in lengths), "a segment must bring at least one token"
    sizes = torch.tensor(list(lengths), dtype=torch.int64)
    starts = torch.cumsum(sizes, 0) - sizes
    segment_ids = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    positions = torch.arange(int(sizes.sum())) - starts[segment_ids]
    return Layout(
        lengths=tuple(lengths),
        starts=tuple(starts.tolist()),
        context=tuple(context),
        segment_ids=segment_ids.to(device),
        positions=positions.to(device),
        has_context=torch.tensor([n > 0 for n in context], device=device),
        slots=slots,
        pages=pages,
        page_size=page_size,
    )
