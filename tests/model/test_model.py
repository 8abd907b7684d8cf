"""The model against itself: packing, chunking, stepwise decode, drafting, gradients, names."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.model.config import ModelConfig
from aprium.model.layout import Drafting, Layout
from aprium.model.model import HybridModel, Routing
from aprium.model.presets import PRESETS
from aprium.model.state import HybridState
from tests.model.test_transformers import random_model

TOY = PRESETS["toy"]
PAGE = 8


@pytest.fixture(scope="module")
def toy() -> HybridModel:
    return random_model(TOY, 0)


def dirty_state(config: ModelConfig = TOY, **options: Any) -> HybridState:
    """A state full of another sequence's leftovers, as a recycled one is."""
    state = HybridState.allocate(config, num_slots=4, num_pages=40, page_size=PAGE, **options)
    for group in (state.conv, state.ssm, state.ring, state.ssm_scales, state.keys, state.values):
        for buffer in group:
            buffer.fill_(float("nan"))
    return state


def pages_of(sequence: int) -> list[int]:
    """Eight pages of one sequence, in an order that is not that of memory."""
    return [(sequence * 8 + 5 * i) % 8 + sequence * 8 for i in range(8)]


@torch.inference_mode()
def run_schedule(
    model: HybridModel, prompts: list[torch.Tensor], steps: list[list[int]], **options: Any
) -> list[torch.Tensor]:
    """Run `steps` (tokens of each sequence at each step); return each sequence's hidden states."""
    state, done = dirty_state(model.config, **options), [0] * len(prompts)
    collected: list[list[torch.Tensor]] = [[] for _ in prompts]
    for step in steps:
        active = [i for i, n in enumerate(step) if n]
        layout = Layout.build(
            lengths=[step[i] for i in active],
            context=[done[i] for i in active],
            slots=active,
            pages=[pages_of(i) for i in active],
            page_size=PAGE,
        )
        tokens = torch.cat([prompts[i][done[i] : done[i] + step[i]] for i in active])
        parts = model(tokens, layout, state).split([step[i] for i in active])
        for i, part in zip(active, parts, strict=True):
            collected[i].append(part)
            done[i] += step[i]
    return [torch.cat(parts) for parts in collected]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of up to three sequences and a random way to cut and mix them into steps."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    left, steps = list(lengths), []
    while any(left):
        step = [min(n, draw(st.sampled_from((0, 1, 1, 2, 5, 17, 64)))) for n in left]
        if not any(step):
            step = [min(n, 1) for n in left]
        steps.append(step)
        left = [n - taken for n, taken in zip(left, step, strict=True)]
    return lengths, steps


@settings(max_examples=25)
@given(schedules(), st.integers(0, 1000))
def test_hidden_states_do_not_depend_on_schedule(
    toy: HybridModel, schedule: tuple[list[int], list[list[int]]], seed: int
) -> None:
    lengths, steps = schedule
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, TOY.vocab_size, (n,), generator=generator) for n in lengths]
    mixed = run_schedule(toy, prompts, steps)
    for i, prompt in enumerate(prompts):
        alone = run_schedule(toy, [prompt], [[len(prompt)]])[0]
        assert torch.equal(mixed[i], alone)


@torch.inference_mode()
def test_packed_training_forward_equals_each_document_alone(toy: HybridModel) -> None:
    lengths = [1, 37, 16, 5, 33, 2]
    documents = [torch.randint(0, TOY.vocab_size, (n,)) for n in lengths]
    together = toy(torch.cat(documents), Layout.packed(lengths)).split(lengths)
    for document, found in zip(documents, together, strict=True):
        alone = run_schedule(toy, [document], [[len(document)]])[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_drafts_equal_prediction_head_over_the_whole_sequence(toy: HybridModel) -> None:
    """Recursive drafting with cached keys equals recomputing the head from the start."""
    length, num_drafts = 21, 4
    tokens = torch.randint(0, TOY.vocab_size, (length,))
    state = dirty_state()

    def layout(count: int, done: int) -> Layout:
        return Layout.build(
            lengths=[count], context=[done], slots=[0], pages=[pages_of(0)], page_size=PAGE
        )

    hidden = toy(tokens, layout(length, 0), state)
    sampled = toy.logits(hidden[-1:]).argmax(-1)
    following = torch.cat((tokens[1:], sampled))
    drafting = Drafting(range(length), following.tolist(), layout(length, 0), [num_drafts])
    (drafted,) = toy.draft(hidden, drafting, state)
    assert len(drafted) == num_drafts
    drafts = torch.tensor(drafted)

    rows, chance = hidden, 1.0
    for i in range(num_drafts):
        out = toy.predict(rows, following, Layout.packed([rows.shape[0]]))
        logits = toy.logits(out[-1:])
        assert int(logits.argmax(-1)) == int(drafts[i])
        before, chance = chance, chance * float(logits.softmax(-1).max())
        for least, count in ((before * 0.999, i), (chance * 1.001, i), (chance * 0.999, i + 1)):
            if least > chance or count > i:
                drafting = drafting._replace(least=least)
                assert toy.draft(hidden, drafting, state) == [drafted[:count]]
        rows = torch.cat((rows, out[-1:]))
        following = torch.cat((following, drafts[i : i + 1]))


def test_gradients_reach_every_parameter_and_match_finite_differences() -> None:
    # With every expert active there is no choice that could jump between the two evaluations.
    config = dataclasses.replace(TOY, num_active_experts=TOY.num_experts)
    model = random_model(config, 3).double()
    model.compute_dtype = torch.float64
    lengths = [9, 23]
    tokens = torch.randint(0, TOY.vocab_size, (sum(lengths),))
    layout = Layout.packed(lengths)
    routing: list[Routing] = []

    def loss() -> torch.Tensor:
        hidden = model(tokens, layout, routing=routing)
        drafted = model.predict(hidden, tokens.roll(-1), layout)
        return model.logits(hidden).double().square().mean() + drafted.square().mean()

    loss().backward()
    assert [r.name for r in routing] == ["backbone.layers.2.mixer", "backbone.layers.5.mixer"]
    for name, parameter in model.named_parameters():
        if "e_score_correction_bias" not in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # Along the gradient itself, where the slope is its norm; float32 inside bounds the accuracy.
    for name in ("backbone.layers.0.mixer.in_proj.weight", "backbone.layers.3.mixer.q_proj.weight"):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-2)
            high = loss()
            parameter.sub_(direction, alpha=2e-2)
            low = loss()
            parameter.add_(direction, alpha=1e-2)
        slope = float((high - low) / 2e-2)
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=2e-2)


def test_router_groups_and_two_physical_heads() -> None:
    config = dataclasses.replace(TOY, num_mtp_layers=2)
    model = random_model(config, 1)
    assert len(model.mtp.layers) == 4
    hidden = torch.randn(3, TOY.hidden_size)
    tokens, layout = torch.tensor([1, 2, 3]), Layout.packed([3])
    first, second, third = (model.predict(hidden, tokens, layout, depth=d) for d in range(3))
    assert not torch.equal(first, second)
    assert torch.equal(second, third)
