"""The loop: it learns, it resumes bit for bit after a kill, it refuses damaged checkpoints."""

import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.records import Sample
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.train import checkpoint
from aprium.train.losses import LossConfig
from aprium.train.monitor import DivergenceError, StabilityConfig
from aprium.train.optim import OptimConfig, build_optimisers
from aprium.train.policy_loss import PolicyLossConfig
from aprium.train.trainer import Trainer, TrainerConfig

TOY = PRESETS["toy"]


class Copies:
    """Batches of documents whose second half repeats the first."""

    def __init__(
        self, interrupt_at: int | None = None, number: int = signal.SIGTERM, index: int = 0
    ) -> None:
        self.index, self.interrupt_at, self.number = index, interrupt_at, number

    def next_batch(self) -> Sequence[Sample]:
        if self.index == self.interrupt_at:
            os.kill(os.getpid(), self.number)
        rng = random.Random(self.index)
        self.index += 1
        samples = []
        for _ in range(12):
            half = [rng.randint(20, 30) for _ in range(rng.randint(2, 5))]
            weights = [0.0] * (len(half) + 1) + [1.0] * len(half)
            samples.append(
                Sample(tokens=(*half, 1, *half), ce_weight=tuple(weights), domain="copy")
            )
        return samples

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def make(
    output: Path,
    steps: int,
    source: Copies | None = None,
    every: int = 4,
    stability: StabilityConfig | None = None,
) -> Trainer:
    model = HybridModel(TOY, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    config = TrainerConfig(steps=steps, eval_every=5, checkpoint_every=every, log_every=1)
    return Trainer(
        model,
        source or Copies(),
        Copies(index=10_000).next_batch(),
        output=output,
        optim=OptimConfig(lr=3e-3, muon_lr=0.01, warmup_steps=3),
        loss=LossConfig(),
        config=config,
        stability=stability,
    )


def figures(trainer: Trainer) -> list[dict[str, float]]:
    return [
        {k: v for k, v in f.items() if k != "tokens_per_s"} for f in trainer.metrics.read("train")
    ]


def test_loss_falls_and_outputs_are_written(tmp_path: Path) -> None:
    trainer = make(tmp_path, 40)
    assert trainer.run()
    heldout = [f["loss"] for f in trainer.metrics.read("heldout")]
    assert heldout[-1] < heldout[0] - 0.5
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("train") == 40 and kinds.count("heldout") == 8
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000036", "step-000040"]


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    straight = make(tmp_path / "a", 10)
    straight.run()
    assert make(tmp_path / "b", 10, Copies(interrupt_at=6)).run() is False
    # A crash after the checkpoint at step 4 leaves a partial directory behind.
    (tmp_path / "b" / "step-000009.partial").mkdir()
    resumed = make(tmp_path / "b", 10)
    assert resumed.run()
    assert figures(resumed) == figures(straight)
    for (name, one), (_, other) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_run_killed_between_checkpoints_continues_the_same_curve(tmp_path: Path) -> None:
    straight = make(tmp_path / "a", 10)
    straight.run()
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(tmp_path / "b",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = make(tmp_path / "b", 10)
    assert resumed.run()
    assert figures(resumed) == figures(straight)
    assert _metrics(tmp_path / "b") == _metrics(tmp_path / "a")


def _killed(output: Path) -> None:
    torch.set_num_threads(1)
    make(output, 10, Copies(interrupt_at=6, number=signal.SIGKILL)).run()


@pytest.mark.slow
def test_run_killed_again_and_again_ends_with_the_same_curve(tmp_path: Path) -> None:
    straight = make(tmp_path / "a", 40, every=2)
    straight.run()
    numbers, context = random.Random(0), multiprocessing.get_context("spawn")
    kills, exitcode = 0, None
    while exitcode != 0:
        process = context.Process(target=_long_run, args=(tmp_path / "b",))
        process.start()
        begun = checkpoint.complete(tmp_path / "b")[-1:]
        while process.exitcode is None and checkpoint.complete(tmp_path / "b")[-1:] == begun:
            time.sleep(0.01)  # until it gets somewhere
        process.join(numbers.random())
        process.kill()
        process.join()
        exitcode = process.exitcode
        kills += exitcode != 0
    assert kills > 2
    assert _metrics(tmp_path / "b") == _metrics(tmp_path / "a")


def _long_run(output: Path) -> None:
    torch.set_num_threads(1)
    make(output, 40, every=2).run()


def _metrics(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_s"} for x in lines]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4)
    trainer.run()
    file = tmp_path / "step-000004" / "optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="step-000004"):
        make(tmp_path, 8).run()


def test_a_changed_state_is_noticed_and_the_checkpoint_before_named(tmp_path: Path) -> None:
    make(tmp_path, 8).run()
    file = tmp_path / "step-000008" / "state.json"
    written = json.loads(file.read_text())
    no_digest = {key: value for key, value in written.items() if key != "digest"}
    for state in ({**written, "source": {"index": 3}}, {**no_digest, "digests": []}, []):
        file.write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match=r"step-000008 .*json is not what") as error:
            make(tmp_path, 9).run()
        assert f"delete it to resume from {tmp_path / 'step-000004'}" in str(error.value)
    file.write_text(json.dumps(no_digest))  # as earlier versions wrote it
    make(tmp_path, 9).run()
    (tmp_path / "step-000009" / "state.json").unlink()
    shutil.rmtree(tmp_path / "step-000008")
    with pytest.raises(CheckpointError, match="delete it to begin again"):
        make(tmp_path, 10).run()


def test_changed_byte_is_noticed(tmp_path: Path) -> None:
    make(tmp_path, 4).run()
    file = tmp_path / "step-000004" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        make(tmp_path, 8).run()


def test_full_disk_is_told_and_the_earlier_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 4).run()

    def full(tensors: dict[str, torch.Tensor], file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            make(tmp_path, 6).run()
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000004"]
    resumed = make(tmp_path, 6)
    assert resumed.run()
    straight = make(tmp_path / "straight", 6)
    straight.run()
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_infinite_loss_stops_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"step 0: the weight of lm_head\.weight"):
        trainer.run()


def test_the_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4)
    name = "backbone.layers.2.mixer.gate.weight"
    trainer.model.get_parameter(name).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(CheckpointError, match=f"the gradient of {re.escape(name)} is not finite"):
        trainer.run()


