"""What a simulated service is asked: open and closed loops, agents' sessions, recorded traces.

A trace yields the jobs that arrive by themselves, in order of time, and says what follows when a
job has finished. Token ids matter only where prefixes are reused: a session's prompts are the
beginning of one endless text, so that each turn begins with all of the turn before.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aprium.base.errors import ConfigError

_BLOCK = 512  # tokens that one hash id of a recorded trace stands for


class Job(NamedTuple):
    """One request: when it arrives, tokens of its prompt and answer, and whose turn it is.

    `session` names the text that the prompt begins, -1 where it shares nothing; `turn` counts from
    0. `hashes` are the prompt's blocks of 512 tokens in a recorded trace.
    """

    arrival_s: float
    prompt: int
    output: int
    session: int = -1
    turn: int = 0
    hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths around a mean: fixed, or log-normal with a coefficient of variation `spread`."""

    mean: int
    spread: float = 0.0
    most: int = 1 << 20

    def draw(self, numbers: random.Random) -> int:
        """Return one length, at least 1."""
        if not self.spread:
            return self.mean
        import math

        sigma = math.sqrt(math.log(1 + self.spread**2))
        length = self.mean * math.exp(numbers.gauss(-sigma * sigma / 2, sigma))
        return max(min(round(length), self.most), 1)


class Trace:
    """The base of all traces: jobs that arrive by themselves, and none that follow."""

    shares_prefixes = False

    def arrivals(self) -> Iterator[Job]:
        """Yield jobs in order of arrival."""
        raise NotImplementedError

    def follow(self, job: Job, finished_s: float) -> Job | None:
        """Return the job that comes because `job` has finished, if any."""
        return None


class OpenLoop(Trace):
    """Requests that arrive at random (Poisson) at `rate` a second, whatever the service does."""

    def __init__(
        self, *, rate: float, requests: int, prompt: Lengths, output: Lengths, seed: int = 0
    ) -> None:
        if rate <= 0:
            raise ConfigError(f"rate is {rate}: it must be above 0 requests a second")
        self.rate, self.requests, self.seed = rate, requests, seed
        self.prompt, self.output = prompt, output

    def arrivals(self) -> Iterator[Job]:
        """Yield `requests` jobs."""
        numbers, now = random.Random(self.seed), 0.0
        for _ in range(self.requests):
            now += numbers.expovariate(self.rate)
            yield Job(now, self.prompt.draw(numbers), self.output.draw(numbers))


class ClosedLoop(Trace):
    """`users` who each send the next request `think` seconds after the answer to the last."""

    def __init__(
        self,
        *,
        users: int,
        requests: int,
        prompt: Lengths,
        output: Lengths,
        think: float = 0.0,
        seed: int = 0,
    ) -> None:
        if users < 1:
            raise ConfigError(f"users is {users}: it must be at least 1")
        self.users, self.think = users, think
        self.prompt, self.output = prompt, output
        self._numbers = random.Random(seed)
        self._left = requests

    def _job(self, arrival_s: float) -> Job | None:
        if not self._left:
            return None
        self._left -= 1
        numbers = self._numbers
        return Job(arrival_s, self.prompt.draw(numbers), self.output.draw(numbers))

    def arrivals(self) -> Iterator[Job]:
        """Yield every user's first job, at 0."""
        for _ in range(self.users):
            job = self._job(0.0)
            if job is not None:
                yield job

    def follow(self, job: Job, finished_s: float) -> Job | None:
        """Return the user's next job."""
        return self._job(finished_s + self.think)


class Agents(Trace):
    """`users` in sessions of `turns`: each prompt is all before, the answer, and a tool's result.

    `prompt` is the first prompt's length, `grow` what a tool's result adds. A session that has
    ended is followed by a new one until `requests` jobs were sent.
    """

    shares_prefixes = True

    def __init__(
        self,
        *,
        users: int,
        requests: int,
        turns: int,
        prompt: Lengths,
        grow: Lengths,
        output: Lengths,
        think: float = 0.0,
        seed: int = 0,
    ) -> None:
        if users < 1 or turns < 1:
            raise ConfigError(f"users is {users} and turns {turns}: both must be at least 1")
        self.users, self.turns, self.think = users, turns, think
        self.prompt, self.grow, self.output = prompt, grow, output
        self.seed = seed
        self._left, self._sessions = requests, 0

    def _draw(self, lengths: Lengths, session: int, turn: int) -> tuple[int, int]:
        """Return tokens of prompt and answer; the same whatever else was drawn before."""
        numbers = random.Random(f"{self.seed}/{session}/{turn}")
        return lengths.draw(numbers), self.output.draw(numbers)

    def _first(self, arrival_s: float) -> Job | None:
        if not self._left:
            return None
        self._left -= 1
        self._sessions += 1
        length, answer = self._draw(self.prompt, self._sessions, 0)
        return Job(arrival_s, length, answer, self._sessions)

    def arrivals(self) -> Iterator[Job]:
        """Yield every user's first job, at 0."""
        for _ in range(self.users):
            job = self._first(0.0)
            if job is not None:
                yield job

    def follow(self, job: Job, finished_s: float) -> Job | None:
        """Return the next turn, or the first of a new session."""
        if job.turn + 1 >= self.turns:
            return self._first(finished_s + self.think)
        if not self._left:
            return None
        self._left -= 1
        more, answer = self._draw(self.grow, job.session, job.turn + 1)
        length = job.prompt + job.output + more
        return Job(finished_s + self.think, length, answer, job.session, job.turn + 1)


