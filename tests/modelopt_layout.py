"""Writes small quantised checkpoints in the layouts of ModelOpt and compressed-tensors.

Written from the format description with the safetensors library, so that the reader is tested
against something other than its own writer. `write` returns the values that the stored tensors
stand for.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from aprium.checkpoint.names import matrices, tensor_table
from aprium.model.config import ModelConfig

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def encode_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ModelOpt's dynamic encoder: codes [N, K/2], block scales [N, K/16], global scale."""
    blocks = x.float().unflatten(-1, (-1, 16))
    scale_2 = blocks.abs().max() / 2688
    wanted = blocks.abs().amax(-1) / (6 * scale_2)
    wanted = torch.where(wanted == 0, 1.0, wanted).clamp(2**-9, 448)
    scale = wanted.to(torch.float8_e4m3fn)
    y = (blocks / (scale.float() * scale_2)[..., None]).abs()
    code = torch.zeros_like(y, dtype=torch.uint8)
    for threshold, inclusive in (
        *((0.25, False), (0.75, True), (1.25, False), (1.75, True)),
        *((2.5, False), (3.5, True), (5.0, False)),
    ):
        code += ((y >= threshold) if inclusive else (y > threshold)).to(torch.uint8)
    code = (code | ((blocks < 0).to(torch.uint8) << 3)).flatten(-2)
    return code[..., ::2] | (code[..., 1::2] << 4), scale, scale_2


def decode_nvfp4(packed: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Values of `packed`, with the product of both scales already taken, [N, K/16]."""
    code = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    values = torch.where(code > 7, -E2M1[code & 7], E2M1[code & 7])
    return (values.unflatten(-1, (-1, 16)) * factor[..., None]).flatten(-2)


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of an unquantised checkpoint in published names, BF16 but the router bias."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in tensor_table(config).items():
        value = torch.randn(spec.shape, generator=generator) * 0.1
        leaf = name.rsplit(".", 1)[-1]
        if "norm" in name:
            value = value + 1
        if leaf == "e_score_correction_bias":
            tensors[name] = value
        elif leaf in ("A_log", "dt_bias"):
            tensors[name] = value.abs().bfloat16()
        else:
            tensors[name] = value.bfloat16()
    return tensors


def choose(config: ModelConfig, scheme: str) -> dict[str, str]:
    """Which module has which format under a named scheme."""
    formats = {}
    for name in matrices(config):
        if name.startswith("mtp."):
            continue
        expert, shared = ".experts." in name, ".shared_experts." in name
        mamba = name.endswith(("in_proj", "out_proj"))
        if scheme in ("nvfp4", "compressed-tensors") and (expert or shared or mamba):
            formats[name] = "nvfp4"
        elif scheme in ("fp8", "compressed-fp8") and (expert or shared or mamba):
            formats[name] = "fp8"
        elif scheme == "mixed" and (expert or shared or name == "lm_head"):
            formats[name] = "w4a16_nvfp4"
        elif scheme == "mixed" and mamba:
            formats[name] = "fp8"
    return formats


def write(
    directory: Path,
    config: ModelConfig,
    scheme: str,
    *,
    num_shards: int = 1,
    seed: int = 0,
    scalar_shape: tuple[int, ...] = (),
) -> dict[str, torch.Tensor]:
    """Write a checkpoint; `scheme` is bf16, fp8, nvfp4, mixed, compressed-tensors or -fp8.

    Returns float32 values by published name, as an unquantised model would have them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plain = random_tensors(config, seed)
    formats = choose(config, scheme)
    compressed = scheme.startswith("compressed")
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if module not in formats:
            stored[name], values[name] = tensor, tensor.float()
            continue
        shape = (1,) if compressed else scalar_shape
        parts, value = _encode(tensor, formats[module], compressed, shape)
        stored |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
        values[name] = value
    if scheme == "mixed":
        for name in list(plain):
            if name.startswith("backbone.") and name.endswith(("k_proj.weight", "v_proj.weight")):
                letter = name.split(".")[-2][0]
                stored[name.removesuffix("weight") + f"{letter}_scale"] = torch.tensor(0.5)
    _save(directory, stored, num_shards)
    _write_json(directory, config, scheme, formats)
    return values


def _encode(tensor, fmt, compressed, shape):
    input_scale = torch.full(shape, 0.25)
    if fmt == "fp8":
        scale = (tensor.float().abs().max() / 448).reshape(shape)
        codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
        parts = {"weight": codes, "weight_scale": scale, "input_scale": input_scale}
        return parts, codes.float() * scale
    packed, scale, scale_2 = encode_nvfp4(tensor)
    if compressed:
        divisor = (1 / scale_2).reshape(shape)
        parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor}
        if fmt == "nvfp4":
            parts["input_global_scale"] = 1 / input_scale
        return parts, decode_nvfp4(packed, scale.float() / divisor)
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": scale_2.reshape(shape)}
    if fmt == "nvfp4":
        parts["input_scale"] = input_scale
    return parts, decode_nvfp4(packed, scale.float() * scale_2)


def _save(directory: Path, stored: dict[str, torch.Tensor], num_shards: int) -> None:
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    if num_shards == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(stored)
    weight_map = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: stored[name] for name in names[i::num_shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_json(directory: Path, config: ModelConfig, scheme: str, formats: dict[str, str]) -> None:
    hf = config.to_hf()
    body: dict | None = None
    group = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    if scheme == "nvfp4":
        left = [name for name in matrices(config) if name not in formats and "mtp." not in name]
        body = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
        body["exclude_modules"] = ["backbone.layers.*.mixer.gate", "mtp*", *left]
    elif scheme == "fp8":
        left = [name for name in matrices(config) if name not in formats and "mtp." not in name]
        body = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": left}
    elif scheme == "mixed":
        entries = {"fp8": {"quant_algo": "FP8"}}
        entries["w4a16_nvfp4"] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        layers = {name: entries[fmt] for name, fmt in formats.items()}
        body = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8"}
        body |= {"exclude_modules": ["mtp*"], "quantized_layers": layers}
    elif scheme == "compressed-tensors":
        hf["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": group, "input_activations": group}
            },
            "ignore": [
                *("lm_head", "re:.*latent_proj", "re:.*[qkvo]_proj$", "re:mtp.*"),
                r"re:backbone\.layers\.\d+\.mixer\.(up|down)_proj",
            ],
        }
    elif scheme == "compressed-fp8":
        eight = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
        hf["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["re:.*experts.*", "re:.*(in|out)_proj"],
                    "weights": eight,
                    "input_activations": eight,
                }
            },
            "ignore": ["re:mtp.*"],
        }
    if body is not None:
        data = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": body}
        (directory / "hf_quant_config.json").write_text(json.dumps(data, indent=4))
    (directory / "config.json").write_text(json.dumps(hf, indent=2))
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