def test_run_killed_before_its_first_checkpoint_begins_its_figures_anew(tmp_path: Path) -> None:
    first = make(tmp_path, 4)
    for _ in range(2):
        first.metrics.append("train", first.train_step(first.source.next_batch()))
    again = make(tmp_path, 4)
    again.run()
    assert [f["step"] for f in again.metrics.read("train")] == [1, 2, 3, 4]


def test_what_grows_with_a_run_is_not_in_its_checkpoints(tmp_path: Path) -> None:
    sizes = []
    for steps in (4, 12):
        make(tmp_path, steps).run()
        sizes.append((tmp_path / f"step-{steps:06d}" / "state.json").stat().st_size)
    assert sizes[1] < sizes[0] + 20


def test_no_heldout_loss_where_nothing_is_held_out(tmp_path: Path) -> None:
    trainer = make(tmp_path, 5)
    trainer.heldout = []
    trainer.run()
    assert trainer.metrics.read("heldout") == [] and len(trainer.metrics.read("train")) == 5


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", "step-000004.partial", "step-old"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-999999", "step-1000000"]


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    make(tmp_path, 2).run()
    other = make(tmp_path, 4)
    other.optim = replace(other.optim, muon_lr=None)
    other.optimisers = build_optimisers(other.model, other.optim)
    with pytest.raises(CheckpointError, match="trained with another optimiser"):
        other.run()
    narrow = make(tmp_path, 4)
    narrow.model.lm_head.weight = torch.nn.Parameter(torch.zeros(3, TOY.hidden_size))
    narrow.optimisers = build_optimisers(narrow.model, narrow.optim)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape .* of another model"):
        narrow.run()


def test_figures_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match="checkpoints are whole"):
        trainer.run()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        make(tmp_path / "file", 4)


