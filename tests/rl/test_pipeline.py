"""The pipeline: every item is trained on once and in time, whatever the order things end in."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import DataError
from aprium.base.records import Group, Sample, TeacherScores, Trajectory
from aprium.rl.ledger import Item, Ledger, Scores
from aprium.rl.pipeline import Pipeline, PipelineConfig, Played, Stages, fits


@dataclass(frozen=True)
class Made:
    samples: tuple[Sample, ...]
    figures: dict[str, float] = field(default_factory=dict)


class World:
    """Stages that take `seconds(number)` of an event loop's time; useless items give no samples."""

    def __init__(self, seconds: Any, useless: Any = lambda number: False) -> None:
        self.seconds, self.useless = seconds, useless
        self.version = 0
        self.played: list[int] = []
        self.playing = self.most_playing = 0

    async def generate(self, item: Item) -> Group:
        begun = self.version
        self.playing += 1
        self.most_playing = max(self.most_playing, self.playing)
        await asyncio.sleep(self.seconds(item.number))
        self.playing -= 1
        self.played.append(item.number)
        spans = ((begun, 1), (self.version, 1)) if begun != self.version else ((begun, 2),)
        one = Trajectory(
            task=str(item.number),
            domain=item.domain,
            tokens=(1, item.number, 2),
            sampled=(False, True, True),
            logprobs=(0.0, -1.0, -1.0),
            reward=float(not self.useless(item.number)),
            weight_spans=spans,
        )
        return Group(task=one.task, trajectories=(one,))

    async def credit(self, group: Group, scores: Scores) -> Made:
        number = int(group.task)
        if self.useless(number):
            return Made(())
        said = scores[0].logprobs if scores and scores[0] is not None else ()
        return Made((Sample(tokens=(1, number), ce_weight=(0.0, 1.0), teacher_logprob=said[:2]),))

    async def score(self, group: Group) -> Scores:
        await asyncio.sleep(0.001)
        number = int(group.task)
        return (TeacherScores(teacher="t", logprobs=(0.0, -float(number), -1.0)),)

    def stages(self, teachers: bool = False) -> Stages:
        return Stages(
            generate=self.generate, credit=self.credit, score=self.score if teachers else None
        )


def draw(number: int) -> Item:
    return Item(number=number, domain="d", index=number)


def run(
    world: World,
    path: Path,
    config: PipelineConfig,
    steps: range,
    *,
    train_s: float = 0.0,
    teachers: bool = False,
) -> list[list[Played]]:
    """Run the steps of a trainer that takes `train_s` each; the ledger stays under `path`."""

    async def go() -> list[list[Played]]:
        ledger = Ledger(path)
        pipeline = Pipeline(world.stages(teachers), draw, ledger, config)
        batches = []
        try:
            for step in steps:
                world.version = step
                batches.append(await pipeline.next_batch(step))
                await asyncio.sleep(train_s)
        finally:
            await pipeline.close()
            ledger.close()
        return batches

    return asyncio.run(go())


def numbers(batches: Sequence[Sequence[Played]]) -> list[list[int]]:
    return [[one.item.number for one in batch] for batch in batches]


def test_in_turns_batches_are_the_items_in_order(tmp_path: Path) -> None:
    rng = random.Random(0)
    world = World(lambda number: rng.random() / 500)
    batches = run(world, tmp_path, PipelineConfig(groups_per_step=3), range(4))
    assert numbers(batches) == [[3 * s, 3 * s + 1, 3 * s + 2] for s in range(4)]
    assert all(one.age == 0 for batch in batches for one in batch)
    assert world.most_playing == 3 and len(world.played) == 12  # nothing is played ahead


def test_while_the_trainer_works_the_next_items_are_played(tmp_path: Path) -> None:
    world = World(lambda number: 0.001)
    config = PipelineConfig(groups_per_step=2, max_age=1)
    batches = run(world, tmp_path, config, range(3), train_s=0.02)
    assert {one.age for batch in batches[1:] for one in batch} == {1}
    assert len(world.played) == 8  # those of a step ahead too


@settings(max_examples=40)
@given(st.data())
def test_every_item_is_used_once_and_in_time(tmp_path_factory: Any, data: st.DataObject) -> None:
    size, max_age = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    slow = data.draw(st.sets(st.integers(0, 40)))
    refill = data.draw(st.booleans())
    useless = data.draw(st.sets(st.integers(0, 20), max_size=6))
    world = World(lambda n: 0.02 if n in slow else 0.0005, useless.__contains__)
    config = PipelineConfig(groups_per_step=size, max_age=max_age, refill=refill)
    path = tmp_path_factory.mktemp("run")
    steps = data.draw(st.integers(1, 6))
    cut = data.draw(st.integers(0, steps))
    before = run(world, path, config, range(cut), train_s=0.001)
    after = run(world, path, config, range(cut, steps), train_s=0.001)  # another process goes on
    batches = before + after
    used = [n for batch in numbers(batches) for n in batch]
    assert len(used) == len(set(used))
    for batch in batches:
        learnt = [one for one in batch if one.learnt.samples]
        assert learnt and max(one.age for one in batch) <= max_age
        assert len(learnt) == size if refill else len(batch) >= size
    ledger = Ledger(path)
    left = [entry.item.number for entry in ledger.open_entries()]
    assert sorted(used + left) == list(range(ledger.num_issued))
    assert len(left) <= size * (max_age + 1) + len(useless)
    ledger.close()


