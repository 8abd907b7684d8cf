"""Configuration from plain values: nesting, types, unknown keys, overrides."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from aprium.base.config import from_dict, load_toml, require_finite, to_dict
from aprium.base.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    sizes: tuple[int, ...] = ()
    path: Path | None = None
    many: tuple[Inner, ...] = ()
    names: dict[str, int] = field(default_factory=dict)
    flag: bool = False
    bound: int | None = None


def test_floats_that_are_not_finite_are_refused() -> None:
    @dataclass(frozen=True)
    class Rates:
        rate: float = 1.0
        betas: tuple[float, float] = (0.9, 0.9)
        bound: float | None = math.inf
        steps: int = 1

    require_finite(Rates(), "optim", infinite=("bound",))
    for rates, name in (
        (Rates(rate=math.nan), "rate"),
        (Rates(betas=(0.9, math.inf)), "betas"),
        (Rates(bound=-math.inf), "bound"),
    ):
        with pytest.raises(ConfigError, match=rf"optim\.{name} is .* finite"):
            require_finite(rates, "optim", infinite=("bound",))


@dataclass(frozen=True)
class _Bounded:
    bound: int | None = 3


def test_false_is_none_where_it_is_no_switch() -> None:
    assert from_dict(_Bounded, {"bound": False}).bound is None
    assert from_dict(_Bounded, {}).bound == 3
    with pytest.raises(ConfigError, match="must be an integer"):
        from_dict(_Bounded, {"bound": True})


def test_round_trip() -> None:
    data = {
        "inner": {"rate": 1, "kind": "b"},
        "sizes": [1, 2],
        "path": "x/y",
        "many": [{"rate": 0.5}],
        "names": {"k": 3},
        "flag": True,
    }
    config = from_dict(Outer, data)
    assert config == Outer(Inner(1.0, "b"), (1, 2), Path("x/y"), (Inner(0.5),), {"k": 3}, flag=True)
    assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"rate": 1, "typo": 2}}, "unknown key inner.typo"),
        ({}, "missing key inner"),
        ({"inner": {"rate": "fast"}}, "inner.rate is 'fast'"),
        ({"inner": {"rate": 1, "kind": "c"}}, "one of 'a', 'b'"),
        ({"inner": {"rate": 1}, "sizes": [1, "x"]}, r"sizes\[1\] is 'x'"),
        ({"inner": {"rate": 1}, "bound": True}, "bound is True"),
        ({"inner": 3}, "expected a table"),
    ],
)
def test_errors_name_the_value(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, data)


def test_toml_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("sizes = [3]\n[inner]\nrate = 0.1\n")
    config = load_toml(Outer, file, {"inner.rate": 0.2, "flag": True})
    assert config == Outer(Inner(0.2), (3,), flag=True)
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(Outer, tmp_path / "none.toml")
    file.write_text("sizes = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(Outer, file)
    file.write_text("sizes = [3]\n[inner]\nrate = 0.1\n")
    with pytest.raises(ConfigError, match="not a table"):
        load_toml(Outer, file, {"sizes.x": 1})
