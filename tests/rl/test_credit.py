"""Credit against its formulas by hand: baselines, shaping, defects, teachers, what is left out."""

import math
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError
from aprium.base.records import Group, Sample, TeacherScores, Trajectory
from aprium.rl.credit import (
    CreditConfig,
    EffortConfig,
    LengthConfig,
    OverlongConfig,
    credit,
    group_advantages,
    shaped_rewards,
)

PLAIN = CreditConfig(baseline="mean", normalise_std=False)


def episode(reward: float = 0.0, turns: tuple[int, ...] = (3,), **changes: Any) -> Trajectory:
    """Return an episode whose turns have so many sampled tokens, two shown before each."""
    sampled: list[bool] = []
    for count in turns:
        sampled += [False, False, *[True] * count]
    values: dict[str, Any] = {
        "task": "t",
        "domain": "d",
        "tokens": tuple(range(10, 10 + len(sampled))),
        "sampled": tuple(sampled),
        "logprobs": tuple(-0.1 * t if s else 0.0 for t, s in enumerate(sampled)),
        "reward": reward,
        "weight_spans": ((0, sum(turns)),),
    }
    return Trajectory(**{**values, **changes})


def group(*episodes: Trajectory) -> Group:
    return Group(task="t", trajectories=episodes)


def scores(one: Trajectory) -> TeacherScores:
    count = len(one.tokens)
    logprobs = (0.0, *(-0.2 * t for t in range(1, count)))
    return TeacherScores(teacher="x", logprobs=logprobs, top=({}, *[{1: -0.5}] * (count - 1)))


rewards_of = st.lists(st.floats(-2, 2), min_size=1, max_size=9)


@given(rewards=rewards_of, normalise=st.booleans())
def test_advantages_equal_their_formulas(rewards: list[float], normalise: bool) -> None:
    values, count = numpy.array(rewards), len(rewards)
    others = [(values.sum() - r) / (count - 1) if count > 1 else r for r in rewards]
    expected = {
        "mean": values - values.mean(),
        "leave_one_out": values - numpy.array(others),
        "none": values,
    }
    deviation = values.std(ddof=1) if count > 1 else 0.0
    for baseline, wanted in expected.items():
        config = CreditConfig(baseline=baseline, normalise_std=normalise)  # type: ignore[arg-type]
        found = group_advantages(rewards, config)
        if normalise and deviation > 1e-9:
            wanted = wanted / deviation
        numpy.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@given(rewards=rewards_of)
def test_leave_one_out_is_the_mean_scaled(rewards: list[float]) -> None:
    """r - mean of others = n / (n - 1) (r - mean): the two differ by a factor alone."""
    if len(rewards) < 2:
        return
    one, other = (
        group_advantages(rewards, CreditConfig(baseline=b, normalise_std=False))
        for b in ("leave_one_out", "mean")
    )
    factor = len(rewards) / (len(rewards) - 1)
    assert one == pytest.approx([factor * a for a in other], abs=1e-9)


def test_only_what_the_model_wrote_is_credited() -> None:
    first, second = episode(1.0, (2, 3)), episode(0.0, (4,))
    found = credit(group(first, second), PLAIN)
    for one, sample, advantage in zip((first, second), found.samples, (0.5, -0.5), strict=True):
        assert sample.tokens == one.tokens and not any(sample.ce_weight)
        assert sample.rl_weight == tuple(map(float, one.sampled))
        assert sample.advantage == tuple(advantage * s for s in one.sampled)
        assert sample.behaviour_logprob == one.logprobs
        assert sample.kl_weight == sample.teacher_logprob == sample.teacher_top == ()
    assert found.figures["tokens"] == 9 and found.figures["reward"] == 1.0


def test_a_first_token_that_was_sampled_is_not_learnt() -> None:
    """Nothing precedes it, so that nothing predicts it."""
    one = Trajectory(
        task="t",
        domain="d",
        tokens=(1, 2),
        sampled=(True, True),
        logprobs=(-1.0, -2.0),
        weight_spans=((0, 2),),
    )
    (sample,) = credit(group(one), PLAIN).samples
    assert sample.rl_weight == (0.0, 1.0) and sample.behaviour_logprob == (0.0, -2.0)


def test_errors_give_nothing_and_are_counted() -> None:
    broken = episode(0.0, stop="error", error="RuntimeError: no")
    late = episode(0.0, stop="deadline", error="not done in 1 s")
    found = credit(group(broken, episode(1.0), episode(0.0), late), PLAIN)
    assert [s.advantage[2] for s in found.samples] == [0.5, -0.5]  # without the broken ones
    assert found.figures["errors"] == 2 and found.figures["episodes"] == 4
    alone = credit(group(broken), PLAIN)
    assert alone.samples == () and alone.figures["errors"] == 1


def test_groups_of_equal_rewards_are_dropped_after_shaping() -> None:
    config = CreditConfig(drop_equal=True)
    same = group(episode(1.0), episode(1.0, (5,)))
    found = credit(same, config)
    assert found.samples == () and found.figures["dropped"] == 1
    assert len(credit(group(episode(1.0), episode(0.0)), config).samples) == 2
    # Lengths make a difference where they are asked to.
    shaped = CreditConfig(drop_equal=True, length=LengthConfig())
    assert len(credit(same, shaped).samples) == 2
    assert len(credit(same, CreditConfig()).samples) == 2


def test_unfinished_episodes_are_compared_with_and_not_learnt() -> None:
    cut = episode(0.0, stop="tokens")
    found = credit(group(episode(1.0), cut), CreditConfig(unfinished="mask", normalise_std=False))
    assert [s.advantage[2] for s in found.samples] == [1.0] and found.figures["unfinished"] == 1
    assert len(credit(group(episode(1.0), cut), PLAIN).samples) == 2


