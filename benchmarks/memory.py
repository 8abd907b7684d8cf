"""How soon a model answers from a cold process, and what memory it takes, against what `info` says.

python benchmarks/memory.py CHECKPOINT [--load memory|mmap] [--prompt 0]

Times the first token from the start of the process, the files being in the system's cache or not as
they are. With --prompt it then reads that many tokens and compares the growth of anonymous memory
with the bytes that `info` predicts. Prints one JSON line a case.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.info import model_info
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine

WARM = 2048  # tokens read before memory is first looked at, so that working buffers are there


def since_start() -> float:
    """Return the seconds since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / 100  # USER_HZ is 100 on Linux


def resident() -> dict[str, int]:
    """Return resident bytes in all, and of anonymous memory."""
    found = re.findall(r"(VmRSS|RssAnon):\s+(\d+)", Path("/proc/self/status").read_text())
    return {name: int(kib) * 1024 for name, kib in found}


def read(engine: Engine, count: int) -> None:
    """Let the engine read `count` random tokens and generate one."""
    numbers = random.Random(count)
    tokens = tuple(numbers.randrange(engine.vocab_size) for _ in range(count))
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add(Request(id=f"prompt-{count}", tokens=tokens, params=params))
    while engine.has_work:
        engine.step()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--load", default="memory")
    parser.add_argument("--prompt", type=int, default=0)
    options = parser.parse_args()
    longest = max(options.prompt + 64, 4096)
    engine = Engine(
        EngineConfig(
            model=options.checkpoint,
            max_num_seqs=1,
            max_model_len=longest,
            load=options.load,
            enable_prefix_caching=False,
        )
    )
    read(engine, 3)
    first = {"case": "first token", "load": options.load, "seconds": round(since_start(), 2)}
    print(json.dumps(first | {"resident_bytes": resident()["VmRSS"]}), flush=True)
    if not options.prompt:
        return
    read(engine, WARM)
    before, begun = resident()["RssAnon"], time.monotonic()
    read(engine, options.prompt)
    grown = resident()["RssAnon"] - before
    facts = model_info(options.checkpoint)
    predicted = (options.prompt - WARM) * facts["kv_bytes_per_token_float32"]
    line = {
        "case": f"prompt of {options.prompt} tokens after one of {WARM}",
        "predicted_bytes": predicted,  # the state is there since the first prompt
        "grown_bytes": grown,
        "ratio": round(grown / predicted, 4),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
