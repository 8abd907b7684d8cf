"""The tables: sources, dates, a user's values over them."""

from pathlib import Path

import pytest

from aprium.base.errors import ConfigError
from aprium.plan.data import TABLES, load_data, load_overrides, merged
from aprium.plan.hardware import device, devices


def test_every_figure_has_a_source_and_a_date() -> None:
    for name in TABLES:
        assert load_data(name)["date"].year >= 2026
    for where in devices().values():
        assert where.source, where.key
        assert all(hasattr(where, field) for field in where.unverified), where.key
    prices = load_data("prices")
    for table in ("rental", "purchase", "api"):
        for row in prices[table].values():
            assert row["source"]
            if "low" in row:
                assert row["low"] <= row["typical"] <= row["high"]
    published = load_data("published")
    for table in ("size", "gguf", "minimum", "rate"):
        assert all(row["source"] for row in published[table])


def test_a_users_file_replaces_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[hardware.h100-sxm]\nbandwidth_tb_s = 3.0\n[prices.power]\nper_kwh = 0.3\n")
    overrides = load_overrides(path)
    assert device("h100-sxm", overrides).bandwidth == 3.0e12
    assert device("h100-sxm", overrides).memory_gb == device("h100-sxm").memory_gb
    assert merged("prices", overrides)["power"]["per_kwh"] == 0.3
    assert load_data("prices")["power"]["per_kwh"] != 0.3


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match="cannot read"):
        load_overrides(path)
    path.write_text("[hardwear.x]\n")
    with pytest.raises(ConfigError, match="'hardwear' is no table"):
        load_overrides(path)
    path.write_text("[hardware.h100-sxm]\nbandwith = 3\n")
    with pytest.raises(ConfigError, match=r"unknown key hardware.h100-sxm.bandwith"):
        device("h100-sxm", load_overrides(path))
    path.write_text("= 3\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_overrides(path)


def test_names_of_devices() -> None:
    assert device("H100").key == "h100-sxm"
    assert device("b200").peak("nvfp4") == 9e15
    # Hopper has no 4-bit products: weights are widened.
    assert device("h100").peak("nvfp4") == device("h100").peak("bf16")
    assert device("epyc-9654").peak("nvfp4") > device("epyc-9654").peak("bf16")
    with pytest.raises(ConfigError, match=r"did you mean .*h100-sxm"):
        device("h1000")
