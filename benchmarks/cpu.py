"""Compare generation on this CPU with llama.cpp, both read into anonymous memory, runs interleaved.

python benchmarks/cpu.py CHECKPOINT --llama BIN_DIR --gguf FILE [--runs 3] [--isa avx512]

BIN_DIR holds llama-bench and llama-batched-bench; FILE a model of the same shape at the same bits
a weight (`benchmarks/random_checkpoint.py` writes CHECKPOINT). Each run loads one program after
the other, since two full-size models do not fit side by side. Prints one JSON line a case: medians
of the runs, and the median of the ratios of neighbouring runs, ours over theirs.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH_PROMPT, BATCH_GENERATE = 64, 24  # what each of several sequences reads and writes


def ours(options: argparse.Namespace, prompt: int, generate: int, batch: int) -> dict[str, Any]:
    """Run `aprium bench` in a process of its own."""
    command = [
        *(sys.executable, "-m", "aprium.cli", "bench", options.checkpoint, "--json"),
        *("--prompt", prompt, "--generate", generate, "--batch", batch, "--load", "memory"),
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def llama_bench(options: argparse.Namespace) -> tuple[float, float]:
    """Return prefill and decode rates of llama-bench."""
    command = [
        *(options.llama / "llama-bench", "-m", options.gguf, "-t", options.threads),
        *("-p", options.prompt, "-n", options.generate, "-r", 1, "-lm", "none", "-o", "json"),
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    rates = {entry["n_gen"] > 0: entry["avg_ts"] for entry in json.loads(done.stdout)}
    return rates[False], rates[True]


def llama_batched(options: argparse.Namespace, batch: int) -> float:
    """Return the total decode rate of `batch` sequences in llama-batched-bench."""
    command = [
        *(options.llama / "llama-batched-bench", "-m", options.gguf, "-t", options.threads),
        *("-npp", BATCH_PROMPT, "-ntg", BATCH_GENERATE, "-npl", batch, "-lm", "none"),
        *("-c", batch * (BATCH_PROMPT + BATCH_GENERATE) + 256, "--output-format", "jsonl"),
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    found = re.findall(r'"speed_tg": ([\d.]+)', done.stdout)
    return float(found[-1])


def report(case: str, mine: list[float], theirs: list[float], **more: Any) -> None:
    """Print one line."""
    line = {
        "case": case,
        "median": round(statistics.median(mine), 2),
        "spread": [round(min(mine), 2), round(max(mine), 2)],
        "peer": "llama.cpp",
        "peer_median": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3),
    }
    print(json.dumps(line | more), flush=True)


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    single: list[dict[str, Any]] = []
    many: list[dict[str, Any]] = []
    peers: list[tuple[float, float, float]] = []
    for run in range(options.runs):
        single.append(ours(options, options.prompt, options.generate, 1))
        prefill, decode = llama_bench(options)
        many.append(ours(options, BATCH_PROMPT, BATCH_GENERATE, options.batch))
        peers.append((prefill, decode, llama_batched(options, options.batch)))
        print(f"run {run + 1}: {single[-1]} {many[-1]} {peers[-1]}", file=sys.stderr, flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"isa": single[0]["isa"], "commit": commit, "runs": options.runs}
    one, several = ([r["results"][0] for r in group] for group in (single, many))
    prefill, decode, batched = (list(column) for column in zip(*peers, strict=True))
    report("prefill", [r["prefill_tokens_per_s"] for r in one], prefill, **facts)
    limits = {
        name: round(statistics.median(r[name] for r in one), 4)
        for name in ("bandwidth_share", "overhead_share")
        if one[0][name] is not None
    }
    report("decode, batch 1", [r["decode_tokens_per_s"] for r in one], decode, **facts, **limits)
    rates = [r["decode_tokens_per_s"] for r in several]
    report(f"decode, batch {options.batch}, total", rates, batched, **facts)


if __name__ == "__main__":
    main()
