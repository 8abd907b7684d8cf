"""A server under many clients that come, go, stop halfway and hang up, for as long as you like.

python benchmarks/soak.py MODEL [--minutes 10] [--clients 64] [--seed 0] [-- FLAGS OF SERVE]

Starts `aprium serve` and lets clients loose on it: chats, completions, messages, responses,
sessions and embeddings, streamed or whole, some of which hang up at a random byte. Every request
that was not hung up on must be answered, with 200 or an asked-for refusal (429, 503), and a stream
must end as streams do. Memory of the server is read every few seconds; its slope over the second
half is reported, in MiB an hour. At the end pools must be what they were. Prints one JSON line,
and ends with status 1 where something was wrong.
"""

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = "plum garden window paper stone bread music winter river apple number seven".split()
REFUSALS = (429, 503)


class Clients:
    """What all clients share: counts of what became of requests, and what went wrong."""

    def __init__(self, address: str, until_s: float) -> None:
        self.parts = urlsplit(address)
        self.until_s = until_s
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def note(self, what: str, problem: str | None = None) -> None:
        """Count an end; `problem` says what should not have been."""
        with self.lock:
            self.counts[what] += 1
            if problem is not None and len(self.wrong) < 20:
                self.wrong.append(problem)


def make_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request of a random kind."""
    text = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 10, 60])))
    count = rng.choice([1, 8, 40, 120])
    chat = [{"role": "user", "content": text}]
    if rng.random() < 0.4:  # a history that others have too
        chat = [{"role": "system", "content": "You are a gardener. " * 20}, *chat]
    stream = rng.random() < 0.6
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": chat, "max_tokens": count, "stream": stream}),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": count, "n": 3}),
        (
            "/v1/chat/completions",
            {"messages": chat, "max_tokens": count, "response_format": {"type": "json_object"}},
        ),
        ("/v1/completions", {"prompt": text, "max_tokens": count, "stream": stream}),
        ("/v1/messages", {"messages": chat[-1:], "max_tokens": count, "stream": stream}),
        ("/v1/responses", {"input": text, "max_output_tokens": count, "stream": stream}),
        ("/v1/embeddings", {"input": [text, "plum"]}),
    ]
    return rng.choice(kinds)


def client(clients: Clients, seed: int) -> None:
    """Ask until the time is up."""
    rng = random.Random(seed)
    while time.monotonic() < clients.until_s:
        path, body = make_request(rng)
        hang_up = rng.randrange(4000) if rng.random() < 0.2 else None
        connection = http.client.HTTPConnection(
            clients.parts.hostname or "", clients.parts.port, timeout=120
        )
        try:
            ask(clients, connection, path, body, hang_up)
        except OSError as error:
            clients.note("lost", f"{path}: {type(error).__name__}: {error}")
        except http.client.HTTPException as error:
            clients.note("lost", f"{path}: {type(error).__name__}: {error}")
        finally:
            connection.close()
        time.sleep(rng.random() / 20)


def ask(
    clients: Clients,
    connection: http.client.HTTPConnection,
    path: str,
    body: dict[str, Any],
    hang_up: int | None,
) -> None:
    """Make one request; `hang_up` is after how many bytes of the answer to go."""
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    if hang_up == 0:
        clients.note("hung up")
        return
    response = connection.getresponse()
    if hang_up is not None:
        response.read(hang_up)
        clients.note("hung up")
        return
    text = response.read().decode()
    if response.status in REFUSALS:
        clients.note(f"refused {response.status}")
        if response.headers.get("Retry-After") is None:
            clients.note("refused", f"{path}: {response.status} without Retry-After: {text[:200]}")
        return
    if response.status != 200:
        clients.note("failed", f"{path}: {response.status}: {text[:200]}")
        return
    if body.get("stream"):
        ends = {"/v1/messages": "message_stop", "/v1/responses": "response.completed"}
        found = ends.get(path, "data: [DONE]") in text or "response.incomplete" in text
        problem = None if found else f"{path}: a stream that does not end: {text[-200:]}"
        clients.note("answered", problem)
        return
    json.loads(text)
    clients.note("answered")


def memory_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def pools(address: str) -> dict[str, Any]:
    """Return how much is in use."""
    with urllib.request.urlopen(f"{address}/load", timeout=30) as response:
        load = json.load(response)
    engine = load["engine"]
    return {
        "requests": load["server_load"],
        "running": engine["num_running"],
        "waiting": engine["num_waiting"],
        "slots_in_use": engine["slots_total"] - engine["slots_free"] - engine["num_snapshots"],
    }


def serve(model: str, flags: list[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server; return its process and address."""
    command = [sys.executable, "-m", "aprium.cli", "serve", model, "--port", "0", *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    while process.poll() is None:
        found = re.search(r"serving .* on (http://\S+)", log.read_text())
        if found is not None:
            return process, found[1]
        time.sleep(0.2)
    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")


def main() -> int:
    """Soak a server and say how it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    flags = ["--max-model-len", "2K", "--max-num-queued-reqs", "48", "--max-stored-responses", "64"]
    flags += ["--prefix-cache-ram-bytes", "64M"]  # full soon, so that what grows is a leak
    with tempfile.TemporaryDirectory() as directory:
        process, address = serve(options.model, flags + options.flags, Path(directory) / "log")
        try:
            time.sleep(2)
            before = pools(address)
            clients = Clients(address, time.monotonic() + 60 * options.minutes)
            threads = [
                threading.Thread(target=client, args=(clients, options.seed * 1000 + i))
                for i in range(options.clients)
            ]
            for thread in threads:
                thread.start()
            samples: list[tuple[float, float]] = []
            while any(thread.is_alive() for thread in threads) and process.poll() is None:
                samples.append((time.monotonic() / 3600, memory_mib(process.pid)))
                time.sleep(2)
            for thread in threads:
                thread.join()
            alive = process.poll() is None
            time.sleep(3)
            after = pools(address) if alive else {}
        finally:
            process.terminate()
            process.wait(60)
        tail = samples[len(samples) // 2 :]
        slope = statistics.linear_regression(*zip(*tail, strict=True)).slope if len(tail) > 2 else 0
        traces = (Path(directory) / "log").read_text().count("Traceback")
        fine = alive and not clients.wrong and after == before and process.returncode == 0
        facts = {
            "case": "soak",
            "minutes": options.minutes,
            "clients": options.clients,
            "ends": dict(clients.counts),
            "memory_mib": [round(samples[0][1]), round(samples[-1][1])],
            "slope_mib_per_hour": round(slope, 1),
            "pools": [before, after],
            "tracebacks": traces,
            "wrong": clients.wrong,
            "fine": fine and not traces,
        }
    print(json.dumps(facts))
    return 0 if facts["fine"] else 1


if __name__ == "__main__":
    sys.exit(main())
