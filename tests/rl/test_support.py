"""Support: measured on scores whose overlap is known, and what follows from it."""

import asyncio
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.errors import ConfigError, EngineError
from aprium.base.records import TeacherScores, Trajectory
from aprium.rl.support import Support, SupportConfig, choose_form, measure, score_support
from aprium.rl.teachers import RemoteConfig, TeacherConfig, TeachersConfig
from tests.rl.test_teachers import TEXTS, trajectory

CONFIG = SupportConfig()


def episode(tokens: list[int], sampled: list[bool]) -> Trajectory:
    return Trajectory(
        task="d/1",
        domain="d",
        tokens=tuple(tokens),
        sampled=tuple(sampled),
        logprobs=(0.0,) * len(tokens),
        weight_spans=((0, sum(sampled)),),
    )


def said(logprobs: list[float], top: list[dict[int, float]]) -> TeacherScores:
    return TeacherScores(
        teacher="t",
        logprobs=(0.0, *(math.log(p) for p in logprobs)),
        top=({}, *({token: math.log(p) for token, p in row.items()} for row in top)),
    )


def test_shares_are_counted_over_sampled_tokens() -> None:
    # A prompt token, then four that the student wrote; the teacher would not have written the last
    # but one, and has half of its probability on a token that the student does not see.
    one = episode([9, 1, 2, 3, 4], [False, True, True, True, True])
    theirs = said(
        [0.5, 0.5, 0.01, 0.5],
        [{1: 0.5, 7: 0.5}, {2: 0.5, 1: 0.25}, {5: 0.9, 6: 0.1}, {4: 0.5, 8: 0.5}],
    )
    own = said(
        [0.25, 0.5, 0.5, 0.5],
        [{1: 0.25, 2: 0.5}, {2: 0.5, 1: 0.5}, {3: 0.5, 5: 0.5}, {4: 0.5, 8: 0.5}],
    )
    found = measure([one], [theirs], [own])
    assert (found.episodes, found.tokens, found.teacher) == (1, 4, "t")
    assert found.inside == 3 / 4 and found.prefix == 2 / 4
    assert found.own_inside == 1.0 and found.own_prefix == 1.0
    assert found.mass == pytest.approx((0.5 + 1.0 + 0.9 + 1.0) / 4)
    gaps = [math.log(2), 0.0, math.log(0.02), 0.0]
    assert found.gap == pytest.approx(sum(gaps) / 4)
    assert found.gap_quantiles == pytest.approx((math.log(0.02), math.log(0.02), 0.0, math.log(2)))
    # What the model did not write does not count, whatever the teacher thinks of it.
    shown = replace(one, sampled=(False, True, True, False, True), weight_spans=((0, 3),))
    assert measure([shown], [theirs], [own]).inside == 1.0
    with pytest.raises(EngineError, match="wrote nothing"):
        measure([replace(one, sampled=(False,) * 5, weight_spans=())], [theirs], [own])


probabilities = st.dictionaries(st.integers(0, 5), st.floats(0.01, 0.2), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.integers(0, 5), probabilities, probabilities), min_size=1, max_size=6))
def test_shares_are_shares_and_oneself_is_the_whole(
    rows: list[tuple[int, dict[int, float], dict[int, float]]],
) -> None:
    tokens = [0, *(token for token, _, _ in rows)]
    one = episode(tokens, [False] + [True] * len(rows))
    theirs = said([0.1] * len(rows), [row for _, row, _ in rows])
    own = said([0.2] * len(rows), [row for _, _, row in rows])
    found = measure([one], [theirs], [own])
    for share in (found.inside, found.prefix, found.own_inside, found.own_prefix, found.mass):
        assert 0 <= share <= 1 + 1e-12
    assert found.prefix <= found.inside  # the prefix has no token that is outside
    assert found.gap == pytest.approx(math.log(0.5))
    same = measure([one], [own], [own])
    assert same.mass == pytest.approx(1) and same.gap == 0
    assert (same.inside, same.prefix) == (same.own_inside, same.own_prefix)


def support(**values: float) -> Support:
    plain = dict.fromkeys(("inside", "prefix", "own_inside", "own_prefix", "mass"), 1.0)
    return Support(teacher="t", episodes=1, tokens=1, gap=0.0, gap_quantiles=(), **(plain | values))


def test_a_warmup_is_needed_where_answers_soon_leave_the_support() -> None:
    assert not support().needs_warmup(CONFIG)
    assert support(prefix=0.3).needs_warmup(CONFIG)
    # Sampling at temperature 1 leaves one's own top tokens too: that is no fault of the teacher.
    assert not support(prefix=0.3, own_prefix=0.4).needs_warmup(CONFIG)
    assert support(prefix=0.1, own_prefix=0.4).needs_warmup(CONFIG)


def test_the_dense_form_is_for_shared_support_alone() -> None:
    assert choose_form({"a": support(), "b": support(mass=0.95)}, CONFIG) == "top_k"
    assert choose_form({"a": support(), "b": support(mass=0.5)}, CONFIG) == "sampled"
    assert choose_form({}, CONFIG) == "sampled"  # nothing is known
    for fields in ({"rollouts": -1}, {"top": 0}, {"min_mass": 1.5}, {"min_prefix": -0.1}):
        with pytest.raises(ConfigError, match=r"support\."):
            SupportConfig(**fields)


def test_teacher_and_student_score_the_same_rollouts() -> None:
    teachers = TeachersConfig(teachers=(TeacherConfig(name="t", checkpoint="pico"),))
    items = [trajectory(text, "a") for text in TEXTS] + [trajectory(TEXTS[0], "b")]
    found = asyncio.run(
        score_support(items, teachers, CONFIG, student="pico", routes={"a": "t", "b": None})
    )
    (one,) = found.values()  # domain b has no teacher
    assert list(found) == ["a"] and one.episodes == len(TEXTS)
    # The teacher is the student.
    assert one.mass == pytest.approx(1) and one.gap == 0 and one.inside == one.own_inside


def test_a_teacher_that_scores_nothing_is_not_one_whose_support_is_enough() -> None:
    gone = RemoteConfig(url="http://127.0.0.1:1", model="m", retries=0)
    listed = (TeacherConfig(name="t", checkpoint="pico"), TeacherConfig(name="u", remote=gone))
    items = [trajectory(text, domain) for text in TEXTS for domain in "ab"]
    words = "of 3 episodes of 'b' none has scores of teacher 'u' .* .*127.0.0.1:1 does not answer"
    with pytest.raises(EngineError, match=words):
        asyncio.run(
            score_support(
                items,
                TeachersConfig(teachers=listed),
                CONFIG,
                student="pico",
                routes={"a": "t", "b": "u"},
            )
        )
