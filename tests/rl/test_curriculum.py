"""The curriculum: shares, chances against the normal density, what is dropped, resuming."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError, DataError
from aprium.rl.curriculum import Curriculum, CurriculumConfig

KEYS = [f"k{i}" for i in range(11)]


def profiled(config: CurriculumConfig) -> Curriculum:
    """Return a curriculum whose key number i was solved in i of 10 trials, as often as needed."""
    made = Curriculum({"d": KEYS}, {"d": 1.0}, config)
    for i, key in enumerate(KEYS):
        made.see("d", key, 1e6 * i, trials=10_000_000)
    return made


def test_chances_follow_the_normal_density() -> None:
    config = CurriculumConfig(steps=1, easy=0.3, hard=0.3, width=0.15, drop_after=10**9)
    made, count = profiled(config), 4000
    drawn = Counter(made.next_batch(1)[0][1] for _ in range(count))
    weights = [math.exp(-(((i / 10 - 0.3) / 0.15) ** 2) / 2) for i in range(11)]
    for key, weight in zip(KEYS, weights, strict=True):
        share = weight / sum(weights)
        spread = math.sqrt(share * (1 - share) / count)
        assert drawn[key] / count == pytest.approx(share, abs=4.5 * spread + 1e-4), key


def test_the_mean_goes_from_easy_to_hard_and_stays() -> None:
    made = profiled(CurriculumConfig(steps=4, easy=0.9, hard=0.1))
    means = []
    for _ in range(6):
        means.append(made.mean)
        made.next_batch(2)
    assert means == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1, 0.1])


def test_batches_get_harder() -> None:
    made = profiled(CurriculumConfig(steps=20, width=0.1))
    means = []
    for _ in range(21):
        batch = made.next_batch(4)
        means.append(sum(made.pass_rate("d", key) for _, key in batch) / 4)
    assert sum(means[:5]) / 5 > sum(means[-5:]) / 5 + 0.3


def test_what_is_always_solved_is_dropped_until_nothing_is_left() -> None:
    made = Curriculum({"a": ["x", "y"], "b": ["z"]}, {"a": 1, "b": 1}, CurriculumConfig(steps=1))
    made.see("a", "x", 7, trials=7)
    assert not made.is_mastered("a", "x")  # too few trials to say so
    made.see("a", "x", 1)
    made.see("a", "y", 7.5, trials=8)
    made.see("b", "z", 8, trials=8)
    assert made.is_mastered("a", "x") and not made.is_mastered("a", "y")
    assert set(made.next_batch(6)) == {("a", "y")}  # b has nothing left: a takes its share
    made.see("a", "x", 0)
    assert {key for _, key in made.next_batch(6)} == {"x", "y"}  # it was lost again
    made = Curriculum({"a": ["x"]}, {"a": 1}, CurriculumConfig(steps=1, drop_after=1))
    made.see("a", "x", 1)
    with pytest.raises(DataError, match="every item"):
        made.next_batch(1)


@settings(max_examples=30)
@given(
    shares=st.lists(st.floats(0.1, 5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=12),
)
def test_shares_are_kept_over_batches(shares: list[float], sizes: list[int]) -> None:
    names = [f"d{i}" for i in range(len(shares))]
    made = Curriculum(
        dict.fromkeys(names, KEYS), dict(zip(names, shares, strict=True)), CurriculumConfig(steps=3)
    )
    drawn: Counter[str] = Counter()
    for size in sizes:
        batch = made.next_batch(size)
        assert len(batch) == size
        if size <= len(KEYS):
            assert len(set(batch)) == size  # no item twice
        drawn.update(domain for domain, _ in batch)
    for name, share in zip(names, shares, strict=True):
        wanted = sum(sizes) * share / sum(shares)
        assert abs(drawn[name] - wanted) <= len(names)


def test_a_small_domain_is_drawn_again_only_after_all_of_it() -> None:
    made = Curriculum({"d": ["x", "y", "z"]}, {"d": 1.0}, CurriculumConfig(steps=1))
    counts = Counter(key for _, key in made.next_batch(8))
    assert sorted(counts.values()) == [2, 3, 3]


def test_resuming_draws_the_same() -> None:
    made = profiled(CurriculumConfig(steps=5))
    made.next_batch(3)
    state = json.loads(json.dumps(made.state_dict()))
    expected = [made.next_batch(3) for _ in range(4)]
    again = Curriculum({"d": KEYS}, {"d": 1.0}, CurriculumConfig(steps=5))
    again.load_state_dict(state)
    assert [again.next_batch(3) for _ in range(4)] == expected
    assert again.state_dict() == made.state_dict()
    other = Curriculum({"e": KEYS}, {"e": 1.0}, CurriculumConfig(steps=5))
    with pytest.raises(DataError, match="domains d"):
        other.load_state_dict(state)


def test_unknown_items_count_as_the_prior_says() -> None:
    config = CurriculumConfig(steps=1, prior=2.0, prior_rate=0.5)
    made = Curriculum({"d": ["x"]}, {"d": 1.0}, config)
    assert made.pass_rate("d", "x") == 0.5
    made.see("d", "x", 1, trials=2)
    made.see("d", "x", 2, trials=2)
    assert made.pass_rate("d", "x") == pytest.approx((3 + 1) / (4 + 2))
    with pytest.raises(DataError, match="3 of 2"):
        made.see("d", "x", 3, trials=2)


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in (
        *({"steps": 0}, {"steps": 1, "easy": 1.1}, {"steps": 1, "easy": 0.1, "hard": 0.2}),
        *({"steps": 1, "width": 0.0}, {"steps": 1, "prior": 0.0}, {"steps": 1, "drop_after": 0}),
    ):
        with pytest.raises(ConfigError):
            CurriculumConfig(**wrong)  # type: ignore[arg-type]
    config = CurriculumConfig(steps=1)
    with pytest.raises(ConfigError, match="give each domain both"):
        Curriculum({"d": KEYS}, {"e": 1.0}, config)
    with pytest.raises(ConfigError, match="must be positive"):
        Curriculum({"d": KEYS}, {"d": 0.0}, config)
    with pytest.raises(DataError, match="no items"):
        Curriculum({"d": []}, {"d": 1.0}, config)
