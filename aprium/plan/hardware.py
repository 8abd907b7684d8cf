"""Devices that models run on: memory, bandwidth, peaks and links, from `tables/hardware.toml`."""

import difflib
from dataclasses import dataclass
from typing import Any

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError
from aprium.plan.data import merged

ALIASES = {"h100": "h100-sxm", "a100": "a100-sxm", "spark": "dgx-spark", "station": "dgx-station"}
ALIASES |= {"gb10": "dgx-spark", "4090": "rtx-4090", "5090": "rtx-5090", "h200-sxm": "h200"}
# Products run in the narrowest of these that a device has: format -> peaks to try in order.
_PEAKS = {
    "nvfp4": ("fp4_tflops", "bf16_tflops"),
    "fp8": ("fp8_tflops", "bf16_tflops"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device, dense peaks. Links are bytes a second per direction, 1e9 each.

    `domain` devices are joined by `link_gb_s`, more by `network_gb_s`. `host_gb` of memory beside
    it are read at `host_bandwidth_tb_s` by its own processor and at `host_link_gb_s` by the device.
    `unified` memory is also the operating system's. `unverified` names figures no source states.
    """

    key: str
    name: str
    memory_gb: float
    bandwidth_tb_s: float
    bf16_tflops: float
    fp8_tflops: float = 0.0
    fp4_tflops: float = 0.0
    int8_tops: float = 0.0
    f32_tflops: float = 0.0
    link_gb_s: float = 0.0
    network_gb_s: float = 0.0
    domain: int = 1
    power_w: float = 0.0
    host_gb: float = 0.0
    host_bandwidth_tb_s: float = 0.0
    host_link_gb_s: float = 0.0
    kind: str = "gpu"
    unified: bool = False
    source: str = ""
    unverified: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> float:
        """Memory that a program sees, before any share is set aside."""
        return self.memory_gb * 1e9

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the memory's data sheet."""
        return self.bandwidth_tb_s * 1e12

    def peak(self, fmt: str) -> float:
        """Operations a second of products with weights of format `fmt`.

        Weights without hardware of their own are widened: 4-bit ones run at the 16-bit peak on
        Hopper. On a CPU 4-bit formats run as int8 and 8-bit ones as BF16; unquantised weights run
        in float32 where that peak is known, as this engine does it.
        """
        if self.kind == "cpu":
            if fmt in ("bf16", "f32", "f16"):
                return 1e12 * (self.f32_tflops or self.bf16_tflops)
            return 1e12 * (self.bf16_tflops if fmt == "fp8" else self.int8_tops or self.bf16_tflops)
        for name in _PEAKS.get(fmt, ("bf16_tflops",)):
            if getattr(self, name):
                return 1e12 * getattr(self, name)
        return 1e12 * self.bf16_tflops


def devices(overrides: dict[str, dict[str, Any]] | None = None) -> dict[str, Device]:
    """Return all devices by key, a user's values put over the package's."""
    table = merged("hardware", overrides or {})
    return {key: _device(key, value) for key, value in table.items() if isinstance(value, dict)}


def device(name: str, overrides: dict[str, dict[str, Any]] | None = None) -> Device:
    """Return the device called `name`; raise ConfigError with the nearest names otherwise."""
    table = merged("hardware", overrides or {})
    key = name.lower().replace("_", "-")
    key = key if key in table else ALIASES.get(key, key)
    if key not in table or key == "date":
        known = [k for k in table if k != "date"]
        near = difflib.get_close_matches(key, known, 3, 0.5) or known
        raise ConfigError(
            f"unknown device {name!r}: did you mean {', '.join(near)}? `aprium plan --list-gpus` "
            "names all, and a file given with --data may add one"
        )
    return _device(key, table[key])


def _device(key: str, values: dict[str, Any]) -> Device:
    return from_dict(Device, {"key": key, **values}, where=f"hardware.{key}")