class Recorded(Trace):
    """A trace in a file of JSON lines: `timestamp` (ms), `input_length`, `output_length`.

    `hash_ids`, where given, name the prompt's blocks of 512 tokens; equal ones are equal tokens.
    The format is that of the published Mooncake traces.
    """

    def __init__(self, path: Path, *, speed: float = 1.0) -> None:
        self.jobs = sorted(_read(path, speed))
        self.shares_prefixes = any(job.hashes for job in self.jobs)

    def arrivals(self) -> Iterator[Job]:
        """Yield the jobs of the file."""
        return iter(self.jobs)


def _read(path: Path, speed: float) -> Iterator[Job]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read trace {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            job = Job(
                float(row["timestamp"]) / 1e3 / speed,
                int(row["input_length"]),
                int(row["output_length"]),
                hashes=tuple(int(i) for i in row.get("hash_ids", ())),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number}: a line needs timestamp, input_length and output_length: {error}"
            ) from error
        if job.prompt < 1 or job.output < 1 or job.arrival_s < 0:
            raise ConfigError(f"{path}:{number}: lengths must be at least 1, times at least 0")
        yield job


def prompt_tokens(job: Job) -> list[int]:
    """Return token ids of the prompt of `job`, equal where texts are."""
    if job.hashes:
        tokens = [h * _BLOCK + i for h in job.hashes for i in range(_BLOCK)][: job.prompt]
        return tokens + list(range(-1, len(tokens) - job.prompt - 1, -1))
    return session_tokens(job, 0, job.prompt)


def session_tokens(job: Job, start: int, count: int) -> list[int]:
    """Return `count` token ids of the session of `job` from position `start` on.

    A session is one text, in which the answers stand as they were given: the next turn's prompt
    repeats them. Of a job with `hashes` nobody knows that, so its answers are repeated by none.
    """
    if job.hashes:
        return [0] * count
    base = (job.session << 24) + start
    return list(range(base, base + count))


_KEYS = {
    "open": ("rate", "requests", "spread", "seed"),
    "closed": ("users", "requests", "spread", "think", "seed"),
    "agents": ("users", "requests", "turns", "grow", "spread", "think", "seed"),
}


def parse(text: str, *, prompt: int, output: int, most: int) -> Trace:
    """Read a trace's description: `open:rate=2,requests=1000`, `closed:users=32`, `agents:...`.

    Anything else is the path of a recorded trace. Raises ConfigError naming what is wrong.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KEYS:
        if Path(text).is_file():
            return Recorded(Path(text))
        raise ConfigError(
            f"trace {text!r} is no file, and none of open:…, closed:…, agents:… "
            "(as in open:rate=2,requests=1000)"
        )
    values: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in _KEYS[kind] or not equals:
            raise ConfigError(f"{part!r} in trace {text!r}: use {', '.join(_KEYS[kind])}")
        try:
            values[key] = float(value)
        except ValueError as error:
            raise ConfigError(f"{part!r} in trace {text!r}: not a number") from error
    spread, seed = values.get("spread", 0.0), int(values.get("seed", 0))
    requests, users = int(values.get("requests", 1000)), int(values.get("users", 16))
    answers = Lengths(mean=output, spread=spread, most=most // 4)
    prompts = Lengths(mean=prompt, spread=spread, most=most // 2)
    if kind == "open":
        rate = values.get("rate", 1.0)
        return OpenLoop(rate=rate, requests=requests, prompt=prompts, output=answers, seed=seed)
    think = values.get("think", 0.0)
    if kind == "closed":
        return ClosedLoop(
            users=users, requests=requests, prompt=prompts, output=answers, think=think, seed=seed
        )
    turns = max(int(values.get("turns", 8)), 0)
    grow = int(values.get("grow", max((most - prompt) // max(turns, 1) - output, 1)))
    return Agents(
        users=users,
        requests=requests,
        turns=turns,
        prompt=Lengths(mean=prompt, spread=0.0),
        grow=Lengths(mean=grow),
        output=Lengths(mean=output),
        think=think,
        seed=seed,
    )