def test_recorded_batches_come_again_and_then_new_ones(tmp_path: Path) -> None:
    rng = random.Random(1)
    world = World(lambda number: rng.random() / 200)
    config = PipelineConfig(groups_per_step=2, max_age=2)
    first = run(world, tmp_path, config, range(6), teachers=True)
    played = len(world.played)
    again = run(world, tmp_path, config, range(2, 8), teachers=True)
    assert numbers(again)[:4] == numbers(first)[2:]
    assert [[o.learnt for o in batch] for batch in again[:4]] == [
        [o.learnt for o in batch] for batch in first[2:]
    ]
    assert [[o.age for o in batch] for batch in again[:4]] == [
        [o.age for o in batch] for batch in first[2:]
    ]
    used = [n for batch in numbers(first + again[4:]) for n in batch]
    assert len(used) == len(set(used)) == 16
    assert len(world.played) < played + 10  # what was played is not played again


def test_scores_reach_the_samples_and_are_asked_for_once(tmp_path: Path) -> None:
    world = World(lambda number: 0.0)
    (batch,) = run(world, tmp_path, PipelineConfig(groups_per_step=3), range(1), teachers=True)
    said = [sample.teacher_logprob for one in batch for sample in one.learnt.samples]
    assert said == [(0.0, 0.0), (0.0, -1.0), (0.0, -2.0)]


def test_with_refill_useless_groups_are_replaced_and_go_along(tmp_path: Path) -> None:
    world = World(lambda number: 0.0, lambda number: number % 2 == 0)
    config = PipelineConfig(groups_per_step=3, refill=True)
    batches = run(world, tmp_path, config, range(3))
    assert numbers(batches) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    plain = run(world, tmp_path / "plain", PipelineConfig(groups_per_step=3), range(2))
    assert numbers(plain) == [[0, 1, 2], [3, 4, 5]]


def test_a_run_that_learns_nothing_says_why(tmp_path: Path) -> None:
    world = World(lambda number: 0.0, lambda number: True)
    for refill in (False, True):
        config = PipelineConfig(groups_per_step=2, refill=refill)
        with pytest.raises(DataError, match=r"mean reward of 32 episodes is 0.000; give tasks"):
            run(world, tmp_path / str(refill), config, range(1))


def test_what_a_stage_raises_ends_the_run(tmp_path: Path) -> None:
    def fail(number: int) -> float:
        if number == 2:
            raise ValueError("no such thing")
        return 0.0

    with pytest.raises(ValueError, match="no such thing"):
        run(World(fail), tmp_path, PipelineConfig(groups_per_step=2, max_age=1), range(3))


def test_items_that_other_settings_made_too_old_are_dropped(tmp_path: Path) -> None:
    world = World(lambda number: 0.0)
    run(
        world,
        tmp_path,
        PipelineConfig(groups_per_step=2, max_age=3),
        range(2),
        train_s=0.01,
    )
    batches = run(world, tmp_path, PipelineConfig(groups_per_step=2, max_age=0), range(2, 4))
    assert all(one.age == 0 for batch in batches for one in batch)
    assert "steps old, of at most 0" in (tmp_path / "ledger.jsonl").read_text()


def test_groups_at_a_time_are_bounded(tmp_path: Path) -> None:
    world = World(lambda number: 0.001)
    run(world, tmp_path, PipelineConfig(groups_per_step=8, max_groups=3), range(2))
    assert world.most_playing == 3


@given(st.lists(st.integers(0, 6), max_size=8), st.integers(1, 3))
def test_fits_is_what_trying_all_orders_says(last_steps: list[int], size: int) -> None:
    room = dict.fromkeys(range(7), size)
    possible = True
    for last in sorted(last_steps):  # the first free place: greedy is optimal for intervals
        place = next((s for s in range(1, last + 1) if room[s]), None)
        possible = possible and place is not None
        if place is not None:
            room[place] -= 1
    assert fits(1, size, last_steps) == possible


def test_a_straggler_is_waited_for_only_when_it_would_be_too_old(tmp_path: Path) -> None:
    world = World(lambda number: 0.15 if number == 0 else 0.001)
    config = PipelineConfig(groups_per_step=2, max_age=2)
    batches = run(world, tmp_path, config, range(4), train_s=0.002)
    (at,) = [step for step, batch in enumerate(numbers(batches)) if 0 in batch]
    assert at == 2  # the last step that may use what began under version 0
    assert world.played.index(0) >= 4
    assert batches[2][0].age == 2
