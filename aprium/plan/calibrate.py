"""Predicted against published: every row, the errors, and the fit of the constants.

No constant belongs to a row, a model, a device or an engine. What is left is shown, and its spread
is the range that every prediction carries.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from aprium.plan.cost import Constants, CostModel, Rates, constants, serve
from aprium.plan.data import load_data
from aprium.plan.hardware import device
from aprium.plan.memory import TIGHT_SHARE, Deployment, judge, memory
from aprium.plan.shapes import Shape, target_shape

_KEYS = ("tp", "pp", "dp", "ep", "drafts", "state_dtype", "kv_dtype", "attention", "offload_gb")
# What a row may publish -> how to read it off the rates.
METRICS = {
    "tokens_per_s": lambda r: r.output_tokens_per_s,
    "decode_tokens_per_s": lambda r: r.decode_tokens_per_s,
    "tpot_ms": lambda r: 1e3 * r.tpot_s,
    "step_ms": lambda r: 1e3 * r.step_s,
    "ttft_ms": lambda r: 1e3 * r.ttft_s,
}
_FITTED_METRICS = ("tokens_per_s", "decode_tokens_per_s", "tpot_ms", "step_ms")


class Residual(NamedTuple):
    """One published figure, what is predicted for it, and their ratio."""

    id: str
    metric: str
    published: float
    predicted: float
    fitted: bool
    note: str

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.published - 1


def row_deployment(row: dict[str, Any]) -> Deployment:
    """Return the deployment that a published row describes."""
    return Deployment(**{key: row[key] for key in _KEYS if key in row})


def row_rates(row: dict[str, Any], values: Constants, shape: Shape | None = None) -> Rates:
    """Predict one row."""
    found, where = row_deployment(row), device(row["gpu"])
    shape = shape or target_shape(row["model"], row["precision"])
    model = CostModel(shape, where, found, values)
    length = row["prompt"] + row["output"]
    most = memory(shape, where, found).max_concurrency(length)
    if not most:
        lean = dataclasses.replace(found, lean=True)
        most = memory(shape, where, lean).max_concurrency(length, TIGHT_SHARE)
    return serve(
        model,
        concurrency=row["concurrency"],
        prompt=row["prompt"],
        output=row["output"],
        reuse=row.get("reuse", 0.0),
        most_running=most or math.inf,
        together=row.get("together", False),
    )


def residuals(values: Constants | None = None, *, fitted: bool | None = None) -> list[Residual]:
    """Predict all rows, or those that are `fitted` or not."""
    values = values or constants()
    found = []
    for row in load_data("published")["rate"]:
        if fitted is not None and row.get("fitted", False) != fitted:
            continue
        rates = row_rates(row, values)
        for metric, read in METRICS.items():
            if metric in row:
                note = f"assumed: {row['assumed']}" if "assumed" in row else ""
                is_fitted = row.get("fitted", False) and metric in _FITTED_METRICS
                published = float(row[metric])
                found.append(
                    Residual(row["id"], metric, published, read(rates), is_fitted, note)
                )  # fmt: skip
    return found


class Spread(NamedTuple):
    """Absolute errors of a group of figures: how many, median, 90th percentile."""

    count: int
    median: float
    p90: float


def spread(rows: Sequence[Residual]) -> Spread:
    """Return the spread of |predicted / published - 1|."""
    errors = sorted(abs(row.error) for row in rows)
    rank = max(math.ceil(0.9 * len(errors)) - 1, 0)
    return Spread(len(errors), statistics.median(errors), errors[rank])


def range_of(rows: Sequence[Residual]) -> float:
    """Return the factor either way within which nine of ten figures lie."""
    factors = sorted(math.exp(abs(math.log(1 + row.error))) for row in rows)
    return factors[max(math.ceil(0.9 * len(factors)) - 1, 0)]


def fit() -> Constants:
    """Fit the constants to the fitted rows, held by their priors; robust to single rows."""
    from scipy.optimize import least_squares

    table = load_data("constants")
    prior = {name: tuple(value) for name, value in table["prior"].items()}
    names = list(prior)
    rows = [row for row in load_data("published")["rate"] if row.get("fitted")]
    shapes = [target_shape(row["model"], row["precision"]) for row in rows]

    def misfit(logs: Any) -> list[float]:
        values = Constants(**dict(zip(names, map(math.exp, logs), strict=True)))
        found = []
        for row, shape in zip(rows, shapes, strict=True):
            rates = row_rates(row, values, shape)
            metrics = [m for m in _FITTED_METRICS if m in row]
            for metric in metrics:
                ratio = METRICS[metric](rates) / row[metric]
                found.append(math.log(ratio) / 0.2 / math.sqrt(len(metrics)))
        held = [
            (log - math.log(prior[name][0])) / prior[name][1]
            for name, log in zip(names, logs, strict=True)
        ]
        return found + held

    start = [math.log(prior[name][0]) for name in names]
    limits = {"bandwidth": 0.95, "compute": 0.9, "link": 0.95, "distinct": 1.0}
    limits |= {"cpu_bandwidth": 0.95, "cpu_compute": 0.95, "imbalance": 2.0}
    high = [math.log(limits.get(name, 1000.0)) for name in names]
    low = [math.log(1.0 if name == "imbalance" else 0.01) for name in names]
    found = least_squares(misfit, start, bounds=(low, high), loss="soft_l1")
    return Constants(
        **{n: float(f"{math.exp(x):.3g}") for n, x in zip(names, found.x, strict=True)}
    )


def verdicts() -> list[tuple[dict[str, Any], str]]:
    """Return every published smallest deployment with the class it gets."""
    found = []
    for row in load_data("published")["minimum"]:
        shape = target_shape(row["model"], row["precision"])
        verdict, _, _ = judge(shape, device(row["gpu"]), row_deployment(row), 8192, 1)
        found.append((row, verdict.verdict))
    return found
