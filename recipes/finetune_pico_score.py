"""Score checkpoints on the held-out tasks that `finetune_pico_data.py` made.

    python recipes/finetune_pico_score.py runs/finetune pico runs/sft-pico/model

Greedy, one question a conversation. An item counts when the reply after the closing thinking tag is
the answer word for word. One JSON line a checkpoint and switch: right and asked by family, and what
the commonest answer alone would get.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from aprium import LLM, SamplingParams
from aprium.data.rows import read_all
from aprium.text.parse import parse

GREEDY = SamplingParams(temperature=0, max_tokens=200)


def score(llm: LLM, rows: list[dict[str, Any]], *, thinking: bool) -> dict[str, list[int]]:
    """Return right and asked by family, and over all as "all"."""
    prompts = [row["messages"][:-1] for row in rows]
    options = {"enable_thinking": thinking}
    found: dict[str, list[int]] = {"all": [0, 0]}
    completions = llm.generate(prompts, GREEDY, chat_template_kwargs=options)
    for row, completion in zip(rows, completions, strict=True):
        said = (parse(completion.text, thinking=thinking).content or "").strip()
        for name in (row["task"], "all"):
            counts = found.setdefault(name, [0, 0])
            counts[0] += said == row["messages"][-1]["content"].strip()
            counts[1] += 1
    return found


def main() -> None:
    """Score what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--items", type=int, default=240)
    options = parser.parse_args()
    rows = read_all(options.data / "tasks_heldout.jsonl")[: options.items]
    answers = Counter(row["messages"][-1]["content"] for row in rows)
    constant = answers.most_common(1)[0][1]
    for checkpoint in options.checkpoints:
        with LLM(checkpoint) as llm:
            for thinking in (True, False):
                line = {"checkpoint": checkpoint, "thinking": thinking, "constant": constant}
                print(json.dumps(line | {"right": score(llm, rows, thinking=thinking)}), flush=True)


if __name__ == "__main__":
    main()
