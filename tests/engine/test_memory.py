"""Sizes of the generation state: right bytes, within bounds, or refused."""

import logging

import pytest
import torch

from aprium.base.errors import ConfigError
from aprium.base.memory import available_bytes
from aprium.engine.memory import FORK_SNAPSHOTS, Budget, plan_cache
from aprium.model.presets import preset
from aprium.model.state import HybridState

GIB = 1 << 30


def plan(name="nano", *, free=64 * GIB, **options):
    defaults = {
        "dtype": torch.float32,
        "ssm_dtype": torch.float32,
        "max_model_len": None,
        "max_num_seqs": 4,
        "page_size": 64,
        "kv_cache_bytes": None,
        "caches": False,
        "budget": Budget(free_bytes=free, state_bytes=free // 2, store_bytes=0),
    }
    return plan_cache(preset(name), **(defaults | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_planned_bytes_are_the_allocated_ones(dtype, ssm_dtype):
    dtypes = {"dtype": dtype, "ssm_dtype": ssm_dtype}
    sizes = plan("toy", max_model_len=100, page_size=16, **dtypes)
    state = HybridState.allocate(
        preset("toy"), num_slots=sizes.num_slots, num_pages=sizes.num_pages, page_size=16, **dtypes
    )
    assert state.num_bytes == sizes.kv_bytes + sizes.state_bytes


def test_a_small_model_holds_every_sequence_at_full_length():
    sizes = plan("toy")
    assert sizes.num_pages == 4 * preset("toy").max_position_embeddings // 64


def test_a_large_one_holds_at_least_one():
    sizes = plan("nano")
    assert sizes.max_model_len == preset("nano").max_position_embeddings
    assert sizes.num_pages * 64 >= sizes.max_model_len
    assert sizes.kv_bytes + sizes.state_bytes <= 32 * GIB


def test_a_machine_too_small_shortens_the_context_aloud(caplog):
    logging.getLogger("aprium").propagate = True
    with caplog.at_level(logging.WARNING, logger="aprium"):
        sizes = plan("nano", free=2 * GIB)
    assert 0 < sizes.max_model_len < preset("nano").max_position_embeddings
    assert sizes.max_model_len == sizes.num_pages * 64
    assert sizes.kv_bytes + sizes.state_bytes <= GIB
    assert str(sizes.max_model_len) in caplog.text


def test_what_was_asked_for_is_not_shortened():
    with pytest.raises(ConfigError, match="one sequence of 200000 tokens"):
        plan("nano", free=2 * GIB, max_model_len=200_000)
    with pytest.raises(ConfigError, match="recurrent states take 9"):
        plan("nano", free=2 * GIB, max_num_seqs=200)


def test_a_context_beyond_the_models_own_is_allowed_aloud(caplog):
    logging.getLogger("aprium").propagate = True
    with caplog.at_level(logging.WARNING, logger="aprium"):
        sizes = plan("toy", max_model_len=10_000)
    assert sizes.max_model_len == 10_000 and "4096" in caplog.text


def test_this_machine_has_memory():
    assert available_bytes() > 1 << 20


def test_snapshots_and_copies_come_out_of_the_budget():
    budget = Budget(free_bytes=64 * GIB, state_bytes=32 * GIB, ring_bytes=1000, step_bytes=2000)
    sizes = plan("nano", caches=True, budget=budget)
    assert sizes.num_snapshots == 32 and sizes.num_slots == 36
    assert sizes.store_bytes == 2 * GIB
    taken = sizes.kv_bytes + sizes.state_bytes + sizes.store_bytes + 36 * 1000 + 2000
    assert taken <= 32 * GIB
    table = sizes.table(5 * GIB)
    assert "5.00 GiB" in table and "36" not in table and f"{sizes.num_pages} pages" in table
    small = plan("nano", caches=True, budget=Budget(free_bytes=4 * GIB, state_bytes=2 * GIB))
    assert FORK_SNAPSHOTS < small.num_snapshots < 32
    fixed = Budget(free_bytes=64 * GIB, state_bytes=32 * GIB, snapshot_bytes=3 * sizes.slot_bytes)
    assert plan("nano", caches=True, budget=fixed).num_snapshots == 3
    with pytest.raises(ConfigError, match="one snapshot takes"):
        plan(caches=True, budget=Budget(free_bytes=GIB, state_bytes=GIB, snapshot_bytes=9))
