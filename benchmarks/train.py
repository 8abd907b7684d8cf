"""Training: tokens a second and peak memory against transformers' own implementation.

python benchmarks/train.py [pico hybrid-100m] [--batches equal chat] [--dtypes float32 bfloat16]
                           [--rounds 3] [--steps 4] [--length 512] [--threads 2]

Both sides start from the same float32 weights and take the same batch: cross-entropy over every
token but each document's first, backward, clipping, AdamW. "equal" is documents of one length, so
that nobody pads; "chat" has lengths as conversations have them, which Aprium packs and the peer
pads to the longest. The peer is `transformers.AutoModelForCausalLM` in plain PyTorch, without
prediction head (it has none), with the faster of its implementations of experts; in bfloat16 it
runs under autocast, and Aprium with bfloat16 activations, both with float32 weights and optimiser.
Each round is a fresh process a side, in turn; figures are medians over rounds of the median step,
memory the process's peak, and that peak over what the loaded model had. `cpu_ratio` is that of
processor time, which says more than the clock where other programs run. `loss` is the first step's,
which shows that both compute the same. Bars: tokens a second >= 3 times, peak memory <= 0.6 times.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from aprium.base.records import Sample
from aprium.model.config import PATTERN_KINDS, ModelConfig
from aprium.model.presets import PRESETS

PEERS = ("eager", "grouped_mm")


def shapes() -> dict[str, ModelConfig]:
    """Return the shapes compared: the bundled one, and one of a hundred million parameters."""
    pattern = "MEMEM*EMEM*E"
    return {
        "pico": replace(PRESETS["pico"], num_mtp_layers=0, mtp_layers=()),
        "hybrid-100m": ModelConfig(
            vocab_size=16384,
            hidden_size=512,
            layers=tuple(PATTERN_KINDS[letter] for letter in pattern),
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            mamba_num_heads=16,
            mamba_head_dim=64,
            ssm_state_size=64,
            num_groups=4,
            chunk_size=64,
            intermediate_size=1024,
            num_experts=32,
            num_active_experts=4,
            expert_intermediate_size=384,
            shared_expert_intermediate_size=768,
            routed_scaling_factor=2.5,
        ),
    }


def write(shape: ModelConfig, directory: Path) -> int:
    """Write random weights of `shape` where both sides read them; returns the parameters."""
    from aprium.checkpoint.save import save_checkpoint
    from aprium.model.model import HybridModel

    model = HybridModel(shape, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(model, directory, dtype=torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def batch(kind: str, length: int, vocab: int) -> list[list[int]]:
    """Return about 4 `length` tokens: documents of one length, or of lognormal ones."""
    numbers = random.Random(1)
    if kind == "equal":
        lengths = [length] * 4
    else:
        lengths = []
        while sum(lengths) < 4 * length:
            drawn = round(numbers.lognormvariate(math.log(length / 4), 0.8))
            lengths.append(min(max(drawn, 16), 2 * length))
    return [[numbers.randrange(vocab) for _ in range(n)] for n in lengths]


def ours(directory: Path, documents: list[list[int]], dtype: str) -> Callable[[], float]:
    """Load the model for Aprium's trainer and return one step."""
    from aprium.checkpoint.load import load_checkpoint
    from aprium.train.batch import collate
    from aprium.train.losses import LossConfig, compute_losses
    from aprium.train.optim import OptimConfig, build_optimisers

    model = load_checkpoint(directory).model
    model.compute_dtype = getattr(torch, dtype)
    optim = OptimConfig(muon_lr=None)
    optimisers = build_optimisers(model, optim)
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples = [
        Sample(tokens=tuple(d), ce_weight=(0.0,) + (1.0,) * (len(d) - 1), domain="")
        for d in documents
    ]
    config = LossConfig(mtp_weight=0.0, balance_weight=0.0)

    def step() -> float:
        losses = compute_losses(model, collate(samples), config)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return losses.ce

    return step


def peer(
    directory: Path, documents: list[list[int]], dtype: str, experts: str
) -> Callable[[], float]:
    """Load the model for transformers and return one step in plain PyTorch."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation=experts
    )
    model.train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    longest = max(map(len, documents))
    tokens = torch.tensor([d + [0] * (longest - len(d)) for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in documents])
    labels = tokens.where(mask == 1, -100)
    given = {} if bool(mask.all()) else {"attention_mask": mask}

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=labels, use_cache=False, **given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def work(options: argparse.Namespace) -> None:
    """Time one side and print its figures; runs in a process of its own."""
    torch.set_num_threads(options.threads)
    directory: Path = options.directory
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    documents = batch(options.kind, options.length, vocab)
    if options.side == "aprium":
        step = ours(directory, documents, options.dtype)
    else:
        step = peer(directory, documents, options.dtype, options.side)
    loaded = _resident()
    first = step()
    seconds, worked = [], []
    for _ in range(options.steps):
        begin, before = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - begin)
        worked.append(time.process_time() - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = {"s": statistics.median(seconds), "cpu": statistics.median(worked), "loss": first}
    line |= {"peak": peak, "over": peak - loaded, "tokens": sum(map(len, documents))}
    print(json.dumps(line))


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Run `work` in a fresh process."""
    names = ("steps", "length", "threads", "kind", "dtype", "directory")
    settings = [f"--{name}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, f"--side={side}", *settings]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one shape, batch and dtype."""
    trial = {side: measure(side, options)["s"] for side in PEERS}
    best = min(trial, key=lambda side: trial[side])
    rounds = [(measure("aprium", options), measure(best, options)) for _ in range(options.rounds)]

    def middle(pick: Callable[[dict[str, float], dict[str, float]], float]) -> float:
        return statistics.median(pick(mine, theirs) for mine, theirs in rounds)

    speeds = [theirs["s"] / mine["s"] for mine, theirs in rounds]
    return {
        "case": f"{name}, {options.kind}, {options.dtype}",
        "parameters": count,
        "tokens_per_step": rounds[0][0]["tokens"],
        "threads": options.threads,
        "peer": f"transformers, experts {best}",
        "loss": [rounds[0][0]["loss"], rounds[0][1]["loss"]],
        "tokens_per_s": round(middle(lambda mine, _: mine["tokens"] / mine["s"])),
        "peer_tokens_per_s": round(middle(lambda _, theirs: theirs["tokens"] / theirs["s"])),
        "ratio": round(statistics.median(speeds), 2),
        "spread": [round(min(speeds), 2), round(max(speeds), 2)],
        "cpu_ratio": round(middle(lambda mine, theirs: theirs["cpu"] / mine["cpu"]), 2),
        "peak_mib": round(middle(lambda mine, _: mine["peak"])),
        "peer_peak_mib": round(middle(lambda _, theirs: theirs["peak"])),
        "peak_ratio": round(middle(lambda mine, theirs: mine["peak"] / theirs["peak"]), 2),
        "over_loaded_ratio": round(middle(lambda mine, theirs: mine["over"] / theirs["over"]), 2),
        "bars": "ratio >= 3, peak_ratio <= 0.6",
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=list(shapes()))
    parser.add_argument("--batches", nargs="+", default=["equal", "chat"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    for name in ("side", "kind", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work(options)
        return
    for name in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            count = write(shapes()[name], Path(folder))
            options.directory = Path(folder)
            for kind, dtype in product(options.batches, options.dtypes):
                options.kind, options.dtype = kind, dtype
                print(json.dumps(compare(name, count, options)), flush=True)


if __name__ == "__main__":
    main()