def test_nothing_is_written_in_the_middle_of_a_spike(tmp_path: Path) -> None:
    limit = StabilityConfig(spike_ratio=1.0001, patience=100, window=2, action="rollback")
    trainer = make(tmp_path, 40, every=100, stability=limit)
    step = trainer.train_step

    def stop_high(samples: Sequence[Sample], *, monitor: bool = True) -> dict[str, Any]:
        found = step(samples, monitor=monitor)
        if found["step"] == 6:
            trainer._request_stop(signal.SIGTERM, None)
            return found | {"loss": 99.0}
        return found

    trainer.train_step = stop_high  # type: ignore[method-assign]
    assert trainer.run() is False
    assert trainer.spikes.num_above and trainer.progress.step == 6
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000000"]


def test_annealing_needs_a_decay_to_begin(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4)
    for optim in (replace(trainer.optim, schedule="cosine"), OptimConfig(decay_fraction=0.0)):
        with pytest.raises(ConfigError, match=r"set optim\.schedule to 'wsd'"):
            Trainer(
                trainer.model,
                Copies(),
                [],
                output=tmp_path,
                optim=optim,
                loss=LossConfig(),
                config=trainer.config,
                stability=StabilityConfig(action="anneal"),
            )


class Poisoned(Copies):
    """Batches of which one has a weight that makes the gradient infinite."""

    def next_batch(self) -> Sequence[Sample]:
        bad = self.index == 6
        samples = super().next_batch()
        if not bad:
            return samples
        return [_weighted(sample, float("inf")) for sample in samples]


def _weighted(sample: Sample, factor: float) -> Sample:
    weights = tuple(w * factor if w else 0.0 for w in sample.ce_weight)
    return replace(sample, ce_weight=weights)


@pytest.mark.parametrize("action", ["rollback", "anneal"])
def test_divergence_goes_back_and_on_with_the_data_after_it(
    tmp_path: Path, action: Literal["rollback", "anneal"]
) -> None:
    trainer = make(tmp_path, 12, Poisoned(), stability=StabilityConfig(action=action))
    assert trainer.run()
    assert trainer.progress.rollbacks == 1
    assert trainer.source.state_dict()["index"] == 7 + trainer.progress.step - 4
    assert trainer.progress.step == (12 if action == "rollback" else 4 + 3)
    steps = [f["step"] for f in trainer.metrics.read("train")]
    assert steps == list(range(1, trainer.progress.step + 1))
    events = [x for x in _metrics(tmp_path) if x["kind"] == "rollback"]
    assert len(events) == 1 and "not finite" in events[0]["cause"]


def test_no_more_rollbacks_than_allowed(tmp_path: Path) -> None:
    class Hopeless(Copies):
        def next_batch(self) -> Sequence[Sample]:
            return [_weighted(sample, float("nan")) for sample in super().next_batch()]

    limit = StabilityConfig(action="rollback", max_rollbacks=2)
    with pytest.raises(CheckpointError, match="after 2 rollbacks"):
        make(tmp_path, 12, Hopeless(), stability=limit).run()


def test_a_weight_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    def spoil(trainer: Trainer, at: int) -> None:
        step = trainer.train_step

        def spoiled(samples: Sequence[Sample], *, monitor: bool = True) -> dict[str, Any]:
            found = step(samples, monitor=monitor)
            if trainer.source.state_dict()["index"] == at:  # once: the data go on after a rollback
                with torch.no_grad():
                    trainer.model.lm_head.weight[0, 0] = float("inf")
            return found

        trainer.train_step = spoiled  # type: ignore[method-assign]

    wanted = r"step 4: the weight of lm_head\.weight is not finite"
    trainer = make(tmp_path / "last", 4)
    spoil(trainer, 4)
    with pytest.raises(CheckpointError, match=wanted):
        trainer.run()
    stopped = make(tmp_path / "stopped", 8, Copies(interrupt_at=1))
    spoil(stopped, 2)
    with pytest.raises(CheckpointError, match="nothing is written of it"):
        stopped.run()
    for name in ("last", "stopped"):
        assert checkpoint.complete(tmp_path / name) == []
    back = make(tmp_path / "back", 8, stability=StabilityConfig(action="rollback"))
    spoil(back, 8)
    assert back.run() and back.progress.rollbacks == 1
    (event,) = back.metrics.read("rollback")
    assert (event["step"], event["from_step"]) == (4, 8)


