"""Launch commands carry the plan; what cannot be run is a sentence."""

import json
import shlex

from aprium.plan.hardware import device
from aprium.plan.launch import commands
from aprium.plan.memory import Deployment
from aprium.plan.shapes import target_shape


def words(name: str, gpu: str, engine: str, **cut: object) -> list[str]:
    deployment = Deployment(**cut)  # type: ignore[arg-type]
    found = commands(target_shape(name), device(gpu), deployment, 65536, 16)[engine]
    return shlex.split(found.replace("<(", "").rstrip(")"))


def after(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_vllm() -> None:
    line = words("ultra-nvfp4", "h100", "vllm", tp=8, drafts=5)
    assert line[:3] == ["vllm", "serve", "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4"]
    assert after(line, "--tensor-parallel-size") == "8"
    assert after(line, "--max-model-len") == "65536"
    assert after(line, "--kv-cache-dtype") == "fp8"
    assert after(line, "--mamba-ssm-cache-dtype") == "float32"
    assert json.loads(after(line, "--speculative-config"))["num_speculative_tokens"] == 5
    station = words("ultra-nvfp4", "dgx-station", "vllm", offload_gb=150)
    assert after(station, "--cpu-offload-gb") == "150"
    assert "--pipeline-parallel-size" in words("ultra-nvfp4", "dgx-station", "vllm", pp=2)


def test_sglang_and_tensorrt() -> None:
    line = words("ultra", "b200", "sglang", tp=4, dp=2, ep=True)
    assert after(line, "--tp") == "8" and after(line, "--dp") == "2"
    assert "--enable-dp-attention" in line and after(line, "--ep") == "8"
    line = words("ultra-nvfp4", "b200", "tensorrt-llm", tp=4, ep=True, drafts=3)
    options = json.loads(line[-1])
    assert options["speculative_config"]["num_nextn_predict_layers"] == 3
    assert after(line, "--tp_size") == after(line, "--ep_size") == "4"


def test_aprium_on_its_own_machines() -> None:
    line = words("nano-nvfp4", "epyc-9654", "aprium", drafts=0)
    assert line[:2] == ["aprium", "serve"] and after(line, "--max-num-seqs") == "16"
    for name, gpu, part in (
        ("nano-nvfp4", "h100", "CPUs"),
        ("glm-5", "epyc-9654", "family only"),
        ("nano", "epyc-9654", "aprium serve"),
    ):
        found = commands(target_shape(name), device(gpu), Deployment(), 4096, 1)["aprium"]
        assert part in found
    gguf = commands(target_shape("nano", "q4_0"), device("epyc-9654"), Deployment(), 4096, 1)
    assert all("GGUF" in text or "CPUs" in text or "GPUs" in text for text in gguf.values())


def test_the_servers_own_parser_takes_the_command() -> None:
    from aprium.serve.flags import prepare, read

    line = words("nano-nvfp4", "epyc-9654", "aprium", state_dtype="float16")
    flags = dict(zip(line[3::2], line[4::2], strict=True))
    prepare(line[2:])
    read({key.removeprefix("--"): value for key, value in flags.items()})
