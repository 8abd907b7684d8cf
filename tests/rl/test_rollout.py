"""Rollouts: which item is what, episodes that begin alike, and weights that change under way."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aprium.base.errors import ConfigError, RequestError
from aprium.base.records import Group, SamplingParams, Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.engine.speculative import SpeculativeConfig
from aprium.envs.dialogue import ChatFormat
from aprium.envs.places import Places
from aprium.model.model import HybridModel
from aprium.rl.evaluate import EvaluateConfig, Evaluation, chat_format
from aprium.rl.ledger import Item
from aprium.rl.rollout import DomainConfig, RolloutConfig, Rollouts, forked
from aprium.rl.weights import Weights
from aprium.train.sft import open_model, read_text
from tests.envs.counter import row
from tests.rl.test_demonstrations import ADD as DRY
from tests.rl.test_demonstrations import CHAT, Slow

ADD = DomainConfig(name="add", family="exercises", options={"families": ["add"]}, max_tokens=24)
TOOLS = DomainConfig(name="tools", family="tool-use", thinking=False)
CONFIG = RolloutConfig(group_size=5, max_tokens=24, episode_tokens=160, max_turns=3)


@pytest.fixture
def weights() -> Weights:
    return Weights(open_model(PICO_DIR, read_text(PICO_DIR)))


def make_engine(weights: Weights, **options) -> AsyncEngine:
    return AsyncEngine(
        EngineConfig(model="pico", max_model_len=1024, **options), weights.checkpoint(PICO_DIR)
    )


@pytest.fixture
def engine(weights: Weights) -> Iterator[AsyncEngine]:
    engine = make_engine(weights)
    yield engine
    asyncio.run(engine.close())


def play(engine: AsyncEngine, items: list[Item], *domains: DomainConfig) -> list[Group]:
    rollouts = Rollouts(domains or (ADD,), CONFIG, EnginePolicy(engine), chat_format(engine))

    async def go() -> list[Group]:
        return list(await asyncio.gather(*map(rollouts.play, items)))

    return asyncio.run(go())


def test_an_item_is_played_the_same_again_and_its_episodes_differ(engine: AsyncEngine) -> None:
    items = [Item(number=n, domain="add", index=n) for n in range(3)]
    first = play(engine, items)
    again = play(engine, items[1:2])  # alone: what it is batched with does not matter
    assert again == first[1:2]
    for group in first:
        assert len(group.trajectories) == 5 and all(t.error is None for t in group.trajectories)
        prompts = {tuple(t.tokens[: t.sampled.index(True)]) for t in group.trajectories}
        assert len(prompts) == 1
    texts = {t.tokens for group in first for t in group.trajectories}
    assert len(texts) > 3
    assert len({group.task for group in first}) == 3


def test_episodes_are_of_the_domain_that_the_recipe_names(
    engine: AsyncEngine, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row(i)) for i in range(40)))  # of "counter_agent"
    options = {"rows": str(rows), "url": "http://127.0.0.1:1"}
    counting = DomainConfig(name="counting", family="nemo-gym", options=options)
    (group,) = play(engine, [Item(number=0, domain="counting", index=0)], counting)
    assert {t.domain for t in group.trajectories} == {"counting"}
    config = EvaluateConfig(items=2, max_tokens=4, episode_tokens=160)
    found = asyncio.run(Evaluation([counting], config)(EnginePolicy(engine), chat_format(engine)))
    assert {name: one.items for name, one in found.items()} == {"counting": 2}


def test_the_first_prompt_of_a_group_is_read_once(engine: AsyncEngine) -> None:
    (group,) = play(engine, [Item(number=0, domain="add", index=0)])
    prompt = group.trajectories[0].sampled.index(True)
    assert engine.stats().prefix_tokens_reused == 4 * (prompt - 1)


def test_episodes_of_many_turns_part_after_the_first(engine: AsyncEngine) -> None:
    (group,) = play(engine, [Item(number=0, domain="tools", index=1)], TOOLS)
    assert all(t.error is None for t in group.trajectories), group.trajectories[0].error


def test_drafts_change_no_token(weights: Weights, engine: AsyncEngine) -> None:
    items = [Item(number=n, domain="add", index=n) for n in range(2)]
    drafting = make_engine(
        weights, speculative=SpeculativeConfig(method="mtp", num_speculative_tokens=2)
    )
    try:
        drafted = play(drafting, items)
        assert sum(drafting.stats().drafts_compared) > 0
    finally:
        asyncio.run(drafting.close())
    plain = play(engine, items)
    # Drafts are off under temperature unless they are sampled in the same way: same bits.
    assert drafted == plain


def test_a_fork_answers_as_the_policy_does(engine: AsyncEngine) -> None:
    prompt = engine.tokenizer.encode("What is 2 + 2?")
    params = SamplingParams(max_tokens=6, seed=1)

    async def go() -> None:
        policy = EnginePolicy(engine)
        async with forked(policy, 3, seed=1) as forks:
            first, other = await asyncio.gather(
                forks[0].complete(prompt, params), forks[2].complete(prompt[:-1], params)
            )
            assert first.prompt_tokens == tuple(prompt)
            assert other.prompt_tokens == tuple(prompt[:-1])  # it had another prompt
            again = await forks[0].complete((*prompt, *first.tokens), params)
            assert again.prompt_tokens == (*prompt, *first.tokens)
            assert await forks[1].score(prompt) == await policy.score(prompt)
        async with forked(policy, 2, seed=1) as forks:
            answers = [fork.complete((), params) for fork in forks]
            for error in await asyncio.gather(*answers, return_exceptions=True):
                assert isinstance(error, RequestError)
        assert engine.stats().num_running == 0

    asyncio.run(go())


def test_groups_that_wait_for_places_are_not_late() -> None:
    """More groups under way than an engine has places for, as where generation runs ahead."""
    config = RolloutConfig(group_size=4, deadline_s=1.0)

    async def go(count: int) -> list[str]:
        rollouts = Rollouts([DRY], config, Slow(), CHAT, Places(count))
        items = [Item(number=n, domain="add", index=n) for n in range(15)]
        groups = await asyncio.gather(*map(rollouts.play, items))
        return [one.stop for group in groups for one in group.trajectories]

    assert set(asyncio.run(go(2))) == {"done"}
    assert "deadline" in asyncio.run(go(60))


@pytest.mark.parametrize("recompute", [False, True])
def test_new_weights_go_into_running_episodes_and_spans_say_so(
    weights: Weights, recompute: bool
) -> None:
    """Tokens after a push come from the new weights, those before from the old."""
    engine = make_engine(weights)
    long = DomainConfig(name="add", family="exercises", options={"families": ["add"]})
    config = RolloutConfig(group_size=2, max_tokens=400, episode_tokens=600, temperature=5.0)
    rollouts = Rollouts([long], config, EnginePolicy(engine), chat_format(engine))

    async def go() -> Group:
        task = asyncio.create_task(rollouts.play(Item(number=0, domain="add", index=0)))
        while engine.stats().generated_tokens < 20:
            await asyncio.sleep(0.001)
        with torch.no_grad():
            for parameter in weights._parameters.values():
                parameter.mul_(1.01)
        await weights.push(engine, 7, recompute=recompute)
        group = await task
        await engine.close()
        return group

    group = asyncio.run(go())
    versions = Counter()
    for trajectory in group.trajectories:
        assert trajectory.error is None
        assert [version for version, _ in trajectory.weight_spans] in ([0], [0, 7])
        versions.update(dict(trajectory.weight_spans))
    assert versions[0] > 0 and versions[7] > 0
    for i, trajectory in enumerate(group.trajectories):
        old, new = (score(w, trajectory) for w in (Weights(original()), weights))
        places = [t for t, sampled in enumerate(trajectory.sampled) if sampled]
        count = trajectory.weight_spans[0][1]
        for t in places[:count]:
            assert trajectory.logprobs[t] == pytest.approx(old[t], abs=1e-5), i
        # Later ones are the new weights' own, of states of their own if those were computed anew.
        gaps = [abs(trajectory.logprobs[t] - (new[t] or 0.0)) for t in places[count:]]
        assert (max(gaps, default=0.0) < 1e-5) == (recompute or not gaps), i


def original() -> HybridModel:
    return open_model(PICO_DIR, read_text(PICO_DIR))


def score(weights: Weights, trajectory: Trajectory) -> list[float | None]:
    """Return what an engine with `weights` makes of all tokens."""
    engine = make_engine(weights)

    async def go() -> list[float | None]:
        try:
            return await EnginePolicy(engine).score(trajectory.tokens)
        finally:
            await engine.close()

    return asyncio.run(go())


def test_two_domains_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two domains have one name"):
        Rollouts([ADD, ADD], CONFIG, None, ChatFormat(tokenizer=None, template=None))
