"""How much of its teachers' lead the student has recovered, by domain, with standard errors.

Recovery is (student - baseline) / (teacher - baseline). All three play the same held-out tasks, so
errors are those of paired differences; with several seeds there is a second error, over runs. Where
the teacher's lead is within its own error there is nothing to recover, and no figure is given.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aprium.base.config import from_dict, to_dict
from aprium.base.errors import CheckpointError
from aprium.rl.evaluate import Accuracy, EvaluateConfig, evaluate_checkpoint
from aprium.rl.lineage import SOLUTIONS, START, RoundsConfig, digest, read_state
from aprium.rl.rollout import DomainConfig
from aprium.rl.teachers import SELF
from aprium.train.pretrain import write_json

Scores = Mapping[str, Mapping[str, Accuracy]]  # by what was evaluated, by domain
_LEAD = 2.0  # standard errors that a teacher must be ahead by


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """A share of the teacher's lead, and its standard errors: over items, and over seeds if any."""

    value: float
    item_error: float
    seed_error: float | None = None


def recovery(
    student: Sequence[float], baseline: Sequence[float], teacher: Sequence[float]
) -> Recovery | None:
    """Return the recovery of rewards on the same tasks; None where the teacher is not ahead.

    The error is that of a ratio of means by the delta method.
    """
    count = len(baseline)
    gains = [s - b for s, b in zip(student, baseline, strict=True)]
    leads = [t - b for t, b in zip(teacher, baseline, strict=True)]
    lead = math.fsum(leads) / count
    if count < 2 or lead <= _LEAD * _error(leads):
        return None
    value = math.fsum(gains) / count / lead
    rests = [gain - value * one for gain, one in zip(gains, leads, strict=True)]
    return Recovery(value=value, item_error=_error(rests) / lead)


def _error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    count = len(values)
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(count - 1, 1) / count)


def over_seeds(found: Sequence[Recovery | None]) -> Recovery | None:
    """Return the mean of the seeds that have a figure, with both its errors."""
    known = [one for one in found if one is not None]
    if not known:
        return None
    values = [one.value for one in known]
    return Recovery(
        value=math.fsum(values) / len(values),
        item_error=math.sqrt(math.fsum(one.item_error**2 for one in known)) / len(known),
        seed_error=_error(values) if len(values) > 1 else None,
    )


# ---- what is evaluated, and where that is written ----


def evaluated(recipe: RoundsConfig, seed: int) -> dict[str, tuple[str, Path]]:
    """Return all there is to evaluate for `seed` by name: the checkpoint, and the file of scores.

    Those are the nodes that are done, and what is outside the graph.
    """
    found = outside(recipe)
    for name, node in recipe.nodes.items():
        place = recipe.place(name, seed)
        state = read_state(place)
        if node.evaluate and state is not None and state.status == "done" and state.checkpoint:
            found[name] = (state.checkpoint, place / "scores.json")
    return found


def outside(recipe: RoundsConfig) -> dict[str, tuple[str, Path]]:
    """Return the checkpoints that the recipe itself names, as `evaluated`: the start, and teachers.

    Servers are not evaluated.
    """
    found = {START: recipe.checkpoint}
    for node in recipe.nodes.values():
        for source in (*node.teachers.values(), node.default):
            known = (None, SELF, SOLUTIONS, *recipe.nodes, *recipe.remotes)
            if source is not None and source not in known:
                found[source] = source
    place = recipe.output / "shared"
    return {
        name: (source, place / f"scores-{digest([source])}.json") for name, source in found.items()
    }


def evaluate(recipe: RoundsConfig, checkpoint: str, file: Path, node: str | None = None) -> None:
    """Let a checkpoint play the held-out tasks of all domains, unless `file` has its scores.

    It is that of `node`, which may ask for its own domains alone.
    """
    if not is_scored(recipe, file, node):
        found = evaluate_checkpoint(checkpoint, _asked(recipe, node), recipe.evaluate)
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: asdict(accuracy) for name, accuracy in found.items()}
        write_json(file, {"digest": _settings(recipe), "domains": rows})


def is_scored(recipe: RoundsConfig, file: Path, node: str | None = None) -> bool:
    """Tell whether `file` has scores, and of these settings of evaluation."""
    found = _read(file, recipe)
    return found is not None and {domain.name for domain in _asked(recipe, node)} <= found.keys()


def _asked(recipe: RoundsConfig, node: str | None) -> Sequence[DomainConfig]:
    own = node is not None and recipe.nodes[node].evaluate == "own"
    return recipe.domains_of(node) if node is not None and own else recipe.domains


def _settings(recipe: RoundsConfig) -> str:
    """Return a name for how is evaluated: scores of other settings are not compared."""
    config: EvaluateConfig = recipe.evaluate
    return digest([to_dict(config), [to_dict(domain) for domain in recipe.domains]])


def _read(file: Path, recipe: RoundsConfig) -> dict[str, Accuracy] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["digest"] != _settings(recipe):
            return None
        return {name: from_dict(Accuracy, row) for name, row in data["domains"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}): remove it") from error


