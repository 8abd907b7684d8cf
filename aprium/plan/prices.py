"""What tokens cost: rented or bought hours over tokens served, beside what an API asks for them.

Prices are ranges, since the same device differs by up to 18 times between clouds; one price of the
user's replaces them. Source of every figure: `tables/prices.toml`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from aprium.plan.data import merged
from aprium.plan.hardware import Device

_YEAR_HOURS = 8760.0


class PriceRange(NamedTuple):
    """Dollars: cheapest, typical, most."""

    low: float
    typical: float
    high: float

    def scaled(self, factor: float) -> "PriceRange":
        """Return all three times `factor`."""
        return PriceRange(*(factor * value for value in self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Dollars of a deployment. Figures a million tokens assume that it is busy all the time.

    `break_even` is the share of the time it must be busy to cost what the API asks, over 1 where it
    never does; None where no API price is known. `power` is electricity, contained in rents.
    """

    per_hour: PriceRange
    per_million_output: PriceRange
    licence_per_hour: float
    power_per_hour: float
    api_per_million_output: float | None
    break_even: float | None
    source: str


def hourly(
    device: Device, overrides: dict[str, dict[str, Any]], price: float | None = None
) -> tuple[PriceRange, str] | None:
    """Return dollars of one device and hour, and where they come from; None where unknown."""
    if price is not None:
        return PriceRange(price, price, price), "given"
    table = merged("prices", overrides)
    if device.key in table["rental"]:
        row = table["rental"][device.key]
        return PriceRange(row["low"], row["typical"], row["high"]), f"rent: {row['source']}"
    if device.key in table["purchase"]:
        row = table["purchase"][device.key]
        hours = row["years"] * _YEAR_HOURS
        energy = power(device, overrides)
        found = PriceRange(*(row[k] / hours + energy for k in ("low", "typical", "high")))
        return found, f"bought over {row['years']} years, with power: {row['source']}"
    return None


def power(device: Device, overrides: dict[str, dict[str, Any]]) -> float:
    """Return dollars an hour of one device's electricity."""
    table = merged("prices", overrides)["power"]
    return device.power_w / 1e3 * table["overhead"] * table["per_kwh"]


def cost(
    device: Device,
    num: int,
    base: str,
    *,
    output_tokens_per_s: float,
    prompt_per_output: float,
    reuse: float,
    overrides: dict[str, dict[str, Any]],
    price: float | None = None,
    licence: bool = False,
) -> Cost | None:
    """Return what a deployment of `num` devices costs; None where no price is known.

    `prompt_per_output` prompt tokens are read for every token written, `reuse` of them from a
    cache.
    """
    found = hourly(device, overrides, price)
    if found is None or output_tokens_per_s <= 0:
        return None
    each, source = found
    table = merged("prices", overrides)
    extra = table["licence"]["per_gpu_year"] / _YEAR_HOURS if licence else 0.0
    per_hour = PriceRange(*(num * (value + extra) for value in each))
    millions = output_tokens_per_s * 3600 / 1e6
    api = table["api"].get(base)
    asked = None
    if api is not None:
        cached = api.get("cached", api["input"])
        asked = api["output"] + prompt_per_output * (
            (1 - reuse) * api["input"] + reuse * cached
        )  # fmt: skip
    return Cost(
        per_hour=per_hour,
        per_million_output=per_hour.scaled(1 / millions),
        licence_per_hour=num * extra,
        power_per_hour=num * power(device, overrides),
        api_per_million_output=asked,
        break_even=None if asked is None else per_hour.typical / (asked * millions),
        source=source,
    )
