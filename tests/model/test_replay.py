"""Tokens that are taken back leave no trace: held in the ring, replayed when accepted."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.native import bind
from aprium.model.presets import PRESETS
from aprium.ops import _native
from tests.model.test_model import PAGE, dirty_state, pages_of, run_schedule
from tests.model.test_transformers import random_model

LIBRARY = _native.library()
BACKENDS = ["none", *(LIBRARY.supported() if LIBRARY else ())]
RING = 17
ODD = dataclasses.replace(PRESETS["toy"], ssm_state_size=37, mamba_head_dim=7)


@pytest.fixture(scope="module", params=[*BACKENDS, *(f"{b} odd" for b in BACKENDS)])
def toy(request) -> HybridModel:
    """States of 16 values a row, and of a number that fills no vector."""
    backend, _, odd = request.param.partition(" ")
    model = random_model(ODD if odd else PRESETS["toy"], 0)
    if backend != "none":
        assert LIBRARY is not None
        bind(model, "float32", LIBRARY.Machine(backend, 2))
    return model


@st.composite
def histories(draw):
    """For each of up to three sequences: first chunk, then (drafts, accepted) or a plain count."""
    most, steps = draw(st.sampled_from([(6, 5), (RING, 3)]))
    counts = st.integers(1, most).flatmap(
        lambda count: st.tuples(st.just(count), st.booleans(), st.integers(1, count))
    )
    sequence = st.tuples(st.integers(1, 12), st.lists(counts, min_size=1, max_size=steps))
    return draw(st.lists(sequence, min_size=1, max_size=3))


@torch.inference_mode()
def speculate(model: HybridModel, prompts, histories) -> list[torch.Tensor]:
    """Run the histories side by side; rejected tokens are random; return accepted hidden states."""
    state = dirty_state(model.config, ring_size=RING)
    generator = torch.Generator().manual_seed(9)
    done, late = [0] * len(prompts), [0] * len(prompts)
    collected: list[list[torch.Tensor]] = [[] for _ in prompts]
    steps = [[(first, False, first), *rest] for first, rest in histories]
    for number in range(max(map(len, steps))):
        active = [i for i, own in enumerate(steps) if number < len(own)]
        tokens, lengths, held, kept = [], [], [], []
        for i in active:
            count, hold, accepted = steps[i][number]
            accepted = accepted if hold else count
            real = prompts[i][done[i] : done[i] + accepted]
            wrong = torch.randint(0, 64, (count - accepted,), generator=generator)
            tokens.append(torch.cat((real, wrong)))
            lengths.append(count)
            held.append(hold)
            kept.append(accepted)
        layout = Layout.build(
            lengths=lengths,
            context=[done[i] for i in active],
            slots=active,
            pages=[pages_of(i) for i in active],
            page_size=PAGE,
            replay=[late[i] for i in active],
            hold=held,
        )
        parts = model(torch.cat(tokens), layout, state).split(lengths)
        for i, part, hold, accepted in zip(active, parts, held, kept, strict=True):
            collected[i].append(part[:accepted])
            done[i] += accepted
            late[i] = accepted if hold else 0
    return [torch.cat(parts) for parts in collected]


@settings(max_examples=25)
@given(histories())
def test_bits_are_those_of_a_plain_run(toy, histories):
    lengths = [
        first + sum(accepted if hold else count for count, hold, accepted in rest)
        for first, rest in histories
    ]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 64, (n,), generator=generator) for n in lengths]
    found = speculate(toy, prompts, histories)
    for prompt, hidden in zip(prompts, found, strict=True):
        assert torch.equal(hidden, run_schedule(toy, [prompt], [[len(prompt)]])[0])


def test_memory_does_not_hold_a_state_a_draft():
    config = PRESETS["nano"]
    sizes = []
    for ring in (0, 2, 6):
        with torch.device("meta"):
            from aprium.model.state import HybridState

            state = HybridState.allocate(
                config, num_slots=1, num_pages=1, page_size=16, ring_size=ring, device="meta"
            )
        sizes.append(state.num_bytes)
    one_state = sum(t.numel() * 4 for t in state.ssm)
    assert sizes[2] - sizes[0] < 0.15 * one_state
