"""The search: nothing better is left out, nothing on the front is beaten."""

import json
from pathlib import Path

import pytest

from aprium import cli
from aprium.base.errors import ConfigError
from aprium.plan.plan import Load
from aprium.plan.search import dollars, pareto, search


@pytest.fixture(scope="module")
def found():
    return search("super", load=Load(), gpus=["h100-sxm", "b200"], concurrency=(1, 16, 64))


def test_the_front_is_not_beaten(found) -> None:
    best = pareto(found)
    assert 2 < len(best) < len(found)

    def score(plan):
        return dollars(plan), plan.rates.tpot_s, -plan.rates.output_tokens_per_s / plan.num

    for one in best:
        for other in found:
            better = all(a <= b for a, b in zip(score(other), score(one), strict=True))
            assert not better or score(other) == score(one)
    assert min(map(dollars, found)) == dollars(best[0])
    assert min(p.rates.tpot_s for p in found) == min(p.rates.tpot_s for p in best)


def test_all_found_hold_the_load(found) -> None:
    assert {plan.device.key for plan in found} == {"h100-sxm", "b200"}
    for plan in found:
        assert plan.verdict.verdict != "no"
        assert plan.max_concurrency >= plan.load.concurrency
        assert plan.deployment.devices == plan.num


def test_limits() -> None:
    load = Load(concurrency=8)
    quick = search("super", load=load, gpus=["b200"], max_tpot_s=0.008)
    assert all(plan.rates and plan.rates.tpot_s <= 0.008 for plan in quick)
    with pytest.raises(ConfigError, match="within the limits"):
        search("super", load=load, gpus=["b200"], max_tpot_s=1e-5)
    with pytest.raises(ConfigError, match="no deployment of up to 1 devices holds ultra"):
        search("ultra", load=load, gpus=["h100-sxm"], counts=[1])


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "search.html"
    options = ["plan", "nano", "--search", "--gpu", "h100", "--gpu", "l40s", "--max-num", "2"]
    assert cli.main([*options, "--html", str(page)]) == 0
    assert "$/M output" in capsys.readouterr().out
    assert "data:image/png;base64," in page.read_text(encoding="utf-8")
    assert cli.main([*options, "--concurrency", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["pareto"]
    assert rows and {row["concurrency"] for row in rows} == {8}
    assert {row["num"] for row in rows} <= {1, 2}
