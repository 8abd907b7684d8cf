"""inspect-ai against a real server: every sample scored as the engine alone scores it."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from aprium import LLM
from tests.e2e.clients.conftest import KEY, need, run

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import exact
from inspect_ai.solver import generate


@task
def add():
    return Task(dataset=json_dataset("items.jsonl"), solver=generate(), scorer=exact())
"""


def test_samples_agree_with_the_engine(pico: str, card: ModuleType, tmp_path: Path) -> None:
    need("inspect_ai")
    items = card.held_out_items("add", [], 20)
    lines = [json.dumps({"input": item.question, "target": item.answer}) for item in items]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "add.py").write_text(TASK)
    run(
        "inspect_ai", "eval", "add.py", "--model", "openai-api/aprium/pico",
        "--temperature", "0", "--max-tokens", "160",
        "--display", "plain", "--log-format", "json", "--log-dir", "logs",
        cwd=tmp_path, APRIUM_API_KEY=KEY, APRIUM_BASE_URL=f"{pico}/v1",
    )  # fmt: skip
    (file,) = tmp_path.glob("logs/*.json")
    log = json.loads(file.read_text())
    assert log["status"] == "success"
    with LLM("pico") as llm:
        solved, completions = card.answer(llm, items, thinking=True)
    assert log["results"]["scores"][0]["metrics"]["mean"]["value"] == pytest.approx(solved)
    assert 0 < solved < 1
    for sample, completion in zip(log["samples"], completions, strict=True):
        reasoning, text = completion.text.split("</think>")
        thought, said = sample["output"]["choices"][0]["message"]["content"]
        assert thought["reasoning"].strip() == reasoning.strip()
        assert said["text"] == text
