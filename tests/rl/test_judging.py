"""A judge's scores are the rewards of a run, and a judge that says nothing ends it."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from aprium.base.errors import ConfigError, EngineError
from aprium.base.records import Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.rl.ledger import Ledger
from aprium.rl.loop import run_config
from aprium.text.tokenizer import Tokenizer
from tests.rl.conftest import recipe
from tests.served import served

TOKENIZER = Tokenizer.load(PICO_DIR)


def score(answer: str) -> int:
    """What the judge of these tests makes of an answer, whatever it is compared with."""
    return 1 + zlib.crc32(answer.strip().encode()) % 5


async def complete(request: Request) -> Response:
    text = TOKENIZER.decode((await request.json())["prompt"], skip_special_tokens=False)
    first, rest = text.split("[response 1]\n")[1].split("[response 2]\n")
    second = rest.split("[principle to judge by]\nbe brief")[0]
    verdict = {"score_1": score(first), "score_2": score(second), "ranking": 3.5}
    said = "</think>" + json.dumps(verdict)
    ids = [*TOKENIZER.encode(said), TOKENIZER.id_of("<|im_end|>")]
    choice = {
        "text": said, "token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)},
        "finish_reason": "stop",
    }  # fmt: skip
    return JSONResponse({"choices": [choice]})


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])) as found:
        yield found


def run(output: Path, judge: dict[str, Any], **changes: Any) -> list[Trajectory]:
    """Run a step, and return what was played for it."""
    changes = {"trainer": {"steps": 1}, "evaluate": None} | changes
    config = recipe(output, judge=judge, **changes)
    run_config(config)
    ledger = Ledger(config.output)
    played = [t for e in ledger.entries.values() if e.group for t in e.group.trajectories]
    ledger.close()
    return played


@pytest.mark.usefixtures("no_page")
def test_scores_of_the_judge_are_the_rewards(tmp_path: Path, url: str) -> None:
    judge = {"remote": {"url": url, "model": "j"}, "domains": ["next"], "principle": "be brief"}
    played = run(tmp_path / "out", judge, rollout={"temperature": 3.0})
    judged = [t for t in played if t.domain == "next"]
    assert judged and {t.domain for t in played} == {"add", "next"}
    assert all("own" not in t.parts for t in played if t.domain == "add")
    rewards = set()
    for one in judged:
        if one.stop != "done":
            assert one.reward == 0.0 and one.parts["own"] == 0.0
            continue
        wrote = [t for t, sampled in zip(one.tokens, one.sampled, strict=True) if sampled]
        answer = TOKENIZER.decode(wrote, skip_special_tokens=True)
        alone = sum(t.task == one.task and t.stop == "done" for t in judged) == 1
        assert one.reward == (0.5 if alone else (score(answer) - 1) / 4)
        assert one.parts["own"] in (0.0, 1.0)
        rewards.add(one.reward)
    assert len(rewards) > 1


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    "judge",
    [
        {"remote": {"url": "http://127.0.0.1:1", "model": "j", "retries": 0}},
        {"checkpoint": "pico", "max_tokens": 4, "max_model_len": 512},  # no verdict is that short
    ],
)
def test_a_judge_that_gives_no_verdict_ends_the_run(tmp_path: Path, judge: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="the judge has given no verdict on 1 groups in a row"):
        run(tmp_path / "out", judge | {"max_failures": 1, "domains": ["next"]})


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    for judge, more, words in (
        ({}, {}, "names no judge: give a checkpoint, or a remote"),
        ({"checkpoint": "pico", "domains": ["x"]}, {}, "names 'x': those of .* are add, next"),
        ({"checkpoint": "pico"}, {"rollout": {"group_size": 1}}, "group_size is 1: set it to 2"),
        ({"checkpoint": "pico", "max_tokens": 0}, {}, "judge.max_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            recipe(tmp_path / "out", judge=judge, **more)