def read_scores(recipe: RoundsConfig, seed: int) -> dict[str, dict[str, Accuracy]]:
    """Return the scores that there are for `seed`, by what was evaluated, by domain."""
    found = {name: _read(file, recipe) for name, (_, file) in evaluated(recipe, seed).items()}
    return {name: scores for name, scores in found.items() if scores is not None}


# ---- the table ----


def baseline_of(recipe: RoundsConfig) -> str:
    """Return from where the teachers' lead is counted.

    Unless the recipe says, that is the node or checkpoint that the first distilled node came from,
    past warm-ups.
    """
    if recipe.baseline is not None:
        return recipe.baseline
    for name in recipe.order():
        node = recipe.nodes[name]
        if node.kind != "mopd":
            continue
        parent = node.parent
        while parent in recipe.nodes and recipe.nodes[parent].kind == "warmup":
            parent = recipe.nodes[parent].parent
        return parent if parent in recipe.nodes else START
    return START


def teachers_of(recipe: RoundsConfig) -> dict[str, str]:
    """Return the last teacher that each domain has in the graph, other than the student itself."""
    found = {}
    for name in recipe.order():
        if recipe.nodes[name].kind == "mopd":
            taught = recipe.teachers_of(name).items()
            found |= {domain: teacher for domain, teacher in taught if teacher != SELF}
    return found


def learners(recipe: RoundsConfig) -> tuple[str, ...]:
    """Return the nodes whose recovery is of interest: what learnt of teachers, or averages them."""
    return tuple(
        name
        for name in recipe.order()
        if recipe.nodes[name].kind in ("mopd", "merge", "warmup")
        or set(recipe.teachers_of(name).values()) - {SOLUTIONS}
    )


def table(recipe: RoundsConfig) -> dict[str, Any]:
    """Return scores and recovery as plain values: of every node by domain, over all seeds.

    `scores[node][domain]` has mean, item_error, seed_error and seeds; `recovery` likewise has
    value, item_error and seed_error, with "all" for the mean over taught domains.
    """
    per_seed = {seed: read_scores(recipe, seed) for seed in recipe.seeds}
    names = [*outside(recipe), *recipe.order()]
    teachers, baseline = teachers_of(recipe), baseline_of(recipe)
    scores, recovered = {}, {}
    for name in names:
        rows = [found[name] for found in per_seed.values() if name in found]
        if rows:
            domains = [d for d in recipe.domain_names() if all(d in row for row in rows)]
            scores[name] = {domain: _score([row[domain] for row in rows]) for domain in domains}
    for name in learners(recipe):
        row = {}
        for domain in (*teachers, "all"):
            asked = teachers if domain == "all" else {domain: teachers[domain]}
            found = [
                _recovery(seen, name, baseline, asked)
                for seen in per_seed.values()
                if {name, baseline, *asked.values()} <= seen.keys()
                and all(asked.keys() <= seen[one].keys() for one in (name, baseline))
                and all(domain in seen[teacher] for domain, teacher in asked.items())
            ]
            one = over_seeds(found)
            row[domain] = None if one is None else asdict(one)
        recovered[name] = row
    return {
        "baseline": baseline,
        "teachers": teachers,
        "scores": scores,
        "recovery": recovered,
        "seeds": list(recipe.seeds),
    }


def _score(rows: Sequence[Accuracy]) -> dict[str, Any]:
    means = [row.accuracy for row in rows]
    return {
        "mean": math.fsum(means) / len(means),
        "item_error": math.sqrt(math.fsum(r.standard_error**2 for r in rows)) / len(rows),
        "seed_error": _error(means) if len(means) > 1 else None,
        "seeds": len(rows),
    }


def _recovery(
    seen: Scores, name: str, baseline: str, teachers: Mapping[str, str]
) -> Recovery | None:
    """Return the recovery over the tasks of all domains of `teachers`, which have as many each.

    Its error is at most what is given: that domains differ is counted as if it were chance.
    """
    student, base, taught = [], [], []
    for domain, teacher in teachers.items():
        student += seen[name][domain].rewards
        base += seen[baseline][domain].rewards
        taught += seen[teacher][domain].rewards
    return recovery(student, base, taught) if base else None


def lines(table: Mapping[str, Any]) -> list[str]:
    """Return scores and recovery of a run of rounds as lines of text."""
    found = []
    for name, domains in table["scores"].items():
        cells = [f"{domain} {100 * one['mean']:.1f}" for domain, one in domains.items()]
        found.append(f"{name}: {', '.join(cells)} %")
    for name, row in table["recovery"].items():
        one = row.get("all")
        if one is not None:
            error = one["seed_error"] if one["seed_error"] is not None else one["item_error"]
            found.append(
                f"{name}: {100 * one['value']:.0f} +- {100 * error:.0f} % of the way from "
                f"{table['baseline']} to the teachers"
            )
    return found
