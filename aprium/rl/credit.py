"""Credit: what each token of a group of episodes is worth, as samples for the trainer.

Rewards are shaped, compared within the group, and laid on the tokens that the model wrote; what
teachers said of the same tokens goes beside. A group may also turn out to teach nothing. Sources:
GRPO (arXiv 2402.03300), leave-one-out (2402.14740), Dr. GRPO (2503.20783), DAPO (2503.14476); for
length control, effort, defects and MOPD docs/training.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aprium.base.errors import ConfigError
from aprium.base.records import Group, Sample, TeacherScores, Trajectory
from aprium.envs.defects import DEFECTS

# Two rewards that differ by less are one: sums in another order are no difference to learn from.
_EQUAL = 1e-9
_Scored = tuple[Trajectory, TeacherScores | None]


@dataclass(frozen=True, kw_only=True)
class OverlongConfig:
    """A penalty for what comes near the limit: from 0 to `penalty` over the last `buffer` tokens.

    `limit` counts sampled tokens; beyond it the penalty is whole (DAPO, soft overlong punishment).
    """

    limit: int
    buffer: int
    penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_range("overlong.buffer", self.buffer, 1, self.limit)
        _require_range("overlong.penalty", self.penalty, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """A preference for short episodes within a group, which adds nothing to its mean.

    The shortest gets up to `weight`, the longest up to minus that, by where its sampled tokens lie
    between them. Besides, the shortest of those whose reward is within the `top` share of the
    group's gets `bonus`.
    """

    weight: float = 0.1
    bonus: float = 0.0
    top: float = 0.2

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_range("length.weight", self.weight, 0, math.inf)
        _require_range("length.bonus", self.bonus, 0, math.inf)
        _require_range("length.top", self.top, 0, 1)


@dataclass(frozen=True, kw_only=True)
class EffortConfig:
    """Rewards that grow as fewer than `tokens` are sampled, in `domains` of little effort.

    With l = min(1, weight * (1 - sampled / tokens)) the reward R becomes
    R + R * max(l, 0) + penalty * min(l, 0).
    """

    domains: tuple[str, ...]
    tokens: int = 15_000
    weight: float = 0.1
    penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_range("effort.tokens", self.tokens, 1, math.inf)
        _require_range("effort.weight", self.weight, 0, math.inf)
        _require_range("effort.penalty", self.penalty, 0, math.inf)


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """How a group becomes samples.

    An episode's reward is 0 if it has one of the defects `zero_reward`; then comes its shaping by
    `overlong`, `length` and `effort`. From it is taken the `baseline`: the group's mean, that of
    the others ("leave_one_out") or nothing; with `normalise_std` the rest is divided by the group's
    standard deviation (with n - 1). `reward_weight` times that is the advantage of every sampled
    token (0: pure distillation), but in turns with one of the defects `punished` it is
    `punished_advantage`. With `drop_equal` a group whose rewards are all the same gives no samples
    (dynamic sampling). What stopped at a limit is learnt, or with "mask" only compared with.

    `kl_weight` weighs the teacher on every sampled token, `kl_weights` by domain instead;
    `domain_weights` multiply all weights of a domain's tokens, by default 1.
    """

    baseline: Literal["mean", "leave_one_out", "none"] = "leave_one_out"
    normalise_std: bool = True
    reward_weight: float = 1.0
    drop_equal: bool = False
    unfinished: Literal["learn", "mask"] = "learn"
    zero_reward: tuple[str, ...] = ()
    punished: tuple[str, ...] = ()
    punished_advantage: float = -5.0
    overlong: OverlongConfig | None = None
    length: LengthConfig | None = None
    effort: EffortConfig | None = None
    kl_weight: float = 0.0
    kl_weights: dict[str, float] = field(default_factory=dict)
    domain_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for key in ("zero_reward", "punished"):
            for name in getattr(self, key):
                if name not in DEFECTS:
                    known = ", ".join(DEFECTS)
                    raise ConfigError(f"credit.{key} names {name!r}: the defects are {known}")
        _require_range("reward_weight", self.reward_weight, 0, math.inf)
        weights = {"kl_weight": self.kl_weight}
        weights |= {f"kl_weights.{name}": value for name, value in self.kl_weights.items()}
        weights |= {f"domain_weights.{name}": value for name, value in self.domain_weights.items()}
        for name, value in weights.items():
            _require_range(name, value, 0, math.inf)
        if self.drop_equal and not self.reward_weight:
            raise ConfigError(
                "credit.drop_equal leaves out groups by their rewards, and reward_weight is 0: set "
                "one of them otherwise"
            )


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == math.inf else f"in {low:g}..{high:g}"
        raise ConfigError(f"credit.{name} is {value}: it must be {bound}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credited:
    """The samples of a group, none where it teaches nothing, and figures of it by name.

    `figures` are sums over its episodes, and "groups", so that those of many groups add up:
    "episodes", "errors" (which give nothing), "unfinished", "dropped" (groups of equal rewards),
    "reward" (before shaping) and "shaped", "tokens" (sampled), and each defect by name.
    """

    samples: tuple[Sample, ...]
    figures: Mapping[str, float]


def credit(
    group: Group,
    config: CreditConfig,
    scores: Sequence[TeacherScores | None] = (),
    *,
    apart: bool = False,
) -> Credited:
    """Return the samples of `group`; `scores[i]` is what a teacher made of its trajectory i.

    With `apart` the divergence from teachers is a term of its own, which `kl_weight` alone weighs,
    and so with the domain's weight; else `rl_weight` weighs it too (`policy.distillation`
    "sampled"). Raises ConfigError where `kl_weight` asks for a teacher's word on an episode and
    there is none.
    """
    everyone = zip(group.trajectories, scores or (None,) * len(group.trajectories), strict=True)
    kept = [(one, said) for one, said in everyone if one.error is None and any(one.sampled[1:])]
    rewards = shaped_rewards([one for one, _ in kept], config)
    figures = _figures(group, [one for one, _ in kept], rewards)
    if config.drop_equal and (not rewards or max(rewards) - min(rewards) < _EQUAL):
        return Credited(samples=(), figures=figures | {"dropped": 1.0})
    samples = [
        _sample(one, said, config.reward_weight * advantage, config, apart)
        for (one, said), advantage in zip(kept, group_advantages(rewards, config), strict=True)
        if config.unfinished == "learn" or one.stop == "done"
    ]
    return Credited(samples=tuple(samples), figures=figures)


def _figures(
    group: Group, kept: Sequence[Trajectory], rewards: Sequence[float]
) -> dict[str, float]:
    found = {
        "groups": 1.0,
        "dropped": 0.0,
        "episodes": float(len(group.trajectories)),
        "errors": float(sum(one.error is not None for one in group.trajectories)),
        "unfinished": float(sum(one.stop != "done" for one in kept)),
        "reward": math.fsum(one.reward for one in kept),
        "shaped": math.fsum(rewards),
        "tokens": float(sum(map(_length, kept))),
    }
    for name in DEFECTS:
        has = sum(any(what == name for _, _, what in one.defects) for one in kept)
        found |= {name: float(has)} if has else {}
    return found


def _length(one: Trajectory) -> int:
    return sum(one.sampled)


def shaped_rewards(episodes: Sequence[Trajectory], config: CreditConfig) -> list[float]:
    """Return the rewards of a group's episodes after what `config` makes of defects and length."""
    lengths = [_length(one) for one in episodes]
    rewards = [
        0.0 if any(what in config.zero_reward for _, _, what in one.defects) else one.reward
        for one in episodes
    ]
    if config.effort is not None:
        rewards = [
            _with_effort(r, n, config.effort) if one.domain in config.effort.domains else r
            for r, n, one in zip(rewards, lengths, episodes, strict=True)
        ]
    overlong, length = config.overlong, config.length
    added = [0.0] * len(rewards)
    if length is not None and rewards:
        added = _preference(rewards, lengths, length)
    if overlong is not None:
        begin = overlong.limit - overlong.buffer
        over = [min(1.0, max(0, n - begin) / overlong.buffer) for n in lengths]
        added = [a - overlong.penalty * part for a, part in zip(added, over, strict=True)]
    return [r + a for r, a in zip(rewards, added, strict=True)]


