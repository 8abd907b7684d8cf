"""Commands that start a planned deployment: Aprium, vLLM, SGLang, TensorRT-LLM.

Flags are those of the published recipes (docs/planning.md names them). An engine that cannot run
the plan gets a sentence instead of a command.
"""

import json

from aprium.plan.hardware import Device
from aprium.plan.memory import Deployment
from aprium.plan.shapes import HUB_IDS, Shape

ENGINES = ("aprium", "vllm", "sglang", "tensorrt-llm")
_LONG = 262144  # contexts beyond need an engine to be told


def commands(
    shape: Shape, device: Device, deployment: Deployment, context: int, sequences: int
) -> dict[str, str]:
    """Return engine -> command, or the sentence why there is none."""
    model = HUB_IDS.get((shape.base, shape.precision), shape.name)
    sequences = max(sequences, 1)
    return {
        "aprium": _aprium(shape, device, deployment, context, sequences),
        "vllm": _vllm(shape, device, deployment, model, context, sequences),
        "sglang": _sglang(shape, device, deployment, model, context, sequences),
        "tensorrt-llm": _tensorrt(shape, device, deployment, model, context, sequences),
    }


def _aprium(
    shape: Shape, device: Device, deployment: Deployment, context: int, sequences: int
) -> str:
    if not shape.ours:
        return f"Aprium runs the Nemotron 3 family only, not {shape.base}"
    if device.kind != "cpu":
        return "Aprium runs on CPUs in this version: plan for a CPU, or use one of the others"
    if deployment.devices > 1:
        return "Aprium runs on one machine and does not split a model in this version"
    if shape.precision not in ("bf16", "fp8", "nvfp4"):
        return "Aprium loads safetensors checkpoints, not GGUF files"
    target = HUB_IDS.get((shape.base, shape.precision), shape.name)
    parts = ["aprium serve", target, f"--max-model-len {context} --max-num-seqs {sequences}"]
    if deployment.kv_dtype == "fp8" or (deployment.kv_dtype == "auto" and shape.kv_cache == "fp8"):
        parts.append("--kv-cache-dtype fp8")
    if deployment.state_dtype in ("float16", "fp8"):
        parts.append(f"--mamba-ssm-cache-dtype {deployment.state_dtype}")
    if deployment.drafts:
        parts.append(f"--speculative-config '{_speculation(deployment)}'")
    return " ".join(parts)


def _speculation(deployment: Deployment) -> str:
    return json.dumps({"method": "mtp", "num_speculative_tokens": deployment.drafts})


def _vllm(
    shape: Shape,
    device: Device,
    deployment: Deployment,
    model: str,
    context: int,
    sequences: int,
) -> str:
    if device.kind == "cpu" and shape.ours:
        return "vLLM does not run mixtures of ungated experts on CPUs"
    if shape.precision not in ("bf16", "fp8", "nvfp4", "int4", "native"):
        return "vLLM is planned for with safetensors checkpoints, not GGUF files"
    parts = ["vllm serve", model, "--trust-remote-code"]
    if context > _LONG:
        parts.insert(0, "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1")
    parts.append(f"--tensor-parallel-size {deployment.tp}")
    if deployment.pp > 1:
        parts.append(f"--pipeline-parallel-size {deployment.pp}")
    if deployment.dp > 1:
        parts.append(f"--data-parallel-size {deployment.dp}")
    if deployment.ep:
        parts.append("--enable-expert-parallel")
    parts += [
        f"--max-model-len {context}",
        f"--max-num-seqs {sequences}",
        f"--gpu-memory-utilization {deployment.utilization}",
        f"--max-num-batched-tokens {deployment.max_batched_tokens}",
    ]
    if deployment.kv_dtype == "fp8" or (deployment.kv_dtype == "auto" and shape.kv_cache == "fp8"):
        parts.append("--kv-cache-dtype fp8")
    if shape.ours:
        parts.append(f"--mamba-ssm-cache-dtype {deployment.state_dtype}")
    if deployment.drafts:
        parts.append(f"--speculative-config '{_speculation(deployment)}'")
    if deployment.offload_gb:
        parts.append(f"--cpu-offload-gb {deployment.offload_gb:.0f} --cpu-offload-params experts")
    if shape.ours and shape.precision == "nvfp4" and not device.fp4_tflops:
        parts.append("--moe-backend marlin")
    if shape.ours:
        parts.append("--reasoning-parser nemotron_v3 --enable-auto-tool-choice")
        parts.append("--tool-call-parser qwen3_coder")
    return " ".join(parts)


