"""What drafting gains on pico: the prediction head and n-grams against plain decoding.

python benchmarks/speculation.py [--batches 1,4,16,32] [--rounds 3] [--items 64]

Prompts are held-out tasks of the families that pico was trained on, greedy, up to the end of each
answer; every method has to give the same tokens. Groups of a batch's size go through all methods
one after the other, and a ratio is that of a group's two neighbouring runs: decoding (from the
step after which all have a token) and the whole, prompts included. Ratios are given by the clock
on the wall and by the processor time of the engine's thread, which other programs disturb less.
For methods of fixed length also what one step costs against a plain one, verification and drafting
apart, and the gain that this and the tokens a step imply. Last, the engine's own time in a step of
32 sequences: all but that in native calls. Prints one JSON line a case.
"""

import argparse
import itertools
import json
import pydoc_data.topics
import random
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aprium.base.config import load_toml
from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import Checkpoint
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine, load
from aprium.engine.speculative import SpeculativeConfig
from aprium.envs.families import draw
from aprium.ops import _native
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from aprium.train.pretrain import PretrainConfig

RECIPE = Path(__file__).parent.parent / "recipes" / "pico.toml"
METHODS: dict[str, SpeculativeConfig | None] = {
    "off": None,
    **{
        f"mtp {k}": SpeculativeConfig(num_speculative_tokens=k, adaptive=False)
        for k in (1, 2, 3, 5)
    },
    "mtp adaptive": SpeculativeConfig(num_speculative_tokens=5),
    "ngram adaptive": SpeculativeConfig(method="ngram", num_speculative_tokens=5),
}


class Run(NamedTuple):
    """One group through one method; seconds are pairs (on the wall, of the processor)."""

    texts: dict[str, list[int]]
    decode_s: tuple[float, float]
    whole_s: tuple[float, float]
    step_s: list[float]  # by the engine's clock, without drafting
    draft_s: list[float]


def prompts(count: int) -> list[tuple[int, ...]]:
    """Draw `count` held-out tasks, family by family, and render them as pico was trained."""
    config = load_toml(PretrainConfig, RECIPE)
    families = list(dict.fromkeys(name for s in config.data.sources for name in s.families))
    words = sorted(set(re.findall(r"\b[a-z]{3,8}\b", " ".join(pydoc_data.topics.topics.values()))))
    tokenizer, template = Tokenizer.load(PICO_DIR), ChatTemplate.load(PICO_DIR)
    numbers = random.Random("speculation")
    made = []
    for _, family in zip(range(count), itertools.cycle(families), strict=False):
        task = draw(family, numbers, words, held_out=True)
        text = template.render([task.messages(thinking=False)[0]], task.tools, enable_thinking=True)
        made.append(tuple(tokenizer.encode(text)))
    return made


def clocks() -> tuple[float, float]:
    """Read the clock on the wall and the processor time of this thread."""
    return time.perf_counter(), time.thread_time()


def since(begun: tuple[float, float]) -> tuple[float, float]:
    """Return the seconds since `clocks` gave `begun`."""
    now = clocks()
    return now[0] - begun[0], now[1] - begun[1]


def generate(engine: Engine, group: list[tuple[int, ...]], params: SamplingParams) -> Run:
    """Run `group` to the end."""
    for i, tokens in enumerate(group):
        engine.add(Request(id=str(i), tokens=tokens, params=params))
    found: dict[str, list[int]] = {str(i): [] for i in range(len(group))}
    begun, decoding = clocks(), None
    run = Run(found, (0.0, 0.0), (0.0, 0.0), [], [])
    while engine.has_work:
        if decoding is None and all(found.values()):
            decoding = clocks()
        at = engine.runner.clock()
        for delta in engine.step():
            found[delta.id] += delta.tokens
        if decoding is not None:
            run.draft_s.append(engine.runner.draft_s)
            run.step_s.append(engine.runner.clock() - at - engine.runner.draft_s)
    assert decoding is not None
    return run._replace(decode_s=since(decoding), whole_s=since(begun))


def make(checkpoint: Checkpoint, method: SpeculativeConfig | None, batch: int) -> Engine:
    """Make an engine that drafts with `method`."""
    config = EngineConfig(
        model="pico",
        speculative=method,
        max_num_seqs=batch,
        max_model_len=512,
        enable_prefix_caching=False,
    )
    return Engine(config, checkpoint)


