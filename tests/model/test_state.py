"""Caches of fewer bits: right bytes, small errors, and still the same in any batch."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aprium import LLM, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.model.model import Attention, HybridModel
from aprium.model.native import bind
from aprium.model.presets import PRESETS
from aprium.ops import _native, fp8
from aprium.ops.rounding import round_stochastic
from tests.model.test_model import run_schedule, schedules
from tests.model.test_transformers import random_model

FP8, HALF = torch.float8_e4m3fn, torch.float16
LIBRARY = _native.library()
BACKENDS = ["none", *(LIBRARY.supported() if LIBRARY else ())]


@pytest.fixture(scope="module", params=BACKENDS)
def toy(request: pytest.FixtureRequest) -> Iterator[HybridModel]:
    """The toy shape on each back end, with FP8 cache scales of its own."""
    model = random_model(PRESETS["toy"], 0)
    for block in model.backbone.layers:
        mixer = block.mixer
        if isinstance(mixer, Attention):
            mixer.k_proj.k_scale = torch.nn.Parameter(torch.tensor(0.03), requires_grad=False)
            mixer.v_proj.v_scale = torch.nn.Parameter(torch.tensor(0.011), requires_grad=False)
    if request.param != "none":
        assert LIBRARY is not None
        bind(model, "float32", LIBRARY.Machine(request.param, 2))
    yield model


def tokens_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (n,), generator=generator) for n in lengths]


@settings(max_examples=10)
@given(schedules(), st.integers(0, 1000))
def test_an_fp8_cache_gives_the_same_bits_in_any_schedule(toy, schedule, seed):
    lengths, steps = schedule
    prompts = tokens_of(lengths, seed)
    mixed = run_schedule(toy, prompts, steps, dtype=FP8)
    for i, prompt in enumerate(prompts):
        alone = run_schedule(toy, [prompt], [[len(prompt)]], dtype=FP8)[0]
        assert torch.equal(mixed[i], alone)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"dtype": FP8}, 1e-5, 0.05),
        ({"ssm_dtype": HALF}, 1e-6, 0.003),
        ({"ssm_dtype": HALF, "stochastic": False}, 1e-6, 0.003),
        ({"ssm_dtype": FP8}, 1e-5, 0.1),
        ({"ssm_dtype": FP8, "stochastic": False}, 1e-5, 0.1),
    ],
)
def test_errors_are_those_of_the_format(toy, options, least, most):
    prompts = tokens_of([37])
    steps = [[10]] + [[1]] * 27
    exact = run_schedule(toy, prompts, steps)[0]
    found = run_schedule(toy, prompts, steps, **options)[0]
    error = float((found - exact).norm() / exact.norm())
    assert least < error < most


@pytest.mark.parametrize("ssm_dtype", [HALF, FP8])
def test_narrow_states_do_not_depend_on_the_batch(toy, ssm_dtype):
    prompts = tokens_of([17, 23, 9])
    steps = [[5, 8, 0], *[[1, 1, 0]] * 6, [6, 0, 3], *[[0, 1, 1]] * 6, [0, 3, 0]]
    together = run_schedule(toy, prompts, steps, ssm_dtype=ssm_dtype)
    for i, prompt in enumerate(prompts):
        own = [[step[i]] for step in steps if step[i]]
        alone = run_schedule(toy, [prompt], own, ssm_dtype=ssm_dtype)[0]
        assert torch.equal(together[i], alone)


@pytest.mark.skipif(LIBRARY is None, reason="the native library is not installed")
def test_kernels_write_the_codes_that_pytorch_writes():
    """Of the first attention layer, whose inputs differ in the last bits only."""
    from tests.model.test_model import dirty_state, pages_of

    model = random_model(PRESETS["toy"], 3)
    from aprium.model.layout import Layout

    tokens = tokens_of([40])[0]
    layout = Layout.build(lengths=[40], context=[0], slots=[0], pages=[pages_of(0)], page_size=8)
    codes = []
    for isa in BACKENDS:
        assert LIBRARY is not None
        model.native = None
        if isa != "none":
            bind(model, "float32", LIBRARY.Machine(isa, 1))
        state = dirty_state(model.config, dtype=FP8)
        with torch.inference_mode():
            model(tokens, layout, state)
        codes.append(fp8.to_float(state.keys[0].flatten(0, 1)[:40]))
    for other in codes[1:]:
        same = (codes[0] == other) | (codes[0].isnan() & other.isnan())
        assert float(same.float().mean()) > 0.995


@pytest.mark.parametrize(("dtype", "largest"), [(HALF, 65504.0), (FP8, 448.0)])
def test_stochastic_rounding_is_right_on_average(dtype, largest):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, generator=generator) * torch.exp(3 * torch.randn(400, generator=generator))
    draws = torch.stack([round_stochastic(x, dtype, generator).float() for _ in range(3000)])
    fraction, smallest = (10, 2.0**-24) if dtype == HALF else (3, 2.0**-9)
    x = x.clamp(-largest, largest)
    steps = (x.abs().log2().floor().exp2() * 2.0**-fraction).clamp(min=smallest)
    assert bool(((draws - x).abs() < steps).all())  # a neighbour, one side or the other
    assert float(((draws.mean(0) - x) / steps).abs().max()) < 0.05  # 5 sigma
    exact = draws[0]
    assert torch.equal(round_stochastic(exact, dtype, generator).float(), exact)
    many = torch.full((1 << 20,), 1.5)
    assert bool((round_stochastic(many, dtype, generator).float() == 1.5).all())
    huge = torch.tensor([1e9, -1e9, 0.0, -0.0])
    wanted = [largest, -largest, 0.0, 0.0]
    assert round_stochastic(huge, dtype, generator).float().tolist() == wanted


def test_engine_options_save_memory_and_keep_answers():
    said = []
    question = [{"role": "user", "content": "Spell the word plum."}]
    params = SamplingParams(temperature=0, max_tokens=40)
    sizes = []
    for options in (
        {},
        {"kv_cache_dtype": "fp8"},
        {"mamba_ssm_cache_dtype": "float16"},
        {"kv_cache_dtype": "bfloat16", "mamba_ssm_cache_dtype": "fp8"},
    ):
        with LLM(load_checkpoint(PICO_DIR), max_model_len=256, **options) as llm:
            said.append(llm.generate([question], params)[0].text)
            stats = llm.stats()
            sizes.append((stats.kv_bytes, stats.state_bytes))
    assert said[0] == said[1] == said[2]
    assert sizes[1][0] * 4 == sizes[0][0] and sizes[3][0] * 2 == sizes[0][0]
    assert sizes[2][1] < 0.6 * sizes[0][1] and sizes[3][1] < sizes[2][1]
