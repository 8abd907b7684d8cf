"""What a run of rounds is made of: nodes with parents in a graph, and what has become of each.

A recipe says the whole of it: how the student is made, which teachers branch off where, when the
student learns from them, and which checkpoints are averaged beside. Every node is one stage with
one directory under the output, and `node.json` there is the only truth about it: so a run that was
killed goes on at the node it was in, and a finished node is never run again.
Source: docs/training.md.
"""

import contextlib
import fcntl
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from aprium.base.config import from_dict, to_dict
from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.files import write_durably
from aprium.checkpoint.hub import HUB_ID
from aprium.rl.evaluate import EvaluateConfig
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.rl.support import SupportConfig
from aprium.rl.teachers import SELF, RemoteConfig

Kind = Literal["sft", "warmup", "rl", "mopd", "merge"]
SOLUTIONS = "solutions"  # those of the tasks themselves, in a teacher's place
START = "start"  # the recipe's checkpoint, where figures of nodes name it


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """One stage.

    `kind` "sft" fine-tunes on data, on rollouts of `teachers`, or both; "warmup" does the same to
    bring the student into its teachers' support; "rl" is reinforcement learning on tasks; "mopd"
    distils `teachers` on the student's own rollouts; "merge" averages the weights of `members`, by
    `weights` (none: equally). `parent` is the node, checkpoint or hub id to start from (none: the
    recipe's). `domains` are the recipe's that it works on (none: all of them), and `shares` the
    weights of some of these here, in place of their own. `teachers` names one for a domain: a node,
    a checkpoint, a key of the recipe's `[remotes]`, "self", or, to be learnt from, "solutions", the
    tasks' own; `default` is for domains without one. Of each domain with a teacher, `rollouts`
    tasks are played by it for "sft" and "warmup", and episodes with a reward of at least
    `min_reward` learnt (none: all). `when` "needed" measures the support of all teachers first,
    learns only domains where it is not enough, and passes the parent on where there are none.
    `adapt` lets the support measured choose the form of a "mopd" node's distillation.
    `config` are keys of the stage's own recipe, over those in `[base.KIND]`. With `each` it stands
    for one node a domain, NAME-DOMAIN, which other nodes name together: as teachers each teaches
    its domain, as `members` all are meant, and as the `parent` of such a node the one of the same
    domain. With `once` the first seed's is that of all seeds. `evaluate` "own" has it play its
    own domains alone when it is evaluated, false leaves it out of the figures; a domain in which
    the teacher was not evaluated has no recovery.
    """

    kind: Kind
    parent: str | None = None
    domains: tuple[str, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)
    default: str | None = None
    rollouts: int = 0
    min_reward: float | None = None
    when: Literal["always", "needed"] = "always"
    adapt: bool = False
    members: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    each: bool = False
    once: bool = False
    evaluate: bool | Literal["own"] = True


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """A recipe of rounds.

    `checkpoint` is where nodes without a parent start. `rollout` is how tasks are played in all
    nodes, `evaluate` how all are evaluated, and `support` how the support of teachers is measured.
    `base` maps kinds of nodes to what all of that kind have. `baseline` is the node whose distance
    to a teacher is the whole of what may be recovered (none: where the first "mopd" node's line
    begins to have teachers). `seeds` runs the graph once for each. Paths are relative to the
    working directory.
    """

    output: Path
    nodes: dict[str, NodeConfig]
    domains: tuple[DomainConfig, ...]
    checkpoint: str = "pico"
    seeds: tuple[int, ...] = (0,)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    support: SupportConfig = field(default_factory=SupportConfig)
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    remotes: dict[str, RemoteConfig] = field(default_factory=dict)
    baseline: str | None = None

    def __post_init__(self) -> None:
        """Check that the nodes are a graph, and that none asks for what its kind does not do."""
        if not self.nodes:
            raise ConfigError("the recipe has no [nodes.NAME]: say at least one stage")
        object.__setattr__(self, "nodes", _spread(self.nodes, self.domain_names()))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {list(self.seeds)}: give different ones, at least one")
        for kind in self.base:
            if kind not in _FIELDS:
                raise ConfigError(f"[base.{kind}]: the kinds are {', '.join(_FIELDS)}")
        for domain in self.domains:
            if domain.teacher is not None:
                raise ConfigError(
                    f"domain {domain.name!r} names teacher {domain.teacher!r}: nodes say who "
                    "teaches, as in teachers = { DOMAIN = NODE }"
                )
        if self.baseline is not None and self.baseline not in (*self.nodes, START):
            raise ConfigError(
                f"baseline is {self.baseline!r}: name a node, or {START!r} for the checkpoint that "
                "the recipe starts from"
            )
        for name, node in self.nodes.items():
            _check_node(self, name, node)
        self.order()

    def domain_names(self) -> tuple[str, ...]:
        """Return the names of all domains; raises ConfigError for one without."""
        found = tuple(domain.name for domain in self.domains)
        if not all(found) or len(set(found)) < len(found):
            raise ConfigError(f"domains are named {list(found)}: give each a name of its own")
        return found

    def parents(self, name: str) -> tuple[str, ...]:
        """Return the nodes that `name` needs, each once."""
        node = self.nodes[name]
        named = (node.parent, *node.teachers.values(), node.default, *node.members)
        return tuple(dict.fromkeys(n for n in named if n is not None and n in self.nodes))

    def order(self, until: str | None = None) -> tuple[str, ...]:
        """Return the nodes, each after those it needs; with `until` that one and what it needs.

        Raises ConfigError for a cycle or a node that is not there.
        """
        graph = {name: self.parents(name) for name in self.nodes}
        try:
            found = tuple(TopologicalSorter(graph).static_order())
        except CycleError as error:
            raise ConfigError(
                f"nodes wait for each other: {' <- '.join(error.args[1])}; let one of them start "
                "from something earlier"
            ) from error
        if until is None:
            return found
        if until not in self.nodes:
            raise ConfigError(f"no node {until!r}: choose of {', '.join(self.nodes)}")
        needed = {until}
        for name in reversed(found):  # those that need a node come before it here
            if name in needed:
                needed.update(graph[name])
        return tuple(name for name in found if name in needed)

    def domains_of(self, name: str) -> tuple[DomainConfig, ...]:
        """Return the domains that node `name` works on, with their weights there."""
        node = self.nodes[name]
        chosen = node.domains or self.domain_names()
        return tuple(
            replace(domain, weight=node.shares.get(domain.name, domain.weight))
            for domain in self.domains
            if domain.name in chosen
        )

    def teachers_of(self, name: str) -> dict[str, str]:
        """Return what teaches each domain of node `name`: a node, a checkpoint, remote or self."""
        node = self.nodes[name]
        pairs = {d.name: node.teachers.get(d.name, node.default) for d in self.domains_of(name)}
        return {domain: teacher for domain, teacher in pairs.items() if teacher is not None}

    def place(self, name: str, seed: int) -> Path:
        """Return the directory of node `name` for `seed`."""
        return self.output / ("shared" if self.nodes[name].once else f"seed-{seed}") / name


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """What has become of a node, as its `node.json` says.

    `status` is "begun", "failed" (with `error`) or "done". `digest` stands for its settings and
    those of all nodes it came from, `run` for this time that it was run, `parents` map those nodes
    to theirs. `checkpoint` is what it made, or passed on; `adapter` with its
    `base` is the same as factors, where those were trained. `note` says what was unusual.
    """

    name: str
    kind: str
    seed: int
    digest: str
    run: str
    parents: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    status: Literal["begun", "failed", "done"] = "begun"
    checkpoint: str | None = None
    adapter: str | None = None
    base: str | None = None
    seconds: float = 0.0
    error: str | None = None
    note: str | None = None


