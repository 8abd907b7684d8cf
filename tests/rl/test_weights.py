"""Weights pushed to an engine: it then computes what an engine opened with them computes."""

import asyncio
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from aprium.base.records import SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.names import tensor_table
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.model.model import HybridModel
from aprium.quantize import merge, pipeline, recipes
from aprium.rl.weights import Weights
from aprium.train import lora
from aprium.train.lora import LoraConfig
from aprium.train.sft import open_model, read_text

TOKENS = tuple(range(30, 60))


def model(frozen: bool = False) -> HybridModel:
    return open_model(PICO_DIR, read_text(PICO_DIR), frozen=frozen)


def engine_of(weights: Weights) -> AsyncEngine:
    return AsyncEngine(EngineConfig(model="pico"), weights.checkpoint(PICO_DIR))


@torch.no_grad()
def disturb(parameters: Mapping[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def check_push(weights: Weights, parameters: Mapping[str, Tensor]) -> None:
    """Push after a change, and compare with an engine that is opened after it, bit for bit."""

    async def go() -> None:
        old = engine_of(weights)
        before = await EnginePolicy(old).score(TOKENS)
        disturb(parameters)
        await weights.push(old, 11)
        new = engine_of(weights)
        params = SamplingParams(max_tokens=5, seed=2, ignore_eos=True)
        found, wanted = [await EnginePolicy(e).complete(TOKENS, params) for e in (old, new)]
        scores = [await EnginePolicy(e).score(TOKENS) for e in (old, new)]
        assert found.weight_spans == ((11, 5),) and wanted.weight_spans == ((0, 5),)
        assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
        assert scores[0] == scores[1] != before
        await old.close()
        await new.close()

    asyncio.run(go())


def test_all_weights_arrive() -> None:
    trained = model()
    weights = Weights(trained)
    assert set(weights.tensors()) == set(tensor_table(trained.config))
    check_push(weights, {n: p for n, p in trained.named_parameters() if p.requires_grad})


def test_adapters_arrive_merged() -> None:
    trained = model(frozen=True)
    targets = ("mamba_in", "attention_qkv", "expert", "shared_expert")
    adapter = lora.attach(trained, LoraConfig(r=4, targets=targets))
    weights = Weights(trained, adapter)
    check_push(weights, adapter.parameters())
    assert set(weights.changed()) < set(weights.tensors())


def test_merged_weights_are_those_of_a_merged_checkpoint(tmp_path) -> None:
    base = tmp_path / "nvfp4"
    pipeline.quantize(PICO_DIR, base, recipes.read("nvfp4-all"))
    trained = open_model(base, read_text(base), frozen=True)
    adapter = lora.attach(trained, LoraConfig(r=4))
    disturb(adapter.parameters())
    lora.save(adapter, tmp_path / "adapter", base=str(base))
    merge.merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = dict(load_checkpoint(tmp_path / "merged", load="memory").model.named_parameters())
    found = Weights(trained, adapter).checkpoint(base).model
    for name, value in found.named_parameters():
        # Merged checkpoints are BF16, and engines of the loop float32.
        torch.testing.assert_close(
            value.bfloat16().float(), merged[name].float(), rtol=2**-7, atol=1e-6, msg=name
        )


def test_an_unknown_engine_state_is_no_excuse() -> None:
    weights = Weights(model())

    async def go() -> None:
        engine = engine_of(weights)
        await engine.close()
        with pytest.raises(Exception, match="the engine was closed"):
            await weights.push(engine, 1)

    asyncio.run(go())
