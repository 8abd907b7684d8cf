"""What quantising pico costs, by recipe and method: perplexity, divergence, tasks solved.

python benchmarks/quantise.py runs/pico [--items 40] [--only NAME] [--modelopt DIR]

runs/pico is what `recipes/pico_corpus.py` wrote. Calibration samples come from the training
mixture, held-out ones from its held-out side; perplexity and divergence count the tokens that the
mixture trains on (documents, and what an assistant says). With --modelopt, the folder that holds
the installed package, the speed of encoding and its bits are compared with ModelOpt's. Prints one
JSON line a case.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from aprium import LLM
from aprium.base.config import load_toml
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.data.sources import Mixture, Text, heldout_samples
from aprium.envs import families
from aprium.model.model import HybridModel
from aprium.ops import _native, nvfp4
from aprium.quantize import auto, pipeline, qad, recipes
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from aprium.train.batch import collate
from aprium.train.losses import LossConfig, compute_losses
from aprium.train.policy_loss import PolicyLossConfig
from aprium.train.pretrain import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
from pico_card import answer, held_out_items, trained_families  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "max": {"rule": "max"},
    "4/6": {"rule": "four_over_six"},
    "sweep": {"rule": "sweep"},
    "sweep, weighted": {"rule": "sweep", "weighted": True},
    "gptq": {"rule": "max", "method": "gptq"},
    "gptq, 4/6": {"rule": "four_over_six", "method": "gptq"},
    "gptq, sweep": {"rule": "sweep", "method": "gptq"},
}
BEST = METHODS["gptq, sweep"]
CACHES: dict[str, dict[str, Any]] = {
    "exact": {},
    "keys and values bfloat16": {"kv_cache_dtype": "bfloat16"},
    "keys and values fp8": {"kv_cache_dtype": "fp8"},
    "states float16, stochastic": {"mamba_ssm_cache_dtype": "float16"},
    "states float16, nearest": {
        "mamba_ssm_cache_dtype": "float16",
        "mamba_cache_stochastic_rounding": False,
    },
    "states fp8, stochastic": {"mamba_ssm_cache_dtype": "fp8"},
    "states fp8, nearest": {
        "mamba_ssm_cache_dtype": "fp8",
        "mamba_cache_stochastic_rounding": False,
    },
}


class Bench:
    """Samples, tasks, and a place for checkpoints."""

    def __init__(self, corpus: Path, items: int, place: Path) -> None:
        config = load_toml(PretrainConfig, ROOT / "recipes" / "pico.toml")
        sources = tuple(
            dataclasses.replace(
                source,
                **{
                    name: corpus / getattr(source, name).name
                    for name in ("path", "heldout", "words")
                    if getattr(source, name) is not None
                },
            )
            for source in config.data.sources
        )
        data = dataclasses.replace(config.data, sources=sources, heldout_samples=96)
        text = Text(Tokenizer.load(PICO_DIR), ChatTemplate.load(PICO_DIR), families)
        mixture = Mixture(data, text)
        self.calibration = [list(mixture.draw()[1].tokens) for _ in range(256)]
        self.heldout = heldout_samples(data, text)
        self.teacher = load_checkpoint(PICO_DIR).model
        words = (corpus / "words.txt").read_text().split()
        self.tasks = [held_out_items(family, words, items) for family in trained_families()]
        self.place = place

    def accuracy(self, checkpoint: Path, **options: Any) -> float:
        """Return the mean share of tasks solved over families, greedy, thinking."""
        with LLM(
            str(checkpoint),
            activation_dtype="float32",
            max_model_len=512,
            max_num_seqs=64,
            **options,
        ) as llm:
            return statistics.mean(answer(llm, tasks, thinking=True) for tasks in self.tasks)

    def quantise(self, recipe: recipes.Recipe, formats: dict[str, str] | None = None) -> Any:
        """Quantise pico by `recipe` into `place`."""
        return pipeline.quantize(
            PICO_DIR,
            self.place / "model",
            recipe,
            calibration=self.calibration,
            formats=formats,
        )

    @torch.no_grad()
    def quality(self, model: HybridModel) -> dict[str, float]:
        """Return perplexity, and divergence from pico, over the weighted held-out tokens."""
        policy = PolicyLossConfig(distillation="full", direction="forward")
        loss = LossConfig(mtp_weight=0.0, policy=policy)
        total = {"ce": 0.0, "kl": 0.0, "weight": 0.0}
        for begin in range(0, len(self.heldout), 32):
            batch = collate(self.heldout[begin : begin + 32])
            found = compute_losses(model, batch, loss, self.teacher)
            weight = float(batch.ce_weight[found.predicted].sum())
            total["ce"] += found.ce * weight
            total["kl"] += found.kl * weight
            total["weight"] += weight
        return {
            "perplexity": math.exp(total["ce"] / total["weight"]),
            "logit_kl": total["kl"] / total["weight"],
        }

    def perplexity(self, **options: Any) -> float:
        """Return the perplexity of held-out samples with every token a step of its own."""
        nats = count = 0.0
        with LLM(
            str(PICO_DIR),
            activation_dtype="float32",
            max_model_len=512,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            **options,
        ) as llm:
            for sample in self.heldout[::4]:
                scores = llm.score(sample.tokens)[1:]
                pairs = list(zip(scores, sample.ce_weight[1:], strict=True))
                nats -= sum(score * weight for score, weight in pairs if score is not None)
                count += sum(weight for _, weight in pairs)
        return math.exp(nats / count)


def cases(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Yield each case's name and a function that runs it and returns its figures."""
    yield (
        "bf16",
        lambda: (
            {"bits": 16.0} | bench.quality(bench.teacher) | {"accuracy": bench.accuracy(PICO_DIR)}
        ),
    )
    everything = recipes.read("nvfp4-all")
    for name, changes in METHODS.items():
        recipe = dataclasses.replace(everything, **changes)
        yield f"nvfp4-all: {name}", lambda recipe=recipe: measured(bench, bench.quantise(recipe))
    for name in recipes.names():
        if name != "nvfp4-all":
            recipe = recipes.read(name)
            yield name, lambda recipe=recipe: measured(bench, bench.quantise(recipe))
    for budget in (4.75, 5.0):
        yield (
            f"auto {budget}: gptq, sweep",
            lambda budget=budget: searched(bench, dataclasses.replace(everything, **BEST), budget),
        )
    for name in ("max", "gptq, sweep"):
        recipe = dataclasses.replace(everything, **METHODS[name])
        yield f"nvfp4-all: {name}, then QAD", lambda recipe=recipe: distilled(bench, recipe)
    for name, options in CACHES.items():
        yield (
            f"cache: {name}",
            lambda options=options: {
                "perplexity": bench.perplexity(**options),
                "accuracy": bench.accuracy(PICO_DIR, **options),
            },
        )