def read_state(place: Path) -> NodeState | None:
    """Return what became of the node in `place`, None where it never began.

    Raises CheckpointError for a file that is damaged.
    """
    file = place / "node.json"
    try:
        return from_dict(NodeState, json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): remove {place} to run that node again"
        ) from error


def write_state(place: Path, state: NodeState) -> None:
    """Put `state` on the disk; raises CheckpointError."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_dict(state), indent=2) + "\n"
        write_durably(place / "node.json", text.encode())
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold `place` for this process alone; raises CheckpointError where another one has it."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / "lock").open("wb")
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"another process works in {place}: wait for it, or stop it first"
            ) from error
        yield


def digest(parts: Sequence[Any]) -> str:
    """Return a name for plain values, the same in any process."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _spread(nodes: Mapping[str, NodeConfig], domains: Sequence[str]) -> dict[str, NodeConfig]:
    """Return `nodes` with those that are one `each` domain as so many, and named one by one."""
    several = {name: node.domains or tuple(domains) for name, node in nodes.items() if node.each}

    def own(name: str | None, domain: str) -> str | None:
        return f"{name}-{domain}" if name in several else name

    found = {}
    for name, node in nodes.items():
        mine = node.domains or tuple(domains)
        teachers = {d: own(t, d) for d, t in node.teachers.items()}
        default = node.default
        if default in several:
            teachers |= {d: own(default, d) for d in mine if d not in node.teachers}
            default = None
        members = (
            f"{m}-{d}" if m in several else m for m in node.members for d in several.get(m, (m,))
        )
        node = replace(node, teachers=teachers, default=default, members=tuple(members), each=False)
        if name not in several:
            found[name] = node
            continue
        for domain in mine:
            found[f"{name}-{domain}"] = replace(
                node,
                domains=(domain,),
                parent=own(node.parent, domain),
                teachers={d: t for d, t in teachers.items() if d == domain},
                shares={},  # of one there is nothing to share
            )
    return found


# What each kind of node takes beside `config` and `once`.
_LEARNS = ("parent", "domains", "shares", "teachers", "default", "rollouts", "min_reward")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "sft": _LEARNS,
    "warmup": (*_LEARNS, "when"),
    "rl": ("parent", "domains", "shares"),
    "mopd": ("parent", "domains", "shares", "teachers", "default", "adapt"),
    "merge": ("members", "weights"),
}


