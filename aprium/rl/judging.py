"""A judge in a run: the episodes of a group compared with each other, where nothing can be checked.

The judge is any chat model, a checkpoint in this process or a model on a server. What an episode
ended with is compared with that of its neighbours in the group (see `envs/judge.py`), and the mean
score is its reward, in the place of the environment's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aprium.base.errors import ConfigError, EngineError
from aprium.base.log import get_logger
from aprium.base.records import Message, SamplingParams, Trajectory
from aprium.checkpoint.hub import resolve
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Env, Step
from aprium.envs.judge import Judge
from aprium.envs.task import Task
from aprium.rl.teachers import RemoteConfig, RemoteTeacher
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

log = get_logger("rl")
_LOWEST, _HIGHEST = 1.0, 5.0  # of a judge's scores


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who compares the episodes of a group.

    `checkpoint` is the judge, or with `remote` only the tokenizer and template of the model there
    (none: the student's). It judges `domains` (none: all). A verdict has at most `max_tokens`
    tokens, at `temperature`, with the template's switch `thinking`. `principle` is what to judge
    by, and `roles` is for models that were trained to read answers as turns of their own. Of a
    checkpoint at most `max_num_seqs` verdicts are written at a time, in contexts of at most
    `max_model_len` tokens. After `max_failures` groups in a row without a verdict it has failed.
    """

    checkpoint: str | None = None
    remote: RemoteConfig | None = None
    domains: tuple[str, ...] = ()
    max_tokens: int = 1024
    temperature: float = 0.0
    thinking: bool = True
    principle: str | None = None
    roles: bool = False
    max_num_seqs: int = 32
    max_model_len: int = 8192
    max_failures: int = 8

    def __post_init__(self) -> None:
        """Check ranges, and that there is a judge."""
        if self.checkpoint is None and self.remote is None:
            raise ConfigError("[judge] names no judge: give a checkpoint, or a remote")
        for name in ("max_tokens", "max_num_seqs", "max_model_len", "max_failures"):
            if getattr(self, name) < 1:
                raise ConfigError(f"judge.{name} is {getattr(self, name)}: it must be positive")
        if self.temperature < 0:
            raise ConfigError(f"judge.temperature is {self.temperature}: it must be >= 0")


class Heard:
    """An environment that notes what the policy said last; see `Env`."""

    def __init__(self, env: Env) -> None:
        self._env = env
        self.reply: Message | None = None

    @property
    def task(self) -> Task:
        """The task that is played."""
        return self._env.task

    async def reset(self) -> tuple[Message, ...]:
        """Begin, and return the messages to show first."""
        return await self._env.reset()

    async def step(self, reply: Message) -> Step:
        """Take the policy's turn."""
        self.reply = reply
        return await self._env.step(reply)


class GroupJudge:
    """The judge of `config`; use it in one event loop, and close it.

    `student` is the checkpoint whose tokenizer a server has unless the recipe says. Raises
    ConfigError for a judge without a chat template, CheckpointError for one that cannot be opened.
    """

    def __init__(self, config: JudgeConfig, student: str | Path) -> None:
        self._config, self._failures = config, 0
        path = resolve(config.checkpoint or student)
        chat = ChatFormat(
            tokenizer=Tokenizer.load(path),
            template=ChatTemplate.load(path),
            thinking=config.thinking,
        )
        self._open: RemoteTeacher | AsyncEngine
        if config.remote is not None:
            self._open = policy = RemoteTeacher("judge", config.remote, chat.tokenizer)
        else:
            self._open = AsyncEngine(
                EngineConfig(
                    model=str(path),
                    max_num_seqs=config.max_num_seqs,
                    max_model_len=config.max_model_len,
                )
            )
            policy = EnginePolicy(self._open)
        self._judge = Judge(
            policy=policy,
            chat=chat,
            params=SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature),
            principle=config.principle,
            roles=config.roles,
        )

    def judges(self, domain: str) -> bool:
        """Tell whether episodes of `domain` are compared."""
        return not self._config.domains or domain in self._config.domains

    async def grade(
        self, task: Task, trajectories: Sequence[Trajectory], heard: Sequence[Heard]
    ) -> list[Trajectory]:
        """Return the episodes of a group with the judge's rewards, about 0 to 1.

        The environment's own reward is then the part "own". What failed, or was cut before its end,
        is not compared and earns nothing; a single answer earns the middle. Raises EngineError for
        a judge that keeps giving no verdict.
        """
        ended = [
            (i, one.reply.content or "")
            for i, (one, trajectory) in enumerate(zip(heard, trajectories, strict=True))
            if trajectory.stop == "done" and one.reply is not None
        ]
        rewards = dict.fromkeys((i for i, _ in ended), 0.5)
        if len(ended) > 1:
            found = await self._judge.rewards(task.messages, [answer for _, answer in ended])
            self._count(task, found.unread == len(ended))
            for (i, _), score in zip(ended, found.rewards, strict=True):
                rewards[i] = (score - _LOWEST) / (_HIGHEST - _LOWEST)
        return [
            replace(one, reward=rewards.get(i, 0.0), parts={**one.parts, "own": one.reward})
            for i, one in enumerate(trajectories)
        ]

    def _count(self, task: Task, failed: bool) -> None:
        """Book whether a group has verdicts; raises EngineError where there never are."""
        self._failures = self._failures + 1 if failed else 0
        if failed:
            log.warning("the judge gives no verdict on the episodes of %s", task.id)
        if self._failures >= self._config.max_failures:
            raise EngineError(
                f"the judge has given no verdict on {self._failures} groups in a row: see that it "
                "answers, and writes JSON with score_1, score_2 and ranking in judge.max_tokens "
                f"({self._config.max_tokens}); then give the same command again"
            )

    async def close(self) -> None:
        """Stop the engine, or close the connections."""
        await self._open.close()
