"""The flag table: vLLM's spellings taken, the rest refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest

from aprium.base.errors import UnsupportedError
from aprium.serve.flags import FLAGS, REFUSED, prepare, read

# Every flag that published recipes of the family use (with vLLM), as they write them.
RECIPE_FLAGS = """
model served-model-name host port api-key ssl-keyfile ssl-certfile trust-remote-code dtype
quantization kv-cache-dtype mamba-ssm-cache-dtype mamba-cache-dtype
enable-mamba-cache-stochastic-rounding mamba-cache-philox-rounds enable-prefix-caching
mamba-cache-mode mamba-block-size prefix-match-unit enable-mamba-fine-grained-prefix-cache
block-size max-model-len max-num-seqs max-num-batched-tokens enable-chunked-prefill
async-scheduling max-num-queued-reqs max-num-queued-tokens shutdown-timeout
gpu-memory-utilization swap-space tensor-parallel-size pipeline-parallel-size data-parallel-size
enable-expert-parallel mamba-backend mamba-ssu-algorithm moe-backend linear-backend
attention-backend enforce-eager max-cudagraph-capture-size enable-flashinfer-autotune
speculative-config enable-auto-tool-choice tool-call-parser reasoning-parser
reasoning-parser-plugin reasoning-config default-chat-template-kwargs chat-template
generation-config cpu-offload-gb cpu-offload-params load-format download-dir lora-modules
enable-lora max-lora-rank
""".split()


def test_every_recipe_flag_is_known() -> None:
    known = [flag.name for flag in FLAGS] + list(REFUSED)
    assert len(known) == len(set(known))
    assert set(RECIPE_FLAGS) <= set(known)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_flags_say_why(name: str) -> None:
    for spelling in (f"--{name}", f"--{name.replace('-', '_')}=x", f"--{name}.method"):
        with pytest.raises(UnsupportedError, match=f"^--{name} is not supported: .+"):
            prepare(["m", spelling])
    assert prepare(["m", f"--no-{name}", "--port", "1"]) == ["m", "--port", "1"]


def test_one_spelling() -> None:
    given = ["m", "--max_model_len=8", "--api-key", "a_b", "--no_enforce_eager", "-h"]
    wanted = ["m", "--max-model-len=8", "--api-key", "a_b", "--no-enforce-eager", "-h"]
    assert prepare(given) == wanted


def test_lists_of_words() -> None:
    given = ["m", "--served-model-name", "a", "b", "--port", "1", "--api-key", "k"]
    assert prepare(given) == [
        "m", "--served-model-name", "a", "--served-model-name", "b", "--port", "1", "--api-key", "k"
    ]  # fmt: skip
    assert prepare(["--served-model-name", "a", "m"]) == ["--served-model-name", "a", "m"]


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("max-model-len", "32768", 32768),
        ("max-model-len", "32k", 32000),
        ("max-model-len", "32K", 32768),
        ("max-num-batched-tokens", "1.5K", 1536),
        ("kv-cache-memory-bytes", "2G", 2 << 30),
        ("max-model-len", "auto", None),
        ("max-model-len", "-1", None),
        ("default-chat-template-kwargs", '{"enable_thinking": false}', {"enable_thinking": False}),
        ("dtype", "bfloat16", "bfloat16"),
        ("quantization", "compressed-tensors", "compressed-tensors"),
    ],
)
def test_values(name: str, value: str, result: Any) -> None:
    assert read({name: value})[0][name] == result


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("max-model-len", "many", "write it as 32768 or 32K"),
        ("default-chat-template-kwargs", "{", "is not JSON"),
        ("default-chat-template-kwargs", "[1]", "JSON object"),
        ("tensor-parallel-size", "8", "one process"),
        ("kv-cache-dtype", "fp8_e5m2", "float32, bfloat16 or fp8"),
        ("mamba-ssm-cache-dtype", "bfloat16", "float16 or fp8"),
        ("mamba-cache-dtype", "float16", "--mamba-ssm-cache-dtype"),
        ("dtype", "float16", "use auto, float32 or bfloat16"),
        ("quantization", "awq", "format the checkpoint has"),
        ("tool-call-parser", "hermes", "always parsed"),
        ("reasoning-parser", "deepseek_r1", "always parsed"),
        ("load-format", "gguf", "safetensors"),
        ("cpu-offload-gb", "150", "main memory already"),
    ],
)
def test_values_that_cannot_be_had(name: str, value: str, remedy: str) -> None:
    with pytest.raises(UnsupportedError, match=f"--{name} .*{remedy}"):
        read({name: value})


def test_values_that_change_nothing() -> None:
    harmless = {
        "tensor-parallel-size": "1",
        "mamba-cache-dtype": "float32",
        "reasoning-parser": "nano-v3",
        "tool-call-parser": "qwen3_coder",
        "enforce-eager": True,
        "swap-space": "0",
    }
    taken, ignored = read(harmless)
    assert ignored == ["swap-space", "enforce-eager"]
    assert not set(taken) & set(harmless)
    assert (taken["host"], taken["port"], taken["dtype"]) == ("127.0.0.1", 8000, "auto")


def test_the_documentation_names_every_flag() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    named = set(re.findall(r"`--([a-z0-9-]+[a-z0-9])`", text))
    assert named >= {flag.name for flag in FLAGS} | set(REFUSED)
    # Beyond the table only what the text says about single values.
    assert named - {flag.name for flag in FLAGS} - set(REFUSED) <= {"no"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 3}'],
        ["--speculative_config.method", "mtp", "--speculative-config.num-speculative-tokens=3"],
        ["--speculative-config.method=mtp", "--speculative_config.num_speculative_tokens", "3"],
    ],
)
def test_json_flags_may_be_given_key_by_key(arguments: list[str]) -> None:
    prepared = prepare(["pico", *arguments, "--port", "0"])
    given = [argument for argument in prepared if argument.startswith("--speculative-config")]
    text = given[0].partition("=")[2] or prepared[prepared.index(given[0]) + 1]
    taken, _ = read({"speculative-config": text})
    assert taken["speculative-config"] == {"method": "mtp", "num_speculative_tokens": 3}
    assert prepared.count("--port") == 1 and len(given) == 1