def _check_node(recipe: RoundsConfig, name: str, node: NodeConfig) -> None:
    """Raise ConfigError for what `node` asks in vain, or names that is not there."""
    where = f"nodes.{name}"
    if not name.replace("-", "").replace("_", "").isalnum() or name in (SELF, START, SOLUTIONS):
        raise ConfigError(
            f"[{where}]: a name has letters, digits, - and _, and is none of {SELF!r}, {START!r} "
            f"and {SOLUTIONS!r}"
        )
    unused = NodeConfig(kind=node.kind)
    for key in {key for keys in _FIELDS.values() for key in keys} - {*_FIELDS[node.kind]}:
        if getattr(node, key) != getattr(unused, key):
            raise ConfigError(f"{where}.{key} means nothing for kind {node.kind!r}: leave it out")
    _check_domains(recipe, name, node)
    if node.kind == "merge":
        if len(node.members) < 2:
            raise ConfigError(f"{where}.members: name two nodes or more to average")
        if node.weights and len(node.weights) != len(node.members):
            raise ConfigError(f"{where}.weights: give one for each of the members, or none")
        total = sum(node.weights)
        if node.weights and (total == 0 or not math.isfinite(total)):
            raise ConfigError(
                f"{where}.weights is {list(node.weights)}: their sum must be a number, and not 0"
            )
    _check_measured(recipe, where, node)
    for other in (node.parent, *node.members, *node.teachers.values(), node.default):
        _check_source(recipe, where, other, teacher=other not in (node.parent, *node.members))
    for parent in recipe.parents(name):
        if node.once and not recipe.nodes[parent].once:
            raise ConfigError(
                f"{where}.once: it starts from {parent!r}, which every seed makes anew: set once "
                "there as well, or leave it out"
            )


def _check_measured(recipe: RoundsConfig, where: str, node: NodeConfig) -> None:
    """Raise ConfigError for rollouts that cannot be played, of teachers or to measure support."""
    if node.rollouts < 0:
        raise ConfigError(f"{where}.rollouts is {node.rollouts}: it must not be negative")
    asks = "when = 'needed'" if node.when == "needed" else "adapt = true" if node.adapt else None
    if asks is not None and not recipe.support.rollouts:
        raise ConfigError(
            f"{where} has {asks}, which support decides, and support.rollouts is 0: set it above "
            "0, or leave that out"
        )


def _check_domains(recipe: RoundsConfig, name: str, node: NodeConfig) -> None:
    """Raise ConfigError for domains and teachers of a node that do not go together."""
    where = f"nodes.{name}"
    domains = recipe.domain_names()
    for domain in (*node.domains, *node.shares, *node.teachers):
        if domain not in domains:
            raise ConfigError(
                f"{where} names domain {domain!r}: those of [[domains]] are {', '.join(domains)}"
            )
    for key in ("shares", "teachers"):
        for domain in getattr(node, key):
            if node.domains and domain not in node.domains:
                raise ConfigError(f"{where}.{key} names {domain!r}, which is not of its domains")
    for domain, share in node.shares.items():
        if not 0 < share < math.inf:
            raise ConfigError(
                f"{where}.shares gives {domain!r} {share:g}: a share is above 0; to leave it out, "
                "say domains without it"
            )
    if SOLUTIONS in recipe.teachers_of(name).values() and (
        node.kind == "mopd" or node.when == "needed"
    ):
        raise ConfigError(
            f"{where} names {SOLUTIONS!r}, which can be learnt from but scores nothing: that is "
            "for kinds 'sft' and 'warmup', with when = 'always'"
        )
    taught = bool(node.teachers or node.default)
    if node.kind == "warmup" and not taught:
        raise ConfigError(f"{where}: kind 'warmup' needs teachers, as in {{ DOMAIN = NODE }}")
    if node.kind in ("sft", "warmup") and taught != bool(node.rollouts):
        raise ConfigError(f"{where}: teachers and rollouts go together: give both or none")
    if node.kind == "mopd" and node.default is None:
        for domain in node.domains or domains:
            if domain not in node.teachers:
                raise ConfigError(
                    f"{where}: domain {domain!r} has no teacher: name one, or give a default, "
                    f"which may be {SELF!r}"
                )


def _check_source(recipe: RoundsConfig, where: str, source: str | None, *, teacher: bool) -> None:
    """Raise ConfigError unless `source` is a node, a checkpoint or, of a teacher, another one."""
    if source is None or source in recipe.nodes or source == "pico" or Path(source).is_dir():
        return
    if teacher and (source == SELF or source in recipe.remotes):
        return
    if teacher and source == SOLUTIONS:
        return
    if HUB_ID.match(source):
        return
    raise ConfigError(
        f"{where} names {source!r}, which is neither a node nor a checkpoint: the nodes are "
        f"{', '.join(recipe.nodes)}"
    )
