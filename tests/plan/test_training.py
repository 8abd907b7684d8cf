"""Training plans: published sizes of runs, arithmetic, pools."""

import json

import pytest

from aprium import cli
from aprium.base.errors import ConfigError
from aprium.plan.hardware import device
from aprium.plan.plan import Load
from aprium.plan.shapes import target_shape
from aprium.plan.training import Training, activations, device_bytes, training_plan

LOAD = Load(prompt=1024, output=1024)


def plan(model: str, gpu: str, num: int, **settings: object) -> dict:
    training = Training(**settings)  # type: ignore[arg-type]
    return training_plan(model, where=device(gpu), num=num, training=training, load=LOAD)


@pytest.mark.parametrize(
    ("model", "gpu", "num", "settings", "fits"),
    [
        ("nano", "h100", 1, {}, False),  # a full fine-tune on one device
        ("nano", "h100", 8, {"ep": 8}, True),  # NeMo: full fine-tuning on 8 x 80 GB
        ("nano", "h100", 4, {"method": "lora", "ep": 4}, True),  # NeMo: LoRA on 4 x 80 GB
        ("nano", "h100", 16, {"method": "pretrain", "ep": 8}, True),  # Megatron-Bridge
        ("super", "h100", 64, {"method": "pretrain", "ep": 8}, True),
        ("ultra", "gb200", 256, {"method": "pretrain", "ep": 64}, True),
        ("ultra", "h100", 64, {"ep": 64}, False),
    ],
)
def test_published_runs(model: str, gpu: str, num: int, settings: dict, fits: bool) -> None:
    assert (plan(model, gpu, num, **settings)["verdict"] != "no") == fits


def test_bytes_of_a_weight() -> None:
    shape = target_shape("nano")
    held = device_bytes(shape, 8, Training(ep=8))
    each = sum(held[k] for k in ("weights", "gradients", "master weights", "optimizer"))
    assert each * 8 / shape.params() == pytest.approx(16)
    eight = device_bytes(shape, 8, Training(ep=8, optimizer="adamw-8bit"))
    assert eight["optimizer"] == 4 * shape.params() / 8
    lora = device_bytes(shape, 8, Training(method="lora", ep=8))
    assert lora["optimizer"] < 0.01 * held["optimizer"]


def test_recomputing_saves_activations() -> None:
    shape = target_shape("super")
    none, some, full = (activations(shape, Training(recompute=r)) for r in ("none", "selective", "full"))  # fmt: skip  # noqa: E501
    assert full < some < none
    assert full == 2 * shape.hidden * 8192 * 90  # 88 layers and the prediction head's two
    assert activations(shape, Training(recompute="full", cp=4)) == full / 4


def test_the_least_number_is_least() -> None:
    found = plan("super", "h200", 64, ep=8)
    least = found["least_devices"]
    assert plan("super", "h200", least, ep=8)["verdict"] != "no"
    assert plan("super", "h200", least // 2, ep=8)["verdict"] == "no"


def test_pools_keep_pace() -> None:
    found = plan("nano", "h100", 32, method="rl", ep=8, prompts=128, samples=8, answer=4096)
    pools = found["pools"]
    made = pools["rollout_tokens_per_s"] * pools["step_s"]
    assert made >= pools["generated_tokens"] == 128 * 8 * 4096
    assert pools["teacher_devices"] == 0
    distilled = plan("nano", "h100", 32, method="mopd", ep=8, teachers=3)["pools"]
    assert distilled["teacher_devices"] > 0
    total = sum(distilled[f"{name}_devices"] for name in ("rollout", "teacher", "trainer"))
    assert distilled["total_devices"] == total


def test_refusals_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="ep 3 does not divide 8 devices"):
        plan("nano", "h100", 8, ep=3)
    with pytest.raises(ConfigError, match="optimizer is 'sgd'"):
        Training(optimizer="sgd")
    options = ["plan", "nano", "--gpu", "h100", "--num", "8", "--train", "sft", "--set", "ep=8"]
    assert cli.main(options) == 0
    assert "optimizer" in capsys.readouterr().out
    assert cli.main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["least_devices"] == 8
    assert cli.main([*options, "--set", "epp=8"]) == 1
    assert "unknown key epp" in capsys.readouterr().err
