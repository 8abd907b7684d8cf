"""NeMo-Gym's protocol between processes: `aprium serve`, `aprium env serve`, and who asks them."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aprium import cli
from aprium.base.records import SamplingParams, Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Limits, run_episode
from aprium.envs.gym import own_task, row_task
from aprium.envs.gym_client import run_rollout
from aprium.envs.registry import make
from aprium.serve.remote import RemotePolicy
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from tests.e2e.conftest import serving
from tests.scripted import ScriptedPolicy

LIMITS = Limits(max_turns=4)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(tokenizer=Tokenizer.load(PICO_DIR), template=ChatTemplate.load(PICO_DIR))


@contextlib.contextmanager
def serving_env(log: Path, *arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "aprium.cli", "env", "serve", "--port", "0", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stderr=file, stdout=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        for _ in range(600):
            found = re.search(r"serving .* on (http://\S+)", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A model, and environments whose episodes it plays."""
    logs = tmp_path_factory.mktemp("log")
    flags = ("--max-model-len", "2K", "--api-key", "secret", "--no-stable-prompts")
    with (
        serving(Path("pico"), logs / "model", *flags) as model,
        serving_env(
            logs / "env", "exercises", "tool-use", "--model-url", model, "--api-key", "secret",
            "--max-turns", "4",
        ) as envs,
    ):  # fmt: skip
        yield model, envs


def rows_of(capsys: pytest.CaptureFixture[str], name: str, count: int) -> list[dict]:
    assert cli.main(["env", "rows", name, "-n", str(count), "--seed", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        row["responses_create_params"] |= {"temperature": 0, "max_output_tokens": 150}
    return rows


def test_rollouts_there_are_episodes_here(
    addresses: tuple[str, str], capsys: pytest.CaptureFixture[str], chat: ChatFormat
) -> None:
    """The same tokens and the same grades, whoever plays, greedily."""
    model, envs = addresses
    params = SamplingParams(temperature=0, max_tokens=150)
    rows, family = rows_of(capsys, "exercises", 10), make("exercises")

    async def run() -> list[tuple[Trajectory, Trajectory]]:
        pairs = []
        async with RemotePolicy(model, "pico", key="secret") as policy:
            for row in rows:
                there = await run_rollout(row_task(row, "x"), envs)
                env = family.start(own_task(row))
                pairs.append((there, await run_episode(env, policy, chat, params, LIMITS)))
        return pairs

    for there, here in asyncio.run(run()):
        assert there.error is None, there.error
        assert (there.tokens, there.sampled) == (here.tokens, here.sampled)
        assert there.logprobs == pytest.approx(here.logprobs, abs=1e-6)
        assert (there.reward, there.parts) == (here.reward, here.parts)
        assert (there.task, there.domain, there.num_turns) == (here.task, "exercises", 1)


def test_turns_with_tools_are_spliced_as_here(
    addresses: tuple[str, str], capsys: pytest.CaptureFixture[str], chat: ChatFormat
) -> None:
    """What the model wrote there, said again here, gives the same tokens around it, and grades.

    There calls are held to their tools' schemas, so the model does not say the same by itself.
    """
    model, envs = addresses

    async def run() -> None:
        async with RemotePolicy(model, "pico", key="secret") as policy:
            whole = 0
            for row in rows_of(capsys, "tool-use", 6):
                there = await run_rollout(row_task(row, "x"), envs)
                assert there.error is None, there.error
                script = ScriptedPolicy(chat, list(turns_of(there)))
                env = make("tool-use").start(own_task(row))
                here = await run_episode(env, script, chat, limits=LIMITS)
                seen = len(there.tokens)
                assert (there.tokens, there.sampled) == (here.tokens[:seen], here.sampled[:seen])
                assert there.num_turns > 1
                if there.stop != "tokens":  # a turn that was cut there is a whole one here
                    whole += 1
                    assert seen == len(here.tokens)
                    assert (there.reward, there.parts) == (here.reward, here.parts)
                    assert there.num_turns == here.num_turns
                scores = await policy.score(there.tokens)
                for score, logprob, sampled in zip(
                    scores, there.logprobs, there.sampled, strict=True
                ):
                    assert not sampled or score == pytest.approx(logprob, abs=1e-5)
            assert whole

    asyncio.run(run())


def turns_of(found: Trajectory) -> Iterator[tuple[int, ...]]:
    """Yield the tokens of each turn of the model."""
    pairs = zip(found.tokens, found.sampled, strict=True)
    for sampled, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        if sampled:
            yield tuple(token for token, _ in run)


def test_commands_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["nothing"], "no environment 'nothing'"),
        (["choice", "math", "--set", "options=3"], "serve them one by one"),
        (["choice", "--host", "256.0.0.1"], "cannot listen"),
        (["choice", "--max-turns", "0"], "max_turns is 0"),
        (["nemo-gym"], "missing key nemo-gym.rows"),
    ):
        assert cli.main(["env", "serve", *arguments]) != 0
        assert words in capsys.readouterr().err
