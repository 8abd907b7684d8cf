"""Measure pico on held-out tasks and write its model card.

    python recipes/pico_card.py CHECKPOINT runs/pico [--before EARLIER] [--items 200]

CHECKPOINT is a directory in the public layout; the second argument is what `pico_corpus.py` wrote.
Greedy decoding, one question a conversation, no item twice. An item counts when the reply after
the closing thinking tag is the answer word for word. Measured are the checkpoint, the same after
`aprium quantize --recipe nvfp4-all`, and with --before an earlier edition likewise, on the same
items. The card's figures are only ever written here.
"""

import argparse
import dataclasses
import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aprium import LLM, SamplingParams
from aprium.base.config import load_toml
from aprium.checkpoint.info import model_info
from aprium.checkpoint.load import load_checkpoint
from aprium.data.rows import read_all
from aprium.envs.exercise import Exercise, verify
from aprium.envs.families import draw
from aprium.model.layout import Layout
from aprium.model.model import Routing
from aprium.quantize import recipes
from aprium.quantize.run import Options, run
from aprium.text.parse import parse
from aprium.train.boost import measure
from aprium.train.monitor import expert_loads, max_violations
from aprium.train.pretrain import PretrainConfig

HERE = Path(__file__).parent
GREEDY = SamplingParams(temperature=0, max_tokens=160)
NUM_DRAFTS = 5
# Of each family so many held-out items measure drafts and balance.
NUM_PROBES = 12


def trained_families(recipe: Path = HERE / "pico.toml") -> tuple[str, ...]:
    """Return the task families of pico's recipe, each once."""
    config = load_toml(PretrainConfig, recipe)
    found = [name for source in config.data.sources for name in source.families]
    return tuple(dict.fromkeys(found))


def held_out_items(
    family: str, words: list[str], count: int, *, short: bool = False
) -> list[Exercise]:
    """Draw up to `count` different held-out items of a family, asked in words or in short."""
    rng = random.Random(f"card {family} {short}")
    items: dict[str, Exercise] = {}
    for _ in range(count * 100):
        task = draw(family, rng, words, held_out=True)
        # The same two numbers the other way round must not have been trained on either.
        swapped = dataclasses.replace(task, key=" ".join(reversed(task.key.split())))
        if task.short == short and (family not in ("add", "compare") or swapped.held_out):
            items.setdefault(task.key, task)
        if len(items) == count:
            break
    return list(items.values())


def answer(llm: LLM, tasks: list[Exercise], *, thinking: bool) -> float:
    """Return the share of `tasks` that the model solves."""
    options = {"enable_thinking": thinking}
    prompts = [[task.messages(thinking=False)[0]] for task in tasks]
    completions = llm.generate(prompts, GREEDY, tools=tasks[0].tools, chat_template_kwargs=options)
    solved = 0
    for task, completion in zip(tasks, completions, strict=True):
        reply = parse(completion.text, thinking=thinking, tools=task.tools)
        solved += verify(task, reply.content or "", tuple(reply.tool_calls))
    return solved / len(tasks)


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


