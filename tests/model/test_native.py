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
from aprium.model.layout import Drafting, Layout
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
@settings(max_examples=15)
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

    def draft() -> list[list[int]]:
        state = dirty_state(config)
        layout = Layout.build(
            lengths=[21], context=[0], slots=[0], pages=[pages_of(0)], page_size=state.page_size
        )
        hidden = model(tokens, layout, state)
        return model.draft(hidden, Drafting(range(21), [*range(1, 21), 5], layout, [3]), state)

    expected = draft()
    for isa in SUPPORTED:
        bind(model, "float32", machine(isa))
        assert draft() == expected


@st.composite
def draftings(draw) -> list[tuple[int, int, int]]:
    """For each of up to three sequences: tokens read before, now, and drafts wanted."""
    return draw(
        st.lists(
            st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(0, 4)),
            min_size=1,
            max_size=3,
        )
    )


@pytest.mark.parametrize("heads", ["*E", "E*", "E", "**"])
@settings(max_examples=12)
@given(draftings(), st.sampled_from([0.0, 0.02, 0.05, 0.3]), st.integers(0, 1000))
@torch.inference_mode()
def test_drafting_in_one_call_is_the_same_as_by_parts(heads, sequences, least, seed) -> None:
    """The same drafts, and the same bits in the head's pages."""
    kinds = tuple({"*": "attention", "E": "moe"}[k] for k in heads)
    config = dataclasses.replace(TOY, mtp_layers=kinds, num_mtp_layers=2)
    model = random_model(config, 4)
    lengths = [now for _, now, _ in sequences]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths) + 3, config.hidden_size, generator=generator) * 3
    rows = torch.randperm(len(hidden), generator=generator)[: sum(lengths)].tolist()
    following = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator).tolist()
    layout = Layout.build(
        lengths=lengths,
        context=[before for before, _, _ in sequences],
        slots=list(range(len(sequences))),
        pages=[pages_of(i) for i in range(len(sequences))],
        page_size=8,
    )
    drafting = Drafting(rows, following, layout, [count for _, _, count in sequences], least)
    for isa in SUPPORTED:
        bind(model, "float32", machine(isa, 2))
        found = []
        for draft in (model.draft, model.draft_by_parts):
            state = dirty_state(config)
            for buffer in (*state.keys, *state.values):
                buffer.fill_(0.5)
            found.append((draft(hidden, drafting, state), state))
        (drafts, first), (expected, second) = found
        assert drafts == expected
        for mine, theirs in zip(
            first.keys + first.values, second.keys + second.values, strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_embeddings_of_every_format(stored: torch.dtype, computed: torch.dtype) -> None:
    """As the same values in float32; rounded where the model computes in bfloat16."""
    hidden = []
    for exact in (False, True):
        model = random_model(TOY, 5)
        weight = model.backbone.embeddings.weight.detach().to(stored)
        model.backbone.embeddings.weight.data = weight.to(computed).float() if exact else weight
        model.compute_dtype = torch.float32 if exact else computed
        bind(model, "float32", machine(SUPPORTED[0]))
        hidden.append(forward(model, prompts(TOY, [9, 3])))
        model.native = None
    assert torch.equal(*hidden)


@torch.inference_mode()
def test_a_token_without_embedding_is_refused() -> None:
    model = random_model(TOY, 5)
    for isa in SUPPORTED:
        bind(model, "float32", machine(isa))
        for token in (-1, TOY.vocab_size):
            with pytest.raises(IndexError, match=f"token id {token} has no embedding"):
                forward(model, [torch.tensor([1, token])])


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
