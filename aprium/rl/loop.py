"""Reinforcement learning from a recipe: the model plays, is graded, and learns of it, step by step.

The trainer is that of every other stage. Its source of batches is a `Learner`, which plays the
policy's part in a thread of its own: it gives an engine the weights of each step, lets a pipeline
play and credit groups of episodes (with teachers where domains name them), and hands on a batch
when it is due. Under `output`, beside what every run has, are `ledger.jsonl` (see `rl/ledger.py`)
and `evaluation.json`. The same recipe and output continue a run that was stopped or killed.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from aprium.base.config import from_dict, load_toml
from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.base.records import Group, Sample
from aprium.checkpoint.hub import resolve
from aprium.engine.config import EngineConfig
from aprium.envs.places import Places
from aprium.model.model import HybridModel
from aprium.parallel.mesh import require_one_process
from aprium.rl.cluster import Cluster, ClusterConfig, RemoteTeachers
from aprium.rl.credit import CreditConfig, Credited, credit
from aprium.rl.curriculum import CurriculumConfig
from aprium.rl.deal import Course, Deal, Dealer
from aprium.rl.evaluate import (
    EvaluateConfig,
    Evaluation,
    as_figures,
    constant_baselines,
)
from aprium.rl.figures import Tally
from aprium.rl.generation import Embedded, Generation
from aprium.rl.judging import GroupJudge, JudgeConfig
from aprium.rl.ledger import Item, Ledger, Scores
from aprium.rl.pipeline import Pipeline, PipelineConfig, Played, Stages
from aprium.rl.rollout import DomainConfig, RolloutConfig, Rollouts
from aprium.rl.teachers import Teachers, TeachersConfig, load_models
from aprium.rl.weights import Weights
from aprium.train import checkpoint, lora
from aprium.train.lora import LoraConfig
from aprium.train.losses import LossConfig
from aprium.train.metrics import MetricsFile
from aprium.train.optim import OptimConfig
from aprium.train.policy_loss import PolicyLossConfig
from aprium.train.pretrain import export, recipe_text, write_json
from aprium.train.sft import identity, open_model, read_text
from aprium.train.trainer import Trainer, TrainerConfig

log = get_logger("rl")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """A recipe.

    `checkpoint` is a directory, a hub id or pico. `engine` has fields of `EngineConfig` for the
    engine that plays, such as `max_num_seqs` or `speculative`. `optimizer` "adamw" trains
    everything with `optim.lr`, "muon" matrices with `optim.muon_lr`. `lora` trains adapters beside
    the weights, which may then be quantised. `teachers` score the episodes of domains that name
    one, and a `judge` compares those of a group for their rewards. A `curriculum` goes from easy to
    hard ones of `rollout.pool` tasks. With `cluster` engines and teachers are Ray actors; see
    `rl/cluster.py`. Paths are relative to the working directory.
    """

    output: Path
    domains: tuple[DomainConfig, ...]
    trainer: TrainerConfig
    checkpoint: str = "pico"
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    loss: LossConfig = field(default_factory=lambda: LossConfig(mtp_weight=0.0, bias_rate=0.0))
    optimizer: Literal["adamw", "muon"] = "adamw"
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-5, warmup_steps=0, decay_fraction=0.0, weight_decay=0.0
        )
    )
    evaluate: EvaluateConfig | None = field(default_factory=EvaluateConfig)
    engine: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig | None = None
    teachers: TeachersConfig | None = None
    judge: JudgeConfig | None = None
    curriculum: CurriculumConfig | None = None
    cluster: ClusterConfig | None = None

    def __post_init__(self) -> None:
        """Check that there is something to play, and that teachers say what is asked of them."""
        if not self.domains:
            raise ConfigError("domains is empty: name at least one")
        if self.curriculum is not None and self.rollout.pool is None:
            raise ConfigError(
                "[curriculum] draws tasks again by how often they were solved: say of how many "
                "with rollout.pool"
            )
        if self.judge is not None:
            self._check_judge(self.judge)
        _require_ratio(self.loss.policy)
        _require_domains(self.credit, [domain.name for domain in self.domains])
        compared = self.credit.reward_weight and self.credit.baseline != "none"
        taught = any((self.credit.kl_weight, *self.credit.kl_weights.values()))
        if self.rollout.group_size == 1 and compared and not (taught or self.credit.punished):
            raise ConfigError(
                f"rollout.group_size is 1 and credit.baseline {self.credit.baseline!r}, which "
                "compares an episode with others of its task: raise it, or set the baseline to "
                "'none'"
            )
        form, teachers = self.loss.policy.distillation, self.teachers
        if form == "full" and teachers is None:
            raise ConfigError(
                "loss.policy.distillation is 'full', which compares whole vocabularies with those "
                "of teachers in this process: add a [teachers] table"
            )
        if form == "top_k" and (teachers is None or not teachers.top):
            raise ConfigError(
                "loss.policy.distillation is 'top_k': say of how many tokens with teachers.top"
            )
        if teachers is None and (self.credit.kl_weight or any(self.credit.kl_weights.values())):
            raise ConfigError(
                "credit.kl_weight or kl_weights ask for teachers and there are none: add a "
                "[teachers] table, or set them to 0"
            )
        if self.cluster is not None and self.cluster.teachers and teachers is None:
            raise ConfigError(
                f"cluster.teachers is {self.cluster.teachers} and there are no teachers: add a "
                "[teachers] table, or set it to 0"
            )
        if self.cluster is not None and self.cluster.teachers and form == "full":
            raise ConfigError(
                f"cluster.teachers is {self.cluster.teachers} and loss.policy.distillation is "
                "'full', for which the trainer itself has the teachers: set it to 0"
            )

    def _check_judge(self, judge: JudgeConfig) -> None:
        names = [domain.name for domain in self.domains]
        for name in judge.domains:
            if name not in names:
                raise ConfigError(
                    f"judge.domains names {name!r}: those of [[domains]] are {', '.join(names)}"
                )
        if self.rollout.group_size < 2:
            raise ConfigError(
                "[judge] compares the episodes of a group and rollout.group_size is "
                f"{self.rollout.group_size}: set it to 2 or more"
            )


def _require_domains(credit: CreditConfig, names: Sequence[str]) -> None:
    """Refuse what is said of domains that there are not; raises ConfigError."""
    asked: dict[str, Iterable[str]] = {
        "kl_weights": credit.kl_weights,
        "domain_weights": credit.domain_weights,
        "effort.domains": credit.effort.domains if credit.effort is not None else (),
    }
    for key, found in asked.items():
        for name in found:
            if name not in names:
                raise ConfigError(
                    f"credit.{key} names {name!r}, which is no domain: there are {', '.join(names)}"
                )


def _require_ratio(policy: PolicyLossConfig) -> None:
    """Refuse what bounds a ratio that is always 1; raises ConfigError."""
    usual = PolicyLossConfig()
    for name in ("ratio", "surrogate", "eps_low", "eps_high", "dual_clip"):
        value = getattr(policy, name)
        if policy.proximal == "start" and value != getattr(usual, name):
            raise ConfigError(
                f"loss.policy.{name} is {value!r} and proximal 'start': one update is made of each "
                "batch, so the ratio to the policy at its start is 1 and nothing is clipped; set "
                f"proximal = 'behaviour', or leave {name} out"
            )


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Path | None:
    """Train by the TOML file `recipe`, continuing where an earlier run of it stopped.

    `overrides` maps dotted keys ("trainer.steps") to values. Returns the directory of the exported
    checkpoint, or None when asked to stop before the end. Raises ConfigError, TaskError, DataError
    or CheckpointError.
    """
    return run_config(load_toml(RlConfig, recipe, overrides))


def run_config(config: RlConfig) -> Path | None:
    """Train as `config` says; see `run`."""
    require_one_process("aprium rl")
    path = resolve(config.checkpoint)
    engine = _engine_config(config, path)
    text = read_text(path)
    model = open_model(path, text, context=config.rollout.episode_tokens, frozen=bool(config.lora))
    adapter = lora.attach(model, config.lora) if config.lora is not None else None
    learner = Learner(config, engine, Weights(model, adapter), path)
    optim = config.optim if config.optimizer == "muon" else replace(config.optim, muon_lr=None)
    try:
        trainer = Trainer(
            model,
            learner,
            [],
            output=config.output,
            optim=optim,
            loss=config.loss,
            config=config.trainer,
            teacher=_load_teachers(config, path),
            recipe=recipe_text(config),
            identity=identity(path, config.lora, model.mesh),
            before_step=adapter.begin if adapter is not None else None,
            more_figures=learner.figures,
        )
        if not trainer.run():
            log.info("stopped at step %d: the same command continues", trainer.progress.step)
            return None
        if adapter is not None:  # before the evaluation, so that it is there if that fails
            made = config.output / "adapter"
            lora.save(adapter, made, base=config.checkpoint)
        else:
            made = export(model, path, config.output / "model")
        if learner.finish():
            trainer.write_page()
    finally:
        learner.close()
    return made


class Learner:
    """A source of batches that the weights themselves write; see `BatchSource`.

    What it starts, a thread and an engine, it starts when the first batch is asked for.
    """

    def __init__(
        self, config: RlConfig, engine: EngineConfig, weights: Weights, path: Path
    ) -> None:
        self._config, self._engine, self._weights, self._path = config, engine, weights, path
        self._evaluation = Evaluation(config.domains, config.evaluate) if config.evaluate else None
        self._step = 0  # of the batch to come
        self._dealer = _dealer(config)
        self._dealt: dict[str, Any] = {}
        self._tally = Tally()
        self._metrics = MetricsFile(config.output)
        self._pushed: int | None = None
        self._player: _Player | None = None

    def next_batch(self) -> Sequence[Sample]:
        """Return the samples of the next step, when they are there."""
        begun = time.perf_counter()
        player = self._play()
        played = player.call(self._next(player))
        self._tally.add(played, time.perf_counter() - begun)
        self._step += 1
        return [sample for one in played for sample in one.learnt.samples]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next step, and what deals items; the rest is in the ledger."""
        return {"step": self._step, "dealer": self._dealt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch of a step."""
        self._step, self._dealt = state["step"], state["dealer"]
        if self._dealt:
            self._dealer.load_state_dict(self._dealt)

    def figures(self) -> dict[str, Any]:
        """Return what was played since the last call."""
        return self._tally.take()

    def finish(self) -> bool:
        """Evaluate the weights at the end of the run, if at all, and write what was found."""
        if self._evaluation is None:
            return False
        player = self._play()
        player.call(self._evaluate(player, self._step))
        rows = self._metrics.read("accuracy")
        found: dict[str, Any] = {"before": rows[0], "after": rows[-1]}
        assert self._config.evaluate is not None
        if self._config.evaluate.constants:
            found["constant"] = self._constants(self._config.evaluate.constants)
        write_json(self._config.output / "evaluation.json", found)
        log.info(
            "held-out accuracy: %.3f before, %.3f after", rows[0]["accuracy"], rows[-1]["accuracy"]
        )
        return True

    def _constants(self, count: int) -> dict[str, Any]:
        """Return what constant answers earn in each domain where they can be graded."""
        found: dict[str, Any] = {}
        for domain in self._config.domains:
            try:
                found |= constant_baselines([domain], count)
            except Exception as error:  # a family's own grader: nothing that was trained is lost
                log.warning("constant answers of domain %r failed: %s", domain.name, error)
        return found

    def close(self) -> None:
        """Stop everything that was started."""
        if self._player is not None:
            self._player.close()
            self._player = None

    def _play(self) -> "_Player":
        if self._player is None:
            self._player = _Player(
                self._config, self._engine, self._weights, self._path, self._dealer, self._step
            )
            self._pushed = None if self._step else 0  # it begins with these weights, as version 0
        return self._player

    async def _next(self, player: "_Player") -> list[Played]:
        step, config = self._step, self._config.evaluate
        kept = checkpoint.complete(self._config.output)
        if kept:
            player.ledger.compact(int(kept[0].name.removeprefix("step-")))
        if config is not None and (not step or (config.every and step % config.every == 0)):
            await self._evaluate(player, step)
        if step not in player.ledger.batches:
            await self._push(player, step)
        else:  # deal as was dealt when the batch was made, to go on from there
            self._dealer(player.ledger.num_issued_by[step] - 1)
        played = await player.pipeline.next_batch(step)
        self._dealer.see((one.item, one.group) for one in played)
        self._dealt = self._dealer.state_dict()
        return played

    async def _push(self, player: "_Player", step: int) -> None:
        if self._pushed != step:
            recompute = self._config.rollout.recompute
            await player.generation.push(self._weights, step, recompute=recompute)
            self._pushed = step

    async def _evaluate(self, player: "_Player", step: int) -> None:
        """Evaluate the weights of `step`, unless that was done."""
        assert self._evaluation is not None
        if any(row["step"] == step for row in self._metrics.read("accuracy")):
            return
        await self._push(player, step)
        generation = player.generation
        policy = generation.policy(priority=-1)
        found = await self._evaluation(policy, generation.chat, player.places)
        self._metrics.append("accuracy", {"step": step} | as_figures(found))
        for name, one in found.items():
            log.info("step %d: %s %.3f +- %.3f", step, name, one.accuracy, one.standard_error)


def _dealer(config: RlConfig) -> Dealer:
    """Return what deals items."""
    shares = {domain.name: domain.weight for domain in config.domains}
    if config.curriculum is None:
        return Deal(shares, config.rollout.pool)
    assert config.rollout.pool is not None
    size = config.pipeline.groups_per_step
    return Course(shares, config.rollout.pool, size, config.curriculum)


class _Player:
    """The thread in which episodes are played, with its event loop, engines, books and pipeline."""

    def __init__(
        self,
        config: RlConfig,
        engine: EngineConfig,
        weights: Weights,
        path: Path,
        dealer: Dealer,
        step: int,
    ) -> None:
        with contextlib.ExitStack() as undone:
            self.ledger = Ledger(config.output)
            undone.callback(self.ledger.close)
            require_continuable(self.ledger, config, step)
            teachers = _make_teachers(config, path)
            self._cluster: Cluster | None = None
            if config.cluster is not None:
                self._cluster = Cluster(config.cluster, weights.num_bytes)
                undone.callback(self._cluster.close)
            self._teachers = _place_teachers(config, teachers, self._cluster)
            self.generation = _open_generation(config, engine, path, weights, self._cluster)
            undone.callback(lambda: asyncio.run(self.generation.close()))
            if self._cluster is not None:
                self._cluster.open()
            policy, chat = self.generation.policy(), self.generation.chat
            engines = config.cluster.generators if config.cluster is not None else 1
            self.places = Places(engine.max_num_seqs * engines)
            self._judge = None
            if config.judge is not None:
                self._judge = judge = GroupJudge(config.judge, path)
                undone.callback(lambda: asyncio.run(judge.close()))
            self._rollouts = Rollouts(
                config.domains, config.rollout, policy, chat, self.places, self._judge
            )
            self._credit = config.credit
            self._form = config.loss.policy.distillation
            stages = Stages(
                generate=self._generate,
                credit=self._learn,
                score=self._score if self._teachers is not None else None,
            )
            self.pipeline = Pipeline(stages, dealer, self.ledger, config.pipeline)
            undone.pop_all()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="aprium-rl")
        self._thread.start()

    async def _generate(self, item: Item) -> Group:
        group = await self._rollouts.play(item)
        if self.generation.failed is not None:  # which looks like a failure of every episode
            raise self.generation.failed
        return group

    async def _score(self, group: Group) -> Scores:
        assert self._teachers is not None
        return tuple(await asyncio.gather(*map(self._teachers.score, group.trajectories)))

    async def _learn(self, group: Group, scores: Scores) -> Credited:
        return learn(group, self._credit, scores, self._form)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` in the thread, and return what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Stop episodes, teachers, engines and thread."""
        try:
            self.call(self._close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
            if self._cluster is not None:
                self._cluster.close()
            self.ledger.close()

    async def _close(self) -> None:
        await self.pipeline.close()
        if self._judge is not None:
            await self._judge.close()
        if self._teachers is not None:
            await self._teachers.close()
        await self.generation.close()


def require_continuable(ledger: Ledger, config: RlConfig, step: int) -> None:
    """Check that `config` can go on from `step` with what is in `ledger`.

    Raises CheckpointError where episodes are gone that a batch is to be made of again, ConfigError
    where they were played for another recipe.
    """
    domains = {domain.name for domain in config.domains}
    open_ones = {entry.item.number for entry in ledger.open_entries()}
    again = {n: at for at, numbers in ledger.batches.items() if at >= step for n in numbers}
    for number in sorted(open_ones | again.keys()):
        entry = ledger.entries.get(number)
        if entry is None or (number in again and entry.group is None):
            raise CheckpointError(
                f"{ledger.path} no longer has the episodes of step {again[number]}, and no "
                f"checkpoint of {config.output} is as late: put step-* back, or use another output"
            )
        name = entry.item.domain
        if name not in domains:
            raise ConfigError(
                f"{ledger.path} has an item of domain {name!r} to go on with and the recipe has "
                f"none of that name: give {name!r} back, or use another output"
            )
        weight = config.credit.kl_weights.get(name, config.credit.kl_weight)
        asks = weight and config.loss.policy.distillation != "full"
        if asks and number in again and entry.scores is None:
            raise ConfigError(
                f"credit.kl_weight of domain {name!r} is {weight:g} and no teacher scored the "
                f"episodes of step {again[number]} in {ledger.path}, which is to be taken again: "
                "set it to 0 as it was, or use another output"
            )


def learn(group: Group, config: CreditConfig, scores: Scores, form: str = "sampled") -> Credited:
    """Return the samples of a group; an episode that its teacher failed to score gives none.

    So a server that is down for a while costs some episodes, and not the run. `form` is that of
    distillation; with "full" the trainer itself asks the teachers, about every token.
    """
    if form == "full":
        return _learn_whole(group, config)
    apart = form != "sampled"
    domains = {trajectory.domain for trajectory in group.trajectories}
    if not any(config.kl_weights.get(domain, config.kl_weight) for domain in domains):
        return credit(group, config, scores, apart=apart)
    pairs = zip(group.trajectories, scores, strict=True)
    kept = [(one, said) for one, said in pairs if said is not None or one.error is not None]
    found = credit(
        Group(task=group.task, trajectories=tuple(one for one, _ in kept)),
        config,
        tuple(said for _, said in kept),
        apart=apart,
    )
    unscored = float(len(scores) - len(kept))
    return replace(found, figures={**found.figures, "unscored": unscored})


def _learn_whole(group: Group, config: CreditConfig) -> Credited:
    """Return the samples of a group whose teachers the trainer itself asks, about every token."""
    found = credit(group, replace(config, kl_weight=0.0, kl_weights={}))
    samples = []
    for sample in found.samples:
        weight = config.kl_weights.get(sample.domain, config.kl_weight)
        weight *= config.domain_weights.get(sample.domain, 1.0)
        weights = tuple(weight if counts else 0.0 for counts in sample.rl_weight)
        samples.append(replace(sample, kl_weight=weights))
    return replace(found, samples=tuple(samples))


def _load_teachers(config: RlConfig, path: Path) -> dict[str, HybridModel] | None:
    """Return the teachers for the trainer to ask, where the form of distillation is theirs."""
    if config.loss.policy.distillation != "full":
        return None
    assert config.teachers is not None
    routes = {domain.name: domain.teacher for domain in config.domains}
    return load_models(config.teachers, path, routes)


def _make_teachers(config: RlConfig, path: Path) -> Teachers | None:
    """Return who scores episodes; raises ConfigError for a domain that lacks a teacher."""
    if config.loss.policy.distillation == "full":
        return None  # the trainer has them
    routes = {domain.name: domain.teacher for domain in config.domains}
    if config.teachers is not None:
        longest = config.teachers.max_model_len or config.rollout.episode_tokens
        sized = replace(config.teachers, max_model_len=longest)  # states of no more than is asked
        teachers = Teachers(sized, student=path, routes=routes)
        for name in routes:
            weight = config.credit.kl_weights.get(name, config.credit.kl_weight)
            if weight and teachers.teacher_of(name) is None:
                raise ConfigError(
                    f"credit.kl_weight of domain {name!r} is {weight:g} and it has no teacher: "
                    "name one in the domain, give teachers.default, or set its weight to 0 in "
                    "credit.kl_weights"
                )
        return teachers
    for name, teacher in routes.items():
        if teacher is not None:
            raise ConfigError(
                f"domain {name!r} has teacher {teacher!r} and there are no teachers: add a "
                "[teachers] table, or leave it out"
            )
    return None


def _place_teachers(
    config: RlConfig, teachers: Teachers | None, cluster: Cluster | None
) -> Teachers | RemoteTeachers | None:
    """Let actors do what `teachers` would do in this process, where the recipe says so."""
    if teachers is None or cluster is None or not cluster.config.teachers:
        return teachers
    assert config.teachers is not None
    domains = [domain.name for domain in config.domains]
    return cluster.teachers(teachers, config.teachers, student=config.checkpoint, domains=domains)


def _open_generation(
    config: RlConfig, engine: EngineConfig, path: Path, weights: Weights, cluster: Cluster | None
) -> Generation:
    if cluster is None:
        return Embedded(engine, path, weights)
    return cluster.generators(replace(engine, model=config.checkpoint), path, weights)


def _engine_config(config: RlConfig, path: Path) -> EngineConfig:
    episodes = config.pipeline.groups_per_step * config.rollout.group_size
    longest = max(
        config.rollout.episode_tokens, config.evaluate.episode_tokens if config.evaluate else 0
    )
    usual = {
        "max_num_seqs": min(max(episodes, 32), 256),
        "max_num_batched_tokens": 2048,
        "max_model_len": longest,
    }
    return from_dict(EngineConfig, {"model": str(path), **usual, **config.engine}, where="engine")