def loads(checkpoint: Path, sequences: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Return by layer the largest expert's share of all tokens over the mean: 1 is balance."""
    model = load_checkpoint(checkpoint).model
    routing: list[Routing] = []
    with torch.inference_mode():
        for sequence in sequences:
            model(torch.tensor(sequence), Layout.packed([len(sequence)]), routing=routing)
    return max_violations(expert_loads(routing))


def measure_checkpoint(model: str | Path, corpus: Path, count: int) -> dict[str, Any]:
    """Measure one checkpoint on up to `count` items of each family."""
    words = (corpus / "words.txt").read_text().split()
    rows: list[dict[str, Any]] = []
    probes: list[tuple[int, ...]] = []
    written: list[tuple[int, ...]] = []
    with LLM(str(model), max_num_seqs=128, max_num_batched_tokens=1024) as llm:
        for family in trained_families():
            tasks = held_out_items(family, words, count)
            short = held_out_items(family, words, count // 2, short=True)
            first = [[task.messages(thinking=False)[0]] for task in tasks[:NUM_PROBES]]
            probes += [llm.encode(prompt, tools=tasks[0].tools) for prompt in first]
            said = llm.generate(first, GREEDY, tools=tasks[0].tools)
            written += [(*c.prompt_tokens, *c.tokens) for c in said]
            row = {
                "family": family,
                "example": tasks[0].question,
                "items": len(tasks),
                "constant": constant_baseline(tasks),
                "thinking": answer(llm, tasks, thinking=True),
                "direct": answer(llm, tasks, thinking=False),
                "short_example": short[0].question,
                "short_items": len(short),
                "short": answer(llm, short, thinking=True),
            }
            rows.append(row)
            print(model, json.dumps(row), flush=True)
        text_bits = bits_per_byte(llm, corpus)
    return {
        "families": rows,
        "text_bits_per_byte": text_bits,
        "drafts": measure(Path(model), probes, NUM_DRAFTS, GREEDY.max_tokens or 160),
        "max_vio": loads(Path(model), written),
    }


def measure_edition(model: Path, corpus: Path, count: int) -> dict[str, Any]:
    """Measure a checkpoint as it is and, under "nvfp4", with its matrices in NVFP4."""
    found = measure_checkpoint(model, corpus, count)
    with tempfile.TemporaryDirectory() as folder:
        target, recipe = Path(folder) / "nvfp4", recipes.read("nvfp4-all")
        run(str(model), target, recipe, Options(evaluate=False), say=print)
        return found | {"nvfp4": measure_checkpoint(target, corpus, count)}


def mean(found: dict[str, Any], column: str, families: Sequence[str] | None = None) -> float:
    """Return the mean of a column over families, all or those named."""
    rows = [r for r in found["families"] if families is None or r["family"] in families]
    return sum(row[column] for row in rows) / len(rows)


def family_table(found: dict[str, Any]) -> str:
    """Return the table of one row a family."""
    before = {row["family"]: row for row in found.get("before", {}).get("families", ())}
    lines = [
        "| task | example | items | constant answer | thinking | direct | short form | before: "
        "thinking | before: direct |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    if not before:
        lines = [line.rsplit("|", 3)[0] + "|" for line in lines]
    for row in found["families"]:
        cells = [row["family"], row["example"], row["items"], f"{100 * row['constant']:.0f} %"]
        cells += [_percent(row[k], row["items"]) for k in ("thinking", "direct")]
        cells.append(f"{_percent(row['short'], row['short_items'])} (`{row['short_example']}`)")
        if before:
            old = before[row["family"]]
            cells += [_percent(old[k], old["items"]) for k in ("thinking", "direct")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def summary_table(found: dict[str, Any], families: Sequence[str]) -> str:
    """Return the table of means and other figures, of both editions where two were measured."""
    editions = {"this edition": found, "the one before": found.get("before")}
    columns = {name: one for name, one in editions.items() if one is not None}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]

    def row(name: str, values: Sequence[str]) -> None:
        lines.append(f"| {name} | {' | '.join(values)} |")

    for column in ("thinking", "direct", "short"):
        for name, part in (("", None), (", in NVFP4", "nvfp4")):
            chosen = [one[part] if part else one for one in columns.values()]
            values = [f"{100 * mean(one, column, families):.1f} %" for one in chosen]
            row(f"mean over {len(families)} tasks, {column}{name}", values)
    for name, part in (("", None), (", in NVFP4", "nvfp4")):
        chosen = [one[part] if part else one for one in columns.values()]
        row(f"held-out text, bits a byte{name}", [f"{c['text_bits_per_byte']:.2f}" for c in chosen])
    for i in range(NUM_DRAFTS):
        rates = [f"{100 * one['drafts']['by_position'][i]:.0f} %" for one in columns.values()]
        row(f"draft {i + 1} accepted after those before it", rates)
    steps = [f"{one['drafts']['tokens_per_step']:.2f}" for one in columns.values()]
    row(f"tokens a step with {NUM_DRAFTS} drafts", steps)
    balance = [f"{max(one['max_vio'].values()):.2f}" for one in columns.values()]
    row("busiest expert over the mean, worst layer", balance)
    return "\n".join(lines)


def main() -> None:
    """Measure, then write README.md and evaluation.json into the checkpoint directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--before", type=Path, help="an earlier edition to compare with")
    parser.add_argument("--items", type=int, default=200)
    args = parser.parse_args()
    found = measure_edition(args.checkpoint, args.corpus, args.items)
    if args.before is not None:
        found["before"] = measure_edition(args.before, args.corpus, args.items)
    (args.checkpoint / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    write_card(args.checkpoint, found)


def write_card(checkpoint: Path, found: dict[str, Any]) -> None:
    """Fill the card's template with what was measured."""
    card = (HERE / "pico" / "card.md").read_text()
    info = model_info(str(checkpoint))
    # Counting letters came with the second edition.
    shared = [f for f in trained_families() if f != "count" or "before" not in found]
    values = {
        "params_total": f"{info['params_total']:,}",
        "params_active": f"{info['params_active']:,}",
        "params_mtp": f"{info['params_mtp']:,}",
        "table": family_table(found),
        "summary": summary_table(found, shared),
    }
    for name, value in values.items():
        card = card.replace("{{" + name + "}}", value)
    (checkpoint / "README.md").write_text(card)


def _percent(share: float, items: int) -> str:
    """Show a share with its standard error."""
    return f"{100 * share:.0f} % +- {100 * math.sqrt(share * (1 - share) / items):.0f}"


if __name__ == "__main__":
    main()
