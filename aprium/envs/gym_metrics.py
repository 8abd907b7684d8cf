"""Figures of many graded rollouts, by task and in all, under the names that NeMo-Gym gives them."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

TASK_INDEX = "_ng_task_index"
ROLLOUT_INDEX = "_ng_rollout_index"


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, maximum, minimum, median and deviation of every number in graded rows.

    In all (`agent_metrics`, of which the means are `key_metrics`), and for each task. Rows that say
    that they measure nothing (`mask_sample`) are counted and left out.
    """
    scored = [result for result in results if not result.get("mask_sample")]
    by_task: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for result in scored:
        by_task[result.get(TASK_INDEX, 0)].append(result)
    overall: dict[str, Any] = dict(_describe(scored))
    key = {name: value for name, value in overall.items() if name.startswith("mean/")}
    if results:
        overall["num_repeats"] = len({result.get(ROLLOUT_INDEX, 0) for result in results})
    if len(scored) < len(results):
        every = {result.get(TASK_INDEX, 0) for result in results}
        coverage = {
            "coverage/measured_rollouts": len(scored),
            "coverage/masked_rollouts": len(results) - len(scored),
            "coverage/measured_tasks": len(by_task),
            "coverage/fully_masked_tasks": len(every) - len(by_task),
        }
        overall |= coverage
        key |= coverage
    groups = [{TASK_INDEX: index, **_describe(rows)} for index, rows in sorted(by_task.items())]
    return {"group_level_metrics": groups, "agent_metrics": overall, "key_metrics": key}


def _describe(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of each number that the rows have; a deviation of one row is 0."""
    columns: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for name, value in _numbers(result).items():
            columns[name].append(value)
    found: dict[str, float] = {}
    for name, values in columns.items():
        found[f"mean/{name}"] = statistics.fmean(values)
        found[f"max/{name}"] = max(values)
        found[f"min/{name}"] = min(values)
        found[f"median/{name}"] = statistics.median(values)
        found[f"std/{name}"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a graded row, what its model calls used among them."""
    response = result.get("response")
    usage = response.get("usage") if isinstance(response, Mapping) else None
    given = {**(usage if isinstance(usage, Mapping) else {}), **result}
    return {
        name: float(value)
        for name, value in given.items()
        if isinstance(value, int | float) and not name.startswith("_") and name != "mask_sample"
    }