def ratio(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the median and the quartiles of ratios."""
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def compare(checkpoint: Checkpoint, batch: int, rounds: int, items: list[tuple[int, ...]]) -> None:
    """Run all methods on groups of `batch` prompts and print a line for each."""
    engines = {name: make(checkpoint, method, batch) for name, method in METHODS.items()}
    groups = [items[i : i + batch] for i in range(0, len(items) - batch + 1, batch)]
    params = SamplingParams(temperature=0, max_tokens=200)
    for engine in engines.values():  # touch their memory
        generate(engine, groups[0], params)
    warmed = {
        name: (e.stats().drafts_compared, e.stats().drafts_accepted) for name, e in engines.items()
    }
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for group in groups:
            for name, engine in engines.items():
                runs[name].append(generate(engine, group, params))
                if runs[name][-1].texts != runs["off"][-1].texts:
                    raise RuntimeError(f"{name} gave other tokens than plain decoding")
    plain_s = statistics.median(s for run in runs["off"] for s in run.step_s)
    for name, own in runs.items():
        stats = engines[name].stats()
        compared, kept = stats.drafts_compared, stats.drafts_accepted
        before, before_kept = warmed[name]
        tried = [a - b for a, b in zip(compared, before, strict=True)]
        right = [a - b for a, b in zip(kept, before_kept, strict=True)]
        new = sum(len(t) - 1 for run in own for t in run.texts.values())
        line: dict[str, Any] = {
            "case": f"batch {batch}, {name}",
            "tokens_per_s": round(new / sum(run.decode_s[0] for run in own), 1),
        }
        if batch == 1:
            line["tokens_per_step"] = round(new / sum(len(run.step_s) for run in own), 3)
        if name != "off":
            pairs = list(zip(runs["off"], own, strict=True))
            line |= ratio([(a.decode_s[0], b.decode_s[0]) for a, b in pairs])
            line["ratio_processor"] = ratio([(a.decode_s[1], b.decode_s[1]) for a, b in pairs])
            line["ratio_whole"] = ratio([(a.whole_s[0], b.whole_s[0]) for a, b in pairs])
            line["ratio_whole_processor"] = ratio([(a.whole_s[1], b.whole_s[1]) for a, b in pairs])
            line["accepted"] = [round(k / n, 2) for n, k in zip(tried, right, strict=True) if n]
        if name.removeprefix("mtp ").isdigit() and batch == 1:
            verify = statistics.median(s for run in own for s in run.step_s) / plain_s
            drafting = statistics.median(s for run in own for s in run.draft_s) / plain_s
            line["verify"], line["draft"] = round(verify, 2), round(drafting, 2)
            line["implied"] = round(line["tokens_per_step"] / (verify + drafting), 2)
        report(line)


def overhead(checkpoint: Checkpoint, items: list[tuple[int, ...]]) -> None:
    """Print the engine's own time in a step of 32 sequences: greedy, sampled, drafting."""
    for name, method, temperature in (
        ("greedy", None, 0.0),
        ("sampled", None, 0.8),
        ("greedy, mtp 1", METHODS["mtp 1"], 0.0),
    ):
        engine = make(checkpoint, method, 32)
        machine = engine.runner.model.native.machine if engine.runner.model.native else None
        if machine is None:
            return
        params = SamplingParams(
            temperature=temperature, max_tokens=120, ignore_eos=True, logprobs=None
        )
        own_s, step_s = [], []
        for _ in range(3):
            for i, tokens in enumerate(items[:32]):
                engine.add(Request(id=str(i), tokens=tokens, params=params))
            while any(s.num_generated < 1 for s in engine.scheduler.sequences.values()):
                engine.step()
            while len(engine.scheduler.running) == 32:
                machine.take_counters()
                begun = time.perf_counter()
                engine.step()
                step_s.append(time.perf_counter() - begun)
                own_s.append(step_s[-1] - machine.take_counters()[0])
            while engine.has_work:
                engine.step()
        low, middle, high = statistics.quantiles(own_s, n=4)
        report(
            {
                "case": f"overhead at 32 sequences, {name}",
                "median_ms": round(1e3 * middle, 3),
                "quartiles_ms": [round(1e3 * low, 3), round(1e3 * high, 3)],
                "step_ms": round(1e3 * statistics.median(step_s), 3),
            }
        )


def report(line: dict[str, Any]) -> None:
    """Print one line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"isa": _native.isa(), "threads": torch.get_num_threads(), "commit": commit}
    print(json.dumps(line | facts), flush=True)


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,4,16,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=64)
    options = parser.parse_args()
    checkpoint = load(EngineConfig(model="pico"))
    items = prompts(options.items)
    for batch in map(int, options.batches.split(",")):
        compare(checkpoint, batch, options.rounds * (1 if batch < 16 else 4), items)
    overhead(checkpoint, prompts(32))


if __name__ == "__main__":
    main()
