"""Measure pico on held-out tasks and write its model card.

    python recipes/pico_card.py CHECKPOINT runs/pico [--items 200]

CHECKPOINT is a directory in the public layout; the second argument is what `pico_corpus.py` wrote.
Greedy decoding, one question a conversation, no item twice. An item counts when the reply after
the closing thinking tag is the answer word for word. The card's figures are only ever written here.
"""

import argparse
import dataclasses
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from aprium import LLM, Completion, SamplingParams
from aprium.base.config import load_toml
from aprium.checkpoint.info import model_info
from aprium.checkpoint.load import load_checkpoint
from aprium.data.rows import read_all
from aprium.envs.exercise import Exercise, verify
from aprium.envs.families import draw
from aprium.model.layout import Layout
from aprium.text.parse import parse
from aprium.train.pretrain import PretrainConfig

HERE = Path(__file__).parent
GREEDY = SamplingParams(temperature=0, max_tokens=160)


def trained_families() -> tuple[str, ...]:
    """Return the task families of pico's recipe."""
    config = load_toml(PretrainConfig, HERE / "pico.toml")
    return next(source.families for source in config.data.sources if source.kind == "tasks")


def held_out_items(family: str, words: list[str], count: int) -> list[Exercise]:
    """Draw up to `count` different held-out items of a family."""
    rng = random.Random(f"card {family}")
    items: dict[str, Exercise] = {}
    for _ in range(count * 60):
        task = draw(family, rng, words, held_out=True)
        # The same two numbers the other way round must not have been trained on either.
        swapped = dataclasses.replace(task, key=" ".join(reversed(task.key.split())))
        if family not in ("add", "compare") or swapped.held_out:
            items.setdefault(task.key, task)
        if len(items) == count:
            break
    return list(items.values())


def answer(llm: LLM, tasks: list[Exercise], *, thinking: bool) -> tuple[float, list[Completion]]:
    """Return the share of `tasks` that the model solves, and what it said."""
    options = {"enable_thinking": thinking}
    prompts = [[task.messages(thinking=False)[0]] for task in tasks]
    completions = llm.generate(prompts, GREEDY, tools=tasks[0].tools, chat_template_kwargs=options)
    solved = 0
    for task, completion in zip(tasks, completions, strict=True):
        reply = parse(completion.text, thinking=thinking, tools=task.tools)
        solved += verify(task, reply.content or "", tuple(reply.tool_calls))
    return solved / len(tasks), completions


def draft_agreement(checkpoint: Path, completions: list[Completion]) -> float:
    """Return how often the prediction head's first draft is the token that was generated."""
    model = load_checkpoint(checkpoint).model
    agreed = total = 0
    with torch.inference_mode():
        for completion in completions:
            tokens = torch.tensor((*completion.prompt_tokens, *completion.tokens))
            hidden = model(tokens, Layout.packed([len(tokens)]))[:-2]
            drafted = model.predict(hidden, tokens[1:-1], Layout.packed([len(hidden)]))
            # Row t drafts token t + 2; the first of interest is the second generated one.
            first = len(completion.prompt_tokens) - 1
            drafts, said = model.logits(drafted[first:]).argmax(-1), tokens[first + 2 :]
            agreed += int((drafts == said).sum())
            total += len(said)
    return agreed / total


def constant_baseline(tasks: list[Exercise]) -> float:
    """Return the accuracy of always giving the most frequent answer."""
    answers = Counter(task.call.arguments if task.call else task.answer for task in tasks)
    return answers.most_common(1)[0][1] / len(tasks)


def bits_per_byte(llm: LLM, corpus: Path, limit: int = 150) -> float:
    """Return the negative log2-likelihood of held-out documents per byte of text.

    Documents with a definition that also occurs in a conversation are left out.
    """
    assert llm.tokenizer is not None
    rows = read_all(corpus / "chat.jsonl")
    answers = {row["messages"][-1]["content"].lower() for row in rows}
    documents = [row["text"][:1500] for row in read_all(corpus / "text_heldout.jsonl")]
    lines = [[line.split(": ")[-1].lower() for line in text.splitlines()] for text in documents]
    fresh = [t for t, part in zip(documents, lines, strict=True) if not answers & set(part)]
    nats = num_bytes = 0.0
    for text in fresh[:limit]:
        nats -= sum(p for p in llm.score(llm.tokenizer.encode(text)) if p is not None)
        num_bytes += len(text.encode())
    return nats / math.log(2) / num_bytes


def main() -> None:
    """Measure, then write README.md and evaluation.json into the checkpoint directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--items", type=int, default=200)
    args = parser.parse_args()
    words = (args.corpus / "words.txt").read_text().split()
    rows: list[dict[str, Any]] = []
    completions: list[Completion] = []
    with LLM(str(args.checkpoint), max_num_seqs=128, max_num_batched_tokens=1024) as llm:
        for family in trained_families():
            tasks = held_out_items(family, words, args.items)
            worked, said = answer(llm, tasks, thinking=True)
            completions += [c for c in said if len(c.tokens) > 2][:20]
            row = {
                "family": family,
                "example": tasks[0].question,
                "items": len(tasks),
                "constant": constant_baseline(tasks),
                "thinking": worked,
                "direct": answer(llm, tasks, thinking=False)[0],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        text_bits = bits_per_byte(llm, args.corpus)
    agreement = draft_agreement(args.checkpoint, completions)
    info = model_info(str(args.checkpoint))
    result = {"text_bits_per_byte": text_bits, "draft_agreement": agreement, "families": rows}
    (args.checkpoint / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    card = (HERE / "pico" / "card.md").read_text()
    table = [
        "| task | example | items | constant answer | thinking | direct |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(_percent(row[k], row["items"]) for k in ("thinking", "direct"))
        table.append(
            f"| {row['family']} | {row['example']} | {row['items']} "
            f"| {100 * row['constant']:.0f} % | {figures} |"
        )
    mean = {k: sum(row[k] for row in rows) / len(rows) for k in ("thinking", "direct")}
    values = {
        "params_total": f"{info['params_total']:,}",
        "params_active": f"{info['params_active']:,}",
        "params_mtp": f"{info['params_mtp']:,}",
        "table": "\n".join(table),
        "mean_thinking": f"{100 * mean['thinking']:.1f}",
        "mean_direct": f"{100 * mean['direct']:.1f}",
        "text_bits": f"{text_bits:.2f}",
        "agreement": f"{100 * agreement:.0f}",
    }
    for name, value in values.items():
        card = card.replace("{{" + name + "}}", value)
    (args.checkpoint / "README.md").write_text(card)


def _percent(share: float, items: int) -> str:
    """Show a share with its standard error."""
    return f"{100 * share:.0f} % +- {100 * math.sqrt(share * (1 - share) / items):.0f}"


if __name__ == "__main__":
    main()
