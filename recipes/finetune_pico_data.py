"""Make the data of the fine-tuning recipes: tasks in words that pico never saw, and long documents.

    pip install 'aprium[recipes]'
    python recipes/finetune_pico_data.py runs/finetune

Tasks: spell_backward, chain_sum and word_sequence_reversal of reasoning-gym (Apache-2.0), small
enough for pico, with solutions worked in steps. Items of neighbouring seeds are the same there, so
the seeds of the two sides lie further apart than their sizes, and equal prompts are dropped across
the split; scores are not used, answers are checked here against the question. Documents: the topics
of Python's own help (PSF licence), one in ten held out, and their words for pico's own tasks.
"""

import json
import pydoc_data.topics
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym


class Family(NamedTuple):
    """How a family's items are drawn, and how one is solved: steps and answer."""

    options: dict[str, Any]
    solve: Callable[[str], tuple[str, str]]


def solve_spelling(question: str) -> tuple[str, str]:
    """Number the letters, then write them backwards, as pico does."""
    word = re.findall(r"[A-Za-z]+", question)[-1]
    letters = [f"{i}{letter}" for i, letter in enumerate(word, 1)]
    return f"{''.join(letters)}|{''.join(reversed(letters))}", word[::-1]


def solve_sum(question: str) -> tuple[str, str]:
    """Add the terms one after the other."""
    formula = re.findall(r"[-+\d ]+", question.rstrip("= "))[-1]
    terms = [int(t.replace(" ", "")) for t in re.findall(r"[-+]? ?\d+", formula)]
    steps, total = [], terms[0]
    for term in terms[1:]:
        sign = "+" if term >= 0 else "-"
        steps.append(f"{total} {sign} {abs(term)} = {total + term}")
        total += term
    return ", ".join(steps), str(total)


def solve_reversal(question: str) -> tuple[str, str]:
    """Reverse the list of words; there is nothing to work out."""
    words = question.split(":")[-1].replace(",", " ").split()
    return "", ", ".join(reversed(words))


FAMILIES = {
    "spell_backward": Family({"min_word_len": 3, "max_word_len": 6}, solve_spelling),
    "chain_sum": Family(
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, solve_sum
    ),
    "word_sequence_reversal": Family({"min_words": 3, "max_words": 4}, solve_reversal),
}
TRAIN, HELD_OUT = (0, 3000), (1_000_000, 300)  # seed and items drawn of each family


def draw(family: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield conversations of a family; without items where solution and stored answer differ."""
    options, solve = FAMILIES[family]
    data = reasoning_gym.create_dataset(family, seed=seed, size=count, **options)
    for item in data:
        reasoning, answer = solve(item["question"])
        if answer != item["answer"]:
            continue
        reply = {"role": "assistant", "content": answer}
        if reasoning:
            reply["reasoning_content"] = reasoning
        yield {"messages": [{"role": "user", "content": item["question"]}, reply], "task": family}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL and say how many."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{file}: {len(rows)} rows, {file.stat().st_size / 1e6:.2f} MB")


def tasks() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what to train on and what to measure on: no prompt is in both, none is there twice."""
    seen: set[str] = set()
    sides = []
    for seed, count in (HELD_OUT, TRAIN):  # so that what is held out is taken from the training
        rows = [row for family in FAMILIES for row in draw(family, seed, count)]
        kept = []
        for row in rows:
            prompt = row["messages"][0]["content"]
            if prompt not in seen:
                seen.add(prompt)
                kept.append(row)
        random.Random(0).shuffle(kept)
        sides.append(kept)
    return sides[1], sides[0]


def main(output: Path) -> None:
    """Write tasks, documents and words under `output`."""
    output.mkdir(parents=True, exist_ok=True)
    train, held_out = tasks()
    write(output / "tasks_train.jsonl", train)
    write(output / "tasks_heldout.jsonl", held_out)
    topics = sorted(pydoc_data.topics.topics.items())
    documents = [{"text": text, "topic": name} for name, text in topics]
    write(output / "documents_train.jsonl", [d for i, d in enumerate(documents) if i % 10])
    write(output / "documents_heldout.jsonl", [d for i, d in enumerate(documents) if not i % 10])
    everything = " ".join(text for _, text in topics)
    words = sorted(set(re.findall(r"\b[a-z]{3,8}\b", everything)))
    (output / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/finetune"))