def _sglang(
    shape: Shape,
    device: Device,
    deployment: Deployment,
    model: str,
    context: int,
    sequences: int,
) -> str:
    if device.kind == "cpu":
        return "SGLang is planned for on GPUs only"
    if shape.precision not in ("bf16", "fp8", "nvfp4", "int4", "native"):
        return "SGLang is planned for with safetensors checkpoints, not GGUF files"
    if deployment.offload_gb:
        return "SGLang's host offload does not follow this plan: use vLLM"
    world = deployment.tp * deployment.dp
    parts = ["python -m sglang.launch_server --model-path", model, "--trust-remote-code"]
    parts.append(f"--tp {world}")
    if deployment.dp > 1:
        parts.append(f"--dp {deployment.dp} --enable-dp-attention")
    if deployment.ep:
        parts.append(f"--ep {world}")
    if deployment.pp > 1:
        parts.append(f"--pp-size {deployment.pp}")
    parts += [
        f"--context-length {context}",
        f"--max-running-requests {sequences}",
        f"--mem-fraction-static {deployment.utilization}",
        f"--chunked-prefill-size {deployment.max_batched_tokens}",
    ]
    if deployment.kv_dtype == "fp8" or (deployment.kv_dtype == "auto" and shape.kv_cache == "fp8"):
        parts.append("--kv-cache-dtype fp8_e4m3")
    if shape.ours:
        parts.append("--mamba-radix-cache-strategy extra_buffer")
        parts.append("--tool-call-parser qwen3_coder --reasoning-parser nemotron_3")
    if deployment.drafts:
        parts.insert(0, "SGLANG_ENABLE_SPEC_V2=1")
        parts.append(
            f"--speculative-algorithm EAGLE --speculative-num-steps {deployment.drafts} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {deployment.drafts + 1}"
        )
    return " ".join(parts)


def _tensorrt(
    shape: Shape,
    device: Device,
    deployment: Deployment,
    model: str,
    context: int,
    sequences: int,
) -> str:
    if device.kind == "cpu" or device.key == "mi300x":
        return "TensorRT-LLM runs on NVIDIA GPUs only"
    if shape.precision not in ("bf16", "fp8", "nvfp4", "int4", "native"):
        return "TensorRT-LLM does not load GGUF files"
    if deployment.offload_gb:
        return "TensorRT-LLM does not keep experts in host memory: use vLLM"
    options = {
        "enable_attention_dp": deployment.dp > 1,
        "enable_chunked_prefill": True,
        "kv_cache_config": {
            "dtype": "fp8" if shape.kv_cache == "fp8" else "auto",
            "enable_block_reuse": False,
            "free_gpu_memory_fraction": deployment.utilization,
        },
    }
    if shape.ours:
        options["kv_cache_config"]["mamba_ssm_cache_dtype"] = deployment.state_dtype
    if deployment.drafts:
        options["speculative_config"] = {
            "decoding_type": "MTP",
            "num_nextn_predict_layers": deployment.drafts,
        }
    world = deployment.tp * deployment.dp
    parts = ["trtllm-serve", model, f"--tp_size {world}"]
    if deployment.ep or deployment.dp > 1:
        parts.append(f"--ep_size {world}")
    if deployment.pp > 1:
        parts.append(f"--pp_size {deployment.pp}")
    parts.append(f"--max_batch_size {sequences} --max_seq_len {context}")
    parts.append(f"--max_num_tokens {deployment.max_batched_tokens} --trust_remote_code")
    if shape.ours:
        parts.append("--reasoning_parser nano-v3 --tool_parser qwen3_coder")
    if context > _LONG:
        parts.insert(0, "TLLM_ALLOW_LONG_MAX_MODEL_LEN=1")
    parts.append(f"--extra_llm_api_options <(echo '{json.dumps(options)}')")
    return " ".join(parts)
