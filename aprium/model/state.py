"""Generation state: recurrent slots and KV pages of every layer, in one object passed to forward.

A sequence owns one slot (convolution tail and SSM state of every Mamba layer) and as many KV
pages as its tokens need; who owns which is the engine's business. A sequence whose context is 0
never reads its slot, so slots and pages are recycled without clearing. SSM states may be kept in
fewer bits: a step then works on float32 copies of its own slots, and rounds them once at its end.

Tokens that may be taken back (drafts under verification) must not reach a slot, since a recurrence
cannot be undone. Their inputs to each Mamba layer go into a ring beside the slot; the next step
replays those that were accepted into the slot, then goes on. So one state a sequence is enough,
whatever the number of drafts.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from aprium.model.config import ModelConfig
from aprium.model.layout import Layout
from aprium.ops import fp8
from aprium.ops.rounding import round_stochastic

_LARGEST_HALF = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class HybridState:
    """Buffers that `HybridModel.forward` reads and writes in place.

    conv: per Mamba layer float32 [slots, conv_kernel - 1, conv_dim], oldest input first.
    ssm: per Mamba layer [slots, H, P, N] of float32, float16 or float8_e4m3fn.
    ssm_scales: per Mamba layer float32 [slots, H, P], which multiply float8 states; else none.
    ring: per Mamba layer float32 [slots, ring_size, in_proj_dim], the inputs of tokens held.
    keys, values: per attention layer (backbone first, then the MTP head's) [pages, Q, K, P] of
    float32, bfloat16 or float8_e4m3fn. `stochastic` rounds narrow SSM states to either neighbour.
    """

    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]
    ring: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    page_size: int
    kv_dtype: torch.dtype
    ssm_scales: tuple[Tensor, ...] = ()
    stochastic: bool = True

    @staticmethod
    def allocate(
        config: ModelConfig,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        ssm_dtype: torch.dtype = torch.float32,
        stochastic: bool = True,
        ring_size: int = 0,
        device: torch.device | str = "cpu",
    ) -> "HybridState":
        """Allocate buffers, unwritten; `dtype` is that of keys and values.

        `ring_size` is how many tokens of a sequence can be held at a time.
        """
        num_mamba = config.layers.count("mamba")
        conv_shape = (num_slots, config.conv_kernel - 1, config.conv_dim)
        ssm_shape = (
            num_slots,
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.ssm_state_size,
        )
        kv_shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)

        def buffers(count: int, shape: tuple[int, ...], kind: torch.dtype) -> tuple[Tensor, ...]:
            return tuple(torch.empty(shape, dtype=kind, device=device) for _ in range(count))

        narrow = ssm_dtype == torch.float8_e4m3fn
        ring_shape = (num_slots, ring_size, config.in_proj_dim)
        return HybridState(
            conv=buffers(num_mamba, conv_shape, torch.float32),
            ssm=buffers(num_mamba, ssm_shape, ssm_dtype),
            ring=buffers(num_mamba, ring_shape, torch.float32),
            ssm_scales=buffers(num_mamba if narrow else 0, ssm_shape[:-1], torch.float32),
            keys=buffers(config.num_attention_caches, kv_shape, dtype),
            values=buffers(config.num_attention_caches, kv_shape, dtype),
            page_size=page_size,
            kv_dtype=dtype,
            stochastic=stochastic,
        )

    @property
    def ring_size(self) -> int:
        """Tokens of a sequence that can be held at a time."""
        return self.ring[0].shape[1] if self.ring else 0

    @property
    def is_narrow(self) -> bool:
        """Whether SSM states are kept in fewer bits than they are computed in."""
        return bool(self.ssm) and self.ssm[0].dtype != torch.float32

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a recurrent state to another slot."""
        for buffer in (*self.conv, *self.ssm, *self.ssm_scales):
            buffer[target].copy_(buffer[source])

    def copy_page(self, source: int, target: int) -> None:
        """Copy a KV page to another."""
        for buffer in (*self.keys, *self.values):
            buffer[target].copy_(buffer[source])

    def export(self, slot: int, pages: Sequence[int], start: int, end: int) -> dict[str, Tensor]:
        """Return copies of the state in `slot`, and of keys and values of tokens [start, end).

        conv [layers, ...], ssm [layers, H, P, N], ssm_scales where there are any, keys and values
        [layers, end - start, K, P]; in the dtypes of the buffers.
        """
        found = {
            name: torch.stack([_plain(buffer[slot]) for buffer in group])
            for name, group in (("conv", self.conv), ("ssm", self.ssm), ("scales", self.ssm_scales))
            if group
        }
        first = start // self.page_size
        ids = torch.tensor(pages[first : -(-end // self.page_size)], dtype=torch.int64)
        skip = start - first * self.page_size
        for name, group in (("keys", self.keys), ("values", self.values)):
            if group:
                rows = [_plain(buffer)[ids].flatten(0, 1)[skip:] for buffer in group]
                found[name] = torch.stack([r[: end - start] for r in rows])
        return found

    def restore_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Put the recurrent state that `export` gave into `slot`."""
        for name, group in (("conv", self.conv), ("ssm", self.ssm), ("scales", self.ssm_scales)):
            for layer, buffer in enumerate(group):
                _plain(buffer[slot]).copy_(tensors[name][layer])

    def restore_pages(
        self, pages: Sequence[int], start: int, tensors: Mapping[str, Tensor]
    ) -> None:
        """Put keys and values that `export` gave for tokens from `start` on into `pages`."""
        for name, group in (("keys", self.keys), ("values", self.values)):
            for layer, buffer in enumerate(group):
                rows = tensors[name][layer]
                places = torch.arange(start, start + len(rows))
                held = torch.tensor(pages, dtype=torch.int64)[places // self.page_size]
                _plain(buffer)[held, places % self.page_size] = rows

    @contextmanager
    def widened(self, layout: Layout) -> Iterator[tuple["HybridState", Layout]]:
        """Give a float32 copy of the slots of `layout`, and the layout in it; store it afterwards.

        How a sequence's state is rounded depends on its position and layer alone, so not on what
        it is batched with; it does depend on where steps end.
        """
        assert layout.slots is not None
        assert not any(layout.replay) and not any(layout.hold), "the ring belongs to float32 states"
        slots = layout.slots
        wide = dataclasses.replace(
            self,
            conv=tuple(t[slots] for t in self.conv),
            ssm=tuple(self._read(layer, slots) for layer in range(len(self.ssm))),
            ssm_scales=(),
        )
        yield wide, dataclasses.replace(layout, slot_ids=tuple(range(layout.num_segments)))
        for layer, (conv, ssm) in enumerate(zip(wide.conv, wide.ssm, strict=True)):
            self.conv[layer][slots] = conv
            for i, slot in enumerate(layout.slot_ids or ()):
                seed = (layout.context[i] + layout.lengths[i]) * len(self.ssm) + layer
                self._write(layer, slot, ssm[i], seed)

    def _read(self, layer: int, slots: Tensor) -> Tensor:
        stored = self.ssm[layer]
        if stored.dtype == torch.float16:
            return stored[slots].float()
        codes = stored.view(torch.uint8)[slots].view(stored.dtype)  # torch cannot index these
        return fp8.to_float(codes) * self.ssm_scales[layer][slots].unsqueeze(-1)

    def _write(self, layer: int, slot: int, value: Tensor, seed: int) -> None:
        """Round `value` [H, P, N] into slot `slot`; FP8 rows get their largest value as scale."""
        stored = self.ssm[layer]
        if stored.dtype == torch.float8_e4m3fn:
            largest = value.abs().amax(-1)
            scale = torch.where(largest > 0, largest / fp8.LARGEST, 1.0)
            self.ssm_scales[layer][slot] = scale
            value = value / scale.unsqueeze(-1)
        if self.stochastic:
            generator = torch.Generator().manual_seed(seed)
            rounded = round_stochastic(value, stored.dtype, generator)
        elif stored.dtype == torch.float16:
            rounded = value.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
        else:
            rounded = fp8.to_fp8(value)
        stored[slot].copy_(rounded)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers together."""
        groups = (self.conv, self.ssm, self.ring, self.ssm_scales, self.keys, self.values)
        return sum(t.numel() * t.element_size() for group in groups for t in group)


def _plain(tensor: Tensor) -> Tensor:
    """View FP8 values as bytes, which torch can index and copy."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
