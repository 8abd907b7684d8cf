"""What is found wrong with a command line before a model is loaded."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aprium import cli
from aprium.base.errors import ConfigError
from aprium.serve.flags import read
from aprium.serve.launch import engine_config, launch, sampling_defaults


def flags(**values: Any) -> dict[str, Any]:
    return read({name.replace("_", "-"): value for name, value in values.items()})[0]


def test_engine_config() -> None:
    config = engine_config(
        "m", flags(max_model_len="2K", dtype="float", seed=4, enable_chunked_prefill=False)
    )
    assert (config.max_model_len, config.dtype, config.seed) == (2048, "float32", 4)
    assert not config.enable_chunked_prefill
    assert engine_config("m", flags(load_format="safetensors")).load_format == "auto"
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        engine_config("m", flags(max_num_seqs=0))


def test_sampling_defaults(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path, flags()) == {}
    data = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": 2, "top_k": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    assert sampling_defaults(tmp_path, flags()) == {"temperature": 0.6, "top_p": 0.95}
    assert sampling_defaults(tmp_path, flags(generation_config="vllm")) == {}
    other = flags(generation_config=str(tmp_path), override_generation_config='{"top_p": 0.5}')
    assert sampling_defaults(Path("/"), other) == {"temperature": 0.6, "top_p": 0.5}
    with pytest.raises(ConfigError, match="give auto, vllm or a folder"):
        sampling_defaults(tmp_path, flags(generation_config=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="temperature is -1"):
        sampling_defaults(tmp_path, flags(override_generation_config='{"temperature": -1}'))


def test_a_taken_port_is_found_first(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
            launch(str(tmp_path / "no-model"), flags(port=port))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["m", "--speculative-config", "{"], 2, "--speculative-config '{' is not JSON"),
        (["pico", "--speculative_config.method", "eagle"], 1, "speculative method is 'eagle'"),
        (["pico", "--speculative-config", '{"model": "x"}'], 1, "unknown key speculative.model"),
        (["m", "--tensor_parallel_size=2"], 2, "--tensor-parallel-size 2 is not supported"),
        (["m", "--lora-modules", "a=b", "c=d"], 2, "merge them into the checkpoint"),
        (["a", "--model", "b"], 2, "the model is given twice"),
        (["m", "--no-such-flag"], 2, "--no-such-flag"),
        (["m", "--port", "x"], 2, "'x' is not a valid integer"),
        (["/no/such/dir", "--port", "0"], 1, "aprium: error: no checkpoint '/no/such/dir'"),
        (["toy", "--port", "0", "--load_format", "dummy"], 1, "toy has no tokenizer"),
        (["m", "--port", "123456"], 1, "choose another --host or --port"),
        (["pico", "--port", "0", "--sse-keep-alive", "-1"], 1, "--sse-keep-alive is -1.0"),
        (["pico", "--port", "0", "--sse-keep-alive", "inf"], 1, "and finite"),
    ],
)
def test_exit_status(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == status
    assert words in capsys.readouterr().err


def test_flags_without_effect_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["/no/such", "--port", "0", "--trust-remote-code", "--moe-backend", "marlin"]
    assert cli.main(["serve", *arguments]) == 1
    assert "without effect here: --trust-remote-code, --moe-backend" in capsys.readouterr().err


def test_help_and_refusals_are_light() -> None:
    code = (
        "import sys; from aprium.cli import main\n"
        "main(['serve', '--help']); main(['serve', 'm', '--enable-lora'])\n"
        "print([m for m in ('torch', 'fastapi', 'pydantic', 'uvicorn') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip().endswith("[]")
