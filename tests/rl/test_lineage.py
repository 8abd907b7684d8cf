"""Recipes of rounds: what is no graph is refused, nodes come after what they need, states last."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.config import from_dict, load_toml, to_dict
from aprium.base.errors import CheckpointError, ConfigError
from aprium.rl.lineage import (
    NodeState,
    RoundsConfig,
    locked,
    read_state,
    write_state,
)

TOY = Path(__file__).parents[2] / "recipes" / "mopd-toy.toml"
DOMAINS = [
    {"name": name, "family": "exercises", "options": {"families": [name]}}
    for name in ("add", "sort")
]


def recipe(nodes: dict[str, Any], **more: Any) -> RoundsConfig:
    return from_dict(RoundsConfig, {"output": "out", "domains": DOMAINS, "nodes": nodes, **more})


def test_the_toy_recipe_is_one() -> None:
    found = load_toml(RoundsConfig, TOY)
    order = found.order()
    assert set(order) == set(found.nodes)
    assert found.order("mopd1")[-1] == "mopd1" and "mopd2" not in found.order("mopd1")
    assert found.teachers_of("mopd2") == {"add": "add-teacher-2", "sort": "self"}
    assert found.parents("mopd2") == ("mopd1", "add-teacher-2")


@given(st.data())
def test_every_node_comes_after_those_it_needs(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    names = data.draw(st.permutations([f"n{i}" for i in range(count)]))
    nodes: dict[str, Any] = {}
    for i, name in enumerate(names):
        earlier = st.sampled_from(names[:i]) if i else st.just("pico")
        if i and data.draw(st.booleans()):
            teachers = {"add": data.draw(earlier), "sort": data.draw(earlier)}
            nodes[name] = {"kind": "mopd", "parent": data.draw(earlier), "teachers": teachers}
        else:
            nodes[name] = {"kind": "rl", "parent": data.draw(earlier)}
    shuffled = {name: nodes[name] for name in data.draw(st.permutations(names))}
    found = recipe(shuffled)
    order = found.order()
    assert sorted(order) == sorted(names)
    for name in names:
        assert all(order.index(parent) < order.index(name) for parent in found.parents(name))
    target = data.draw(st.sampled_from(names))
    some = found.order(target)
    # All that the target needs, and nothing that is not needed by another of them.
    assert some[-1] == target
    needed = {parent for name in some for parent in found.parents(name)}
    assert needed | {target} == set(some)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({"a": {"kind": "rl", "parent": "b"}, "b": {"kind": "rl", "parent": "a"}}, "each other"),
        ({"a": {"kind": "rl", "parent": "a"}}, "wait for each other: a <- a"),
        ({"a": {"kind": "rl", "parent": "b"}}, "names 'b', which is neither a node nor"),
        ({"a": {"kind": "rl", "parent": "self"}}, "neither a node nor a checkpoint"),
        ({"a": {"kind": "merge", "members": ["pico", "b"]}}, "names 'b'"),
        ({"a": {"kind": "merge", "members": ["pico"]}}, "name two nodes or more"),
        ({"a": {"kind": "merge", "members": ["pico", "pico"], "weights": [1]}}, "weights: give"),
        (
            {"a": {"kind": "merge", "members": ["pico", "pico"], "weights": [0, 0]}},
            r"weights is \[0.0, 0.0\]: their sum must be a number, and not 0",
        ),
        (
            {"a": {"kind": "sft", "default": "pico", "rollouts": -5}},
            "a.rollouts is -5: it must not be negative",
        ),
        ({"a": {"kind": "mopd", "teachers": {"add": "pico"}}}, "'sort' has no teacher"),
        ({"a": {"kind": "mopd", "teachers": {"mul": "pico"}}}, "domain 'mul'.* add, sort"),
        ({"a": {"kind": "rl", "domains": ["mul"]}}, "domain 'mul'"),
        ({"a": {"kind": "rl", "teachers": {"add": "pico"}}}, "teachers means nothing for .*'rl'"),
        ({"a": {"kind": "rl", "when": "needed"}}, "when means nothing"),
        ({"a": {"kind": "rl", "adapt": True}}, "adapt means nothing"),
        ({"a": {"kind": "warmup", "rollouts": 4}}, "'warmup' needs teachers"),
        ({"a": {"kind": "sft", "teachers": {"add": "pico"}}}, "teachers and rollouts go together"),
        (
            {"a": {"kind": "mopd", "domains": ["add"], "teachers": {"sort": "self"}}},
            "names 'sort', which is not of its domains",
        ),
        ({"a": {"kind": "rl", "shares": {"mul": 2}}}, "domain 'mul'"),
        ({"a": {"kind": "rl", "shares": {"add": 0}}}, "gives 'add' 0: a share is above 0"),
        (
            {"a": {"kind": "rl", "domains": ["add"], "shares": {"sort": 2}}},
            "shares names 'sort', which is not of its domains",
        ),
        (
            {"a": {"kind": "merge", "members": ["pico", "pico"], "shares": {"add": 2}}},
            "shares means nothing",
        ),
        ({"self": {"kind": "rl"}}, "none of 'self', 'start'"),
        ({"a/b": {"kind": "rl"}}, "a name has letters"),
        ({}, "say at least one stage"),
        (
            {"a": {"kind": "rl"}, "b": {"kind": "rl", "parent": "a", "once": True}},
            "once: it starts from 'a'",
        ),
        ({"a": {"kind": "ppo"}}, "nodes.a.kind is 'ppo'"),
        ({"a": {"kind": "rl", "steps": 3}}, "unknown key nodes.a.steps"),
    ],
)
def test_what_is_no_graph_is_refused(nodes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe(nodes)


def test_what_the_recipe_itself_cannot_be_is_refused() -> None:
    nodes = {"a": {"kind": "rl"}}
    for more, words in (
        ({"seeds": [1, 1]}, "give different ones"),
        ({"seeds": []}, "at least one"),
        ({"base": {"ppo": {}}}, "the kinds are sft"),
        ({"baseline": "b"}, "baseline is 'b'"),
        (
            {"nodes": {"a": {"kind": "mopd", "default": "self", "adapt": True}}}
            | {"support": {"rollouts": 0}},
            "has adapt = true, which support decides, and support.rollouts is 0: set it above",
        ),
        (
            {"nodes": {"a": {"kind": "warmup", "default": "self", "rollouts": 4, "when": "needed"}}}
            | {"support": {"rollouts": 0}},
            "has when = 'needed', which support decides, and support.rollouts is 0",
        ),
        ({"domains": [DOMAINS[0], DOMAINS[0]]}, "a name of its own"),
        ({"domains": [{**DOMAINS[0], "teacher": "a"}]}, "nodes say who teaches"),
    ):
        with pytest.raises(ConfigError, match=words):
            from_dict(RoundsConfig, {"output": "out", "domains": DOMAINS, "nodes": nodes} | more)
    with pytest.raises(ConfigError, match="no node 'c': choose of a"):
        recipe(nodes).order("c")


def test_shared_nodes_have_one_place_for_all_seeds() -> None:
    found = recipe(
        {"a": {"kind": "rl", "once": True}, "b": {"kind": "rl", "parent": "a"}}, seeds=[3, 4]
    )
    assert found.place("a", 3) == found.place("a", 4) == Path("out/shared/a")
    assert found.place("b", 4) == Path("out/seed-4/b")


def test_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "a"
    assert read_state(place) is None
    state = NodeState(
        name="a", kind="rl", seed=1, digest="d", run="r", parents={"b": "q"},
        config={"trainer": {"steps": 3}}, status="done", checkpoint="x/model", seconds=2.5,
    )  # fmt: skip
    write_state(place, state)
    assert read_state(place) == state
    (place / "node.json").write_text('{"name": ')
    with pytest.raises(CheckpointError, match=r"node.json cannot be read .* remove"):
        read_state(place)


def test_a_place_is_held_once(tmp_path: Path) -> None:
    refused = pytest.raises(CheckpointError, match="another process works in")
    with locked(tmp_path), refused, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_node_of_each_domain_is_so_many_nodes() -> None:
    found = recipe(
        {
            "base": {"kind": "sft", "default": "solutions", "rollouts": 4},
            "adept": {"kind": "sft", "each": True, "parent": "base", "default": "solutions",
                      "rollouts": 4},
            "better": {"kind": "rl", "each": True, "parent": "adept", "domains": ["sort"]},
            "student": {"kind": "mopd", "parent": "base", "teachers": {"sort": "better"},
                        "default": "adept"},
            "average": {"kind": "merge", "members": ["adept", "student"]},
        }
    )  # fmt: skip
    assert set(found.nodes) == {
        "base", "adept-add", "adept-sort", "better-sort", "student", "average"
    }  # fmt: skip
    assert found.nodes["adept-add"].domains == ("add",)
    assert found.teachers_of("adept-add") == {"add": "solutions"}
    assert found.nodes["better-sort"].parent == "adept-sort"
    assert found.teachers_of("student") == {"add": "adept-add", "sort": "better-sort"}
    assert found.nodes["average"].members == ("adept-add", "adept-sort", "student")
    assert from_dict(RoundsConfig, to_dict(found)) == found  # as it is written beside the outputs


@pytest.mark.parametrize(
    "node",
    [
        {"kind": "mopd", "default": "solutions"},
        {"kind": "mopd", "teachers": {"add": "solutions"}, "default": "self"},
        {"kind": "warmup", "default": "solutions", "rollouts": 4, "when": "needed"},
    ],
)
def test_solutions_are_only_learnt_from(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="scores nothing"):
        recipe({"a": node})
