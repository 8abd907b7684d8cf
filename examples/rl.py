"""Let pico learn of its own answers: a few steps of reinforcement learning on sums.

python examples/rl.py [OUTPUT]
"""

import json
import sys
import tempfile
from pathlib import Path

from aprium.rl.credit import CreditConfig
from aprium.rl.evaluate import EvaluateConfig
from aprium.rl.loop import RlConfig, run_config
from aprium.rl.pipeline import PipelineConfig
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.train.losses import LossConfig
from aprium.train.metrics import MetricsFile
from aprium.train.optim import OptimConfig
from aprium.train.trainer import TrainerConfig


def main(output: Path) -> None:
    """Train for six steps; run it again with the same output and more steps to go on."""
    config = RlConfig(
        output=output,
        domains=(DomainConfig(name="add", family="exercises", options={"families": ["add"]}),),
        trainer=TrainerConfig(steps=6, log_every=1, threads=1, freeze_router=True),
        # The next step's episodes are played while one is trained on.
        pipeline=PipelineConfig(groups_per_step=8, max_age=1),
        rollout=RolloutConfig(group_size=4, max_tokens=40, episode_tokens=128),
        credit=CreditConfig(drop_equal=True),
        loss=LossConfig(mtp_weight=0.0, balance_weight=0.0, bias_rate=0.0),
        optim=OptimConfig(lr=1e-4, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0),
        evaluate=EvaluateConfig(items=40, max_tokens=40, episode_tokens=128),
    )
    directory = run_config(config)
    for row in MetricsFile(output).read("train"):
        print(
            f"step {row['step']}: reward {row['reward']:.2f}, {row['length']:.0f} tokens an "
            f"episode, weights {row['age']:.1f} steps old, mismatch {row['policy']['mismatch']:.6f}"
        )
    found = json.loads((output / "evaluation.json").read_text())
    for when in ("before", "after"):
        one = found[when]["domains"]["add"]
        print(f"{when}: {one['accuracy']:.2f} +- {one['standard_error']:.2f} of held-out sums")
    constant = found["constant"]["add"]
    print(f"the constant {constant['answer']!r} would earn {constant['accuracy']:.2f}")
    print(f"the model is in {directory}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
