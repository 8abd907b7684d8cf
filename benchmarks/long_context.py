"""A million tokens in one sequence: the state stays flat, keys and values grow linearly, all exact.

python benchmarks/long_context.py [--tokens 1048576] [--chunk 2048] [--heads 2]

Attention is quadratic, so the model has pico's sizes but one attention layer, of --heads heads and
one KV head, and random weights. Strings are planted all over a random prompt. Checked at the end:
keys and values of a shorter prefix against a run of that prefix alone in other chunks (bit for
bit) and against the PyTorch reference; the last token's hidden state, which attends over the whole,
against the PyTorch reference on the same state; the bytes against what `info` predicts; and that
the same text with another end goes on from its snapshot. Prints one JSON line a power of two of
tokens read, and one for the checks.
"""

import argparse
import dataclasses
import json
import random
import time

import torch

from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.info import kv_bytes_per_token, state_bytes_per_sequence
from aprium.checkpoint.load import Checkpoint
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.model.config import ModelConfig, QuantConfig
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.model.state import HybridState
from aprium.ops import _native

SHORT, REFERENCE = 16384, 4096  # prefixes that other runs compute, too
PLANTED = tuple(range(300, 340))
PAGE = 256


def shape(heads: int) -> ModelConfig:
    """Return pico's shape with one attention layer of `heads` heads and no prediction head."""
    layers = tuple(
        kind for i, kind in enumerate(PRESETS["pico"].layers) if kind != "attention" or i == 5
    )
    config = dataclasses.replace(PRESETS["pico"], layers=layers, num_heads=heads, num_kv_heads=1)
    return config.without_mtp()


def checkpoint(config: ModelConfig) -> Checkpoint:
    """Return a model of that shape with random weights."""
    model = HybridModel(config, dtype=torch.float32).eval().requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    return Checkpoint(path=None, config=config, quant=QuantConfig(), model=model)