def measured(bench: Bench, result: Any) -> dict[str, Any]:
    """Return the figures of a quantised checkpoint."""
    checkpoint = bench.place / "model"
    found = bench.quality(load_checkpoint(checkpoint).model)
    before = bench.quality(bench.teacher)["perplexity"]
    return {
        "bits": round(result.bits, 3),
        **found,
        "perplexity_change": found["perplexity"] / before - 1,
        "accuracy": bench.accuracy(checkpoint),
        "fell_back": sum(matrix.fell_back for matrix in result.matrices),
        "seconds": round(result.seconds, 1),
    }


def searched(bench: Bench, recipe: recipes.Recipe, budget: float) -> dict[str, Any]:
    """Choose formats under a budget, then quantise."""
    model = load_checkpoint(PICO_DIR).model
    choices = auto.search(model, bench.calibration[:32], recipe, budget)
    return measured(bench, bench.quantise(recipe, auto.formats_of(choices)))


def distilled(bench: Bench, recipe: recipes.Recipe) -> dict[str, Any]:
    """Quantise, then train the result on the teacher's logits."""
    result = bench.quantise(recipe)
    config = qad.QadConfig(steps=200, lr=2e-4)
    qad.distil(
        PICO_DIR,
        bench.place / "model",
        recipe.rule,
        config,
        samples=bench.calibration,
        heldout=[list(sample.tokens) for sample in bench.heldout[:8]],
    )
    return measured(bench, result)


def encoding(modelopt: Path) -> Iterator[dict[str, Any]]:
    """Compare the speed and the bits of encoding with ModelOpt's on one tensor of an expert."""
    sys.path.append(str(modelopt))
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import (  # type: ignore[import-not-found]
        NVFP4QTensor,
    )

    x = (torch.randn(1856, 2688, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    mine = nvfp4.encode(x)
    theirs, scale, scale_2 = NVFP4QTensor.quantize(x, 16)
    same = (
        torch.equal(theirs._quantized_data, mine.packed)
        and torch.equal(scale.view(torch.uint8), mine.scale.view(torch.uint8))
        and float(scale_2) == float(mine.scale_2)
    )

    def seconds(function: Any) -> float:
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    for rule in nvfp4.RULES:
        pairs = [
            (
                seconds(lambda rule=rule: nvfp4.encode(x, rule)),
                seconds(lambda: NVFP4QTensor.quantize(x, 16)),
            )
            for _ in range(7)
        ]
        yield {
            "case": f"encode 1856 x 2688 bfloat16, {rule}",
            "median": round(x.numel() / statistics.median(a for a, _ in pairs) / 1e6, 1),
            "unit": "million weights/s",
            "peer": "ModelOpt, max",
            "peer_median": round(x.numel() / statistics.median(b for _, b in pairs) / 1e6, 1),
            "ratio": round(statistics.median(b / a for a, b in pairs), 2),
            "same_bits": same if rule == "max" else None,
        }


def main() -> None:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--only", help="only the cases whose names contain this")
    parser.add_argument("--modelopt", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"machine": platform.machine(), "isa": _native.isa(), "commit": commit}
    if options.modelopt is not None:
        for line in encoding(options.modelopt):
            print(json.dumps(line | facts), flush=True)
        return
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options.corpus, options.items, Path(place))
        for name, run in cases(bench):
            if options.only is None or options.only in name:
                figures = {k: v if v is None else round(v, 5) for k, v in run().items()}
                print(json.dumps({"case": name} | figures | facts), flush=True)


if __name__ == "__main__":
    main()