def test_overlong_penalty_is_that_of_dapo() -> None:
    config = CreditConfig(overlong=OverlongConfig(limit=10, buffer=4, penalty=0.5))
    lengths = (3, 6, 7, 9, 10, 12)
    found = shaped_rewards([episode(1.0, (n,)) for n in lengths], config)
    expected = []
    for n in lengths:
        penalty = 0.0 if n <= 6 else (6 - n) / 4 if n <= 10 else -1.0
        expected.append(1.0 + 0.5 * penalty)
    assert found == pytest.approx(expected)


def test_effort_is_its_formula_in_its_domains() -> None:
    config = CreditConfig(effort=EffortConfig(domains=("quick",), tokens=10, weight=0.4, penalty=2))
    for length, reward in ((4, 1.0), (10, 1.0), (25, 1.0), (25, 0.0), (1, 0.3)):
        part = min(1.0, 0.4 * (1 - length / 10))
        wanted = reward + reward * max(part, 0) + 2 * min(part, 0)
        (found,) = shaped_rewards([episode(reward, (length,), domain="quick")], config)
        assert found == pytest.approx(wanted)
        assert shaped_rewards([episode(reward, (length,))], config) == [reward]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_preference_for_short_ones_keeps_the_mean(lengths: list[int]) -> None:
    config = CreditConfig(length=LengthConfig(weight=0.3))
    found = shaped_rewards([episode(1.0, (n,)) for n in lengths], config)
    assert math.fsum(found) / len(found) == pytest.approx(1.0)
    ordered = [r for _, r in sorted(zip(lengths, found, strict=True), key=lambda pair: pair[0])]
    assert ordered == sorted(ordered, reverse=True)
    assert max(found) - min(found) == pytest.approx(0.3 if len(set(lengths)) > 1 else 0.0)


def test_bonus_goes_to_the_shortest_of_the_best() -> None:
    config = CreditConfig(length=LengthConfig(weight=0.0, bonus=0.5, top=0.4))
    rewards, lengths = (1.0, 0.0, 1.0, 0.9, 0.1), (9, 1, 7, 2, 3)
    made = [episode(r, (n,)) for r, n in zip(rewards, lengths, strict=True)]
    assert shaped_rewards(made, config) == pytest.approx([1.0, 0.0, 1.5, 0.9, 0.1])


def test_defects_cost_the_reward_or_their_turn() -> None:
    defects = ((6, 9, "invalid_call"),)
    bad = episode(1.0, (2, 3, 1), defects=defects)
    assert bad.sampled[6:9] == (True,) * 3
    good = episode(1.0)
    zero = CreditConfig(baseline="none", normalise_std=False, zero_reward=("invalid_call",))
    first, second = credit(group(bad, good), zero).samples
    assert not any(first.advantage) and second.advantage[2] == 1.0
    punish = CreditConfig(baseline="none", normalise_std=False, punished=("invalid_call",))
    (first, _) = (found := credit(group(bad, good), punish)).samples
    expected = [1.0 * s for s in bad.sampled]
    expected[6:9] = [-5.0] * 3
    assert list(first.advantage) == expected and found.figures["invalid_call"] == 1
    other = CreditConfig(baseline="none", normalise_std=False, punished=("empty_answer",))
    assert credit(group(bad, good), other).samples[0].advantage[6] == 1.0


def test_teachers_and_rewards_are_weighed() -> None:
    one, two = episode(1.0), episode(0.0, domain="d")
    config = CreditConfig(
        baseline="mean",
        normalise_std=False,
        reward_weight=0.5,
        kl_weight=2.0,
        domain_weights={"d": 3.0},
    )
    said = [scores(one), scores(two)]
    for sample, advantage, heard in zip(
        credit(group(one, two), config, said).samples, (0.25, -0.25), said, strict=True
    ):
        assert sample.advantage == tuple(advantage * s for s in one.sampled)
        assert sample.rl_weight == tuple(3.0 * s for s in one.sampled)
        assert sample.kl_weight == tuple(2.0 * s for s in one.sampled)
        assert sample.teacher_logprob == heard.logprobs and sample.teacher_top == heard.top
    for sample in credit(group(one, two), config, said, apart=True).samples:
        assert sample.kl_weight == tuple(6.0 * s for s in one.sampled)
        assert sample.rl_weight == tuple(3.0 * s for s in one.sampled)
    pure = CreditConfig(reward_weight=0.0, kl_weight=1.0, kl_weights={"d": 0.5})
    (sample,) = credit(group(one), pure, said[:1]).samples
    assert not any(sample.advantage) and sample.kl_weight[2:] == (0.5,) * 3
    with pytest.raises(ConfigError, match="no teacher scored"):
        credit(group(one), pure)
    silent = CreditConfig(kl_weight=1.0, kl_weights={"d": 0.0})
    assert isinstance(credit(group(one), silent).samples[0], Sample)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"zero_reward": ["rudeness"]}, "the defects are"),
        ({"punished": ["rudeness"]}, "the defects are"),
        ({"kl_weight": -1.0}, "credit.kl_weight"),
        ({"domain_weights": {"d": -1.0}}, "domain_weights.d"),
        ({"drop_equal": True, "reward_weight": 0.0}, "drop_equal"),
        ({"overlong": {"limit": 5, "buffer": 6}}, "overlong.buffer"),
        ({"length": {"top": 2.0}}, "length.top"),
        ({"effort": {"domains": ["d"], "tokens": 0}}, "effort.tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_dict(CreditConfig, wrong)
