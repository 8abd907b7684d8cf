"""How much memory generation may take: sizes of KV pages, state slots and snapshots, from a budget.

Recurrent slots cost the same whatever the length and there is one a running sequence; snapshots of
prompts take as many more; KV pages are what is left of the budget. By default the pages hold every
running sequence at full length where that is little, and all of it takes no more than half of what
the machine has free. Everything is allocated at the start, and a sequence is admitted when its
pages are free, so that serving never asks for memory that is not there.
"""

from dataclasses import dataclass

import torch

from aprium.base.errors import ConfigError
from aprium.base.log import get_logger
from aprium.model.config import ModelConfig

# KV pages taken by default beyond one sequence of full length.
_DEFAULT_KV_BYTES = 1 << 30
_DEFAULT_SNAPSHOTS = 32
_DEFAULT_STORE_BYTES = 2 << 30
_GIB = 1 << 30
FORK_SNAPSHOTS = 2  # kept without prefix caching, for the continuations of one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the state may take: `free_bytes` of the machine are left, `state_bytes` may be used.

    `snapshot_bytes` and `store_bytes` None fit the budget; `step_bytes` are needed to compute, and
    `ring_bytes` by each slot for drafts under verification. `fill` lets KV pages take all that is
    left, not just what is usual.
    """

    free_bytes: int
    state_bytes: int
    snapshot_bytes: int | None = None
    store_bytes: int | None = None
    step_bytes: int = 0
    ring_bytes: int = 0
    fill: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """Sizes of the generation state, and the longest sequence it holds.

    `num_slots` are those of `max_num_seqs` sequences and of `num_snapshots`; `store_bytes` is what
    copies of snapshots and preempted states may take beside.
    """

    max_model_len: int
    num_pages: int
    page_size: int
    num_slots: int
    page_bytes: int
    slot_bytes: int
    num_snapshots: int = 0
    store_bytes: int = 0
    ring_bytes: int = 0
    step_bytes: int = 0
    free_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of all slots."""
        return self.num_slots * self.slot_bytes

    def table(self, weight_bytes: int) -> str:
        """Return the plan as lines of text, one a use of memory."""
        seqs = self.num_slots - self.num_snapshots
        tokens = self.num_pages * self.page_size
        rows = [
            ("weights", weight_bytes, ""),
            ("recurrent states", seqs * self.slot_bytes, f"{seqs} sequences"),
            ("state snapshots", self.num_snapshots * self.slot_bytes, f"{self.num_snapshots}"),
            ("drafts under verification", self.ring_bytes, ""),
            ("keys and values", self.kv_bytes, f"{tokens} tokens, {self.num_pages} pages"),
            ("stored snapshots", self.store_bytes, "at most"),
            ("buffers of a step", self.step_bytes, "about"),
        ]
        total = sum(size for _, size, _ in rows)
        rows += [("all", total, ""), ("free before, without weights", self.free_bytes, "")]
        lines = [f"  {name:<28} {_amount(size):>10}  {note}".rstrip() for name, size, note in rows]
        return "\n".join(("memory:", *lines))


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
    caches: bool,
    page_size: int,
    kv_cache_bytes: int | None,
    budget: Budget,
) -> CachePlan:
    """Choose sizes within `budget`; `dtype` is that of keys and values.

    `caches` is whether snapshots of prompts are kept.

    An explicit `kv_cache_bytes` or `max_model_len` is honoured or refused; what is left open is
    fitted. Raises ConfigError when a sequence of full length cannot be held.
    """
    per_page, per_slot = page_bytes(config, page_size, dtype), slot_bytes(config, ssm_dtype)
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
    num_snapshots, store = _kept(budget, per_slot, caches)
    # A step widens the narrow slots that it runs.
    working = per_slot if ssm_dtype == torch.float32 else per_slot + slot_bytes(config)
    num_slots = max_num_seqs + num_snapshots
    rings = num_slots * budget.ring_bytes
    state = max_num_seqs * working + num_snapshots * per_slot + rings
    spare = budget.state_bytes - state - store - budget.step_bytes
    if kv_cache_bytes is not None:
        num_pages = kv_cache_bytes // per_page
    else:
        usual = one * max_num_seqs if budget.fill else _DEFAULT_KV_BYTES // per_page
        wanted = min(one * max_num_seqs, max(one, usual))
        num_pages = min(wanted, max(spare, 0) // per_page)
    num_pages = min(num_pages, one * max_num_seqs)
    if num_pages < one:
        held = num_pages * page_size
        if max_model_len is not None or not num_pages:
            _refuse(longest, one * per_page, kv_cache_bytes, state, budget)
        get_logger("engine").warning(
            "memory holds sequences of %d tokens; the model could take %d", held, longest
        )
        longest = held
    return CachePlan(
        max_model_len=longest,
        num_pages=num_pages,
        page_size=page_size,
        num_slots=num_slots,
        page_bytes=per_page,
        slot_bytes=per_slot,
        num_snapshots=num_snapshots,
        store_bytes=store,
        ring_bytes=rings,
        step_bytes=budget.step_bytes,
        free_bytes=budget.free_bytes,
    )


def step_bytes(config: ModelConfig, num_tokens: int, num_rows: int) -> int:
    """Return about what a step of `num_tokens` takes that chooses at `num_rows` of them."""
    widest = max(
        config.in_proj_dim if "mamba" in config.layers else 0,
        config.intermediate_size,
        config.num_active_experts * config.expert_intermediate_size,
    )
    return 4 * (num_tokens * (6 * config.hidden_size + 2 * widest) + num_rows * config.vocab_size)


def _kept(budget: Budget, per_slot: int, caches: bool) -> tuple[int, int]:
    """Return how many snapshots are kept in slots, and the bytes of copies."""
    share = budget.state_bytes // 8
    store = min(share, _DEFAULT_STORE_BYTES) if budget.store_bytes is None else budget.store_bytes
    if not caches:
        return FORK_SNAPSHOTS, store
    size = max(per_slot, 1)
    if budget.snapshot_bytes is None:
        return max(min(_DEFAULT_SNAPSHOTS, share // size), FORK_SNAPSHOTS), store
    if budget.snapshot_bytes < size:
        raise ConfigError(
            f"snapshot_bytes is {budget.snapshot_bytes}: one snapshot takes {size} (raise it, or "
            "turn enable_prefix_caching off)"
        )
    return budget.snapshot_bytes // size, store


def _refuse(
    longest: int, needed: int, kv_cache_bytes: int | None, state: int, budget: Budget
) -> None:
    if kv_cache_bytes is not None:
        have = f"kv_cache_bytes is {kv_cache_bytes}"
    else:
        have = (
            f"{budget.free_bytes / _GIB:.2f} GiB are free, of which "
            f"{budget.state_bytes / _GIB:.2f} may be used, and recurrent states take "
            f"{state / _GIB:.2f} GiB"
        )
    raise ConfigError(
        f"one sequence of {longest} tokens needs {needed} bytes of KV pages; {have}: "
        "lower max_model_len or max_num_seqs, or raise kv_cache_bytes"
    )


def _amount(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB // 10 else f"{size / (1 << 20):.2f} MiB"
