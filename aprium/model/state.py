"""Generation state: recurrent slots and KV pages of every layer, in one object passed to forward.

A sequence owns one slot (convolution tail and SSM state of every Mamba layer) and as many KV
pages as its tokens need; who owns which is the engine's business. A sequence whose context is 0
never reads its slot, so slots and pages are recycled without clearing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aprium.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HybridState:
    """Buffers that `HybridModel.forward` reads and writes in place.

    conv: per Mamba layer float32 [slots, conv_kernel - 1, conv_dim], oldest input first.
    ssm: per Mamba layer float32 [slots, H, P, N].
    keys, values: per attention layer (backbone first, then the MTP head's) [pages, Q, K, P].
    """

    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    page_size: int

    @staticmethod
    def allocate(
        config: ModelConfig,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "HybridState":
        """Allocate buffers, unwritten; `dtype` is that of keys and values."""
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

        return HybridState(
            conv=buffers(num_mamba, conv_shape, torch.float32),
            ssm=buffers(num_mamba, ssm_shape, torch.float32),
            keys=buffers(config.num_attention_caches, kv_shape, dtype),
            values=buffers(config.num_attention_caches, kv_shape, dtype),
            page_size=page_size,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers together."""
        groups = (self.conv, self.ssm, self.keys, self.values)
        return sum(t.numel() * t.element_size() for group in groups for t in group)
