"""How quick the planner is; predicted against published (--table); the constants anew (--fit).

python benchmarks/plan.py [--runs 5] [--table | --write-table | --fit]

By default prints one JSON line a case: seconds of `aprium plan ultra --gpu h100-sxm --num 8` as a
process of its own, seconds of a search, and the bars that the project set itself. --table prints
predicted against published, --write-table puts it into docs/planning.md; --fit rewrites
`aprium/plan/tables/constants.toml` from the fitted rows of `published.toml`.
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from aprium.plan import calibrate
from aprium.plan.cost import constants
from aprium.plan.data import load_data

TABLES = Path(calibrate.__file__).parent / "tables"


def table() -> str:
    """Return predicted against published as a table in Markdown, with the errors below."""
    lines = ["| Row | figure | published | predicted | error | |", "|---|---|---|---|---|---|"]
    rows = calibrate.residuals()
    for row in rows:
        kind = "fitted" if row.fitted else "check"
        note = f"{kind}; {row.note}" if row.note else kind
        lines.append(
            f"| {row.id} | {row.metric} | {row.published:,.4g} | {row.predicted:,.4g} "
            f"| {row.error:+.0%} | {note} |"
        )
    lines.append("")
    rates = [row for row in rows if row.metric != "ttft_ms"]
    groups = {
        "fitted figures": [row for row in rows if row.fitted],
        "figures not fitted, first tokens left out": [r for r in rates if not r.fitted],
        "all, first tokens left out": rates,
    }
    for name, group in groups.items():
        found = calibrate.spread(group)
        lines.append(
            f"- {name} ({found.count}): median error {found.median:.0%}, 90th percentile "
            f"{found.p90:.0%}"
        )
    return "\n".join(lines)


def fit() -> None:
    """Fit the constants and write them, with the range that their residuals have."""
    values = calibrate.fit()
    path = TABLES / "constants.toml"
    text = path.read_text(encoding="utf-8")
    head, rest = text.split("[value]\n")
    _, tail = rest.split("[prior]\n")
    lines = "".join(f"{name} = {value}\n" for name, value in dataclasses.asdict(values).items())
    rows = [row for row in calibrate.residuals(values) if row.metric != "ttft_ms"]
    factor = math.ceil(calibrate.range_of(rows) * 100) / 100
    tail = re.sub(r"factor = .*", f"factor = {factor}", tail)
    path.write_text(f"{head}[value]\n{lines}\n[prior]\n{tail}", encoding="utf-8")
    load_data.cache_clear()
    print(constants(), factor)


def measure(runs: int) -> None:
    """Print what the planner takes here."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()

    def report(case: str, times: list[float], bar: float) -> None:
        line = {"case": case, "median_s": round(statistics.median(times), 3)}
        spread = [round(min(times), 3), round(max(times), 3)]
        print(json.dumps(line | {"spread": spread, "bar_s": bar, "commit": commit}), flush=True)

    command = [sys.executable, "-m", "aprium.cli", "plan", "ultra"]
    for case, more, bar in (
        ("plan ultra --gpu h100-sxm --num 8", ["--gpu", "h100-sxm", "--num", "8"], 0.5),
        ("plan ultra --search", ["--search"], 5.0),
    ):
        times = []
        for _ in range(runs):
            begun = time.perf_counter()
            subprocess.run([*command, *more], capture_output=True, check=True)
            times.append(time.perf_counter() - begun)
        report(case, times, bar)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write-table", action="store_true")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    if options.fit:
        fit()
    elif options.table:
        print(table())
    elif options.write_table:
        page = Path(__file__).resolve().parent.parent / "docs" / "planning.md"
        text = page.read_text(encoding="utf-8")
        begin, end = "<!-- table: begin -->\n", "\n<!-- table: end -->"
        head, rest = text.split(begin)
        page.write_text(f"{head}{begin}{table()}{end}{rest.split(end)[1]}", encoding="utf-8")
    else:
        measure(options.runs)


if __name__ == "__main__":
    main()
