"""Memory and verdicts: published deployments, arithmetic by hand, monotonicity."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.plan.calibrate import verdicts
from aprium.plan.hardware import device, devices
from aprium.plan.memory import Deployment, judge, memory, remedies, stages
from aprium.plan.shapes import target_shape

ORDER = ("no", "tight", "fits")


@pytest.mark.parametrize(
    ("row", "verdict"), verdicts(), ids=lambda v: v if isinstance(v, str) else v["model"]
)
def test_published_deployments(row: dict, verdict: str) -> None:
    assert (verdict != "no") == (row["answer"] == "yes"), row


def test_the_little_law_batch_of_ultra_on_eight_h100() -> None:
    # 1,930 tok/s x 46 ms = 89 sequences run of 72K tokens; by count at most 100 fit.
    found = memory(target_shape("ultra-nvfp4"), device("h100"), Deployment(tp=8, utilization=0.9))
    assert found.max_concurrency(72 * 1024) == pytest.approx(89, rel=0.25)
    wide = memory(target_shape("ultra-nvfp4"), device("b200"), Deployment(tp=4))
    assert wide.max_concurrency(72 * 1024) == pytest.approx(243, rel=0.05)


def test_keys_and_values_are_replicated_beyond_their_heads() -> None:
    shape, where = target_shape("ultra-nvfp4"), device("h200")
    one = memory(shape, where, Deployment(tp=1)).kv_per_token
    assert one == 6144
    assert memory(shape, where, Deployment(tp=2)).kv_per_token == one / 2
    assert memory(shape, where, Deployment(tp=8)).kv_per_token == one / 2
    # Attention-data parallelism does not replicate: a rank has its own sequences.
    apart = memory(shape, where, Deployment(tp=1, dp=8, ep=True))
    assert apart.kv_per_token == one and apart.ranks == 8


def test_fp8_keys_and_values_overtake_the_state_at_the_published_context() -> None:
    for name, context in (("nano", 15_700), ("super", 41_000), ("ultra", 65_500)):
        shape = target_shape(f"{name}-nvfp4")
        found = memory(shape, device("b300"), Deployment())
        convolutions = sum(2 * layer.conv_values for layer in shape.layers)
        states = found.state_per_sequence - convolutions
        assert states / found.kv_per_token == pytest.approx(context, rel=0.01)


def test_drafts_keep_states_in_engines_with_snapshots() -> None:
    shape, where = target_shape("ultra-nvfp4"), device("b200")
    plain = memory(shape, where, Deployment(tp=4))
    drafted = memory(shape, where, Deployment(tp=4, drafts=5))
    assert drafted.state_per_sequence == 6 * plain.state_per_sequence
    assert drafted.kv_per_token > plain.kv_per_token  # the head's own
    replayed = memory(shape, where, Deployment(tp=4, drafts=5, snapshots=False))
    assert replayed.state_per_sequence == plain.state_per_sequence


def test_offloaded_experts_leave_the_device() -> None:
    shape, where = target_shape("ultra-nvfp4"), device("dgx-station")
    whole, away = (memory(shape, where, Deployment(offload_gb=gb)) for gb in (0, 150))
    assert whole.weight_bytes - away.weight_bytes == 150e9
    assert judge(shape, where, Deployment(), 8192, 1)[0].verdict == "no"
    assert judge(shape, where, Deployment(offload_gb=150), 8192, 1)[0].verdict != "no"


def test_stages_are_all_layers_in_order() -> None:
    shape = target_shape("super")
    for count in (1, 2, 3, 7):
        found = stages(shape, count)
        assert [layer for stage in found for layer in stage] == list(shape.layers)
        assert len(found) == count and all(found)
        sizes = [sum(layer.num_bytes for layer in stage) for stage in found]
        assert max(sizes) < 1.5 * sum(sizes) / count


def test_every_byte_is_somewhere() -> None:
    # What all devices of a cut hold is the model, but for what is replicated.
    shape = target_shape("ultra-nvfp4")
    whole = memory(shape, device("b300"), Deployment()).weight_bytes
    assert whole == pytest.approx(shape.num_bytes(), rel=1e-9)
    split = memory(shape, device("b300"), Deployment(tp=2)).weights
    assert split["routed experts"] == shape.bytes_by_role()["routed experts"] / 2
    assert split["router"] == shape.bytes_by_role()["router"]


def test_refused_cuts() -> None:
    nano = target_shape("nano-nvfp4")
    with pytest.raises(ConfigError, match=r"experts of width 1856 .* cannot be sliced over 8"):
        memory(nano, device("h100"), Deployment(tp=8))
    memory(nano, device("h100"), Deployment(tp=8, ep=True))
    with pytest.raises(ConfigError, match="tp 3 does not divide"):
        memory(nano, device("h100"), Deployment(tp=3))
    with pytest.raises(ConfigError, match="does not divide 128 experts"):
        memory(nano, device("h100"), Deployment(dp=3, ep=True))
    with pytest.raises(ConfigError, match=r"utilization is 1.2"):
        Deployment(utilization=1.2)
    with pytest.raises(ConfigError, match="state_dtype is 'int4'"):
        Deployment(state_dtype="int4")


def test_remedies_hold_what_they_promise() -> None:
    shape, where = target_shape("ultra-nvfp4"), device("h100")
    deployment = Deployment(tp=4)
    found = remedies(shape, where, deployment, 8192, 16)
    assert "8 devices (TP8): fits" in found
    wider = dataclasses.replace(deployment, tp=8)
    assert judge(shape, where, wider, 8192, 16)[0].verdict == "fits"


@settings(max_examples=60)
@given(
    name=st.sampled_from(("nano-nvfp4", "super-nvfp4", "ultra-nvfp4", "glm-5", "qwen-3.5")),
    gpu=st.sampled_from([d.key for d in devices().values() if d.kind == "gpu"]),
    context=st.integers(1000, 200_000),
    users=st.integers(1, 300),
)
def test_more_is_never_worse(name: str, gpu: str, context: int, users: int) -> None:
    shape, where = target_shape(name), device(gpu)

    def verdict(deployment: Deployment, length: int, count: int) -> int:
        return ORDER.index(judge(shape, where, deployment, length, count)[0].verdict)

    few, more = Deployment(tp=2, ep=True), Deployment(tp=4, ep=True)
    asked = verdict(few, context, users)
    assert verdict(more, context, users) >= asked
    assert verdict(few, context // 2, users) >= asked
    assert verdict(few, context, max(users // 2, 1)) >= asked
    small = dataclasses.replace(few, state_dtype="float16")
    assert verdict(small, context, users) >= asked
    held, wide = (memory(shape, where, d) for d in (few, more))
    assert wide.max_concurrency(context) >= held.max_concurrency(context)
    assert held.max_concurrency(context) <= held.max_concurrency(context // 2)
    most = held.max_concurrency(context)
    if most:
        assert held.fixed + most * held.sequence(context) <= held.budget
        assert held.fixed + (most + 1) * held.sequence(context) > held.budget
        assert held.max_context(most) >= context
