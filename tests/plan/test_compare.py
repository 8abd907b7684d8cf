"""The family beside its competitors: the order of the published comparison, not tuned."""

import json

import pytest

from aprium import cli
from aprium.plan.compare import compare
from aprium.plan.hardware import device
from aprium.plan.plan import Load


@pytest.fixture(scope="module")
def rows():
    return compare("ultra", device("gb200"), Load(prompt=8192, output=65536), widths=(4, 8, 16))


def rate(rows, model: str, devices: int, assumption: str = "16-bit states") -> float | None:
    return next(
        r["tokens_per_s_per_device"]
        for r in rows
        if (r["model"], r["devices"], r["assumption"]) == (model, devices, assumption)
    )


def test_ultra_leads_on_long_answers_and_qwen_on_long_prompts(rows) -> None:
    assert rate(rows, "ultra", 8) > rate(rows, "qwen-3.5", 8) > rate(rows, "glm-5", 8)
    long = compare("ultra", device("gb200"), Load(prompt=51_200, output=2048), widths=(8,))
    assert rate(long, "qwen-3.5", 8) > rate(long, "ultra", 8)


def test_what_moves_the_order_is_shown(rows) -> None:
    def ratio(devices: int, assumption: str) -> float:
        return rate(rows, "ultra", devices, assumption) / rate(rows, "glm-5", devices, assumption)

    base = ratio(8, "16-bit states")
    assert ratio(4, "16-bit states") > base > ratio(16, "16-bit states")  # capacity
    assert ratio(8, "dense attention") > base
    assert ratio(8, "float32 states") < base
    assert rate(rows, "deepseek-v4", 4) is None  # does not fit


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "ultra", "--compare", "--gpu", "gb200", "--output", "65536"]
    assert cli.main(options) == 0
    assert "does not fit" in capsys.readouterr().out
    assert cli.main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["model"] for row in found} >= {"ultra", "glm-5", "kimi-k2"}