def prompt(count: int, vocab_size: int) -> tuple[int, ...]:
    """Return random tokens with the planted string at the start, all over, and near the end."""
    numbers = random.Random(0)
    tokens = [numbers.randrange(20, vocab_size) for _ in range(count)]
    for place in (100, REFERENCE - 90, SHORT - 90, count // 2, count - 90):
        if 0 <= place < count - len(PLANTED):
            tokens[place : place + len(PLANTED)] = PLANTED
    return tuple(tokens)


def read(loaded: Checkpoint, tokens: tuple[int, ...], chunk: int, report: bool) -> Engine:
    """Read all but the last token, and stop with the state in slot and pages."""
    engine = Engine(
        EngineConfig(
            model="pico",
            max_model_len=len(tokens) + 2,
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
            block_size=PAGE,
            prefix_cache_ram_bytes=0,
            memory_utilization=0.9,
        ),
        loaded,
        eos_token_ids=(),
    )
    params = SamplingParams(temperature=0, max_tokens=1)
    engine.add(Request(id="a", tokens=tokens[:-1], params=params))
    sequence = engine.scheduler.sequences["a"]
    begun = time.perf_counter()
    told, since = 1, begun
    while engine.has_work and sequence.num_computed < len(tokens) - 2:
        engine.step()  # ends at a snapshot point, one token before the end
        done = sequence.num_computed
        if report and done >= told * 4096:
            now = time.perf_counter()
            line = {
                "case": "read",
                "tokens": done,
                "seconds": round(now - begun, 1),
                "tokens_per_s": round((done - told * 2048 * (told > 1)) / (now - since)),
                "snapshots": engine.stats().num_snapshots,
            }
            print(json.dumps(line), flush=True)
            told, since = told * 2, now
    return engine


def held(engine: Engine, end: int, *, start: int = 0) -> dict[str, torch.Tensor]:
    """Return recurrent state, and keys and values of tokens [start, end), of the one sequence."""
    sequence = engine.scheduler.sequences["a"]
    assert sequence.slot is not None
    return engine.runner.state.export(sequence.slot, sequence.pages, start, end)


@torch.inference_mode()
def reference(loaded: Checkpoint, tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return state, keys and values after `tokens`, read at once in PyTorch."""
    config, count = loaded.config, len(tokens)
    pages = -(-count // PAGE)
    state = HybridState.allocate(config, num_slots=1, num_pages=pages, page_size=PAGE)
    run(loaded, tokens, 0, state, 0, tuple(range(pages)))
    return state.export(0, range(pages), 0, count)


def run(
    loaded: Checkpoint,
    tokens: tuple[int, ...],
    context: int,
    state: HybridState,
    slot: int,
    pages: tuple[int, ...],
) -> torch.Tensor:
    """Run the model in PyTorch on `tokens` after `context` others."""
    layout = Layout.build(
        lengths=[len(tokens)], context=[context], slots=[slot], pages=[pages], page_size=PAGE
    )
    native, loaded.model.native = loaded.model.native, None
    try:
        return loaded.model(torch.tensor(tokens), layout, state)
    finally:
        loaded.model.native = native


def again(engine: Engine, tokens: tuple[int, ...]) -> dict[str, float]:
    """Ask once more with another end, and return what was reused and when the answer began."""
    engine.abort("a")
    other = (*tokens[:-2], 50, 51)
    params = SamplingParams(temperature=0, max_tokens=1)
    begun = time.perf_counter()
    engine.add(Request(id="b", tokens=other, params=params))
    deltas = [delta for _ in iter(lambda: engine.has_work, False) for delta in engine.step()]
    return {"reused": deltas[-1].reused, "first_token_s": time.perf_counter() - begun}


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@torch.inference_mode()
def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=2)
    options = parser.parse_args()
    config = shape(options.heads)
    loaded = checkpoint(config)
    tokens = prompt(options.tokens, config.vocab_size)
    long = read(loaded, tokens, options.chunk, report=True)
    sequence = long.scheduler.sequences["a"]
    assert sequence.slot is not None and sequence.num_computed == len(tokens) - 2
    short = read(loaded, tokens[:SHORT], 333, report=False)
    ours, theirs = held(long, SHORT - 2), held(short, SHORT - 2)
    slow = reference(loaded, tokens[:REFERENCE])
    kv_error = max(worst(ours[name][:, :REFERENCE], slow[name]) for name in ("keys", "values"))
    head = read(loaded, tokens[: REFERENCE + 2], 333, report=False)
    state_error = worst(held(head, REFERENCE)["ssm"], slow["ssm"])
    # The next token, with everything before it in the state: ours, then PyTorch's.
    before = held(long, 1)
    pages = sequence.pages
    state = long.runner.state
    layout = Layout.build(
        lengths=[1], context=[len(tokens) - 2], slots=[sequence.slot], pages=[pages], page_size=PAGE
    )
    native = loaded.model(torch.tensor(tokens[-2:-1]), layout, state)
    state.restore_slot(sequence.slot, before)
    torch_hidden = run(loaded, tokens[-2:-1], len(tokens) - 2, state, sequence.slot, pages)
    kv_bytes = len(pages) * long.plan.page_bytes
    predicted = kv_bytes_per_token(config, 4) * len(tokens)
    places = [i for i in range(len(tokens)) if tokens[i : i + len(PLANTED)] == PLANTED]
    checks = {
        "case": "checks",
        "isa": _native.isa(),
        "tokens": len(tokens),
        "planted_at": places,
        "short_prefix_bits_equal": all(
            torch.equal(ours[name], theirs[name]) for name in ("keys", "values")
        ),
        "reference_kv_error": kv_error,
        "reference_state_error": state_error,
        "last_token_error": worst(native, torch_hidden),
        "kv_bytes": kv_bytes,
        "kv_bytes_by_info": predicted,
        "state_bytes": long.plan.slot_bytes,
        "state_bytes_by_info": state_bytes_per_sequence(config, 4),
    }
    print(json.dumps(checks | again(long, tokens)))


if __name__ == "__main__":
    main()
