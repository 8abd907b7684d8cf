"""Training: tokens a second and peak memory against transformers' own implementation.

python benchmarks/train.py [pico hybrid-100m] [--rounds 3] [--steps 4] [--batch 4] [--length 512]
                           [--threads 2]

Both sides start from the same float32 weights and take the same batch: equal sequences, so that
neither pads; cross-entropy over every token but the first, backward, clipping, AdamW. The peer is
`transformers.AutoModelForCausalLM` in plain PyTorch, without prediction head (it has none), with
the faster of its implementations of experts. Each round is a fresh process a side, in turn; figures
are medians over rounds of the median step, memory the process's peak, and that peak over what the
loaded model had. `loss` is the first step's, which shows that both compute the same. Bars: tokens
a second >= 3 times, peak memory <= 0.6 times.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aprium.base.records import Sample
from aprium.model.config import PATTERN_KINDS, ModelConfig
from aprium.model.presets import PRESETS

IMPLEMENTATIONS = ("eager", "grouped_mm")


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


def ours(directory: Path, tokens: Tensor) -> Callable[[], float]:
    """Load the model for Aprium's trainer and return one step."""
    from aprium.checkpoint.load import load_checkpoint
    from aprium.train.batch import collate
    from aprium.train.losses import LossConfig, compute_losses
    from aprium.train.optim import OptimConfig, build_optimisers

    model = load_checkpoint(directory).model
    optim = OptimConfig(muon_lr=None)
    optimisers = build_optimisers(model, optim)
    parameters = [p for p in model.parameters() if p.requires_grad]
    length = tokens.shape[1]
    weights = (0.0,) + (1.0,) * (length - 1)
    samples = [Sample(tokens=tuple(r), ce_weight=weights, domain="") for r in tokens.tolist()]
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


def peer(directory: Path, tokens: Tensor, experts: str) -> Callable[[], float]:
    """Load the model for transformers and return one step in plain PyTorch."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation=experts
    )
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def work(side: str, directory: Path, options: argparse.Namespace) -> None:
    """Time one side and print its figures; runs in a process of its own."""
    torch.set_num_threads(options.threads)
    vocab = json.loads((directory / "config.json").read_text())["vocab_size"]
    shape = (options.batch, options.length)
    tokens = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))
    step = ours(directory, tokens) if side == "ours" else peer(directory, tokens, side)
    loaded = _resident()
    first = step()
    seconds = []
    for _ in range(options.steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = {"s": statistics.median(seconds), "loss": first, "peak": peak, "over": peak - loaded}
    print(json.dumps(line))


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(side: str, directory: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run `work` in a fresh process."""
    settings = [f"--{n}={getattr(options, n)}" for n in ("steps", "batch", "length", "threads")]
    command = [sys.executable, __file__, f"--side={side}", f"--directory={directory}", *settings]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        count = write(shapes()[name], Path(folder))
        trial = {i: measure(i, Path(folder), options)["s"] for i in IMPLEMENTATIONS}
        best = min(trial, key=lambda i: trial[i])
        rounds = [
            (measure("ours", Path(folder), options), measure(best, Path(folder), options))
            for _ in range(options.rounds)
        ]
    tokens = options.batch * options.length

    def middle(pick: Callable[[dict[str, float], dict[str, float]], float]) -> float:
        return statistics.median(pick(mine, theirs) for mine, theirs in rounds)

    return {
        "case": name,
        "parameters": count,
        "tokens_per_step": tokens,
        "threads": options.threads,
        "peer": f"transformers, experts {best}",
        "loss": [rounds[0][0]["loss"], rounds[0][1]["loss"]],
        "tokens_per_s": round(middle(lambda mine, _: tokens / mine["s"])),
        "peer_tokens_per_s": round(middle(lambda _, theirs: tokens / theirs["s"])),
        "ratio": round(middle(lambda mine, theirs: theirs["s"] / mine["s"]), 2),
        "spread": [round(f(t["s"] / m["s"] for m, t in rounds), 2) for f in (min, max)],
        "peak_mib": round(middle(lambda mine, _: mine["peak"])),
        "peer_peak_mib": round(middle(lambda _, theirs: theirs["peak"])),
        "peak_ratio": round(middle(lambda mine, theirs: mine["peak"] / theirs["peak"]), 2),
        "over_loaded_ratio": round(middle(lambda mine, theirs: mine["over"] / theirs["over"]), 2),
        "bars": "ratio >= 3, peak_ratio <= 0.6",
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shapes", nargs="*", default=list(shapes()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work(options.side, options.directory, options)
        return
    for name in options.shapes:
        print(json.dumps(compare(name, options)), flush=True)


if __name__ == "__main__":
    main()
