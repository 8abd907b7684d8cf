"""Throughput of the pipeline of reinforcement learning, against that of its slowest stage.

python benchmarks/pipeline.py [--steps 100] [--pico [--recipe recipes/rl-pico.toml]]

First with stages of synthetic times: episodes of log-normal length (their longest hundredth is
eight times the mean and more), or one in twenty that is twenty times as long as the others, on a
bounded number of slots; teachers; a trainer. For each of the three as the slowest, and for each
age, one JSON line: steps a second as a share of what the slowest stage alone could do. Age 0 is
generation and training in turns. The event loop's clock jumps to the next event, so that a busy
machine changes nothing; what the pipeline itself takes is the case "overhead": groups a second,
ledger and all, where stages take no time.

With --pico then the same recipe on the real model, with ages 0 and 1 by turns: seconds a step
without the first, and their ratio. Generation and training run beside each other, so this needs
two free cores.
"""

import argparse
import asyncio
import json
import random
import selectors
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from aprium.base.config import load_toml
from aprium.base.records import Group, Sample, TeacherScores, Trajectory
from aprium.rl.ledger import Item, Ledger, Scores
from aprium.rl.loop import RlConfig, run_config
from aprium.rl.pipeline import Pipeline, PipelineConfig, Stages

GROUPS, EPISODES, SLOTS, SCORERS = 16, 4, 16, 4
EPISODE = Trajectory(
    task="t",
    domain="d",
    tokens=(1, 2),
    sampled=(False, True),
    logprobs=(0.0, -1.0),
    weight_spans=((0, 1),),
)


@dataclass(frozen=True)
class Learnt:
    """One sample for a group."""

    samples: tuple[Sample, ...] = (Sample(tokens=(1, 2), ce_weight=(0.0, 1.0)),)
    figures: dict[str, float] = field(default_factory=dict)


class Jumping(selectors.SelectSelector):
    """Waits for nothing but moves a clock on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list:
        """Return what is ready, as if the time had passed."""
        self.now += timeout or 0.0
        return super().select(0)


def simulate(coroutine):
    """Run a coroutine on a clock that jumps, and return what it returns."""
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def lognormal(rng: random.Random) -> float:
    """Draw a length of mean 1 with deviation 1.2 of its logarithm."""
    return rng.lognormvariate(-(1.2**2) / 2, 1.2)


def long_tail(rng: random.Random) -> float:
    """Draw a length of 1, in one of twenty cases 20; the mean is 1.95."""
    return 20.0 if rng.random() < 0.05 else 1.0


class Stage:
    """Stages that take synthetic times on so many places each; counts what is busy."""

    def __init__(self, draw, mean: float, generate_s: float, score_s: float) -> None:
        self._rng, self._draw = random.Random(0), draw
        self._unit_s = generate_s / mean / EPISODES * SLOTS  # of an episode: places work together
        self._score_s = score_s * SCORERS
        self._slots, self._scorers = asyncio.Semaphore(SLOTS), asyncio.Semaphore(SCORERS)
        self.version = 0

    async def _episode(self, length: float) -> Trajectory:
        async with self._slots:
            version = self.version
            await asyncio.sleep(length * self._unit_s)
        return Trajectory(
            **{name: getattr(EPISODE, name) for name in ("task", "domain", "tokens", "sampled")},
            logprobs=EPISODE.logprobs,
            weight_spans=((version, 1),),
        )

    async def generate(self, item: Item) -> Group:
        """Play a group."""
        lengths = [self._draw(self._rng) for _ in range(EPISODES)]
        return Group(task="t", trajectories=await asyncio.gather(*map(self._episode, lengths)))

    async def score(self, group: Group) -> Scores:
        """Score a group."""
        async with self._scorers:
            await asyncio.sleep(self._score_s)
        return (TeacherScores(teacher="t", logprobs=(0.0, -1.0)),) * EPISODES

    async def credit(self, group: Group, scores: Scores) -> Learnt:
        """Make a sample, in no time."""
        return Learnt()


async def synthetic(draw, mean: float, times, age: int, steps: int) -> tuple[float, float]:
    """Return steps a second, and the mean age of what was trained on."""
    generate_s, score_s, train_s = times  # of a group, a group, and a step
    stage = Stage(draw, mean, generate_s, score_s)
    stages = Stages(generate=stage.generate, score=stage.score, credit=stage.credit)
    places = 4 * SLOTS // EPISODES  # many groups wait for their last episode
    config = PipelineConfig(groups_per_step=GROUPS, max_age=age, max_groups=places)
    ages = []
    with tempfile.TemporaryDirectory() as place:
        ledger = Ledger(Path(place))
        pipeline = Pipeline(stages, lambda n: Item(number=n, domain="d", index=n), ledger, config)
        warm = 2 * age + 2  # steps until the pipeline is full
        begun = 0.0
        for step in range(warm + steps):
            if step == warm:
                begun = asyncio.get_running_loop().time()
            stage.version = step
            ages += [played.age for played in await pipeline.next_batch(step)]
            await asyncio.sleep(train_s)
        seconds = asyncio.get_running_loop().time() - begun
        await pipeline.close()
        ledger.close()
    return steps / seconds, statistics.mean(ages)


def report_synthetic(steps: int) -> None:
    """Measure every case; the unit is a group of the slowest stage."""
    slowest = {
        "generation": (1.0, 0.5, 0.6),
        "teachers": (0.6, 1.0, 0.5),
        "trainer": (0.6, 0.5, 1.0),
    }
    for name, draw, mean in (("lognormal", lognormal, 1.0), ("long tail", long_tail, 1.95)):
        for stage, (generate, score, train) in slowest.items():
            times = (generate, score, train * GROUPS)
            for age in (0, 1, 2, 4, 8):
                rate, mean_age = simulate(synthetic(draw, mean, times, age, steps))
                line = {
                    "case": "synthetic",
                    "lengths": name,
                    "slowest": stage,
                    "max_age": age,
                    "mean_age": round(mean_age, 2),
                    "of_slowest": round(rate * GROUPS, 3),
                }
                print(json.dumps(line), flush=True)
    begun = time.perf_counter()
    asyncio.run(synthetic(lognormal, 1.0, (0.0, 0.0, 0.0), 1, steps))
    seconds = time.perf_counter() - begun
    print(json.dumps({"case": "overhead", "groups_per_s": round(steps * GROUPS / seconds)}))


def report_pico(recipe: Path, steps: int, rounds: int) -> None:
    """Run the recipe with both ages by turns."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(rounds):
        for age in seconds:
            with tempfile.TemporaryDirectory() as place:
                settings = {
                    "output": place,
                    "trainer.steps": steps,
                    "trainer.log_every": steps,
                    "trainer.checkpoint_every": 10**6,
                    "pipeline.max_age": age,
                }
                config = load_toml(RlConfig, recipe, settings)
                object.__setattr__(config, "evaluate", None)
                begun = time.perf_counter()
                run_config(config)
                seconds[age].append((time.perf_counter() - begun) / steps)
    ratios = [turns / ahead for turns, ahead in zip(*seconds.values(), strict=True)]
    line = {
        "case": "pico",
        "steps": steps,
        "seconds_a_step": {str(age): round(statistics.median(s), 3) for age, s in seconds.items()},
        "turns_over_ahead": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
    }
    print(json.dumps(line))


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pico", action="store_true")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/rl-pico.toml"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report_synthetic(options.steps)
    if options.pico:
        report_pico(options.recipe, 12, options.rounds)


if __name__ == "__main__":
    main()
