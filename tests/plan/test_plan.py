"""One plan from end to end: the JSON, the choice of precision and cut, the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aprium import cli
from aprium.base.errors import ConfigError
from aprium.plan.plan import Load, as_json, make_plan

KEYS = {
    *("verdict", "per_gpu_bytes", "usable_bytes_per_gpu", "max_concurrency", "max_context"),
    *("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "tpot_s"),
    *("cost_per_million_output_tokens", "assumptions", "ranges", "commands"),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_ultra_on_eight_h100(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "ultra", "--gpu", "h100-sxm", "--num", "8", "--json"))
    assert found.keys() >= KEYS
    assert (found["verdict"], found["precision"], found["parallelism"]) == ("fits", "nvfp4", "TP8")
    held = sum(found["per_gpu_bytes"].values())
    assert held < found["usable_bytes_per_gpu"]
    for name, (low, high) in found["ranges"].items():
        assert low < found[name] < high, name
    assert set(found["commands"]) == {"aprium", "vllm", "sglang", "tensorrt-llm"}


def test_bf16_does_not_fit_there_and_says_why() -> None:
    plan = make_plan("ultra", gpu="h100", num=8, precision="bf16", load=Load())
    assert plan.verdict.verdict == "no"
    assert "weights take" in plan.verdict.why
    assert any("16 devices" in remedy for remedy in plan.verdict.remedies)
    assert "nvfp4: fits" in plan.verdict.remedies
    facts = as_json(plan)
    assert facts["decode_tokens_per_s"] is None and facts["max_concurrency"] == 0
    assert facts["cost_per_million_output_tokens"] is None and facts["commands"] == {}


def test_the_widest_precision_that_fits_is_chosen() -> None:
    chosen = {
        num: make_plan("super", gpu="h100", num=num, load=Load()).shape.precision
        for num in (1, 2, 4)
    }
    assert chosen[4] == "bf16"
    assert chosen[2] in ("fp8", "nvfp4")
    assert chosen[1] == "nvfp4"


def test_many_users_at_long_context() -> None:
    load = Load(concurrency=64, prompt=190_000, output=2000, context=200_000)
    plan = make_plan("ultra", gpu="b200", num=8, load=load)
    assert plan.verdict.verdict != "no" and plan.max_concurrency >= 64
    assert plan.max_context >= 200_000
    few = make_plan("ultra", gpu="b200", num=2, precision="nvfp4", load=load)
    assert few.verdict.verdict == "no"


def test_replicas_share_the_load() -> None:
    one = make_plan("nano-fp8", gpu="h100", num=1, load=Load(concurrency=32), settings={"tp": 1})
    four = make_plan("nano-fp8", gpu="h100", num=4, load=Load(concurrency=128), settings={"tp": 1})
    assert four.replicas == 4
    assert one.rates is not None and four.rates is not None
    assert four.rates.output_tokens_per_s == pytest.approx(4 * one.rates.output_tokens_per_s)
    assert four.rates.ttft_s == pytest.approx(one.rates.ttft_s)


def test_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="TP3 takes 3 devices, which do not divide"):
        make_plan("nano", gpu="h100", num=4, load=Load(), settings={"tp": 3})
    with pytest.raises(ConfigError, match="context is 100: it must hold"):
        Load(context=100)
    for arguments, words in (
        (["nano"], "name one device"),
        ([], "name the model"),
        (["nano", "--gpu", "h100", "--num", "0"], "num is 0"),
        (["nano", "--gpu", "h100", "--reuse", "1"], "reuse is 1.0"),
        (["nano", "--gpu", "h100", "--acceptance", "0.5"], "give --drafts"),
        (["nano", "--gpu", "h100", "--tp", "2", "--search"], "do not go together"),
        (["nano", "--gpu", "h100", "--train", "sftt"], "method is 'sftt'"),
        (["nano", "--gpu", "h100", "--simulate", "x.jsonl"], "is no file"),
    ):
        assert cli.main(["plan", *arguments]) == 1
        assert words in capsys.readouterr().err


def test_text_and_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    text = run(capsys, "nano", "--gpu", "rtx-4090", "--precision", "nvfp4", "--html", str(page))
    assert "FITS" in text and "a million output tokens" in text and str(page) in text
    written = page.read_text(encoding="utf-8")
    assert written.count("data:image/png;base64,") == 2
    assert "http://" not in written and "https://" not in written
    listed = run(capsys, "--list-gpus")
    assert "h100-sxm" in listed and "dgx-spark" in listed


def test_prices_and_speculation_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["super-nvfp4", "--gpu", "b200", "--num", "2", "--tp", "2", "--json"]
    plain = json.loads(run(capsys, *base))
    cheap = json.loads(run(capsys, *base, "--price", "1"))
    assert cheap["cost"]["per_hour"] == [2.0, 2.0, 2.0]
    assert cheap["cost_per_million_output_tokens"] < plain["cost_per_million_output_tokens"]
    drafted = json.loads(run(capsys, *base, "--drafts", "3"))
    assert drafted["state_bytes_per_sequence_per_gpu"] == pytest.approx(
        4 * plain["state_bytes_per_sequence_per_gpu"]
    )
    assert any("3 drafts" in text for text in drafted["assumptions"])


def test_a_users_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[hardware.mine]\nname = "mine"\nmemory_gb = 200\nbandwidth_tb_s = 1\nbf16_tflops = 100\n'
    )
    found = json.loads(run(capsys, "nano", "--gpu", "mine", "--data", str(path), "--json"))
    assert found["usable_bytes_per_gpu"] == 200e9 and found["cost"] is None


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from aprium import cli; "
        "cli.main(['plan', 'ultra', '--gpu', 'h100-sxm', '--num', '8']); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
