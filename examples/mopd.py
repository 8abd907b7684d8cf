"""Two specialists of pico, and a student that learns of both: rounds of distillation, tiny.

python examples/mopd.py [OUTPUT]
"""

import sys
import tempfile
from pathlib import Path

from aprium.base.config import from_dict
from aprium.rl.costs import outline
from aprium.rl.lineage import RoundsConfig
from aprium.rl.rounds import run_config

TRAINED = {"trainer": {"steps": 2, "threads": 1}, "optim": {"lr": 1e-3}}
TEACHERS = {"add": "adder", "sort": "sorter"}
RECIPE = {
    "checkpoint": "pico",
    "baseline": "start",
    "domains": [
        {"name": name, "family": "exercises", "options": {"families": [name]}}
        for name in ("add", "sort")
    ],
    "rollout": {"group_size": 4, "max_tokens": 48, "episode_tokens": 128},
    "evaluate": {"items": 8, "max_tokens": 48, "episode_tokens": 128},
    "support": {"rollouts": 4},
    "base": {
        "rl": {**TRAINED, "pipeline": {"groups_per_step": 4}},
        "mopd": {**TRAINED, "pipeline": {"groups_per_step": 8}},
    },
    "nodes": {
        "adder": {"kind": "rl", "domains": ["add"]},
        "sorter": {"kind": "rl", "domains": ["sort"]},
        "student": {"kind": "mopd", "teachers": TEACHERS},
        "average": {"kind": "merge", "members": list(TEACHERS.values())},
    },
}


def main(output: Path) -> None:
    """Show the graph, run it, and print what everybody scores on held-out tasks."""
    recipe = from_dict(RoundsConfig, {"output": output, **RECIPE})
    for row in outline(recipe):
        print(f"{row['node']:<12} {row['from']:<30} trains on {row['trained']:>6} tokens at most")
    table = run_config(recipe)
    assert table is not None, "it was stopped; run it again to go on"
    for name, domains in table["scores"].items():
        scores = (f"{domain} {one['mean']:.2f}" for domain, one in domains.items())
        print(f"{name:<12} {', '.join(scores)}")
    print("the page:", output / "report.html")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
