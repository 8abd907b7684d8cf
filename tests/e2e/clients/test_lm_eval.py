"""lm-eval against a real server: what it measures on pico is what pico's card says.

Its items are those of the card, drawn from the families that need no list of words.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aprium import LLM
from aprium.base.records import Message
from aprium.checkpoint.hub import PICO_DIR
from aprium.text.chat import ChatTemplate
from tests.e2e.clients.conftest import KEY, need, run

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
CARD = json.loads((PICO_DIR / "evaluation.json").read_text())["families"]
GENERATE: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "generation_kwargs": {"until": [], "max_gen_toks": 160, "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    # The answer stands after the reasoning, where there is any; a full stop is forgiven.
    "filter_list": [
        {
            "name": "answer",
            "filter": [
                {"function": "regex", "regex_pattern": r"(?s)(?:.*</think>)?\s*(.*?)\.?\s*$"},
                {"function": "take_first"},
            ],
        }
    ],
}
DIRECT = {
    **GENERATE,
    "generation_kwargs": {
        **GENERATE["generation_kwargs"],
        "chat_template_kwargs": {"enable_thinking": False},
    },
}
CHOOSE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def tasks(tmp_path: Path, card: ModuleType) -> Path:
    """A folder of lm-eval's tasks over the card's items."""
    need("lm_eval")
    template = ChatTemplate.load(PICO_DIR)
    for family in ("add", "subtract", "largest", "even", "compare"):
        rows = []
        for item in card.held_out_items(family, [], 200):
            ask = [Message(role="user", content=item.question)]
            choices = ["odd", "even"] if family == "even" else item.key.split()
            rows.append(
                {
                    "question": item.question,
                    "answer": item.answer,
                    "prompt": template.render(ask, enable_thinking=False),
                    "choices": choices,
                    # An index: a target that reads as a number is taken for one.
                    "right": choices.index(item.answer) if item.answer in choices else -1,
                }
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{family}.jsonl").write_text(lines)
        kinds = {"thinking": GENERATE, "direct": DIRECT, "choose": CHOOSE}
        for kind, fields in kinds.items():
            task = {
                "task": f"pico_{family}_{kind}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{family}.jsonl")}},
                "test_split": "test",
                "doc_to_target": "{{answer}}",
                **fields,
            }
            # JSON is YAML.
            (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    return tmp_path


def evaluate(folder: Path, model: str, url: str, names: str, *flags: str, **fields: Any) -> Any:
    """Run lm-eval; return its results by task."""
    fields = {"model": "pico", "base_url": url, "max_retries": 1, **fields}
    arguments = ",".join(f"{key}={value}" for key, value in fields.items())
    run(
        "lm_eval", "--model", model, "--model_args", arguments, "--tasks", names,
        "--include_path", str(folder), "--output_path", "out", "--log_samples", *flags,
        cwd=folder, OPENAI_API_KEY=KEY,
    )  # fmt: skip
    (file,) = folder.glob("out/**/results_*.json")
    return json.loads(file.read_text())["results"]


def on_card(family: str, kind: str) -> float:
    return next(row[kind] for row in CARD if row["family"] == family)


def test_chat_completions_agree_with_the_card(pico: str, tasks: Path) -> None:
    wanted = [("add", "thinking"), ("subtract", "thinking"), ("largest", "direct")]
    names = ",".join(f"pico_{family}_{kind}" for family, kind in wanted)
    url = f"{pico}/v1/chat/completions"
    found = evaluate(
        tasks, "local-chat-completions", url, names, "--apply_chat_template", num_concurrent=16
    )
    for family, kind in wanted:
        measured = found[f"pico_{family}_{kind}"]
        assert measured["exact_match,answer"] == pytest.approx(on_card(family, kind))
        assert measured["sample_len"] == 200


def test_completions_agree_with_the_card(pico: str, tasks: Path) -> None:
    """The checkpoint's directory as tokenizer and template, prompts as batches of token ids."""
    flags = ("--apply_chat_template", "--batch_size", "8")
    found = evaluate(
        tasks, "local-completions", f"{pico}/v1/completions", "pico_add_thinking", *flags,
        tokenizer=PICO_DIR, tokenizer_backend="huggingface", max_length=2048, num_concurrent=4,
    )  # fmt: skip
    accuracy = found["pico_add_thinking"]["exact_match,answer"]
    assert accuracy == pytest.approx(on_card("add", "thinking"))


def test_choices_are_scored_as_the_engine_scores_them(pico: str, tasks: Path) -> None:
    """Multiple choice by echoed log-probabilities, every one of them compared."""
    found = evaluate(
        tasks, "local-completions", f"{pico}/v1/completions",
        "pico_even_choose,pico_compare_choose", "--batch_size", "8",
        tokenizer=PICO_DIR, tokenizer_backend="huggingface", max_length=2048, num_concurrent=4,
    )  # fmt: skip
    assert found["pico_even_choose"]["acc,none"] == on_card("even", "direct") == 1
    # To choose between the two numbers is easier than to write the larger one.
    direct = on_card("compare", "direct")
    assert direct - 0.01 <= found["pico_compare_choose"]["acc,none"] < 1
    (file,) = tasks.glob("out/**/samples_pico_compare_choose_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    with LLM("pico") as llm:
        assert llm.tokenizer is not None
        for sample in samples[:50]:
            for asked, said in zip(sample["arguments"].values(), sample["resps"], strict=True):
                context = llm.tokenizer.encode(asked["arg_0"])
                whole = llm.tokenizer.encode(asked["arg_0"] + asked["arg_1"])
                scores = llm.score(whole)[len(context) :]
                assert float(said[0][0]) == pytest.approx(sum(scores), abs=1e-6)
