"""Who deals items: shares of any beginning, and a curriculum that goes on where it was."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.base.records import Group, Trajectory
from aprium.rl.curriculum import CurriculumConfig
from aprium.rl.deal import Course, Deal
from aprium.rl.ledger import Item


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.05, 1.0), min_size=1),
    st.integers(0, 60),
)
def test_domains_have_their_shares_of_any_beginning(weights: dict[str, float], count: int) -> None:
    deal = Deal(weights)
    items = [deal(number) for number in range(count)]
    total = sum(weights.values())
    for name, weight in weights.items():
        mine = [item.index for item in items if item.domain == name]
        assert abs(len(mine) - count * weight / total) < len(weights)
        assert mine == list(range(len(mine)))
    assert [Deal(weights)(item.number) for item in reversed(items)] == items[::-1]


def test_without_a_weight_there_is_nothing_to_deal() -> None:
    with pytest.raises(ConfigError, match="no domain has a weight"):
        Deal({"a": 0.0})


def test_tasks_of_a_pool_come_again() -> None:
    deal = Deal({"a": 1.0}, pool=3)
    assert [deal(number).index for number in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def played(item: Item, reward: float) -> tuple[Item, Group]:
    ones = [
        Trajectory(
            task="t",
            domain=item.domain,
            tokens=(1, 2),
            sampled=(False, True),
            logprobs=(0.0, -1.0),
            reward=reward,
            weight_spans=((0, 1),),
        )
    ] * 4
    failed = Trajectory(
        task="t", domain=item.domain, tokens=(), sampled=(), logprobs=(), stop="error", error="no"
    )
    return item, Group(task="t", trajectories=(*ones, failed))


def course() -> Course:
    return Course({"a": 2.0, "b": 1.0}, 12, 6, CurriculumConfig(steps=4, drop_after=4))


def deal_steps(course: Course, steps: range) -> list[Item]:
    items = []
    for step in steps:
        batch = [course(number) for number in range(6 * step, 6 * step + 6)]
        course.see(played(item, float(item.index % 2)) for item in batch)
        items += batch
    return items


def test_a_course_keeps_shares_and_drops_what_is_mastered() -> None:
    items = deal_steps(course(), range(12))
    assert [item.number for item in items] == list(range(72))
    assert sum(item.domain == "a" for item in items) == 48
    late = [item.index for item in items[48:]]
    assert all(index % 2 == 0 for index in late)  # odd ones are solved each time


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=4, max_size=8), st.data())
def test_a_course_that_ran_ahead_goes_on_by_how_much_was_dealt(
    ahead: list[int], data: st.DataObject
) -> None:
    """Items beyond those of a batch were drawn before it was seen: as many must be again."""
    whole, items, states, by = course(), [], [], []
    for step, more in enumerate(ahead):
        items += [whole(n) for n in range(len(items), max(6 * (step + 1) + more, len(items)))]
        by.append(len(items))
        whole.see(played(item, float(item.index % 2)) for item in items[6 * step : 6 * step + 6])
        states.append(whole.state_dict())
    kept = data.draw(st.integers(0, len(ahead) - 1))
    last = data.draw(st.integers(kept, len(ahead) - 1))
    again = course()
    again.load_state_dict(states[kept])
    for step in range(kept + 1, last + 1):
        again(by[step] - 1)
        again.see(played(item, float(item.index % 2)) for item in items[6 * step : 6 * step + 6])
    for step in range(last + 1, len(ahead)):
        assert [again(n) for n in range(by[step - 1], by[step])] == items[by[step - 1] : by[step]]
        again.see(played(item, float(item.index % 2)) for item in items[6 * step : 6 * step + 6])


def test_a_course_goes_on_from_its_state() -> None:
    whole = deal_steps(course(), range(8))
    first, second = course(), course()
    begun = deal_steps(first, range(3))
    state = first.state_dict()
    first(20)  # what is drawn after the state was taken does not matter
    second.load_state_dict(state)
    assert begun + deal_steps(second, range(3, 8)) == whole


def test_what_was_drawn_ahead_is_given_once() -> None:
    one, other = course(), course()
    for number in range(4):  # of a batch of six
        one(number)
    other.load_state_dict(one.state_dict())
    assert [other(n) for n in range(4, 8)] == [one(n) for n in range(4, 8)]
