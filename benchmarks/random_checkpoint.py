"""Write a checkpoint of random weights in a published layout, tensor by tensor.

python benchmarks/random_checkpoint.py DIR --shape nano --layout nvfp4 [--pattern 'MEMEM*']

Layouts: "nvfp4" stores every matrix in NVFP4 (embedding, router and vectors stay BF16 or float32),
4.5 bits a weight as in llama.cpp's Q4_0; "published" is that of the preset `SHAPE-nvfp4`; "bf16".
Values have the deviation 0.02 of initialisation, so routing stays spread and activations finite.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aprium.checkpoint.names import TensorSpec, matrices, tensor_table
from aprium.checkpoint.quant_config import QUANT_FILE, to_hf
from aprium.checkpoint.safetensors import DTYPES, Entry, write_directory
from aprium.model.config import PATTERN_KINDS, ModelConfig, QuantConfig
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import quant_preset

SHARD_BYTES = 4_000_000_000
POOL_BYTES = 1 << 26


def quantisation(config: ModelConfig, shape: str, layout: str) -> QuantConfig:
    """Return the formats of a layout by name."""
    if layout == "bf16":
        return QuantConfig()
    if layout == "nvfp4":
        return QuantConfig(formats=dict.fromkeys(matrices(config), "nvfp4"), kv_cache="fp8")
    return quant_preset(f"{shape}-nvfp4")


def value(name: str, spec: TensorSpec, pool: np.ndarray, random: np.random.Generator) -> Tensor:
    """Draw one tensor."""
    leaf, dtype = name.rpartition(".")[2], DTYPES[spec.dtypes[0]]
    if dtype == torch.uint8:
        count = int(np.prod(spec.shape))
        start = int(random.integers(0, POOL_BYTES))
        data = np.resize(pool[start : start + count], count)
        return torch.from_numpy(data).view(spec.shape)
    if leaf == "weight_scale" and dtype == torch.float8_e4m3fn:
        return torch.full(spec.shape, 0x38, dtype=torch.uint8).view(dtype)  # 1.0
    if leaf in ("weight_scale_2", "input_scale"):
        return torch.full(spec.shape, 0.02 / 3)
    if leaf == "A_log":
        return torch.arange(1, spec.shape[0] + 1).float().log().to(dtype)
    if leaf == "dt_bias":
        return torch.full(spec.shape, -4.0).to(dtype)
    if "norm" in name or leaf == "D":
        return torch.ones(spec.shape, dtype=dtype)
    if leaf in ("bias", "e_score_correction_bias"):
        return torch.zeros(spec.shape, dtype=dtype)
    scale = 0.2 if "conv1d" in name else 0.02
    return torch.from_numpy(random.standard_normal(spec.shape, np.float32) * scale).to(dtype)


def main() -> None:
    """Write the directory that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", default="nano", choices=PRESETS)
    parser.add_argument("--layout", default="nvfp4", choices=("nvfp4", "published", "bf16"))
    parser.add_argument("--pattern", help="layers instead of the shape's own, as letters")
    options = parser.parse_args()
    config = PRESETS[options.shape]
    if options.pattern:
        layers = tuple(PATTERN_KINDS[letter] for letter in options.pattern)
        config = dataclasses.replace(config, layers=layers)
    quant = quantisation(config, options.shape, options.layout)
    table = tensor_table(config, quant, router_dtype="F32")
    random = np.random.default_rng(0)
    pool = random.integers(0, 256, 2 * POOL_BYTES, dtype=np.uint8)
    options.directory.mkdir(parents=True, exist_ok=True)
    hf = config.to_hf() | {"dtype": "bfloat16"}
    if quant.formats:
        quantisation_json, embedded = to_hf(quant, config)
        hf["quantization_config"] = embedded
        (options.directory / QUANT_FILE).write_text(json.dumps(quantisation_json))
    (options.directory / "config.json").write_text(json.dumps(hf))
    entries = [Entry(name, spec.dtypes[0], spec.shape) for name, spec in table.items()]
    write_directory(
        options.directory,
        entries,
        lambda name: value(name, table[name], pool, random),
        SHARD_BYTES,
    )
    print(f"{options.directory}: {sum(e.num_bytes for e in entries) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
