"""The time model: bytes and operations by hand, limits, monotonicity."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError
from aprium.plan.cost import Constants, CostModel, accepted_tokens, constants, serve
from aprium.plan.hardware import device
from aprium.plan.memory import Deployment
from aprium.plan.shapes import target_shape

IDEAL = Constants(
    bandwidth=1.0, compute=1.0, layer_us=0.0, collective_us=0.0, link=1.0, imbalance=1.0,
    distinct=1.0, sequence_us=0.0, expert_us=0.0, cpu_bandwidth=1.0, cpu_compute=1.0,
    cpu_layer_us=0.0,
)  # fmt: skip


def model(name: str, gpu: str, values: Constants | None = None, **cut: object) -> CostModel:
    deployment = Deployment(**cut)  # type: ignore[arg-type]
    return CostModel(target_shape(name), device(gpu), deployment, values or constants())


@pytest.mark.parametrize(("batch", "gigabytes"), [(1, 2.97), (8, 8.17), (64, 24.3), (256, 44.6)])
def test_bytes_of_a_decode_step_of_nano(batch: int, gigabytes: float) -> None:
    # By hand: dense weights, 128 (1 - (1 - 6/128)^B) experts a layer, states twice, 1K of FP8 KV.
    ideal = model("nano-nvfp4", "h100", IDEAL)
    seconds = ideal.decode(batch, 1024)
    # Activations, and the projection's operations at large batches, come on top.
    assert seconds * 3.35e12 / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_operations_of_a_prompt_of_nano() -> None:
    # 2 x 2.875 billion weights, attention and scan: 6.2 GFLOP a token at 8K.
    where = dataclasses.replace(device("h100"), bandwidth_tb_s=1e6)  # so that only they count
    deployment = Deployment(max_batched_tokens=1 << 20)
    ideal = CostModel(target_shape("nano"), where, deployment, IDEAL)
    assert ideal.prefill(8192) * 989e12 / 8192 == pytest.approx(6.2e9, rel=0.03)


def test_coverage() -> None:
    ideal = model("nano", "h100", IDEAL)
    assert [ideal.cover(n) for n in (1, 8, 64)] == pytest.approx([6, 40.8, 122.1], abs=0.1)
    assert model("nano", "h100").cover(1) == pytest.approx(6)
    assert model("nano", "h100").cover(64) < ideal.cover(64)


def test_hopper_widens_four_bits() -> None:
    # Compute-bound, 4-bit weights are no quicker than BF16 where there is no hardware for them.
    long = 1 << 16
    hopper = [model(n, "h100", IDEAL, max_batched_tokens=long) for n in ("ultra", "ultra-nvfp4")]
    quick = [model(n, "b200", IDEAL, max_batched_tokens=long) for n in ("ultra", "ultra-nvfp4")]
    assert hopper[1].prefill(long) > 0.6 * hopper[0].prefill(long)
    assert quick[1].prefill(long) < 0.6 * quick[0].prefill(long)


def test_accepted_tokens() -> None:
    assert accepted_tokens(0) == 1
    assert accepted_tokens(3) == 2.874
    assert accepted_tokens(4) == pytest.approx((2.874 + 3.421) / 2)
    assert accepted_tokens(3, 0.5) == 1 + 0.5 + 0.25 + 0.125
    assert accepted_tokens(3, 1.0) == 4
    assert accepted_tokens(12) == accepted_tokens(7)


def test_speculation_helps_one_user_more_than_many() -> None:
    plain, drafted = (model("ultra-nvfp4", "gb200", tp=4, drafts=d) for d in (0, 5))

    def gain(batch: int) -> float:
        return drafted.yielded() * plain.decode(batch, 8192) / drafted.decode(batch, 8192)

    assert gain(1) > 1.5
    assert gain(1) > gain(64)


def test_a_lone_user_is_prompt_then_steps() -> None:
    one = model("super-nvfp4", "b200")
    rates = serve(one, concurrency=1, prompt=4096, output=512)
    assert rates.ttft_s == one.prefill(4096)
    assert rates.tpot_s == one.decode(1, 4096 + 256)
    assert 1 / rates.requests_per_s == pytest.approx(rates.ttft_s + 512 * rates.tpot_s)


def test_little_law_holds() -> None:
    found = model("ultra-nvfp4", "h100", tp=8)
    for users, most in ((8, 1e9), (64, 1e9), (256, 90)):
        rates = serve(found, concurrency=users, prompt=8192, output=1024, most_running=most)
        decoding = rates.requests_per_s * 1024 * rates.tpot_s
        assert decoding <= min(users, most) * 1.001
        inside = rates.requests_per_s * (rates.ttft_s + 1024 * rates.tpot_s)
        assert inside == pytest.approx(users, rel=0.02)


def test_together_and_apart_serve_about_as_much() -> None:
    found = model("super-nvfp4", "b200")
    rates = [
        serve(found, concurrency=32, prompt=2048, output=1024, together=t) for t in (False, True)
    ]
    assert rates[0].output_tokens_per_s == pytest.approx(rates[1].output_tokens_per_s, rel=0.2)
    assert rates[1].ttft_s > rates[0].ttft_s


def test_prefix_reuse_and_more_links() -> None:
    found = model("super-nvfp4", "b200")
    cold, warm = (
        serve(found, concurrency=32, prompt=32768, output=512, reuse=r) for r in (0.0, 0.9)
    )
    assert warm.output_tokens_per_s > 2 * cold.output_tokens_per_s
    assert warm.ttft_s < cold.ttft_s
    near = model("ultra-nvfp4", "h100", tp=8).decode(1, 1024)
    across = model("ultra-nvfp4", "h100", tp=16).decode(1, 1024)
    quick = model("ultra-nvfp4", "gb200", tp=16).decode(1, 1024)
    assert quick < near and quick < across


def test_sparse_attention_pays_only_where_it_selects() -> None:
    sparse = model("glm-5", "b200", tp=8)
    dense = model("glm-5", "b200", tp=8, attention="dense")
    assert sparse.decode(16, 100_000) < dense.decode(16, 100_000)
    assert sparse.decode(16, 1000) >= dense.decode(16, 1000)


def test_experts_in_host_memory_are_slower() -> None:
    here, away = (model("nano-nvfp4", "rtx-5090", offload_gb=gb) for gb in (0, 15))
    assert away.decode(1, 1024) > 2 * here.decode(1, 1024)


def test_overridden_constants() -> None:
    given = {"constants": {"value": {"bandwidth": 0.5}}}
    assert constants(given).bandwidth == 0.5
    assert constants(given).compute == constants().compute
    with pytest.raises(ConfigError, match=r"unknown key constants.speed"):
        constants({"constants": {"value": {"speed": 1}}})
    assert from_dict(Constants, dataclasses.asdict(IDEAL)) == IDEAL


NAMES = ("nano-nvfp4", "super-fp8", "ultra-nvfp4", "kimi-k2", "deepseek-v4", "qwen-3.5")


@settings(max_examples=80)
@given(
    name=st.sampled_from(NAMES),
    batch=st.integers(1, 512),
    context=st.integers(1, 100_000),
    chunk=st.integers(1, 8192),
)
def test_more_work_takes_longer(name: str, batch: int, context: int, chunk: int) -> None:
    found = model(name, "b200", tp=4, ep=True)
    step = found.decode(batch, context)
    assert 0 < step <= found.decode(batch + 1, context)
    assert step <= found.decode(batch, context + 100)
    assert found.decode(batch, context) / batch >= found.decode(2 * batch, context) / (2 * batch)
    assert found.mixed(batch, context, chunk, 0) >= step
    assert found.prefill(chunk) <= found.prefill(2 * chunk)
    quicker = CostModel(
        found.shape,
        dataclasses.replace(found.device, bandwidth_tb_s=2 * found.device.bandwidth_tb_s),
        found.deployment,
        found.values,
    )
    assert quicker.decode(batch, context) <= step
