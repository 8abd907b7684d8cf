"""A server under load: throughput and latency beside llama-server's on a model of equal shape.

python benchmarks/serve.py MODEL --llama-server BIN --gguf FILE [--concurrency 1 4 16]
                           [--prompt 256] [--output 64] [--rounds 2] [--threads 2]

Both servers stream `/v1/completions` to the same load: as many clients as the concurrency says,
each with its next request as soon as its last is answered; prompts of random tokens, all different,
answers of exactly `--output` tokens, greedy. Both have as many sequences and threads as the load
and the machine. They run one at a time, in turn, so that neither has the other beside it. One JSON
line a concurrency: tokens generated a second, time to the first token and between tokens at 50 and
95 %, medians over rounds, and ratios. Bars at 16: throughput >= 1.5 times, first token at 95 % no
later.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

CONTEXT = 1024  # tokens a sequence may have


class Server:
    """A server process, ready."""

    def __init__(
        self,
        command: list[str],
        ready: Callable[[str], str | None],
        settings: dict[str, str] | None = None,
    ) -> None:
        self.directory = tempfile.TemporaryDirectory()
        log = Path(self.directory.name) / "log"
        with log.open("w") as file:
            environment = os.environ | (settings or {})
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        while self.process.poll() is None:
            address = ready(log.read_text(errors="replace"))
            if address is not None and self._answers(address):
                self.address = address
                return
            time.sleep(0.3)
        raise SystemExit(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}")

    def _answers(self, address: str) -> bool:
        try:
            return httpx2.get(f"{address}/health", timeout=5).status_code == 200
        except httpx2.HTTPError:
            return False

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.directory.cleanup()


def aprium(options: argparse.Namespace, concurrency: int) -> Server:
    """Start Aprium's server."""
    command = [sys.executable, "-m", "aprium.cli", "serve", options.model, "--port", "0"]
    command += ["--served-model-name", "any"]
    command += ["--max-num-seqs", str(concurrency), "--max-model-len", str(CONTEXT)]
    command += options.flags

    def ready(log: str) -> str | None:
        found = re.search(r"serving .* on (http://\S+)", log)
        return found[1] if found else None

    return Server(command, ready, {"OMP_NUM_THREADS": str(options.threads)})


def llama(options: argparse.Namespace, concurrency: int) -> Server:
    """Start llama-server."""
    command = [options.llama_server, "-m", options.gguf, "--port", "8931", "--no-webui"]
    command += ["-np", str(concurrency), "-c", str(CONTEXT * concurrency), "--cont-batching"]
    command += ["-t", str(options.threads), "-tb", str(options.threads)]
    return Server(command, lambda log: "http://127.0.0.1:8931")


async def request(
    client: httpx2.AsyncClient, address: str, prompt: list[int], length: int
) -> tuple[float, float]:
    """Stream one answer; return the seconds to its first event, and from there to the last."""
    body = {
        "model": "any",
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    begun = time.perf_counter()
    first = last = 0.0
    async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                last = time.perf_counter()
                first = first or last
    return first - begun, last - first


async def load(
    address: str, concurrency: int, options: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Put the load on a server; return its figures."""
    numbers = random.Random(seed)
    total = options.requests * concurrency
    prompts = [
        [numbers.randrange(100, options.vocab) for _ in range(options.prompt)]
        for _ in range(total + 1)
    ]
    # A connection for each request: llama-server closes those it has answered on.
    limits = httpx2.Limits(max_connections=concurrency + 1, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=None, limits=limits) as client:
        await request(client, address, prompts.pop(), 2)  # so that memory is there
        found: list[tuple[float, float]] = []

        async def work() -> None:
            while prompts:
                prompt = prompts.pop()
                found.append(await request(client, address, prompt, options.output))

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = time.perf_counter() - begun
    first = [f for f, _ in found]
    between = [rest / (options.output - 1) for _, rest in found]
    return {
        "tokens_per_s": total * options.output / seconds,
        "ttft_p50_s": statistics.median(first),
        "ttft_p95_s": _percentile(first, 95),
        "itl_p50_s": statistics.median(between),
        "itl_p95_s": _percentile(between, 95),
    }


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def compare(concurrency: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both servers at one concurrency."""
    sides: dict[str, Callable[[argparse.Namespace, int], Server]] = {"aprium": aprium}
    if options.llama_server:
        sides["llama-server"] = llama
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for round_ in range(options.rounds):
        for name, start in sides.items():
            with start(options, concurrency) as server:
                runs[name].append(
                    asyncio.run(load(server.address, concurrency, options, 1000 + round_))
                )
    line: dict[str, Any] = {"case": "load", "concurrency": concurrency}
    line |= {"requests": options.requests * concurrency, "rounds": options.rounds}
    for key in runs["aprium"][0]:
        line[key] = {n: round(statistics.median(r[key] for r in f), 4) for n, f in runs.items()}
        if options.llama_server:
            pairs = zip(runs["aprium"], runs["llama-server"], strict=True)
            ratios = [mine[key] / theirs[key] for mine, theirs in pairs]
            line[key]["ratio"] = round(statistics.median(ratios), 2)
            line[key]["spread"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return line | {"bars": "at 16: tokens_per_s ratio >= 1.5, ttft_p95_s ratio <= 1"}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=100_000, help="token ids are below it")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flags", nargs="*", default=[], help="more for `aprium serve`")
    options = parser.parse_args()
    for concurrency in options.concurrency:
        print(json.dumps(compare(concurrency, options)), flush=True)


if __name__ == "__main__":
    main()
