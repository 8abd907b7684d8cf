"""The simulator: each request once, a clock that never runs back, runs of steps equal to steps."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.plan.cost import CostModel, constants
from aprium.plan.hardware import device
from aprium.plan.memory import Deployment
from aprium.plan.shapes import target_shape
from aprium.plan.simulate import LinearCost, Record, Replica, ReplicaConfig, Simulation, Summary
from aprium.plan.traces import Agents, ClosedLoop, Job, Lengths, OpenLoop, Trace

COST = LinearCost(step_s=0.01, sequence_s=0.001, token_s=0.0001, pair_s=1e-8)
SMALL = ReplicaConfig(num_pages=40, page_size=16, max_num_seqs=4, max_num_batched_tokens=64)


def serve(
    trace: Trace, config: ReplicaConfig = SMALL, *, replicas: int = 1, jump: bool = True, cost=COST
) -> tuple[Summary, list[Record], Simulation]:
    fleet = [Replica(cost, config, jump=jump) for _ in range(replicas)]
    simulation = Simulation(fleet, trace)
    records: list[Record] = []
    summary = simulation.run(records.append)
    for replica in fleet:
        replica.scheduler.check()
        assert not replica.jobs
    return summary, records, simulation


def lengths(mean: int, spread: float = 0.0, most: int = 300) -> Lengths:
    return Lengths(mean=mean, spread=spread, most=most)


def a_trace(kind: str, seed: int, requests: int, users: int, mean: int, output: int) -> Trace:
    prompts, answers = lengths(mean, 0.8), lengths(output, 0.8, 200)
    if kind == "open":
        return OpenLoop(
            rate=users * 2.0, requests=requests, prompt=prompts, output=answers, seed=seed
        )
    if kind == "closed":
        return ClosedLoop(
            users=users, requests=requests, prompt=prompts, output=answers, think=0.05, seed=seed
        )
    return Agents(
        users=users, requests=requests, turns=3, prompt=lengths(mean), grow=lengths(20, 0.5),
        output=lengths(min(output, 30), 0.5, 60), seed=seed,
    )  # fmt: skip


TRACES = {
    "kind": st.sampled_from(("open", "closed", "agents")),
    "seed": st.integers(0, 1000),
    "requests": st.integers(1, 40),
    "users": st.integers(1, 8),
    "mean": st.integers(1, 120),
    "output": st.integers(1, 120),
}


@settings(max_examples=50)
@given(
    **TRACES,
    pages=st.integers(36, 80),
    sequences=st.integers(1, 6),
    budget=st.integers(8, 128),
    replicas=st.integers(1, 3),
)
def test_runs_of_steps_are_the_same_as_steps(
    kind, seed, requests, users, mean, output, pages, sequences, budget, replicas
) -> None:
    config = ReplicaConfig(
        num_pages=pages, page_size=16, max_num_seqs=sequences, max_num_batched_tokens=budget,
        num_snapshots=3 if kind == "agents" else 0,
    )  # fmt: skip

    def both(jump: bool):
        trace = a_trace(kind, seed, requests, users, mean, output)
        return serve(trace, config, replicas=replicas, jump=jump)

    together, one_by_one = both(True), both(False)
    assert together[1] == one_by_one[1]
    # Times a replica worked are added up in another order; all else is the same to the last bit.
    assert together[0].busy == pytest.approx(one_by_one[0].busy)
    assert dataclasses.replace(together[0], busy=0.0) == dataclasses.replace(
        one_by_one[0], busy=0.0
    )


@settings(max_examples=40)
@given(**TRACES)
def test_every_request_finishes_once(kind, seed, requests, users, mean, output) -> None:
    config = dataclasses.replace(SMALL, num_snapshots=2 if kind == "agents" else 0)
    trace = a_trace(kind, seed, requests, users, mean, output)
    summary, records, _ = serve(trace, config, replicas=2)
    assert summary.requests == len(records) == requests
    assert [r.finished_s for r in records] == sorted(r.finished_s for r in records)
    for record in records:
        assert record.job.arrival_s <= record.started_s < record.first_s <= record.finished_s
        # A token takes a step at least, and a prompt as many as its chunks.
        steps = record.job.output + (record.job.prompt - 1) // 64
        if kind != "agents":
            assert record.finished_s - record.started_s >= steps * 0.011 * (1 - 1e-9)
    made = sum(r.job.output for r in records)
    assert summary.output_tokens_per_s == pytest.approx(made / summary.duration_s)


def test_one_request_is_the_closed_form() -> None:
    cost = CostModel(target_shape("nano-fp8"), device("h100"), Deployment(), constants())
    config = ReplicaConfig(num_pages=200, max_num_seqs=4, max_num_batched_tokens=8192)
    prompt, output = 3000, 500
    trace = ClosedLoop(
        users=1, requests=1, prompt=Lengths(mean=prompt), output=Lengths(mean=output)
    )
    _, (record,), _ = serve(trace, config, cost=cost)
    pairs = prompt * (prompt + 1) / 2
    first = cost.step(prompt, 1, prompt, pairs, samples=1)
    assert record.first_s == pytest.approx(first)
    steps = sum(cost.step(1, 1, n, n, samples=1) for n in range(prompt + 1, prompt + output))
    assert record.finished_s == pytest.approx(first + steps, rel=1e-9)


def test_the_closed_form_of_a_loop_of_users() -> None:
    from aprium.plan.cost import serve as closed_form

    cost = CostModel(target_shape("super-nvfp4"), device("b200"), Deployment(), constants())
    config = ReplicaConfig(num_pages=20_000, max_num_seqs=64, max_num_batched_tokens=8192)
    trace = ClosedLoop(
        users=32, requests=320, prompt=Lengths(mean=2048, spread=0.3),
        output=Lengths(mean=512, spread=0.3),
    )  # fmt: skip
    summary, _, _ = serve(trace, config, cost=cost)
    formula = closed_form(cost, concurrency=32, prompt=2048, output=512)
    assert summary.output_tokens_per_s == pytest.approx(formula.output_tokens_per_s, rel=0.12)
    assert summary.tpot_s[0] == pytest.approx(formula.tpot_s, rel=0.12)


def test_known_prefixes_are_not_read_again() -> None:
    def trace() -> Agents:
        return Agents(
            users=2, requests=24, turns=6, prompt=lengths(64), grow=lengths(16), output=lengths(8)
        )

    pages = dataclasses.replace(SMALL, num_pages=200)
    cold, _, _ = serve(trace(), pages)
    warm, records, _ = serve(trace(), dataclasses.replace(pages, num_snapshots=16))
    assert cold.reused_share == 0 and warm.reused_share > 0.5
    assert warm.duration_s < cold.duration_s
    assert len({record.job.session for record in records}) == 4


def test_preemption_loses_nothing() -> None:
    tight = ReplicaConfig(num_pages=12, page_size=16, max_num_seqs=4, max_num_batched_tokens=64)
    trace = ClosedLoop(users=4, requests=12, prompt=lengths(40), output=lengths(80))
    summary, records, _ = serve(trace, tight)
    assert summary.preemptions > 0 and len(records) == 12


def test_drafts_shorten_answers() -> None:
    def run(accepted: tuple[float, ...]) -> Summary:
        trace = ClosedLoop(users=2, requests=10, prompt=lengths(20), output=lengths(100))
        return serve(trace, dataclasses.replace(SMALL, accepted=accepted))[0]

    plain, drafted, sure = run(()), run((0.8, 0.6, 0.4)), run((1.0, 1.0, 1.0))
    assert sure.steps < drafted.steps < plain.steps
    # Every draft stands: 100 tokens in a step of one and 25 of up to four.
    assert sure.steps == pytest.approx(10 * 26 / 2, rel=0.1)


def test_replicas_share_the_load() -> None:
    def run(replicas: int) -> Summary:
        trace = OpenLoop(rate=40, requests=300, prompt=lengths(32), output=lengths(32))
        return serve(trace, replicas=replicas)[0]

    few, many = run(1), run(6)
    assert many.ttft_s[1] < few.ttft_s[1] and many.queue_s[2] < few.queue_s[0]
    assert few.busy > 0.99 > many.busy


def test_what_can_never_fit() -> None:
    trace = ClosedLoop(users=1, requests=1, prompt=Lengths(mean=700), output=Lengths(mean=1))
    with pytest.raises(ConfigError, match="exceeds the 640 that a replica holds"):
        serve(trace)
    with pytest.raises(ConfigError, match="at least one replica"):
        Simulation([], trace)


def test_a_request_that_comes_while_a_run_is_on_waits_for_one_step() -> None:
    class Two(Trace):
        def arrivals(self):
            yield Job(0.0, 10, 200)
            yield Job(0.5, 10, 5)

    _, records, _ = serve(Two())
    late = next(record for record in records if record.job.output == 5)
    assert 0.5 <= late.started_s <= 0.5 + 0.012
