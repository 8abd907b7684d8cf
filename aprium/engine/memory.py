"""How much memory generation may take: the sizes of KV pages and state slots, planned at start.

Recurrent slots cost the same whatever the length and there is one a running sequence; KV pages are
what a budget buys. By default the pages hold every running sequence at full length where that is
little, and never take more than half of what the machine has free.
"""

from dataclasses import dataclass

import torch

from aprium.base.errors import ConfigError
from aprium.base.log import get_logger
from aprium.model.config import ModelConfig

# KV pages taken by default beyond one sequence of full length.
_DEFAULT_KV_BYTES = 1 << 30
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Sizes of the generation state, and the longest sequence it holds."""

    max_model_len: int
    num_pages: int
    page_size: int
    num_slots: int
    page_bytes: int
    slot_bytes: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one KV page over all attention layers."""
    values = 2 * config.num_attention_caches * config.num_kv_heads * config.head_dim
    return values * page_size * dtype.itemsize


def slot_bytes(config: ModelConfig, ssm_dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of one sequence's recurrent state over all Mamba layers."""
    tail = (config.conv_kernel - 1) * config.conv_dim * torch.float32.itemsize
    state = config.mamba_inner * config.ssm_state_size * ssm_dtype.itemsize
    if ssm_dtype == torch.float8_e4m3fn:
        state += config.mamba_inner * torch.float32.itemsize  # scales
    return config.layers.count("mamba") * (tail + state)


def plan_cache(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    ssm_dtype: torch.dtype,
    max_model_len: int | None,
    max_num_seqs: int,
    num_snapshots: int = 0,
    page_size: int,
    kv_cache_bytes: int | None,
    free_bytes: int,
) -> CachePlan:
    """Choose sizes for a machine with `free_bytes` left; `dtype` is that of keys and values.

    An explicit `kv_cache_bytes` or `max_model_len` is honoured or refused; what is left open is
    fitted. Raises ConfigError when a sequence of full length cannot be held.
    """
    per_page, per_slot = page_bytes(config, page_size, dtype), slot_bytes(config, ssm_dtype)
    working = per_slot if ssm_dtype == torch.float32 else per_slot + slot_bytes(config)
    per_page = max(per_page, 1)  # a model without attention: pages cost nothing
    longest = config.max_position_embeddings if max_model_len is None else max_model_len
    if longest > config.max_position_embeddings:
        # Nothing in the family encodes positions, so it runs; how well is another question.
        get_logger("engine").warning(
            "max_model_len %d is beyond the %d tokens that the model was made for",
            longest,
            config.max_position_embeddings,
        )
    one = -(-longest // page_size)
    kept = num_snapshots * per_slot
    spare = free_bytes // 2 - kept - max_num_seqs * working  # a step widens the slots that it runs
    if kv_cache_bytes is not None:
        num_pages = kv_cache_bytes // per_page
    else:
        wanted = min(one * max_num_seqs, max(one, _DEFAULT_KV_BYTES // per_page))
        num_pages = min(wanted, max(spare, 0) // per_page)
    num_pages = min(num_pages, one * max_num_seqs)
    if num_pages < one:
        held = num_pages * page_size
        if max_model_len is not None or not num_pages:
            _refuse(
                longest, one * per_page, kv_cache_bytes, max_num_seqs * working + kept, free_bytes
            )
        get_logger("engine").warning(
            "memory holds sequences of %d tokens; the model could take %d", held, longest
        )
        longest = held
    return CachePlan(
        max_model_len=longest,
        num_pages=num_pages,
        page_size=page_size,
        num_slots=max_num_seqs + num_snapshots,
        page_bytes=per_page,
        slot_bytes=per_slot,
    )


def _refuse(
    longest: int, needed: int, kv_cache_bytes: int | None, state: int, free_bytes: int
) -> None:
    if kv_cache_bytes is not None:
        have = f"kv_cache_bytes is {kv_cache_bytes}"
    else:
        have = (
            f"{free_bytes / _GIB:.2f} GiB are free, of which half may be used, and recurrent "
            f"states take {state / _GIB:.2f} GiB"
        )
    raise ConfigError(
        f"one sequence of {longest} tokens needs {needed} bytes of KV pages; {have}: "
        "lower max_model_len or max_num_seqs, or raise kv_cache_bytes"
    )