def _with_effort(reward: float, length: int, effort: EffortConfig) -> float:
    part = min(1.0, effort.weight * (1 - length / effort.tokens))
    return reward + reward * max(part, 0.0) + effort.penalty * min(part, 0.0)


def _preference(
    rewards: Sequence[float], lengths: Sequence[int], config: LengthConfig
) -> list[float]:
    """Return what a group's lengths add to its rewards."""
    low, high = min(lengths), max(lengths)
    places = [1 - (n - low) / (high - low) if high > low else 0.0 for n in lengths]
    mean = math.fsum(places) / len(places)
    found = [config.weight * (place - mean) for place in places]
    if config.bonus:
        within = sorted(rewards, reverse=True)[max(0, math.ceil(config.top * len(rewards)) - 1)]
        best = [i for i, reward in enumerate(rewards) if reward >= within - _EQUAL]
        found[min(best, key=lambda i: lengths[i])] += config.bonus
    return found


def group_advantages(rewards: Sequence[float], config: CreditConfig) -> list[float]:
    """Return what each reward is above its baseline, over the group's deviation if asked for.

    A group of one has nothing to be compared with: 0, unless there is no baseline.
    """
    count, total = len(rewards), math.fsum(rewards)
    if config.baseline == "none":
        found = list(rewards)
    elif config.baseline == "mean":
        found = [r - total / count for r in rewards]
    else:
        found = [r - (total - r) / (count - 1) if count > 1 else 0.0 for r in rewards]
    if config.normalise_std and count > 1:
        mean = total / count
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (count - 1))
        found = [a / deviation if deviation > _EQUAL else a for a in found]
    return found


def _sample(
    one: Trajectory,
    said: TeacherScores | None,
    advantage: float,
    config: CreditConfig,
    apart: bool,
) -> Sample:
    kl_weight = config.kl_weights.get(one.domain, config.kl_weight)
    if kl_weight and said is None:
        raise ConfigError(
            f"credit.kl_weight of {one.domain!r} is {kl_weight:g} and no teacher scored an episode "
            "of it: give the domain a teacher, or set the weight to 0"
        )
    sampled = (False, *one.sampled[1:])
    weight = config.domain_weights.get(one.domain, 1.0)
    advantages = [advantage if s else 0.0 for s in sampled]
    for begin, end, what in one.defects:
        if what in config.punished:
            for t in range(max(1, begin), end):
                advantages[t] = config.punished_advantage if sampled[t] else 0.0
    heard = said if kl_weight else None
    kl_weight *= weight if apart else 1.0
    return Sample(
        tokens=one.tokens,
        ce_weight=(0.0,) * len(one.tokens),
        domain=one.domain,
        rl_weight=tuple(weight if s else 0.0 for s in sampled),
        advantage=tuple(advantages),
        behaviour_logprob=(0.0, *one.logprobs[1:]),
        kl_weight=tuple(kl_weight if s else 0.0 for s in sampled) if heard else (),
        teacher_logprob=(0.0, *heard.logprobs[1:]) if heard else (),
        teacher_top=heard.top if heard else (),
    )
