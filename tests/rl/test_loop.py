"""The loop on pico: what a run writes, and that it goes on bit for bit after any end."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aprium.base.config import load_toml
from aprium.base.errors import CheckpointError, ConfigError, EngineError, TaskError
from aprium.base.records import Group, Sample, TeacherScores, Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.model.layout import Layout
from aprium.rl import loop
from aprium.rl.credit import CreditConfig
from aprium.rl.ledger import Item, Ledger
from aprium.rl.loop import Learner, RlConfig, learn, require_continuable, run_config
from aprium.rl.pipeline import Played
from aprium.rl.rollout import DomainConfig
from aprium.rl.teachers import load_models
from aprium.train.metrics import MetricsFile
from aprium.train.trainer import Trainer
from tests.rl.conftest import RECIPE, recipe
from tests.rl.test_teachers import write_adapter

RECIPES = Path(__file__).parents[2] / "recipes"


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"step-{step:06d}" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def check_books(output: Path, steps: int) -> None:
    """Every item that was issued is in one batch at most, or open."""
    ledger = Ledger(output)
    used = [n for step in range(steps) for n in ledger.batches[step]]
    left = [entry.item.number for entry in ledger.open_entries()]
    assert sorted(ledger.batches) == list(range(steps))
    assert sorted(used + left) == list(range(ledger.num_issued))
    ledger.close()


def test_a_run_writes_what_it_says(tmp_path: Path) -> None:
    config = recipe(tmp_path / "out", evaluate={"constants": 5})
    directory = run_config(config)
    assert directory == config.output / "model"
    load_checkpoint(directory)
    metrics = MetricsFile(config.output)
    rows = metrics.read("train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(row["rewards"]) <= {"add", "next"} and 0 <= row["reward"] <= 1
        assert row["age"] == row["age_max"] == 0 and row["credit"]["episodes"] == 1.0
        assert 0 < row["length"] <= 32
        # The engine that wrote the tokens and the trainer agree up to rounding.
        assert abs(row["policy"]["mismatch"] - 1) < 1e-5
    names = {name for row in rows for name in row["rewards"]}
    assert names == {"add", "next"}
    found = json.loads((config.output / "evaluation.json").read_text())
    assert set(found["before"]["domains"]) == {"add", "next"} == set(found["constant"])
    assert found["before"]["step"] == 0 and found["after"]["step"] == 4
    check_books(config.output, 4)
    assert "groups_per_step" in (config.output / "recipe.json").read_text()


@pytest.mark.usefixtures("no_page")
def test_what_was_trained_is_there_though_the_evaluation_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(tmp_path / "out", trainer={"steps": 1}, evaluate={"constants": 5})
    real, evaluate = loop.constant_baselines, Learner._evaluate

    def constants(domains: list[DomainConfig], count: int) -> dict[str, Any]:
        if domains[0].name == "add":
            raise ValueError("no answer can be graded")
        return real(domains, count)

    async def fail(learner: Learner, player: Any, step: int) -> None:
        if step:
            raise EngineError("gone away")
        await evaluate(learner, player, step)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "_evaluate", fail)
        with pytest.raises(EngineError, match="gone away"):
            run_config(config)
    load_checkpoint(config.output / "model")
    monkeypatch.setattr(loop, "constant_baselines", constants)  # the same command goes on
    with caplog.at_level(logging.WARNING, "aprium"):
        assert run_config(config) == config.output / "model"
    assert "constant answers of domain 'add' failed: no answer can be graded" in caplog.text
    found = json.loads((config.output / "evaluation.json").read_text())
    assert set(found["constant"]) == {"next"}


@pytest.mark.usefixtures("no_page")
def test_in_turns_a_run_is_reproducible_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight, cut = (recipe(tmp_path / name, evaluate=None) for name in ("one", "two"))
    run_config(straight)
    run_config(recipe(cut.output, trainer={"steps": 2}, evaluate=None))
    wanted = weights(straight.output, 4)
    assert same(weights(cut.output, 2), weights(straight.output, 2))
    run_config(cut)
    assert same(weights(cut.output, 4), wanted)
    check_books(cut.output, 4)


@pytest.mark.usefixtures("no_page")
def test_a_curriculum_goes_on_where_it_was(tmp_path: Path) -> None:
    changes = {"rollout": {"pool": 4}, "curriculum": {"steps": 3}, "evaluate": None}
    config = recipe(tmp_path / "out", **changes)
    run_config(config)
    wanted = weights(config.output, 4)
    shutil.rmtree(config.output / "step-000004")
    lines = (config.output / "ledger.jsonl").read_text().splitlines(keepends=True)
    trained = [i for i, line in enumerate(lines) if '"trained", "step": 2' in line]
    (config.output / "ledger.jsonl").write_text("".join(lines[: trained[0] + 1]))
    run_config(config)  # step 2 again as it was, step 3 dealt anew
    assert same(weights(config.output, 4), wanted)
    items = [json.loads(line) for line in lines if '"issued"' in line]
    assert max(item["index"] for item in items) < 4


def test_a_curriculum_that_ran_ahead_deals_again_as_much_as_it_had(tmp_path: Path) -> None:
    """With few groups at a time that is less than the age of what is played would allow."""
    curriculum = {"rollout": {"pool": 16}, "curriculum": {"steps": 3}, "evaluate": None}
    config = recipe(tmp_path / "out", **curriculum, pipeline={"max_age": 4, "max_groups": 1})

    def learner() -> Learner:
        return Learner(config, None, None, PICO_DIR)  # type: ignore[arg-type]

    def played(item: Item) -> Played:
        one = Trajectory(
            task="t",
            domain=item.domain,
            tokens=(1, 2),
            sampled=(False, True),
            logprobs=(0.0, -1.0),
            reward=1.0,
            weight_spans=((0, 1),),
        )
        group = Group(task="t", trajectories=(one,) * 4)
        return Played(item=item, group=group, learnt=learn(group, CreditConfig(), ()), age=0)

    def take(learner: Learner, ledger: Ledger, items: list[Item]) -> None:
        async def next_batch(step: int) -> list[Played]:
            if step not in ledger.batches:
                ledger.take(step, [item.number for item in items])
            return [*map(played, items)]

        player: Any = SimpleNamespace(
            ledger=ledger, pipeline=SimpleNamespace(next_batch=next_batch)
        )
        learner._pushed = 0
        asyncio.run(learner._next(player))

    first, ledger = learner(), Ledger(config.output)
    items = [first._dealer(number) for number in range(4)]
    for item in items:
        ledger.issue(item, 0)
    take(first, ledger, items[:3])
    wanted = [first._dealer(number) for number in range(4, 12)]
    ledger.close()
    again, ledger = learner(), Ledger(config.output)  # killed before there was a checkpoint
    take(again, ledger, items[:3])
    assert [again._dealer(number) for number in range(4, 12)] == wanted
    ledger.close()


def test_what_cannot_be_continued_is_refused_at_the_start(tmp_path: Path) -> None:
    config = recipe(tmp_path / "out", evaluate=None)
    one = Trajectory(
        task="t",
        domain="add",
        tokens=(1, 2),
        sampled=(False, True),
        logprobs=(0.0, -1.0),
        weight_spans=((0, 1),),
    )
    ledger = Ledger(config.output)
    for number in range(3):
        ledger.issue(Item(number=number, domain="add", index=number), 0)
        ledger.finish(number, Group(task="t", trajectories=(one,)))
    ledger.take(0, [0])
    ledger.take(1, [1])
    ledger.close()

    def start(changes: dict[str, Any], step: int) -> None:
        weights: Any = SimpleNamespace(num_bytes=0)
        learner = Learner(recipe(config.output, evaluate=None, **changes), None, weights, PICO_DIR)  # type: ignore[arg-type]
        learner.load_state_dict({"step": step, "dealer": {}})
        learner.next_batch()

    renamed = [{"name": "sum", "family": "exercises", "options": {"families": ["add"]}}]
    with pytest.raises(ConfigError, match="an item of domain 'add' to go on with"):
        start({"domains": renamed}, 2)  # item 2 is open
    taught = {"teachers": {"default": "self"}, "credit": {"kl_weight": 1.0}}
    with pytest.raises(ConfigError, match="no teacher scored the episodes of step 1"):
        start(taught, 1)
    ledger = Ledger(config.output)
    require_continuable(ledger, recipe(config.output, **taught), 2)  # item 2 can be scored yet
    ledger.compact(1)
    ledger.close()
    with pytest.raises(CheckpointError, match="no longer has the episodes of step 0"):
        start({}, 0)  # without the checkpoint that it was compacted for


@pytest.mark.usefixtures("no_page")
def test_steps_after_the_last_checkpoint_are_taken_again(tmp_path: Path) -> None:
    """With generation ahead of training too, since the ledger has the batches."""
    config = recipe(tmp_path / "out", pipeline={"max_age": 2}, evaluate=None)
    run_config(config)
    wanted, rows = weights(config.output, 4), MetricsFile(config.output).read("train")
    assert max(row["age_max"] for row in rows) in (1, 2)
    shutil.rmtree(config.output / "step-000004")  # killed before it was written
    run_config(config)
    assert same(weights(config.output, 4), wanted)
    after = MetricsFile(config.output).read("train")
    assert [row["rewards"] for row in after] == [row["rewards"] for row in rows]
    check_books(config.output, 4)


@pytest.mark.usefixtures("no_page")
def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path / "out", pipeline={"max_age": 1}, evaluate={"every": 2})
    step = Trainer.train_step

    def stop_after_second(self: Trainer, samples: Any, **options: Any) -> dict[str, Any]:
        figures = step(self, samples, **options)
        self._stop = figures["step"] == 2
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_second)
        assert run_config(config) is None
    assert run_config(config) is not None
    check_books(config.output, 4)
    rows = MetricsFile(config.output).read("accuracy")
    assert [row["step"] for row in rows] == [0, 2, 4]


@pytest.mark.usefixtures("no_page")
def test_clips_bound_what_changed_since_an_episode_was_played(tmp_path: Path) -> None:
    policy = {"proximal": "behaviour", "eps_low": 1e-3, "eps_high": 1e-3, "mismatch": "none"}
    config = recipe(
        tmp_path / "out",
        pipeline={"max_age": 1},
        optim={"lr": 1e-3},
        loss={"policy": policy},
        evaluate=None,
    )
    run_config(config)
    rows = MetricsFile(config.output).read("train")
    assert any(row["policy"]["clipped"] > 0 for row in rows if row["age_max"])
    assert all(row["policy"]["clipped"] == 0 for row in rows if not row["age_max"])


@pytest.mark.usefixtures("no_page")
def test_adapters_learn_over_a_frozen_base(tmp_path: Path) -> None:
    config = recipe(
        tmp_path / "out", lora={"r": 4}, trainer={"steps": 4}, optim={"lr": 1e-2}, evaluate=None
    )
    directory = run_config(config)
    assert directory == config.output / "adapter"
    assert (directory / "adapter_config.json").exists()
    rows = MetricsFile(config.output).read("train")
    assert max(row["grad_norm"] for row in rows) > 0
    for row in rows:
        assert abs(row["policy"]["mismatch"] - 1) < 1e-5  # the engine has them merged


@pytest.mark.usefixtures("no_page")
def test_what_came_before_a_kept_checkpoint_is_forgotten(tmp_path: Path) -> None:
    trainer = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 1}
    config = recipe(tmp_path / "out", trainer=trainer, evaluate=None)
    run_config(config)
    lines = [json.loads(line) for line in (config.output / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "trained"] == [0, 1, 2, 3]
    kept = {line["item"] for line in lines if line["event"] == "finished"}
    assert kept == {n for line in lines if line.get("step", 0) >= 3 for n in line["items"]}


@pytest.mark.usefixtures("no_page")
def test_an_engine_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise ValueError("out of order")

    monkeypatch.setattr("aprium.engine.engine.Engine.step", fail)
    with pytest.raises(EngineError, match="out of order"):
        run_config(recipe(tmp_path / "out", evaluate=None))


def test_an_episode_without_scores_is_left_out() -> None:
    one, other = (
        Trajectory(
            task="t",
            domain="d",
            tokens=(1, 2),
            sampled=(False, True),
            logprobs=(0.0, -1.0),
            reward=reward,
            weight_spans=((0, 1),),
        )
        for reward in (0.0, 1.0)
    )
    said = TeacherScores(teacher="x", logprobs=(0.0, -0.5))
    group = Group(task="t", trajectories=(one, other))
    found = learn(group, CreditConfig(kl_weight=1.0), (None, said))
    assert [sample.teacher_logprob for sample in found.samples] == [(0.0, -0.5)]
    assert found.figures["unscored"] == 1.0
    assert len(learn(group, CreditConfig(), (None, said)).samples) == 2
    assert learn(group, CreditConfig(kl_weight=1.0), (None, None)).samples == ()


@pytest.mark.parametrize("form", ["sampled", "k3", "top_k", "full"])
def test_a_domains_weight_weighs_its_teacher_in_every_form(form: str) -> None:
    """In "sampled" `rl_weight` weighs all that is said, elsewhere `kl_weight` alone the teacher."""

    def sample(domain: str) -> Sample:
        one = Trajectory(
            task="t",
            domain=domain,
            tokens=(1, 2, 3),
            sampled=(False, True, False),
            logprobs=(0.0, -1.0, 0.0),
            reward=1.0,
            weight_spans=((0, 1),),
        )
        said = TeacherScores(teacher="x", logprobs=(0.0, -0.5, 0.0), top=({}, {1: -0.5}, {}))
        config = CreditConfig(kl_weight=2.0, domain_weights={"light": 0.25})
        return learn(Group(task="t", trajectories=(one,)), config, (said,), form).samples[0]

    light, usual = sample("light"), sample("other")
    assert (light.rl_weight, usual.rl_weight) == ((0.0, 0.25, 0.0), (0.0, 1.0, 0.0))
    assert usual.kl_weight == (0.0, 2.0, 0.0)
    assert light.kl_weight == (0.0, 2.0 if form == "sampled" else 0.5, 0.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"domains": []}, ConfigError, "domains is empty"),
        ({"domains": [{"name": "a", "family": "nothing"}]}, TaskError, "no environment 'nothing'"),
        ({"credit": {"kl_weight": 1.0}}, ConfigError, r"add a \[teachers\] table"),
        ({"loss": {"policy": {"distillation": "full"}}}, ConfigError, r"add a \[teachers\] table"),
        (
            {"loss": {"policy": {"distillation": "top_k"}}, "teachers": {}},
            ConfigError,
            "with teachers.top",
        ),
        (
            {"loss": {"policy": {"eps_low": 0.1}}},
            ConfigError,
            "eps_low is 0.1 .* one update is made of each batch",
        ),
        ({"loss": {"policy": {"ratio": "sequence"}}}, ConfigError, "proximal = 'behaviour'"),
        ({"credit": {"domain_weights": {"ad": 1}}}, ConfigError, "names 'ad', .* are add, next"),
        ({"credit": {"kl_weights": {"ad": 0}}}, ConfigError, "kl_weights names 'ad'"),
        ({"credit": {"effort": {"domains": ["ad"]}}}, ConfigError, "effort.domains names 'ad'"),
        ({"rollout": {"group_size": 1}}, ConfigError, "group_size is 1 .* 'leave_one_out'"),
        ({"curriculum": {"steps": 3}}, ConfigError, "with rollout.pool"),
        ({"rollout": {"temperature": 0.0}}, ConfigError, "episodes of a group must differ"),
        ({"engine": {"max_num_sequences": 4}}, ConfigError, "unknown key engine.max_num_sequences"),
        (
            {"teachers": {}, "credit": {"kl_weight": 1.0}},
            ConfigError,
            "domain 'add' is 1 and it has no teacher",
        ),
        (
            {"domains": [{"name": "a", "family": "exercises", "teacher": "b"}]},
            ConfigError,
            "has teacher 'b' and there are no teachers",
        ),
        (
            {"domains": [{"name": "a", "family": "exercises", "options": {"families": ["last"]}}]},
            TaskError,
            "ask for fewer than 3",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_config(recipe(tmp_path / "out", **changes))


@pytest.mark.usefixtures("no_page")
def test_every_form_of_distillation_is_that_of_the_domains_teacher(tmp_path: Path) -> None:
    adapter = write_adapter(PICO_DIR, tmp_path / "adapter", ("mlp", "mamba_in"), 0, size=0.2)
    listed = [{"name": "t", "checkpoint": "pico", "adapter": str(adapter)}]
    first, second = RECIPE["domains"]
    found: dict[str, Any] = {}
    for form in ("sampled", "top_k", "full"):
        config = recipe(
            tmp_path / form,
            domains=[{**first, "teacher": "t"}, {**second, "teacher": "self"}],
            trainer={"steps": 1},
            pipeline={"groups_per_step": 6},
            rollout={"group_size": 1},
            credit={"kl_weight": 1.0, "reward_weight": 0.0},
            loss={"policy": {"distillation": form}},
            teachers={"teachers": listed, "top": 0 if form == "full" else 8},
            evaluate=None,
        )
        run_config(config)
        (found[form],) = MetricsFile(config.output).read("train")
        ledger = Ledger(config.output)
        played = [t for e in ledger.entries.values() if e.group for t in e.group.trajectories]
        ledger.close()
    # The same tokens under both models, one episode after the other.
    assert config.teachers is not None
    models = load_models(config.teachers, "pico", {"add": "t", "next": "self"})
    gaps, divergences = [], []
    for episode in played:
        at = [i for i, sampled in enumerate(episode.sampled) if sampled]
        tokens, layout = torch.tensor(episode.tokens), Layout.packed([len(episode.tokens)])
        with torch.no_grad():
            mine, theirs = (
                m.logits(m(tokens, layout)).double().log_softmax(-1)[[i - 1 for i in at]]
                for m in (models["next"], models[episode.domain])
            )
        gaps += (mine - theirs).gather(1, tokens[at][:, None])[:, 0].tolist()
        divergences += (mine.exp() * (mine - theirs)).sum(1).tolist()
    mean = sum(divergences) / len(divergences)
    assert mean > 0.1
    assert found["full"]["kl"] == pytest.approx(mean, rel=1e-3)
    assert 0.1 * mean < found["top_k"]["kl"] < mean  # all but a few tokens are one bucket there
    gap = found["sampled"]["policy"]["teacher_gap"]
    assert gap == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)


def test_whole_distributions_need_teachers_in_the_process(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'full'.* add a .teachers. table"):
        recipe(tmp_path / "out", loss={"policy": {"distillation": "full"}})
    remote = {"name": "t", "remote": {"url": "http://there", "model": "m"}}
    config = recipe(
        tmp_path / "out",
        loss={"policy": {"distillation": "full"}},
        teachers={"teachers": [remote], "default": "t"},
    )
    with pytest.raises(ConfigError, match="the teacher of 'add' is 't', which is on a server"):
        run_config(config)


def test_what_may_be_none_is_switched_off_with_false(tmp_path: Path) -> None:
    policy = {"advantage_clip": False, "sequence_bound": False}
    config = recipe(tmp_path / "out", evaluate=False, loss={"policy": policy})
    assert config.evaluate is None
    assert config.loss.policy.advantage_clip is config.loss.policy.sequence_bound is None
    alone = recipe(tmp_path, rollout={"group_size": 1}, credit={"baseline": "none"})
    assert alone.rollout.group_size == 1


def test_the_shipped_recipe_can_be_read() -> None:
    config = load_toml(RlConfig, RECIPES / "rl-pico.toml")
    assert [domain.name for domain in config.domains] == ["sort", "compare"]
    assert config.credit.drop_equal and config.trainer.freeze_router


KILLED = """
import sys
from pathlib import Path
from tests.rl.conftest import recipe
from aprium.rl.loop import run_config
changes = {"trainer": {"steps": 8}, "pipeline": {"max_age": int(sys.argv[2])}, "evaluate": None}
run_config(recipe(Path(sys.argv[1]), **changes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("max_age", [0, 2])
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(
    tmp_path: Path, max_age: int
) -> None:
    """With kill -9, at moments that move on; in turns even the weights are the same bits."""

    def start(output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", KILLED, str(output), str(max_age)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment)

    output = tmp_path / "killed"
    kills = 0
    while not (output / "model").exists():
        process, begun = start(output), time.monotonic()
        size, changes = _size(output), 0
        while process.poll() is None:  # let it write to the ledger for a while, then kill it
            time.sleep(0.005)
            changes, size = changes + (_size(output) != size), _size(output)
            if changes > 2 + kills and kills < 6:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            assert time.monotonic() - begun < 280
        process.wait()
    assert kills >= 3
    check_books(output, 8)
    rows = MetricsFile(output).read("train")
    assert [row["step"] for row in rows] == list(range(1, 9))
    if max_age == 0:
        assert start(tmp_path / "straight").wait() == 0
        assert same(weights(output, 8), weights(tmp_path / "straight", 8))


def _size(output: Path) -> int:
    """Return the bytes of the ledger, if there is one."""
    file = output / "ledger.jsonl"
    return file.stat().st_size if file.exists() else 0
