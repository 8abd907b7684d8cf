"""Plans as fleets, and where they saturate."""

import json

import pytest

from aprium import cli
from aprium.base.errors import ConfigError
from aprium.plan.fleet import build, saturation, simulate_plan
from aprium.plan.plan import Load, make_plan
from aprium.plan.simulate import LinearCost, Replica, ReplicaConfig, Simulation
from aprium.plan.traces import Lengths, OpenLoop


def test_a_fleet_has_what_the_plan_has() -> None:
    load = Load(concurrency=64, prompt=1024, output=256)
    plan = make_plan("nano-fp8", gpu="h100", num=2, load=load, settings={"tp": 1})
    fleet = build(plan, {}, prefixes=True)
    assert len(fleet) == 2
    assert all(replica.config.max_num_seqs == 32 for replica in fleet)
    assert all(replica.config.num_snapshots > 0 for replica in fleet)
    assert plan.rates is not None
    found = simulate_plan(plan, "closed:users=64,requests=400", {})
    assert found.output_tokens_per_s == pytest.approx(plan.rates.output_tokens_per_s, rel=0.2)


def test_no_fleet_for_what_does_not_fit() -> None:
    plan = make_plan("ultra", gpu="h100", num=4, precision="nvfp4", load=Load())
    with pytest.raises(ConfigError, match="nothing to simulate: weights take"):
        build(plan, {}, prefixes=False)


def test_saturation_of_a_known_server() -> None:
    # One sequence at a time, 10 ms a step: 20 steps a request, so 5 requests a second.
    cost = LinearCost(step_s=0.01, sequence_s=0.0, token_s=0.0)
    config = ReplicaConfig(num_pages=8, max_num_seqs=1, max_num_batched_tokens=64)

    def make(rate: float) -> Simulation:
        trace = OpenLoop(rate=rate, requests=600, prompt=Lengths(mean=8), output=Lengths(mean=20))
        return Simulation([Replica(cost, config)], trace)

    rate, summary = saturation(make, first=1.0)
    assert rate == pytest.approx(5.0, rel=0.1)
    assert summary.busy > 0.9
    slow, calm = saturation(make, first=1.0, limit_s=0.5)
    assert slow < rate and calm.ttft_s[1] <= 0.5
    with pytest.raises(ConfigError, match="no rate is kept up with"):
        saturation(make, first=1.0, limit_s=0.001)


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "nano-fp8", "--gpu", "h100", "--input", "512", "--output", "64", "--json"]
    base += ["--concurrency", "32"]
    assert cli.main([*base, "--simulate", "open:rate=5,requests=50"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 50 and len(found["ttft_s"]) == 3
    assert cli.main([*base, "--simulate", "saturate:requests=120"]) == 0
    assert json.loads(capsys.readouterr().out)["saturation_requests_per_s"] > 5
    assert cli.main([*base[:-3], "--simulate", "closed:users=4,requests=20"]) == 0
    assert "first token" in capsys.readouterr().out
    assert cli.main([*base, "--simulate", "saturate:users=3"]) == 1
    assert "write saturate" in capsys.readouterr().err
