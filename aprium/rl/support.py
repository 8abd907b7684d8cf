"""How far what the student writes lies in its teachers' support, by domain, and what that asks for.

A teacher that scores the student's own tokens is asked about texts that the student chose. After
the first token that the teacher would hardly ever write, it reads what it was never trained on, and
what it says from there on is a guess; this is where distillation on the student's own rollouts
fails (docs/training.md). So three things are measured on them: which tokens are among the teacher's
most probable, how much of an answer comes before the first that is not, and how much of the
teacher's probability lies where the student looks at all.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from aprium.base.errors import ApriumError, ConfigError, EngineError
from aprium.base.records import TeacherScores, TopLogprobs, Trajectory
from aprium.rl.teachers import SELF, Teachers, TeachersConfig

Form = Literal["sampled", "top_k"]
QUANTILES = (0.01, 0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class SupportConfig:
    """How support is measured, and where it is enough.

    `rollouts` of each domain are played (0: nothing is measured). A token is inside where it is
    among the teacher's `top` most probable ones; with 20 that is all but about a hundredth of what
    a model samples of itself, and as many as servers give.

    A warm-up is needed where less than `min_prefix` of what the student's own support would let
    through comes before an answer's first token outside. At a half, most of what the teacher says
    would be about text that it would not have written.

    The divergence over the teacher's top tokens ("top_k") is chosen where at least `min_mass` of
    the teacher's probability lies on tokens that are among the student's top ones too, in every
    domain: the two then differ in weights, which that form compares with less noise than single
    samples do. Below, it would pull towards tokens that the student never reaches, and the
    sampled-token form, which only weighs what was sampled, is the safe one.
    """

    rollouts: int = 32
    top: int = 20
    min_prefix: float = 0.5
    min_mass: float = 0.9

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rollouts < 0:
            raise ConfigError(f"support.rollouts is {self.rollouts}: it must not be negative")
        if self.top < 1:
            raise ConfigError(f"support.top is {self.top}: it must be positive")
        for name in ("min_prefix", "min_mass"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"support.{name} is {getattr(self, name)}: it must be in 0..1")


@dataclass(frozen=True, kw_only=True)
class Support:
    """What was measured in one domain, on `episodes` with `tokens` sampled ones.

    `inside` is the share of sampled tokens among the teacher's top ones, `prefix` the share of an
    answer before its first one outside; `own_inside` and `own_prefix` are those of the student's
    own top tokens, which no teacher can be expected to exceed. `mass` is the share of the teacher's
    probability (of its top tokens) on tokens that are top ones of the student too. `gap` is the
    mean of the teacher's log-probability less the student's: minus the divergence that the
    sampled-token form minimises; `gap_quantiles` are at 0.01, 0.1, 0.5 and 0.9 of the tokens.
    """

    teacher: str
    episodes: int
    tokens: int
    inside: float
    prefix: float
    own_inside: float
    own_prefix: float
    mass: float
    gap: float
    gap_quantiles: tuple[float, ...]

    def needs_warmup(self, config: SupportConfig) -> bool:
        """Tell whether the student is to learn of its teacher's own rollouts first."""
        return self.prefix < config.min_prefix * self.own_prefix


def choose_form(supports: Mapping[str, Support], config: SupportConfig) -> Form:
    """Return the form of distillation that is safe in all domains (see `SupportConfig`)."""
    least = min((support.mass for support in supports.values()), default=0.0)
    return "top_k" if least >= config.min_mass else "sampled"


def measure(
    trajectories: Sequence[Trajectory],
    teacher: Sequence[TeacherScores],
    student: Sequence[TeacherScores],
) -> Support:
    """Compare scores of one domain's `trajectories` by its teacher and by the student, with tops.

    Raises EngineError where nothing was sampled.
    """
    inside, own_inside, mass, gaps = [], [], [], []
    prefixes, own_prefixes = [], []
    for trajectory, theirs, own in zip(trajectories, teacher, student, strict=True):
        at = [t for t, sampled in enumerate(trajectory.sampled) if sampled and t]
        if not at:
            continue
        tokens = trajectory.tokens
        mine = [tokens[t] in theirs.top[t] for t in at]
        self_inside = [tokens[t] in own.top[t] for t in at]
        inside += mine
        own_inside += self_inside
        prefixes.append(_before_first_miss(mine))
        own_prefixes.append(_before_first_miss(self_inside))
        mass += [_shared_mass(theirs.top[t], own.top[t]) for t in at]
        gaps += [theirs.logprobs[t] - own.logprobs[t] for t in at]
    if not gaps:
        raise EngineError("the student wrote nothing: there is no support to measure")
    gaps.sort()
    return Support(
        teacher=teacher[0].teacher,
        episodes=len(prefixes),
        tokens=len(gaps),
        inside=_mean(inside),
        prefix=_mean(prefixes),
        own_inside=_mean(own_inside),
        own_prefix=_mean(own_prefixes),
        mass=_mean(mass),
        gap=_mean(gaps),
        gap_quantiles=tuple(gaps[min(int(q * len(gaps)), len(gaps) - 1)] for q in QUANTILES),
    )


def _before_first_miss(hits: Sequence[bool]) -> float:
    """Return the share of `hits` before the first that is none."""
    return next((i for i, hit in enumerate(hits) if not hit), len(hits)) / len(hits)


def _shared_mass(teacher: TopLogprobs, student: TopLogprobs) -> float:
    """Return the share of the teacher's probability on tokens that both name."""
    whole = math.fsum(map(math.exp, teacher.values()))
    shared = math.fsum(math.exp(value) for token, value in teacher.items() if token in student)
    return shared / whole if whole else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


async def score_support(
    trajectories: Sequence[Trajectory],
    teachers: TeachersConfig,
    config: SupportConfig,
    *,
    student: str | Path,
    routes: Mapping[str, str | None],
) -> dict[str, Support]:
    """Let teachers and student score rollouts of the student; return the support of each domain.

    Domains without a teacher, and trajectories that it could not score, are left out. Raises
    EngineError for a domain with a teacher of which nothing was scored: its support is not known.
    """
    asked = replace(teachers, top=config.top, strict=False)
    found: list[list[TeacherScores | None]] = []
    causes: dict[str, ApriumError] = {}
    for some in (routes, dict.fromkeys(routes, SELF)):
        opened = Teachers(asked, student=student, routes=some)
        try:
            found.append(list(await asyncio.gather(*map(opened.score, trajectories))))
        finally:
            await opened.close()
        causes = {**opened.errors, **causes}
    domains: dict[str, list[tuple[Trajectory, TeacherScores, TeacherScores]]] = {}
    for trajectory, theirs, own in zip(trajectories, *found, strict=True):
        if theirs is not None and own is not None:
            domains.setdefault(trajectory.domain, []).append((trajectory, theirs, own))
    for domain, teacher in routes.items():
        name = teacher or teachers.default
        if name is not None and domain not in domains:
            played = sum(trajectory.domain == domain for trajectory in trajectories)
            raise EngineError(
                f"of {played} episodes of {domain!r} none has scores of teacher {name!r} and of "
                f"the student ({causes.get(name) or causes.get(SELF) or 'no more is known'}): mend "
                "that, then give the same command again"
            )
    return {name: measure(*map(list, zip(*rows, strict=True))) for name, rows in domains.items()}
