"""Let pico play episodes of an environment, and see what it earned against a constant answer."""

import asyncio

from aprium.base.records import SamplingParams
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Limits, run_group
from aprium.envs.family import constant_baseline, take
from aprium.envs.registry import make


async def main() -> None:
    """Play four tasks four times each."""
    family = make("exercises", {"families": ["first", "last", "length", "weather"]})
    engine = AsyncEngine(EngineConfig(model="pico", max_model_len=1024))
    policy = EnginePolicy(engine)
    chat = ChatFormat(tokenizer=engine.tokenizer, template=engine.template)
    params = SamplingParams(max_tokens=120, temperature=0.7, seed=1)
    try:
        tasks = [take(family, index, held_out=True) for index in range(4)]
        groups = await asyncio.gather(
            *(
                run_group(lambda t=task: family.start(t), policy, chat, params, Limits(), size=4)
                for task in tasks
            )
        )
    finally:
        await engine.close()
    for task, group in zip(tasks, groups, strict=True):
        rewards = [trajectory.reward for trajectory in group.trajectories]
        tokens = sum(sum(trajectory.sampled) for trajectory in group.trajectories)
        print(f"{task.messages[-1].content!r}: rewards {rewards}, {tokens} tokens sampled")


if __name__ == "__main__":
    asyncio.run(main())
    answer, reward = constant_baseline(make("exercises", {"families": ["first", "last", "length"]}))
    print(f"the constant {answer!r} would earn {reward:.2f} on average")
