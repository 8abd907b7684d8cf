"""What a run of rounds is made of: nodes with parents in a graph, and what has become of each.

A recipe says the whole of it: how the student is made, which teachers branch off where, when the
student learns from them, and which checkpoints are averaged beside. Every node is one stage with
one directory under the output, and `node.json` there is the only truth about it: so a run that was
killed goes on at the node it was in, and a finished node is never run again.
Source: docs/training.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from aprium.base.errors import ConfigError
from aprium.checkpoint.hub import HUB_ID
from aprium.rl.teachers import SELF, RemoteConfig

Kind = Literal["sft", "warmup", "rl", "mopd", "merge"]


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """One stage.

    `kind` "sft" fine-tunes on data, on rollouts of `teachers`, or both; "warmup" does the same to
    bring the student into its teachers' support; "rl" is reinforcement learning on tasks; "mopd"
    distils `teachers` on the student's own rollouts; "merge" averages the weights of `members`, by
    `weights` (none: equally). `parent` is the node, checkpoint or hub id to start from (none: the
    recipe's). `domains` are the recipe's that it works on (none: all of them). `teachers` names one
    for a domain: a node, a checkpoint, a key of the recipe's `[remotes]`, or "self"; `default` is
    for domains without one. Of each domain with a teacher, `rollouts` tasks are played by it for
    "sft" and "warmup", and those with a reward of at least `min_reward` learnt. `when` "needed"
    passes the parent on where the support of all teachers is measured to be enough; then only
    domains in need are learnt. `config` are keys of the stage's own recipe, over those in
    `[base.KIND]`. `once` runs the node for the first seed alone, and the others take it over.
    """

    kind: Kind
    parent: str | None = None
    domains: tuple[str, ...] = ()
    teachers: dict[str, str] = field(default_factory=dict)
    default: str | None = None
    rollouts: int = 0
    min_reward: float | None = None
    when: Literal["always", "needed"] = "always"
    members: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What is measured of every node, and against what.

    In each domain `items` held-out tasks are played `samples` times, at `temperature` with at most
    `max_tokens`. `baseline` is the node whose distance to a teacher is the whole of what may be
    recovered (none: the parent of the first "mopd" node). `nodes` leaves others out.
    """

    items: int = 64
    samples: int = 1
    temperature: float = 1.0
    max_tokens: int = 256
    baseline: str | None = None
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """A recipe of rounds.

    `checkpoint` is where nodes without a parent start. `domains` have the keys of `aprium rl`'s;
    `base` maps kinds of nodes to what all of that kind have. `seeds` runs the graph once for each.
    Paths are relative to the working directory.
    """

    output: Path
    nodes: dict[str, NodeConfig]
    domains: tuple[dict[str, Any], ...] = ()
    checkpoint: str = "pico"
    seeds: tuple[int, ...] = (0,)
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    remotes: dict[str, RemoteConfig] = field(default_factory=dict)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)

    def __post_init__(self) -> None:
        """Check that the nodes are a graph, and that none asks for what its kind does not do."""
        if not self.nodes:
            raise ConfigError("the recipe has no [nodes.NAME]: say at least one stage")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {list(self.seeds)}: give different ones, at least one")
        for kind in self.base:
            if kind not in _FIELDS:
                raise ConfigError(f"[base.{kind}]: the kinds are {', '.join(_FIELDS)}")
        for name, node in self.nodes.items():
            _check_node(self, name, node)
        self.order()

    def domain_names(self) -> tuple[str, ...]:
        """Return the names of all domains; raises ConfigError for one without."""
        found = tuple(str(domain.get("name", "")) for domain in self.domains)
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
        needed = {until, *self._above(until)}
        return tuple(name for name in found if name in needed)

    def _above(self, name: str) -> Iterator[str]:
        for parent in self.parents(name):
            yield parent
            yield from self._above(parent)

    def teacher_of(self, name: str, domain: str) -> str | None:
        """Return what teaches `domain` in node `name`."""
        node = self.nodes[name]
        return node.teachers.get(domain, node.default)


# What each kind of node takes beside `config` and `once`.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "sft": ("parent", "domains", "teachers", "default", "rollouts", "min_reward"),
    "warmup": ("parent", "domains", "teachers", "default", "rollouts", "min_reward", "when"),
    "rl": ("parent", "domains"),
    "mopd": ("parent", "domains", "teachers", "default"),
    "merge": ("members", "weights"),
}


def _check_node(recipe: RoundsConfig, name: str, node: NodeConfig) -> None:
    """Raise ConfigError for what `node` asks in vain, or names that is not there."""
    where = f"nodes.{name}"
    if not name.replace("-", "").replace("_", "").isalnum() or name == SELF:
        raise ConfigError(f"[{where}]: a name has letters, digits, - and _, and is not {SELF!r}")
    unused = NodeConfig(kind=node.kind)
    for key in ("parent", "domains", "teachers", "default", "rollouts", "min_reward", "when"):
        if key not in _FIELDS[node.kind] and getattr(node, key) != getattr(unused, key):
            raise ConfigError(f"{where}.{key} means nothing for kind {node.kind!r}: leave it out")
    for key in ("members", "weights"):
        if node.kind != "merge" and getattr(node, key):
            raise ConfigError(f"{where}.{key} is for kind 'merge': leave it out")
    domains = recipe.domain_names()
    for domain in (*node.domains, *node.teachers):
        if domain not in domains:
            raise ConfigError(
                f"{where} names domain {domain!r}: those of [[domains]] are {', '.join(domains)}"
            )
    for domain in node.teachers:
        if node.domains and domain not in node.domains:
            raise ConfigError(f"{where}.teachers names {domain!r}, which is not of its domains")
    if node.kind in ("mopd", "warmup") and not (node.teachers or node.default):
        raise ConfigError(f"{where}: kind {node.kind!r} needs teachers, as in {{ DOMAIN = NODE }}")
    if node.kind in ("sft", "warmup") and bool(node.teachers or node.default) != bool(
        node.rollouts
    ):
        raise ConfigError(f"{where}: teachers and rollouts go together: give both or none")
    if node.kind == "merge":
        if len(node.members) < 2:
            raise ConfigError(f"{where}.members: name two nodes or more to average")
        if node.weights and len(node.weights) != len(node.members):
            raise ConfigError(f"{where}.weights: give one for each of the members, or none")
    for other in (node.parent, *node.members, *node.teachers.values(), node.default):
        _check_source(recipe, where, other, teacher=other not in (node.parent, *node.members))
    for parent in recipe.parents(name):
        if node.once and not recipe.nodes[parent].once:
            raise ConfigError(
                f"{where}.once: it starts from {parent!r}, which every seed makes anew: set once "
                "there as well, or leave it out"
            )


def _check_source(recipe: RoundsConfig, where: str, source: str | None, *, teacher: bool) -> None:
    """Raise ConfigError unless `source` is a node, a checkpoint or, of a teacher, another one."""
    if source is None or source in recipe.nodes or source == "pico" or Path(source).is_dir():
        return
    if teacher and (source == SELF or source in recipe.remotes):
        return
    if HUB_ID.match(source):
        return
    raise ConfigError(
        f"{where} names {source!r}, which is neither a node nor a checkpoint: the nodes are "
        f"{', '.join(recipe.nodes)}"
    )
