"""Costs: published figures by hand, break-even, what is not known."""

import pytest

from aprium.plan.hardware import device
from aprium.plan.prices import cost


def of(gpu: str, num: int, base: str, rate: float, **more):
    settings = {"prompt_per_output": 0.0, "reuse": 0.0, "overrides": {}} | more
    return cost(device(gpu), num, base, output_tokens_per_s=rate, **settings)


@pytest.mark.parametrize(
    ("gpu", "num", "rate", "price", "dollars"),
    [("h200", 1, 15_828, 3.8, 0.067), ("b200", 4, 3404, 5.5, 1.80), ("h100", 8, 1930, 2.95, 3.40)],
)
def test_dollars_of_published_rates(gpu, num, rate, price, dollars) -> None:
    found = of(gpu, num, "ultra", rate, price=price)
    assert found.per_million_output.typical == pytest.approx(dollars, rel=0.01)


def test_break_even_with_the_api() -> None:
    # Nano, 1K in and 1K out: the API asks 0.25 a million output tokens, so 27 %.
    nano = of("h200", 1, "nano", 15_828, price=3.8, prompt_per_output=1.0)
    assert nano.api_per_million_output == pytest.approx(0.25)
    assert nano.break_even == pytest.approx(0.27, abs=0.01)
    ultra = of("b200", 4, "ultra", 3404, price=5.5, prompt_per_output=8192 / 65536)
    assert ultra.break_even == pytest.approx(0.70, abs=0.01)
    never = of("h100", 8, "ultra", 1930, price=2.95, prompt_per_output=8192 / 65536)
    assert never.break_even > 1.3


def test_ranges_licences_and_the_unknown() -> None:
    found = of("h100", 2, "super", 1000)
    assert found.per_hour.low < found.per_hour.typical < found.per_hour.high
    licensed = of("h100", 2, "super", 1000, licence=True)
    assert licensed.licence_per_hour == pytest.approx(2 * 0.514, abs=0.001)
    assert licensed.per_hour.typical - found.per_hour.typical == licensed.licence_per_hour
    assert of("gb300", 1, "super", 1000) is None
    assert of("h100", 1, "glm-5", 1000).break_even is None
    bought = of("dgx-spark", 1, "nano", 50)
    assert "bought over 3 years" in bought.source
    assert bought.per_hour.typical == pytest.approx(3999 / 3 / 8760, abs=0.03)
    cached = of("b200", 1, "super", 1000, prompt_per_output=8.0, reuse=1.0)
    assert cached.api_per_million_output == pytest.approx(0.50 + 8 * 0.04)
