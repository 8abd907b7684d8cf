"""What a node's own recipe is, what it depends on, and what it would cost."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from aprium.base.errors import CheckpointError, ConfigError, EngineError, TaskError
from aprium.base.records import Trajectory
from aprium.checkpoint.hub import resolve
from aprium.data.sources import DataConfig, Mixture, SourceConfig, Text
from aprium.envs.dialogue import ChatFormat, Dialogue
from aprium.envs.family import take
from aprium.rl import demonstrations, stages
from aprium.rl.costs import cost, outline
from aprium.rl.lineage import NodeState, RoundsConfig, digest, write_state
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.rl.rounds import check, jobs_of
from aprium.rl.stages import Stage, digest_of, measure, resolved, rl_config, sft_config
from aprium.rl.teachers import SELF, TeachersConfig
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from tests.rl.test_lineage import recipe
from tests.rl.test_teachers import TEXTS, trajectory
from tests.scripted import ScriptedPolicy

BASE = {
    "rl": {"trainer": {"steps": 3}, "pipeline": {"groups_per_step": 2}},
    "mopd": {"trainer": {"steps": 5, "threads": 1}, "pipeline": {"groups_per_step": 4}},
    "sft": {"trainer": {"steps": 7}, "tokens_per_step": 512},
    "warmup": {"trainer": {"steps": 2}},
}
NODES: dict[str, Any] = {
    "rlvr": {"kind": "rl"},
    "adder": {"kind": "rl", "parent": "rlvr", "domains": ["add"]},
    "warm": {
        "kind": "warmup", "parent": "rlvr", "teachers": {"add": "adder"}, "rollouts": 6,
        "when": "needed",
    },
    "one": {
        "kind": "mopd", "parent": "warm", "teachers": {"add": "adder"}, "default": "self",
        "config": {"trainer": {"steps": 9}},
    },
    "imitation": {
        "kind": "sft", "parent": "rlvr", "teachers": {"add": "adder"}, "rollouts": 6,
        "config": {"data": {"max_length": 300}},
    },
    "mean": {"kind": "merge", "members": ["rlvr", "adder"]},
}  # fmt: skip
PLAY = {"group_size": 4, "max_tokens": 20, "max_turns": 2, "episode_tokens": 100}


def config(nodes: dict[str, Any] | None = None, **more: Any) -> RoundsConfig:
    values = {"base": BASE, "rollout": PLAY, **more}
    return recipe(nodes or NODES, **values)


def stage(name: str, seed: int = 0, **more: Any) -> Stage:
    return Stage(recipe=config(**more), name=name, seed=seed)


def test_settings_of_a_node_go_over_those_of_its_kind() -> None:
    found = rl_config(stage("one", 3), Path("o"), "pico", TeachersConfig())
    assert (found.trainer.steps, found.trainer.threads) == (9, 1)
    assert found.trainer.seed == found.rollout.seed == 3
    assert (found.output, found.checkpoint, found.evaluate) == (Path("o"), "pico", None)
    assert [d.teacher for d in found.domains] == ["adder", SELF]
    # Distillation: one rollout of a task, the teacher's word alone.
    assert found.rollout.group_size == 1 and found.rollout.max_tokens == 20
    assert (found.credit.kl_weight, found.credit.reward_weight) == (1.0, 0.0)
    plain = rl_config(stage("adder"), Path("o"), "pico", None)
    assert (plain.rollout.group_size, plain.credit.kl_weight) == (4, 0.0)
    assert [d.name for d in plain.domains] == ["add"] and plain.teachers is None


def test_a_node_has_shares_of_its_own() -> None:
    nodes = {name: {**node} for name, node in NODES.items()}
    nodes["one"]["shares"] = nodes["rlvr"]["shares"] = {"add": 3.0}
    nodes["imitation"] |= {"default": "adder", "shares": {"sort": 0.5}}
    found = config(nodes)
    one, learnt = (Stage(recipe=found, name=name, seed=0) for name in ("one", "imitation"))
    drawn = rl_config(one, Path("o"), "pico", TeachersConfig())
    assert {d.name: d.weight for d in drawn.domains} == {"add": 3.0, "sort": 1.0}
    samples = {"add": Path("a"), "sort": Path("b")}
    sources = sft_config(learnt, Path("o"), "pico", samples).data.sources
    assert {s.name: s.weight for s in sources} == {"add": 1.0, "sort": 0.5}
    assert digest_of(found, "rlvr", 0) != digest_of(config(), "rlvr", 0)


def test_the_form_that_support_chose_is_taken() -> None:
    assert (
        rl_config(
            stage("one"), Path("o"), "pico", TeachersConfig(), "sampled"
        ).loss.policy.distillation
        == "sampled"
    )
    found = rl_config(stage("one"), Path("o"), "pico", TeachersConfig(), "top_k")
    assert found.loss.policy.distillation == "top_k"
    assert found.teachers is not None and found.teachers.top == 20


def test_samples_of_teachers_go_beside_other_data() -> None:
    found = sft_config(stage("imitation", 2), Path("o"), "pico", {"add": Path("a.jsonl")})
    (source,) = found.data.sources
    assert (source.kind, source.name, source.path) == ("samples", "add", Path("a.jsonl"))
    assert (found.data.max_length, found.tokens_per_step, found.data.seed) == (300, 512, 2)
    # Without other settings every episode fits.
    warm = sft_config(stage("warm"), Path("o"), "pico", {"add": Path("a.jsonl")})
    assert warm.data.max_length == 100 and warm.tokens_per_step >= 100


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"config": {"checkpoint": "x"}}, "config sets checkpoint, which the graph says"),
        ({"config": {"trainer": {"seed": 3}}}, "config sets trainer.seed"),
        ({"config": {"trainer": {"step": 3}}}, r"nodes.a: unknown key trainer.step"),
        ({"config": {"teachers": {"top": 3}}}, "kind 'rl' has no teachers"),
        ({"config": {"rollout": {"temperature": 0}}}, "nodes.a: rollout.temperature is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(node: Any, words: str) -> None:
    broken = config({"z": {"kind": "rl"}, "a": {"kind": "rl", **node}})
    with pytest.raises(ConfigError, match=words):
        check(broken, [])


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("rl", {"trainer": 3}, "trainer of .base.rl. or nodes.a.config is 3: it must be a table"),
        ("rl", {"rollout": [1]}, r"rollout of .* is \[1\]: it must be a table"),
        ("mopd", {"loss": 3}, "loss of .* is 3: it must be a table"),
        ("mopd", {"loss": {"policy": 3}}, "loss.policy of .* is 3: it must be a table"),
        ("mopd", {"teachers": 3}, "teachers of .* is 3"),
        ("mopd", {"credit": "x"}, "credit of .* is 'x'"),
        ("warmup", {"data": "x"}, "data of .* is 'x'"),
        ("warmup", {"data": {"sources": 3}}, "data.sources is 3: it must be a list"),
        ("warmup", {"data": {"max_length": "x"}}, "data.max_length is 'x': it must be of type int"),
    ],
)
def test_what_is_of_the_wrong_type_is_said(kind: str, values: Any, words: str) -> None:
    node: dict[str, Any] = {"kind": kind}
    if kind != "rl":
        node["default"] = "self"
    if kind == "warmup":
        node["rollouts"] = 4
    with pytest.raises(ConfigError, match=words):
        outline(recipe({"a": node}, base={kind: values}))
    with pytest.raises(ConfigError, match=words):
        outline(recipe({"a": node | {"config": values}}))


def test_a_teacher_on_a_server_cannot_give_whole_distributions() -> None:
    remotes = {"there": {"url": "http://there", "model": "m"}}
    full = {"loss": {"policy": {"distillation": "full"}}}
    node = {"kind": "mopd", "teachers": {"add": "there"}, "default": "self", "config": full}
    broken = config({"a": node}, remotes=remotes)
    words = "nodes.a: .*'full' and the teacher of 'add' is 'there', which is on a server"
    with pytest.raises(ConfigError, match=words):
        check(broken, [])
    with pytest.raises(ConfigError, match=words):
        outline(broken)
    outline(config({"a": node | {"adapt": True}}, remotes=remotes))  # support says which form
    outline(config({"a": node | {"teachers": {"add": "pico"}}}, remotes=remotes))


def test_a_digest_stands_for_a_node_and_what_it_came_from() -> None:
    plain = config()
    digests = {name: digest_of(plain, name, 0) for name in plain.nodes}
    assert len(set(digests.values())) == len(digests)
    assert digests == {name: digest_of(config(output="other"), name, 0) for name in plain.nodes}
    assert all(digest_of(plain, name, 1) != found for name, found in digests.items())
    # A change reaches what came of it, and nothing else; how is evaluated changes no weights.
    nodes = NODES | {"adder": {**NODES["adder"], "config": {"trainer": {"steps": 4}}}}
    after = {name: digest_of(config(nodes), name, 0) for name in plain.nodes}
    changed = {name for name in digests if digests[name] != after[name]}
    assert changed == {"adder", "warm", "one", "imitation", "mean"}
    assert digests["one"] == digest_of(config(evaluate={"items": 3}), "one", 0)
    silent = NODES | {"adder": {**NODES["adder"], "evaluate": False}}
    assert digests["adder"] == digest_of(config(silent), "adder", 0)
    started = digest_of(config(checkpoint="runs/other"), "rlvr", 0)
    assert started != digests["rlvr"]


def rounds(count: int) -> RoundsConfig:
    """Return rounds in each of which a specialist branches off, and teaches."""
    nodes: dict[str, Any] = {"s0": {"kind": "rl"}}
    for i in range(count):
        nodes[f"t{i}"] = {"kind": "rl", "parent": f"s{i}"}
        nodes[f"s{i + 1}"] = {"kind": "mopd", "parent": f"s{i}", "default": f"t{i}"}
    return config(nodes)


def test_a_digest_is_made_of_its_parents_digests_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    few = rounds(3)

    def plain(name: str) -> str:
        return digest([resolved(few, name, 4), [plain(parent) for parent in few.parents(name)]])

    assert digest_of(few, "s3", 4) == plain("s3")
    asked: list[str] = []
    monkeypatch.setattr(stages, "resolved", lambda recipe, name, seed: asked.append(name) or name)
    many = rounds(14)
    known: dict[tuple[str, int], str] = {}
    digest_of(many, "s14", 0, known)
    assert sorted(asked) == sorted(many.nodes)  # and not thousands of times
    digest_of(many, "t13", 0, known)
    assert len(asked) == len(many.nodes)


def test_what_a_node_needs_is_looked_for_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    many, asked, real = rounds(14), [], RoundsConfig.parents
    monkeypatch.setattr(
        RoundsConfig, "parents", lambda self, name: asked.append(name) or real(self, name)
    )
    assert set(many.order("s14")) == set(many.nodes)
    assert len(asked) == len(many.nodes)


def test_what_a_node_was_run_with_is_not_changed_under_it(tmp_path: Path) -> None:
    before = config(output=str(tmp_path))
    place = before.place("rlvr", 0)
    state = NodeState(
        name="rlvr", kind="rl", seed=0, digest=digest_of(before, "rlvr", 0), run="first",
        config=resolved(before, "rlvr", 0), status="done", checkpoint="m",
    )  # fmt: skip
    write_state(place, state)
    check(before, jobs_of(before))
    base = BASE | {"rl": {"trainer": {"steps": 4}, "pipeline": {"groups_per_step": 2}}}
    after = config(output=str(tmp_path), base=base)
    with pytest.raises(ConfigError, match=r"'rlvr' was run with .*config.trainer.steps: 3 then, 4"):
        check(after, jobs_of(after))
    # A node that came from a run which is gone would be mixed with another one.
    child = dataclasses.replace(
        state, name="adder", digest=digest_of(before, "adder", 0), parents={"rlvr": "zeroth"}
    )
    write_state(before.place("adder", 0), child)
    with pytest.raises(ConfigError, match="'adder' came from a run of 'rlvr' that is gone"):
        check(before, jobs_of(before))


def test_models_are_found_where_nodes_left_them(tmp_path: Path) -> None:
    remotes = {"there": {"url": "http://there", "model": "m"}}
    one = stage("one", output=str(tmp_path), remotes=remotes)
    with pytest.raises(CheckpointError, match="'one' needs 'adder', which is not done"):
        one.locate("adder")
    state = NodeState(
        name="adder", kind="rl", seed=0, digest="d", run="r", status="done",
        checkpoint="x/model", adapter="x/adapter", base="pico",
    )  # fmt: skip
    write_state(one.recipe.place("adder", 0), state)
    (teacher,) = one.teachers({"top": 4}).teachers
    assert (teacher.name, teacher.checkpoint, teacher.adapter) == (
        "adder", "pico", Path("x/adapter")
    )  # fmt: skip
    assert one.locate("pico").as_teacher("p").checkpoint == "pico"
    remote = one.locate("there").as_teacher("t").remote
    assert remote is not None and remote.url == "http://there"


def test_costs_are_counted_in_tokens() -> None:
    plain = config(evaluate={"items": 10, "max_tokens": 8, "max_turns": 1})
    evaluated = 10 * 2 * 8
    written = 20 * 2  # of an episode: two turns of at most 20
    one = cost(plain, "rlvr", 0)
    assert (one.sampled, one.scored, one.trained) == (
        evaluated + 3 * 2 * 4 * written, 0, 3 * 2 * 4 * 100
    )  # fmt: skip
    distilled = cost(plain, "one", 0)
    support = 32 * 2  # rollouts in two domains, "self" among the teachers
    assert distilled.sampled == evaluated + support * written + 9 * 4 * written
    assert distilled.scored == support * 2 * 100 + 9 * 4 * 100
    imitation = cost(plain, "imitation", 0)
    assert (imitation.sampled, imitation.scored) == (evaluated + 6 * written, 0)
    assert imitation.trained == 7 * 512
    assert cost(plain, "mean", 0).trained == 0
    rows = outline(config(seeds=[1, 2]))
    assert [row["node"] for row in rows[:-1]] == list(plain.order())
    total = sum(int(row["trained"].replace(",", "")) for row in rows[:-1])
    assert rows[-1]["node"] == "all, 2 seeds" and rows[-1]["trained"] == f"{2 * total:,}"


def test_demonstrations_are_those_that_earned_enough(tmp_path: Path) -> None:
    good, bad = (
        dataclasses.replace(trajectory(text), reward=reward)
        for text, reward in (("plum", 1.0), ("plums", 0.25))
    )
    nothing: Trajectory = dataclasses.replace(
        good, sampled=(False,) * len(good.tokens), weight_spans=()
    )
    file = tmp_path / "rollouts" / "add.jsonl"
    found = demonstrations.write_samples([good, bad, nothing], file, min_reward=0.5)
    assert (found["played"], found["kept"], found["reward"]) == (3, 1, 0.75)
    (line,) = file.read_text().splitlines()
    assert f'"tokens": {list(good.tokens)}' in line and '"weights": [0.0, 1.0' in line
    assert demonstrations.write_samples([good, bad], file, min_reward=None)["kept"] == 2
    with pytest.raises(TaskError, match="of 1 episodes of add that its teacher played none has"):
        demonstrations.write_samples([bad], file, min_reward=0.5)


def test_solutions_are_shown_as_the_student_is_asked(tmp_path: Path) -> None:
    path = resolve("pico")
    tokenizer, template = Tokenizer.load(path), ChatTemplate.load(path)
    drills = {"kind": "lookup", "least": 3, "most": 4}
    domain = DomainConfig(name="d", family="drills", options=drills, thinking=False)
    found = demonstrations.solve(path, domain, 7, 5)
    assert len(found) == 5
    for index, sample in enumerate(found):
        task = take(domain.make(), index, seed=7)
        dialogue = Dialogue(domain.chat(ChatFormat(tokenizer=tokenizer, template=template)))
        dialogue.show(task.messages)
        asked = len(dialogue.tokens)
        assert list(sample.tokens[:asked]) == dialogue.tokens
        assert sample.ce_weight == (0.0,) * asked + (1.0,) * (len(sample.tokens) - asked)
        assert tokenizer.decode(sample.tokens[asked:]).strip() == task.data["answer"]
        assert sample.tokens[-1] in tokenizer.eos_token_ids
    file = tmp_path / "d.jsonl"
    demonstrations.write_solutions(found, file)
    source = SourceConfig(kind="samples", name="d", path=file)
    data = DataConfig(sources=(source,), max_length=100)
    mixture = Mixture(data, Text(tokenizer, template))
    read = {mixture.draw()[1].tokens for _ in range(5)}
    assert read == {sample.tokens for sample in found}
    with pytest.raises(TaskError, match="only domains whose tasks are solved in one"):
        demonstrations.solve(path, DomainConfig(name="t", family="tool-use"), 0, 3)


def test_solutions_cost_nothing_to_sample() -> None:
    nodes = {"a": {"kind": "sft", "default": "solutions", "rollouts": 6}}
    nodes["b"] = nodes["a"] | {"teachers": {"add": "pico"}}
    one, other = (cost(config(nodes), name, 0) for name in nodes)
    assert one.trained == other.trained and other.sampled == one.sampled + 6 * 20 * 2


def test_support_that_was_not_measured_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remotes = {"gone": {"url": "http://127.0.0.1:1", "model": "m", "retries": 0}}
    node = {"kind": "warmup", "default": "gone", "rollouts": 6, "when": "needed"}
    one = stage("w", nodes={"w": node}, output=str(tmp_path), remotes=remotes)
    monkeypatch.setattr(
        demonstrations,
        "play_checkpoint",
        lambda *rest: [trajectory(text, domain) for text in TEXTS for domain in ("add", "sort")],
    )
    for _ in range(2):  # not at the next start either
        with pytest.raises(EngineError, match="none has scores of teacher 'gone'"):
            measure(one, "pico")
        assert not (one.place / "support.json").exists()
    one.place.mkdir(parents=True)
    (one.place / "support.json").write_text("{}")  # of no domain
    with pytest.raises(EngineError, match="none has scores of teacher 'gone'"):
        measure(one, "pico")


def test_a_student_that_fails_everywhere_has_no_support() -> None:
    path = resolve("pico")
    chat = ChatFormat(tokenizer=Tokenizer.load(path), template=ChatTemplate.load(path))
    domain = DomainConfig(name="add", family="exercises", options={"families": ["add"]})
    policy = ScriptedPolicy(chat, [EngineError("it broke"), EngineError("it broke"), "x"])
    played = demonstrations.play(policy, chat, [domain], RolloutConfig(), 2)
    with pytest.raises(TaskError, match=r"all 2 episodes of 'add' failed, .*it broke"):
        asyncio.run(played)
