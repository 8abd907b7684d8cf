"""Credit: what each token of a group of episodes is worth, as samples for the trainer.

Rewards are shaped, compared within the group, and laid on the tokens that the model wrote; what
teachers said of the same tokens goes beside. Sources: GRPO (arXiv 2402.03300), leave-one-out
(2402.14740), Dr. GRPO (2503.20783), DAPO (2503.14476), effort and MOPD (docs/training.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aprium.base.errors import ConfigError
from aprium.base.records import Group, Sample, TeacherScores, Trajectory


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """How a group becomes samples.

    `reward_weight` scales the advantage that comes of rewards (0: pure distillation), `kl_weight`
    is that of the teacher's word on every sampled token.
    """

    baseline: Literal["mean", "leave_one_out", "none"] = "leave_one_out"
    normalise_std: bool = True
    drop_equal: bool = False
    reward_weight: float = 1.0
    kl_weight: float = 0.0
    domain_weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credited:
    """The samples of a group, none where it was filtered, and figures of it by name."""

    samples: tuple[Sample, ...]
    figures: Mapping[str, float]


def credit(
    group: Group, config: CreditConfig, scores: Sequence[TeacherScores | None] = ()
) -> Credited:
    """Return the samples of `group`; `scores[i]` is what a teacher made of its trajectory i.

    An episode with an error gives nothing but is counted. Raises ConfigError where `kl_weight` asks
    for a teacher's word on an episode and there is none.
    """
    pairs = list(zip(group.trajectories, scores or (None,) * len(group.trajectories), strict=True))
    kept = [(one, said) for one, said in pairs if one.error is None and any(one.sampled)]
    figures = {
        "episodes": float(len(pairs)),
        "errors": float(sum(one.error is not None for one in group.trajectories)),
    }
    rewards = [one.reward for one, _ in kept]
    if rewards:
        figures["reward"] = sum(rewards) / len(rewards)
    if config.drop_equal and len(set(rewards)) < 2:
        return Credited(samples=(), figures=figures | {"filtered": 1.0})
    advantages = [config.reward_weight * a for a in group_advantages(rewards, config)]
    samples = tuple(
        _sample(one, said, advantage, config)
        for (one, said), advantage in zip(kept, advantages, strict=True)
    )
    return Credited(samples=samples, figures=figures | {"filtered": 0.0})


def group_advantages(rewards: Sequence[float], config: CreditConfig) -> list[float]:
    """Return what each reward is above its baseline, over the group's deviation if asked for."""
    count, total = len(rewards), math.fsum(rewards)
    if config.baseline == "none":
        found = list(rewards)
    elif config.baseline == "mean":
        found = [r - total / count for r in rewards]
    else:
        found = [r - (total - r) / (count - 1) if count > 1 else 0.0 for r in rewards]
    if config.normalise_std and count > 1:
        mean = total / count
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (count - 1))
        found = [a / std if std > 1e-9 else a for a in found]
    return found


def _sample(
    one: Trajectory, said: TeacherScores | None, advantage: float, config: CreditConfig
) -> Sample:
    if config.kl_weight and said is None:
        raise ConfigError(
            f"credit.kl_weight is {config.kl_weight} and no teacher scored an episode of "
            f"{one.domain!r}: give the domain a teacher, or set kl_weight to 0"
        )
    weight = config.domain_weights.get(one.domain, 1.0)
    sampled = (False, *one.sampled[1:])
    return Sample(
        tokens=one.tokens,
        ce_weight=(0.0,) * len(one.tokens),
        domain=one.domain,
        rl_weight=tuple(weight if s else 0.0 for s in sampled),
        advantage=tuple(advantage if s else 0.0 for s in sampled),
        behaviour_logprob=(0.0, *one.logprobs[1:]),
        kl_weight=tuple(config.kl_weight if s else 0.0 for s in sampled) if said else (),
        teacher_logprob=(0.0, *said.logprobs[1:]) if said else (),
        teacher_top=said.top if said else (),
    )
