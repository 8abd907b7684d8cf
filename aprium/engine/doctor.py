"""What this machine is for inference: kernels, memory, bandwidth, and each model's bounds here.

Measures rather than guesses: read bandwidth over memory larger than caches, the peak of each dot
product, and whether kernels give what PyTorch gives. The rates of models are bounds from those
measurements; `aprium bench` says what is reached.
"""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from aprium.base.memory import available_bytes
from aprium.checkpoint.info import model_info
from aprium.checkpoint.load import load_checkpoint
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.model.native import bind
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import QUANT_PRESETS
from aprium.model.state import HybridState
from aprium.ops import _native

_GIB = 1 << 30
_PROBE_BYTES = 1 << 30  # memory that bandwidth is measured on
_TOLERANCE = 1e-4  # of hidden states in float32, relative
_PEAKS = ("int8", "bfloat16", "float32")


def diagnose() -> dict[str, Any]:
    """Return the facts as plain values; bytes, bytes a second, operations a second."""
    isa = _native.isa()
    library = _native.library()
    facts: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "supported": list(library.supported()) if library else [],
        "library": _native.missing() or "installed",
        "memory_total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_available_bytes": available_bytes(),
        "huge_pages": _huge_pages(),
    }
    facts["agreement"] = {name: _disagreement(name) for name in facts["supported"]}
    if library:
        machine = _native.machine() or library.Machine("scalar", torch.get_num_threads())
        probe = torch.ones(_PROBE_BYTES, dtype=torch.uint8)
        facts["bandwidth_bytes_per_s"] = machine.bandwidth(probe.data_ptr(), probe.numel(), 5)
        facts["peak_ops_per_s"] = {name: machine.peak(name) for name in _PEAKS}
        del probe
        facts["models"] = {name: _bounds(name, facts) for name in (*PRESETS, *QUANT_PRESETS)}
    return facts


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return next((v.strip() for k, v in lines.items() if k.strip() == "model name"), "unknown")


def _huge_pages() -> str:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        return file.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"


def _disagreement(isa: str) -> float:
    """Return the largest difference from PyTorch of toy's hidden states, relative."""
    library = _native.library()
    assert library is not None
    tokens = torch.arange(40) % 200
    expected = _forward(load_checkpoint("toy").model, tokens)
    model = load_checkpoint("toy").model
    bind(model, "float32", library.Machine(isa, 1))
    found = _forward(model, tokens)
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def _forward(model: HybridModel, tokens: torch.Tensor) -> torch.Tensor:
    size = tokens.shape[0]
    state = HybridState.allocate(model.config, num_slots=1, num_pages=1, page_size=size)
    layout = Layout.build(lengths=[size], context=[0], slots=[0], pages=[[0]], page_size=size)
    return model(tokens, layout, state)


def _bounds(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return whether a preset fits, and the rates that bandwidth and peak allow at most."""
    info = model_info(name)
    sizes, params, active = (
        info[key] for key in ("weights_bytes_by_role", "params_by_role", "params_active_by_role")
    )
    read = sum(sizes[role] * active[role] / params[role] for role in active if role != "embedding")
    moved = read + 2 * info["state_bytes_per_sequence"]
    quantised = info["quantization"] is not None
    layers = sum(active[role] for role in active if role not in ("embedding", "head"))
    fastest = "int8" if quantised and "nvfp4" in name else "bfloat16" if quantised else "float32"
    return {
        "weights_bytes": info["weights_bytes"],
        "fits": info["weights_bytes"] + 3 * _GIB // 2 <= facts["memory_available_bytes"],
        "decode_tokens_per_s_at_most": facts["bandwidth_bytes_per_s"] / moved,
        "prefill_tokens_per_s_at_most": facts["peak_ops_per_s"][fastest] / (2 * layers),
    }


def agrees(facts: dict[str, Any]) -> bool:
    """Return whether every instruction set gave what PyTorch gives."""
    return all(error < _TOLERANCE for error in facts["agreement"].values())


def render(facts: dict[str, Any]) -> str:
    """Return the facts for people."""
    total, free = (facts[f"memory_{k}_bytes"] / _GIB for k in ("total", "available"))
    lines = [
        f"processor   {facts['processor']}, {facts['threads']} threads",
        f"memory      {total:.1f} GiB, {free:.1f} GiB free; huge pages: {facts['huge_pages']}",
    ]
    if not facts["supported"]:
        return "\n".join(
            [
                *lines,
                f"kernels     none: {facts['library']}",
                "            Generation runs in PyTorch, many times slower. Install a C++ compiler",
                "            (on Debian: apt install g++) and install this package again.",
            ]
        )
    chosen = "PyTorch (APRIUM_ISA=none)" if facts["isa"] == "none" else facts["isa"]
    lines.append(f"kernels     {chosen}; here: {', '.join(facts['supported'])}")
    for isa, error in facts["agreement"].items():
        verdict = "agree with" if error < _TOLERANCE else "DISAGREE with"
        lines.append(f"            {isa} kernels {verdict} PyTorch (difference {error:.1e})")
    peaks = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in facts["peak_ops_per_s"].items())
    lines += [
        f"bandwidth   {facts['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s read",
        f"peak        {peaks} Gop/s",
        "",
        f"{'model':<18}{'weights GiB':>12}{'fits':>6}{'decode tok/s':>15}{'prefill tok/s':>15}",
    ]
    for name, row in facts["models"].items():
        decode, prefill = (row[f"{k}_tokens_per_s_at_most"] for k in ("decode", "prefill"))
        size, fits = row["weights_bytes"] / _GIB, "yes" if row["fits"] else "no"
        rates = f"{f'< {decode:.1f}':>15}{f'< {prefill:.0f}':>15}"
        lines.append(f"{name:<18}{size:>12.2f}{fits:>6}{rates}")
    return "\n".join(lines)
