"""The engine as a server drives it: many sequences at once, agents whose history grows, restarts.

python benchmarks/engine.py concurrency MODEL [--load-format dummy] [--most 32]
python benchmarks/engine.py agent MODEL [--turns 12] [--llama-server BIN --gguf FILE]
python benchmarks/engine.py restart MODEL [--history 8192]

"concurrency" times decoding with 1, 2, 4, ... sequences. "agent" replays one conversation of turns,
each a prompt that begins with the whole history, and times its first token with prefix reuse, and
without; with llama-server and a GGUF of the same shape also there, its own prompt cache on. A turn
adds --new tokens (a tool result and a short answer) to a history that starts with --system tokens.
"restart" times the first token of a prompt in a cold engine, in one that has it in memory, and in
a new process' engine that finds it on disk. Tokens are random, the same for everybody; ratios pair
neighbouring measurements. Prints one JSON line a case.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.load import Checkpoint
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine, load
from aprium.ops import _native

END = 11  # ends a message in the family's template
FIRST = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def report(case: str, **facts: Any) -> None:
    """Print one line."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
    print(json.dumps({"case": case, "isa": _native.isa(), **rounded}), flush=True)


def tokens_of(count: int, vocab_size: int, seed: int) -> list[int]:
    """Return `count` random tokens, the last of which ends a message."""
    numbers = random.Random(seed)
    return [numbers.randrange(20, vocab_size) for _ in range(count - 1)] + [END]


def first_token_s(engine: Engine, tokens: list[int], name: str) -> tuple[float, int]:
    """Return the seconds until the first token after `tokens`, and how many were reused."""
    begun = time.perf_counter()
    engine.add(Request(id=name, tokens=tuple(tokens), params=FIRST))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    return time.perf_counter() - begun, deltas[-1].reused


def concurrency(checkpoint: Checkpoint, most: int, prompt: int, generate: int) -> None:
    """Time decoding with 1, 2, 4, ... up to `most` sequences."""
    engine = make(checkpoint, prompt + generate, max_num_seqs=most, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=generate, ignore_eos=True)
    alone = 0.0
    count = 1
    while count <= most:
        rates, overheads = [], []
        for turn in range(3):
            for i in range(count):
                tokens = tuple(tokens_of(prompt, engine.vocab_size, 1000 * turn + i))
                engine.add(Request(id=f"{turn}-{i}", tokens=tokens, params=params))
            while any(s.num_generated < 1 for s in engine.scheduler.sequences.values()):
                engine.step()
            native = engine.runner.model.native
            if native:
                native.machine.take_counters()
            begun, made, steps = time.perf_counter(), 0, 0
            while engine.has_work:
                made += sum(len(delta.tokens) for delta in engine.step())
                steps += 1
            seconds = time.perf_counter() - begun
            rates.append(made / seconds)
            if native:
                overheads.append((seconds - native.machine.take_counters()[0]) / steps)
        rate = statistics.median(rates)
        alone = alone or rate
        overhead = 1e3 * statistics.median(overheads) if overheads else None
        report("concurrency", sequences=count, tokens_per_s=rate, ratio_to_one=rate / alone,
               outside_kernels_ms_per_step=overhead)  # fmt: skip
        count *= 2


def agent(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Replay a growing conversation with reuse, without, and on llama-server."""
    longest = options.system + options.turns * options.new + 64
    history = tokens_of(options.system, checkpoint.config.vocab_size, 0)
    prompts = []
    for turn in range(options.turns):
        history = history + tokens_of(options.new, checkpoint.config.vocab_size, turn + 1)
        prompts.append([*history, 12, 13, 14])
    reusing = make(checkpoint, longest, max_num_seqs=1)
    plain = make(checkpoint, longest, max_num_seqs=1, enable_prefix_caching=False)
    server = None
    if options.llama_server:
        server = Peer(options.llama_server, options.gguf, longest, options.threads)
    first = tokens_of(200, checkpoint.config.vocab_size, 999)
    for engine in (reusing, plain):  # so that memory is there
        first_token_s(engine, first, "first")
    if server is not None:
        server.first_token_s(first)
    try:
        for turn, prompt in enumerate(prompts):
            on, reused = first_token_s(reusing, prompt, f"on-{turn}")
            off, _ = first_token_s(plain, prompt, f"off-{turn}")
            facts = {"first_token_s": on, "without_reuse_s": off, "ratio": on / off}
            if server is not None:
                peer, cached = server.first_token_s(prompt)
                facts |= {"llama_server_s": peer, "llama_server_cached": cached,
                          "ratio_to_llama_server": on / peer}  # fmt: skip
            report("agent", turn=turn, history=len(prompt) - options.new, new=options.new,
                   reused=reused, **facts)  # fmt: skip
    finally:
        if server is not None:
            server.close()


class Peer:
    """A llama-server with a GGUF, whose prompt cache is on."""

    def __init__(self, binary: str, gguf: str, context: int, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [binary, "-m", gguf, "-c", str(context + 64), "-np", "1", "-t", str(threads),
                   "--port", str(self.port), "--no-webui", "--ctx-checkpoints", "32"]  # fmt: skip
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=null, stderr=null)
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.5)
        self.close()
        raise SystemExit(f"{binary} does not serve {gguf}")

    def first_token_s(self, tokens: list[int]) -> tuple[float, int]:
        """Return the seconds until the first token after `tokens`, and how many were cached."""
        body = {"prompt": tokens, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        begun = time.perf_counter()
        with urllib.request.urlopen(request, timeout=600) as answer:
            found = json.load(answer)
        return time.perf_counter() - begun, found["timings"].get("cache_n", 0)

    def close(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait()


def restart(checkpoint: Checkpoint, history: int) -> None:
    """Time a prompt cold, from memory, and from disk in a new engine."""
    prompt = [*tokens_of(history, checkpoint.config.vocab_size, 0), 12, 13, 14]
    with tempfile.TemporaryDirectory() as directory:
        options = {"max_num_seqs": 1, "prefix_cache_dir": Path(directory)}
        engine = make(checkpoint, history + 64, **options)
        cold, _ = first_token_s(engine, prompt, "cold")
        warm, in_memory = first_token_s(engine, prompt, "warm")
        begun = time.perf_counter()
        engine.close()
        closing = time.perf_counter() - begun
        disk_bytes = engine.stats().disk_bytes
        again = make(checkpoint, history + 64, **options)
        disk, on_disk = first_token_s(again, prompt, "disk")
        again.close()
    report("restart", history=history, cold_s=cold, memory_s=warm, disk_s=disk, closing_s=closing,
           reused_from_memory=in_memory, reused_from_disk=on_disk, disk_bytes=disk_bytes,
           ratio_memory=warm / cold, ratio_disk=disk / cold)  # fmt: skip


def make(checkpoint: Checkpoint, longest: int, **options: Any) -> Engine:
    """Make an engine over a loaded model."""
    options = {"max_num_batched_tokens": 512, **options}
    config = EngineConfig(model=str(checkpoint.path), max_model_len=longest, **options)
    return Engine(config, checkpoint, eos_token_ids=(2, END))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("concurrency", "agent", "restart"))
    parser.add_argument("model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--most", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--system", type=int, default=1536)
    parser.add_argument("--new", type=int, default=600)
    parser.add_argument("--history", type=int, default=8192)
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    checkpoint = load(EngineConfig(model=options.model, load_format=options.load_format))
    if options.what == "concurrency":
        concurrency(checkpoint, options.most, options.prompt, options.generate)
    elif options.what == "agent":
        agent(checkpoint, options)
    else:
        restart(checkpoint, options.history)


if __name__ == "__main__":
    main()
