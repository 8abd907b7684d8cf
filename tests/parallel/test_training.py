"""Training cut over processes against one process: losses, gradients, updates, checkpoints."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from aprium.base.errors import ApriumError, CheckpointError
from aprium.model.model import HybridModel
from aprium.parallel.mesh import Mesh, ParallelConfig
from aprium.train.policy_loss import PolicyLossConfig
from aprium.train.shards import load
from tests.parallel.conftest import spawn
from tests.parallel.runs import (
    ADAMW,
    TOY,
    Documents,
    is_close,
    make,
    one_kv_head,
    take_steps,
    train,
)

# Name: the mesh, and what is trained. Data parallel is what the other axes leave over.
PAIRS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp": ({}, {"optim": ADAMW}),
    "ep": ({"ep": 2}, {"optim": ADAMW}),
    "tp": ({"tp": 2}, {"optim": ADAMW}),
    "cp": ({"cp": 2}, {"optim": ADAMW}),
    "dp, AdamW on whole stacks, no prediction head": (
        {},
        {"optim": ADAMW, "loss": {"mtp_weight": 0.0}},
    ),
    "tp, one KV head": ({"tp": 2}, {"optim": ADAMW, "shape": one_kv_head()}),
    "cp and more processes than groups": (
        {"cp": 2},
        {"optim": ADAMW, "shape": dataclasses.replace(TOY, num_groups=1)},
    ),
    "ep, all tokens to one process": ({"ep": 2}, {"optim": ADAMW, "crowd": True}),
    "dp, one document": ({}, {"optim": ADAMW, "source": 1}),
    "cp and ep": ({"cp": 2, "ep": 2}, {"optim": ADAMW}),
    "dp, episodes, routers frozen": (
        {},
        {
            "optim": ADAMW,
            "source": 7,
            "episodes": True,
            "loss": {"policy": PolicyLossConfig(normalise="sequences", sequence_bound=6.0)},
            "trainer": {"freeze_router": True, "micro_tokens": 90},
        },
    ),
    "cp, episodes, ratio of sequences": (
        {"cp": 2},
        {
            "optim": ADAMW,
            "source": 7,
            "episodes": True,
            "loss": {
                "mtp_detach": True,
                "policy": PolicyLossConfig(
                    ratio="sequence", sequence_bound=None, geometric_band=(0.6, 2.0)
                ),
            },
        },
    ),
    # Orthogonalising rounds to bfloat16: from the third step on a router may choose otherwise.
    "dp, Muon": ({}, {"optim": {"muon_lr": 1e-3, "lr": 1e-4}, "steps": 2}),
    "tp, Muon": ({"tp": 2}, {"optim": {"muon_lr": 1e-3, "lr": 1e-4}, "steps": 2}),
    "ep, Muon": ({"ep": 2}, {"optim": {"muon_lr": 1e-3, "lr": 1e-4}, "steps": 2}),
}
FOURS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tp and ep": ({"tp": 2, "ep": 2}, {"optim": ADAMW}),
    "ep, experts cut again": ({"ep": 2}, {"optim": ADAMW}),
    "cp and tp": ({"cp": 2, "tp": 2}, {"optim": ADAMW}),
    "cp 4": ({"cp": 4}, {"optim": ADAMW}),
    "tp, KV heads shared by two": (
        {"tp": 4},
        {"optim": ADAMW, "shape": dataclasses.replace(TOY, num_groups=4)},
    ),
    "cp, dp and ep 4": ({"cp": 2, "ep": 4}, {"optim": ADAMW}),
    "tp and ep, Muon": (
        {"tp": 2, "ep": 2},
        {"optim": {"muon_lr": 1e-3, "lr": 1e-4}, "steps": 2},
    ),
}
REFUSED = {
    "parallel.tp is 2, which does not divide num_groups 1": (
        {"tp": 2},
        dataclasses.replace(TOY, num_groups=1),
    ),
    "parallel.ep is 2, which does not divide num_experts 7": (
        {"ep": 2},
        dataclasses.replace(TOY, num_experts=7),
    ),
    "parallel.tp is 2, which does not divide num_heads 3": (
        {"tp": 2},
        dataclasses.replace(TOY, num_heads=3, num_kv_heads=1),
    ),
    "it must divide the 3 Mamba heads": (
        {"cp": 2},
        dataclasses.replace(TOY, mamba_num_heads=3, num_groups=3),
    ),
    "is 3 x 1, which does not divide the 2 process(es)": ({"tp": 3}, TOY),
}
STEPS = 2
SLOW = {"muon_lr": 1e-4, "lr": 1e-4}  # so that a rounding turns no choice of a router


def _train(output: Path, mesh: dict[str, int], case: dict[str, Any]) -> dict[str, Any]:
    case = dict(case)
    if "source" in case:
        case["source"] = Documents(case["source"], case.pop("episodes", False))
    return train(output, mesh, **case)


def _run_cases(directory: Path, cases: dict[str, Any]) -> dict[str, Any]:
    return {name: _train(directory / name, mesh, case) for name, (mesh, case) in cases.items()}


def _refusal(mesh: dict[str, int], shape: Any) -> str:
    try:
        HybridModel(shape, mesh=Mesh.from_environment(ParallelConfig(**mesh)))
    except ApriumError as error:
        return str(error)
    return "nothing was refused"


def _stop(directory: Path) -> bool:
    """Ask one process to stop; return whether this one went on to the end."""
    trainer = make(directory, ParallelConfig(), 50)
    if trainer.mesh.leads:
        trainer._request_stop(15, None)
    trainer.source.next_batch()
    return trainer.run()


def _two(directory: Path) -> dict[str, Any]:
    found = _run_cases(directory, PAIRS)
    found["refused"] = [_refusal(*case) for case in REFUSED.values()]
    found["stopped"] = _stop(directory / "stopped")
    found["resharded"] = [
        take_steps(make(directory / "resharded", ParallelConfig(**mesh), 9, optim=SLOW), STEPS)
        for mesh in ({"ep": 2}, {"tp": 2})
    ]
    found["from one"] = take_steps(make(directory / "one", ParallelConfig(), 9, optim=SLOW), STEPS)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def pair(directory: Path) -> list[dict[str, Any]]:
    take_steps(make(directory / "one", ParallelConfig(), 9, optim=SLOW), STEPS)
    return spawn(_two, 2, directory, directory)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return take_steps(
        make(tmp_path_factory.mktemp("straight"), ParallelConfig(), 9, optim=SLOW), 3 * STEPS
    )


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_equal_one(name: str, pair: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = _train(tmp_path, {}, PAIRS[name][1])
    for found in pair:
        is_close(found[name], alone)


def test_meshes_that_do_not_fit_are_refused(pair: list[dict[str, Any]]) -> None:
    for found in pair:
        for message, expected in zip(found["refused"], REFUSED, strict=True):
            assert expected in message


def test_all_stop_when_one_is_asked_to(pair: list[dict[str, Any]]) -> None:
    assert [found["stopped"] for found in pair] == [False, False]


def test_checkpoint_of_two_is_read_by_two_others_and_by_one(
    pair: list[dict[str, Any]], straight: list[dict[str, float]], directory: Path
) -> None:
    last = make(directory / "resharded", ParallelConfig(), 9, optim=SLOW)
    found = [*pair[0]["resharded"][0], *pair[0]["resharded"][1], *take_steps(last, STEPS)]
    _same_losses(found, straight)


def test_checkpoint_of_one_is_read_by_two(
    pair: list[dict[str, Any]], straight: list[dict[str, float]]
) -> None:
    _same_losses(pair[1]["from one"], straight[STEPS : 2 * STEPS])


def test_read_checkpoint_holds_every_value_that_was_written(directory: Path, pair: Any) -> None:
    one, cut = (
        make(directory / name, ParallelConfig(), 9, optim=SLOW) for name in ("one", "resharded")
    )
    for trainer in (one, cut):
        load(trainer.output / f"step-{2 * STEPS:06d}", trainer.model, trainer.optimisers)
    for (name, a), b in zip(one.model.named_parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
        states, others = _state(one, a), _state(cut, b)
        assert states.keys() == others.keys()
        for leaf, state in states.items():
            assert (state - others[leaf]).norm() <= 0.2 * state.norm() + 1e-6, (name, leaf)


def test_changed_byte_of_a_shard_is_noticed(directory: Path, pair: Any, tmp_path: Path) -> None:
    name = f"step-{2 * STEPS:06d}"
    shutil.copytree(directory / "resharded" / name, tmp_path / name)
    file = min((tmp_path / name / "shards").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name} is not what was written"):
        make(tmp_path, ParallelConfig(), 9, optim=SLOW).resume()


def _state(trainer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        leaf: value
        for optimiser in trainer.optimisers
        if parameter in optimiser.state
        for leaf, value in optimiser.state[parameter].items()
    }


def _same_losses(found: list[dict[str, float]], straight: list[dict[str, float]]) -> None:
    for key in ("loss", "mtp_loss", "grad_norm"):
        assert [f[key] for f in found] == pytest.approx([f[key] for f in straight], rel=5e-5)
    assert [f["step"] for f in found] == [f["step"] for f in straight]


def _four(directory: Path) -> dict[str, Any]:
    found = _run_cases(directory, FOURS)
    mesh = ParallelConfig(tp=2, ep=2)
    found["resharded"] = take_steps(make(directory / "two", mesh, 9, optim=SLOW), STEPS)
    return found


def _first(directory: Path) -> list[dict[str, float]]:
    return take_steps(make(directory / "two", ParallelConfig(ep=2), 9, optim=SLOW), STEPS)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path: Path, straight: list[dict[str, float]]) -> None:
    first = spawn(_first, 2, tmp_path / "first", tmp_path)
    four = spawn(_four, 4, tmp_path / "four", tmp_path)
    for name, (_, case) in FOURS.items():
        alone = _train(tmp_path / f"{name}, alone", {}, case)
        for found in four:
            is_close(found[name], alone)
    last = take_steps(make(tmp_path / "two", ParallelConfig(), 9, optim=SLOW), STEPS)
    _same_losses([*first[0], *four[0]["resharded"], *last], straight)
