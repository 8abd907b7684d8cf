"""Predicted against published: the committed table is what the code computes, and is bounded."""

import importlib.util
import sys
from pathlib import Path

import pytest

from aprium.plan import calibrate
from aprium.plan.cost import constants, range_factor

ROOT = Path(__file__).resolve().parents[2]


def _benchmark():
    spec = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks/plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_committed_table_is_what_the_code_computes() -> None:
    text = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    begin, end = "<!-- table: begin -->\n", "\n<!-- table: end -->"
    committed = text.partition(begin)[2].partition(end)[0]
    assert committed == _benchmark().table(), "run: python benchmarks/plan.py --write-table"


def test_the_committed_constants_are_a_best_fit() -> None:
    found = constants()
    fitted = calibrate.fit()
    for name in ("bandwidth", "compute", "layer_us", "collective_us"):
        assert getattr(fitted, name) == pytest.approx(getattr(found, name), rel=0.02), name


def test_errors_are_within_what_is_promised() -> None:
    rows = calibrate.residuals()
    fitted = calibrate.spread([row for row in rows if row.fitted])
    assert fitted.count >= 25 and fitted.median <= 0.15 and fitted.p90 <= 0.35
    others = [row for row in rows if not row.fitted and row.metric != "ttft_ms"]
    assert calibrate.spread(others).median <= 0.3
    rates = [row for row in rows if row.metric != "ttft_ms"]
    inside = sum(1 / range_factor() <= 1 + row.error <= range_factor() for row in rates)
    assert inside >= 0.9 * len(rates)


def test_spread_and_range() -> None:
    rows = [
        calibrate.Residual(str(i), "tokens_per_s", 100.0, 100.0 + 10 * i, True, "")
        for i in range(10)
    ]
    found = calibrate.spread(rows)
    assert (found.count, found.median) == (10, pytest.approx(0.45))
    assert found.p90 == pytest.approx(0.8)
    assert calibrate.range_of(rows) == pytest.approx(1.8)


def test_another_planner_agrees_on_one_h100() -> None:
    # aiconfigurator 0.12.0's own predictions, within what both may be off by.
    from aprium.plan.cost import CostModel
    from aprium.plan.data import load_data
    from aprium.plan.hardware import device
    from aprium.plan.memory import Deployment
    from aprium.plan.shapes import target_shape

    for row in load_data("published")["peer"]:
        shape = target_shape(row["model"], row["precision"])
        model = CostModel(shape, device(row["gpu"]), Deployment(), constants())
        assert 1e3 * model.prefill(8192) == pytest.approx(row["prefill_ms"], rel=0.4)
        assert 1e3 * model.decode(1, 1100) == pytest.approx(row["decode_ms"][0], rel=0.4)
        assert 1e3 * model.decode(8, 1100) == pytest.approx(row["decode_ms"][1], rel=0.5)
