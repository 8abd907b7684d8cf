"""reasoning-gym behind its wrapper: what its scorers would pay or run, and this does not."""

import asyncio

import pytest

from aprium.base.errors import TaskError
from aprium.envs import reasoning, sandbox
from aprium.envs.env import replay
from aprium.envs.family import constant_baseline, take, validate
from aprium.envs.reasoning import EXCLUDED, ReasoningGym, is_plain
from aprium.envs.task import say

pytestmark = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=sandbox.why_not() or "isolated"
)


def reward(family: ReasoningGym, index: int, text: str) -> float:
    task = take(family, index)
    return asyncio.run(replay(family.start(task), [say(text)])).reward


def test_scorers_that_raise_pay_nothing() -> None:
    family = ReasoningGym(datasets=("prime_factorization",))
    with pytest.raises(ValueError, match=r"Error"):
        reasoning._worker.call("score", take(family, 0).data["address"], "a x b")
    assert reward(family, 0, "a x b") == 0.0


@pytest.mark.parametrize("name", ["palindrome_generation", "sentence_reordering"])
def test_a_little_for_junk_is_nothing(name: str) -> None:
    family = ReasoningGym(datasets=(name,))
    steps = [asyncio.run(replay(family.start(take(family, i)), [say("zzz")])) for i in range(8)]
    assert any(step.parts["score"] > 0 for step in steps)
    assert all(step.reward == 0 for step in steps)


def test_code_is_not_evaluated() -> None:
    """The scorer of string_insertion runs this, and would pay a little for what it returns."""
    family = ReasoningGym(datasets=("string_insertion",))
    task = take(family, 0)
    gold = (task.solution[0].content or "").removeprefix("<answer>").removesuffix("</answer>")
    code = f"[__import__('os').environ.setdefault('X', {gold!r})]"
    assert reasoning._worker.call("score", task.data["address"], code) > 0.0
    assert not is_plain("string_insertion", code)
    step = asyncio.run(replay(family.start(task), [say(code)]))
    assert step.reward == 0.0 and step.parts["score"] == 0.0
    assert is_plain("string_insertion", repr(list(gold))) and reward(family, 0, gold) == 1.0


@pytest.mark.parametrize(
    ("dataset", "text", "plain"),
    [
        ("countdown", "3 * (4 + 5) - 2.5", True),
        ("countdown", "().__class__", False),
        ("countdown", "open('x')", False),
        ("countdown", "exec(x)", False),
        ("simple_integration", "6*X**3 + sin(2*X)/3 + C", True),
        ("simple_integration", "x.func(x)", False),
        ("spiral_matrix", "1 2 3", True),
        ("spiral_matrix", "[1, 2, 3]", True),
        ("spiral_matrix", "[x for x in range(9)]", False),
        ("spell_backward", "print(1)", True),
        ("spell_backward", "x" * 30_000, False),
    ],
)
def test_what_may_be_evaluated(dataset: str, text: str, plain: bool) -> None:
    assert is_plain(dataset, text) is plain


def test_an_expression_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning, "_LIMIT_S", 0.5)
    assert reward(ReasoningGym(datasets=("countdown",)), 0, "9**9**9**9**9") == 0.0


def test_seeds_share_no_item_across_the_split() -> None:
    family = ReasoningGym(datasets=("spell_backward",), options=(("max_word_len", 4),))
    trained = {take(family, i, seed=s).key for s in (1, 2) for i in range(150)}
    tested = {take(family, i, seed=s, held_out=True).key for s in (1, 2) for i in range(30)}
    assert not trained & tested


def test_compact_prompts_levels_and_baselines() -> None:
    family = ReasoningGym(datasets=("spell_backward", "chain_sum"), compact=True)
    for index in range(6):
        text = take(family, index).messages[0].content or ""
        assert text[:2] in ("B:", "C:") and text[-1] == "=" and len(text) < 60
    assert validate(family, count=6).ok
    steep = ReasoningGym(datasets=("word_sorting",), level=3)
    assert validate(steep, count=3).ok
    _, score = constant_baseline(ReasoningGym(datasets=("isomorphic_strings",)), count=12)
    assert score > 0.2


def test_what_is_refused() -> None:
    for name in EXCLUDED:
        with pytest.raises(TaskError, match=f"{name} cannot be graded soundly"):
            ReasoningGym(datasets=(name,))
    with pytest.raises(TaskError, match="no dataset 'chess'"):
        ReasoningGym(datasets=("chess",))
    with pytest.raises(TaskError, match="has no compact prompt"):
        ReasoningGym(datasets=("sudoku",), compact=True)
    with pytest.raises(TaskError, match="of one dataset"):
        ReasoningGym(options=(("x", 1),))
    with pytest.raises(TaskError, match=r"does not take|cannot make"):
        take(ReasoningGym(datasets=("gcd",), options=(("nonsense", 1),)), 0)
