"""This machine measured, and predictions for it."""

import json

import pytest

from aprium import cli
from aprium.plan import here
from aprium.plan.hardware import Device


def test_predictions_follow_the_measurements() -> None:
    slow = Device(
        key="a", name="a", kind="cpu", memory_gb=24, bandwidth_tb_s=0.0336, bf16_tflops=0.232,
        f32_tflops=0.119, int8_tops=0.467,
    )  # fmt: skip
    shape = here.shape_of("nano-nvfp4")
    one, eight = here.predict(shape, slow, prompt=512, generate=64, batches=[1, 8])
    # By hand: 2.97 GB a token, with float32 caches 3.0 GB, at 33.6 GB/s at most.
    assert 0.6 * 11.2 < one.decode_tokens_per_s < 11.2
    assert one.decode_tokens_per_s < eight.decode_tokens_per_s < 8 * one.decode_tokens_per_s
    rows = here.comparison(
        slow, [one], [{"prefill_tokens_per_s": 10.0, "decode_tokens_per_s": 5.0}]
    )
    assert rows[1]["error"] == one.decode_tokens_per_s / 5 - 1
    assert "decode" in here.comparison_text(rows)


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "_PROBE_BYTES", 1 << 24)
    assert cli.main(["plan", "pico", "--here", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["bandwidth_tb_s"] > 0 and found["device"]["memory_gb"] > 0
    assert [row["batch"] for row in found["predicted"]] == [1, 4, 8]
    assert all(row["decode_tokens_per_s"] > 0 for row in found["predicted"])
    assert cli.main(["plan", "pico", "--here"]) == 0
    assert "which fit" in capsys.readouterr().out
    assert cli.main(["plan", "pico", "--here", "--gpu", "h100"]) == 1
    assert "leave --gpu" in capsys.readouterr().err