def test_a_checkpoint_that_diverges_at_once_again_gives_way_to_the_one_before(
    tmp_path: Path,
) -> None:
    trainer = make(tmp_path, 12, stability=StabilityConfig(action="rollback"))
    step = trainer.train_step

    def doomed(samples: Sequence[Sample], *, monitor: bool = True) -> dict[str, Any]:
        if trainer.progress.step == 8 and trainer.source.state_dict()["index"] < 12:
            raise DivergenceError("spoiled")
        return step(samples, monitor=monitor)

    trainer.train_step = doomed  # type: ignore[method-assign]
    assert trainer.run()
    assert [event["step"] for event in trainer.metrics.read("rollback")] == [4]
    assert trainer.progress.rollbacks == 2 and trainer.progress.step == 12


def test_parts_of_a_step_and_recomputed_layers_give_its_gradients(tmp_path: Path) -> None:
    plain = make(tmp_path / "a", 1)
    plain.run()
    for name, settings in {"b": {"micro_tokens": 20}, "c": {"recompute": True}}.items():
        other = make(tmp_path / name, 1)
        other.config = replace(other.config, **settings)
        other.run()
        (wanted,), (found,) = plain.metrics.read("train"), other.metrics.read("train")
        for key in ("loss", "mtp_loss", "balance", "grad_norm"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-5), (name, key)
        assert found["max_vios"] == wanted["max_vios"]


