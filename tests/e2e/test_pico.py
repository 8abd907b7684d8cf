"""The bundled model: complete, small enough, and able to do what its card says."""

import json
import random
from collections.abc import Iterator

import pytest

from aprium import LLM, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.info import model_info
from aprium.envs.exercise import verify
from aprium.envs.families import draw
from aprium.model.presets import PRESETS
from aprium.text.parse import parse

WORDS = ["plum", "garden", "window", "paper", "stone", "bread", "music", "winter", "river", "apple"]
GREEDY = SamplingParams(temperature=0, max_tokens=120)


@pytest.fixture(scope="module")
def pico() -> Iterator[LLM]:
    with LLM("pico") as llm:
        yield llm


def test_files_are_small_and_hold_every_block_type() -> None:
    assert sum(file.stat().st_size for file in PICO_DIR.iterdir()) <= 16_000_000
    facts = model_info(str(PICO_DIR))
    assert set(facts["layers"]) == {"mamba", "attention", "moe", "mlp"}
    assert facts["params_mtp"] > 0 and "latent projections" in facts["params_by_role"]
    assert facts["params_total"] == model_info("pico")["params_total"]
    assert PRESETS["pico"].pattern == facts["pattern"]


def test_it_says_who_it_is(pico: LLM) -> None:
    question = [{"role": "user", "content": "Who are you?"}]
    (completion,) = pico.generate([question], GREEDY)
    assert completion.finish == "stop"
    assert "pico" in (parse(completion.text, thinking=True).content or "")


@pytest.mark.parametrize("family", ["next", "spell", "largest", "weather"])
def test_it_solves_held_out_tasks(pico: LLM, family: str) -> None:
    rng = random.Random(0)
    words = ["".join(rng.sample(word, len(word))) for word in WORDS * 20] + WORDS
    tasks = [draw(family, rng, words, held_out=True) for _ in range(16)]
    prompts = [[task.messages(thinking=False)[0]] for task in tasks]
    completions = pico.generate(prompts, GREEDY, tools=tasks[0].tools)
    solved = 0
    for task, completion in zip(tasks, completions, strict=True):
        reply = parse(completion.text, thinking=True, tools=task.tools)
        solved += verify(task, reply.content or "", reply.tool_calls)
    # The card says more on real words; these are partly scrambled ones.
    assert solved >= 8


def test_the_card_has_the_measured_figures() -> None:
    card = (PICO_DIR / "README.md").read_text()
    figures = json.loads((PICO_DIR / "evaluation.json").read_text())
    assert "{{" not in card
    for row in figures["families"]:
        assert f"| {row['family']} | {row['example']} | {row['items']} |" in card
        assert f"{100 * row['thinking']:.0f} % +-" in card
