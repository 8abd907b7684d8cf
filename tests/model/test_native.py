"""A model on native kernels: equal to PyTorch, and the same bits whatever it is computed beside."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.checkpoint.load import load_checkpoint
from aprium.model.config import ModelConfig
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.native import bind
from aprium.model.presets import PRESETS
from aprium.ops import _native
from tests import modelopt_layout
from tests.model.test_model import dirty_state, pages_of, run_schedule, schedules
from tests.model.test_transformers import random_model

TOY = PRESETS["toy"]
SUPPORTED = _native.library().supported() if _native.library() else []
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the native library is not installed")


def machine(isa: str, num_threads: int = 1):
    library = _native.library()
    assert library is not None
    return library.Machine(isa, num_threads)


# Shapes that fill no vector: odd heads, states, groups, kernels, widths.
ODD = {
    "toy": TOY,
    "no latent": dataclasses.replace(TOY, latent_size=None, conv_bias=False, norm_topk_prob=False),
    "narrow": dataclasses.replace(
        TOY,
        hidden_size=37,
        head_dim=5,
        mamba_num_heads=6,
        mamba_head_dim=3,
        ssm_state_size=11,
        num_groups=3,
        conv_kernel=2,
        expert_intermediate_size=17,
        shared_expert_intermediate_size=1,
        latent_size=15,
        intermediate_size=33,
        time_step_limit=(0.01, 0.5),
    ),
    "wide": dataclasses.replace(
        TOY,
        hidden_size=272,
        head_dim=80,
        ssm_state_size=64,
        mamba_head_dim=17,
        num_router_groups=4,
        num_active_router_groups=2,
        mlp_bias=True,
        mamba_proj_bias=True,
    ),
    "one head": dataclasses.replace(
        TOY, num_heads=1, num_kv_heads=1, mamba_num_heads=1, num_groups=1, ssm_state_size=128
    ),
}


def prompts(config: ModelConfig, lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in lengths]


@torch.inference_mode()
def forward(model: HybridModel, tokens: list[torch.Tensor]) -> torch.Tensor:
    config = model.config
    state = dirty_state(config)
    lengths = [len(t) for t in tokens]
    slots = list(range(len(tokens)))
    layout = Layout.build(
        lengths=lengths,
        context=[0] * len(tokens),
        slots=slots,
        pages=[pages_of(i) for i in slots],
        page_size=state.page_size,
    )
    return model(torch.cat(tokens), layout, state)


@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("name", ODD)
def test_equals_pytorch(name: str, isa: str) -> None:
    model = random_model(ODD[name], 1)
    tokens = prompts(ODD[name], [33, 1, 17])
    expected = forward(model, tokens)
    with torch.inference_mode():
        expected_logits = model.logits(expected)
    bind(model, "float32", machine(isa, 2))
    found = forward(model, tokens)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(found), expected_logits, rtol=2e-4, atol=5e-4)


@pytest.fixture(scope="module", params=["bf16", "fp8", "nvfp4", "mixed", "compressed-tensors"])
def stored(request, tmp_path_factory) -> Iterator[HybridModel]:
    path = tmp_path_factory.mktemp(request.param)
    # With every expert active no rounding can make the router jump.
    config = dataclasses.replace(
        TOY, hidden_size=304, expert_intermediate_size=272, num_active_experts=TOY.num_experts
    )
    modelopt_layout.write(path, config, request.param)
    yield load_checkpoint(path).model


@pytest.mark.parametrize("isa", SUPPORTED)
def test_every_format_and_activation_dtype(stored: HybridModel, isa: str) -> None:
    tokens = prompts(stored.config, [23, 2])
    stored.native = None
    reference = forward(stored, tokens)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.02), ("int8", 0.06)):
        bind(stored, dtype, machine(isa))
        found = forward(stored, tokens)
        error = (found - reference).norm() / reference.norm()
        assert error < tolerance, (dtype, float(error))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@settings(max_examples=15, deadline=None)
@given(schedules(), st.integers(0, 1000))
def test_bits_do_not_depend_on_schedule(dtype, stored, schedule, seed) -> None:
    lengths, steps = schedule
    for isa in SUPPORTED:
        bind(stored, dtype, machine(isa, 2))
        tokens = prompts(stored.config, lengths, seed)
        mixed = run_schedule(stored, tokens, steps)
        for i, prompt in enumerate(tokens):
            alone = run_schedule(stored, [prompt], [[len(prompt)]])[0]
            assert torch.equal(mixed[i], alone), isa


@torch.inference_mode()
def test_drafts_equal_pytorch() -> None:
    config = dataclasses.replace(TOY, num_mtp_layers=2)
    model = random_model(config, 4)
    tokens = torch.arange(21)

    def draft() -> list[int]:
        state = dirty_state(config)

        def layout(count: int, done: int) -> Layout:
            return Layout.build(
                lengths=[count], context=[done], slots=[0], pages=[pages_of(0)], page_size=8
            )

        hidden = model(tokens, layout(21, 0), state)
        model.predict(hidden[:-1], tokens[1:], layout(20, 0), state)
        steps = [layout(1, 20 + i) for i in range(3)]
        return model.draft(hidden[-1:], torch.tensor([5]), steps, state)[0].tolist()

    expected = draft()
    for isa in SUPPORTED:
        bind(model, "float32", machine(isa))
        assert draft() == expected


def test_training_stays_in_pytorch() -> None:
    model = random_model(TOY, 2)
    bind(model, "float32", machine(SUPPORTED[0]))
    hidden = model(torch.arange(9), Layout.packed([9]))
    model.logits(hidden).sum().backward()
    assert model.backbone.embeddings.weight.grad is not None


def test_unknown_names_are_refused() -> None:
    model = random_model(TOY, 2)
    with pytest.raises(ConfigError, match="activation_dtype is 'fp4'"):
        bind(model, "fp4")
    library = _native.library()
    assert library is not None
    with pytest.raises(ValueError, match="no sse2 kernels"):
        library.Machine("sse2", 1)