def test_what_is_held_out_is_evaluated_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, 1)
    whole, sizes = trainer.evaluate(), list[int]()
    forward = HybridModel.forward

    def note(self: HybridModel, tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        return forward(self, tokens, *rest, **options)

    monkeypatch.setattr(HybridModel, "forward", note)
    trainer.config = replace(trainer.config, micro_tokens=20)
    assert trainer.evaluate()["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert len(sizes) > 3 and max(sizes) <= 20


def test_bfloat16_activations_learn_as_float32_ones(tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make(tmp_path / dtype, 30)
        trainer.config = replace(trainer.config, dtype=dtype)
        trainer.model.compute_dtype = getattr(torch, dtype)
        trainer.run()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        losses[dtype] = trainer.metrics.read("heldout")[-1]["loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


def test_the_step_of_the_selection_bias_falls_with_the_learning_rates(tmp_path: Path) -> None:
    trainer = make(tmp_path, 12)
    trainer.loss = replace(trainer.loss, bias_rate=0.01)
    biases = [p for n, p in trainer.model.named_parameters() if n.endswith("correction_bias")]
    moved, factors = [], []
    for _ in range(12):
        before = [bias.detach().clone() for bias in biases]
        factors.append(trainer.train_step(trainer.source.next_batch(), monitor=False)["lr_factor"])
        steps = [bias - old for bias, old in zip(biases, before, strict=True)]
        # Overloaded experts go down and underloaded ones up by as much; then all are centred.
        moved.append(max(float(step.max() - step.min()) / 2 for step in steps))
    assert factors[0] < 1 and moved[:3] == pytest.approx([0.01] * 3)  # while they are rising
    assert moved[3:] == pytest.approx([0.01 * factor for factor in factors[3:]], rel=1e-3)
    assert moved[-1] < 0.005


@pytest.mark.parametrize(("steps", "told"), [(2, "end at 67 % of their peaks"), (3, "")])
def test_a_warmup_longer_than_the_run_is_told(
    tmp_path: Path, steps: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("aprium").propagate = True
    trainer = make(tmp_path, steps)
    trainer.heldout = []
    trainer.run()
    assert told in caplog.text and bool(told) == ("warmup_steps" in caplog.text)


def test_page_shows_curves_by_role_and_layer(tmp_path: Path) -> None:
    trainer = make(tmp_path, 5)
    trainer.run()
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "http-equiv" not in page
    last = trainer.metrics.read("train")[-1]
    assert set(last["grad_norms"]) >= {"mtp", "embedding", "head", "router", "experts", "mamba"}
    total = sum(value**2 for value in last["grad_norms"].values()) ** 0.5
    assert total == pytest.approx(last["grad_norm"], rel=1e-4)
    assert next(iter(last["residual"])) == "backbone.layers.0"
    assert last["max_vio"] == max(last["max_vios"].values())


class Choices:
    """Episodes of one token after a prompt: token 7 pays, token 9 costs; or a teacher prefers 7."""

    def __init__(self, *, distilled: bool = False) -> None:
        self.distilled = distilled

    def next_batch(self) -> Sequence[Sample]:
        samples = []
        for token, worth in ((7, 1.0), (9, -0.5)):
            kl = {"kl_weight": (0.0, 0.0, 1.0), "teacher_logprob": (0.0, 0.0, -5.0 + 2 * worth)}
            samples.append(
                Sample(
                    tokens=(3, 4, token),
                    ce_weight=(0.0, 0.0, 0.0),
                    domain=f"choice {token}",
                    rl_weight=(0.0, 0.0, 1.0),
                    advantage=() if self.distilled else (0.0, 0.0, worth),
                    **(kl if self.distilled else {}),
                )
            )
        return samples

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def play(output: Path, source: Choices, steps: int, **config: Any) -> tuple[Trainer, list[float]]:
    """Train on choices alone; return the trainer and how much likelier 7 than 9 became."""
    model = HybridModel(TOY, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    trainer = Trainer(
        model,
        source,
        list(source.next_batch()),
        output=output,
        optim=OptimConfig(lr=3e-3, muon_lr=None, warmup_steps=1),
        loss=LossConfig(balance_weight=0.0, mtp_detach=True, bias_rate=0.1),
        config=TrainerConfig(steps=steps, eval_every=steps, log_every=1, **config),
        stability=StabilityConfig(spike_ratio=1.5, patience=1, window=2),
    )

    def gap() -> float:
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([3, 4]), Layout.packed([2])))[-1]
            return float(logits[7] - logits[9])

    before = gap()
    assert trainer.run()
    return trainer, [before, gap()]


@pytest.mark.parametrize("distilled", [False, True], ids=["rewards", "teacher"])
def test_episodes_teach_what_pays_or_what_the_teacher_prefers(
    tmp_path: Path, distilled: bool
) -> None:
    """Without cross-entropy anywhere: steps, spikes, evaluation, page and checkpoints go on."""
    trainer, (before, after) = play(tmp_path, Choices(distilled=distilled), 6)
    assert after > before + 0.5
    found = figures(trainer)
    assert [f["loss"] for f in found] == [0.0] * 6 and found[0]["rl_loss"] != 0.0
    assert set(found[0]["policy_domains"]) == {"choice 7", "choice 9"}
    names = {"masked", "clipped", "entropy", "advantage"} | (
        {"teacher_gap"} if distilled else set()
    )
    assert set(found[0]["policy"]) == names
    (heldout,) = trainer.metrics.read("heldout")
    assert heldout["loss"] == 0.0 and heldout["domains"] == {}


def test_frozen_routers_do_not_move(tmp_path: Path) -> None:
    trainer, _ = play(tmp_path, Choices(), 3, freeze_router=True)
    fresh = HybridModel(TOY, dtype=torch.float32)
    fresh.init_weights(torch.Generator().manual_seed(0))
    first = dict(fresh.named_parameters())
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, first[n])}
    assert moved and not any(".gate." in name for name in moved)
    free, _ = play(tmp_path / "free", Choices(), 3)
    assert any(
        name.endswith("gate.weight") and not torch.equal(p, first[name])
        for name, p in free.model.named_parameters()
    )
    assert any(
        name.endswith("e_score_correction_bias") and not torch.equal(p, first[name])
        for name, p in free.model.named_parameters()
    )


def test_a_teacher_that_is_not_asked_for_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, 1)
    for form, teacher in (("full", None), ("sampled", trainer.model)):
        with pytest.raises(ConfigError, match="distillation is"):
            Trainer(
                trainer.model,
                Copies(),
                [],
                output=tmp_path,
                optim=trainer.optim,
                loss=LossConfig(policy=PolicyLossConfig(distillation=form)),  # type: ignore[arg-type]
                config=trainer.config,
                teacher=teacher,
            )
