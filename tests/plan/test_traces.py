"""Traces: arrivals in order, lengths, sessions that begin alike, files."""

import json
import statistics
from pathlib import Path

import pytest

from aprium.base.errors import ConfigError
from aprium.plan.traces import (
    Agents,
    ClosedLoop,
    Job,
    Lengths,
    OpenLoop,
    Recorded,
    parse,
    prompt_tokens,
)


def test_an_open_loop_arrives_at_its_rate() -> None:
    trace = OpenLoop(
        rate=50, requests=5000, prompt=Lengths(mean=300, spread=1.0), output=Lengths(mean=20)
    )
    jobs = list(trace.arrivals())
    times = [job.arrival_s for job in jobs]
    assert times == sorted(times) and len(jobs) == 5000
    assert times[-1] == pytest.approx(100, rel=0.06)
    assert statistics.mean(job.prompt for job in jobs) == pytest.approx(300, rel=0.06)
    assert {job.output for job in jobs} == {20}
    assert trace.follow(jobs[0], 1.0) is None


def test_a_closed_loop_sends_as_many_as_asked() -> None:
    lengths = Lengths(mean=8)
    trace = ClosedLoop(users=3, requests=7, prompt=lengths, output=lengths, think=2.0)
    jobs = list(trace.arrivals())
    assert len(jobs) == 3
    later = []
    for _ in range(10):
        job = trace.follow(jobs[0], 5.0)
        if job is not None:
            later.append(job)
    assert len(later) == 4 and {job.arrival_s for job in later} == {7.0}


def test_turns_begin_with_the_turns_before() -> None:
    trace = Agents(
        users=2, requests=20, turns=3, prompt=Lengths(mean=50), grow=Lengths(mean=10),
        output=Lengths(mean=5),
    )  # fmt: skip
    first, other = trace.arrivals()
    second = trace.follow(first, 1.0)
    assert second is not None
    assert second.session == first.session and second.prompt == 50 + 5 + 10
    assert prompt_tokens(second)[:50] == prompt_tokens(first)
    assert not set(prompt_tokens(first)) & set(prompt_tokens(other))
    third = trace.follow(second, 2.0)
    assert third is not None and third.turn == 2
    new = trace.follow(third, 3.0)
    assert new is not None and new.turn == 0 and new.session not in (first.session, other.session)


def test_recorded_traces(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 2000, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 500, "input_length": 1100, "output_length": 7, "hash_ids": [1, 2, 3]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    trace = Recorded(path)
    jobs = list(trace.arrivals())
    assert [job.arrival_s for job in jobs] == [0.5, 2.0] and trace.shares_prefixes
    assert prompt_tokens(jobs[1]) == prompt_tokens(jobs[0])[:1000]
    assert len(prompt_tokens(jobs[0])) == 1100
    assert isinstance(parse(str(path), prompt=1, output=1, most=9), Recorded)
    path.write_text('{"timestamp": 1}\n')
    with pytest.raises(ConfigError, match=r"trace.jsonl:1: a line needs"):
        Recorded(path)
    path.write_text('{"timestamp": 1, "input_length": 0, "output_length": 1}\n')
    with pytest.raises(ConfigError, match="lengths must be at least 1"):
        Recorded(path)


def test_descriptions() -> None:
    trace = parse("closed:users=4,requests=9,spread=0.5", prompt=100, output=10, most=1000)
    assert isinstance(trace, ClosedLoop) and trace.users == 4
    agents = parse("agents:users=2,turns=3", prompt=100, output=10, most=1000)
    assert isinstance(agents, Agents) and agents.shares_prefixes
    assert isinstance(parse("open:", prompt=1, output=1, most=9), OpenLoop)
    for text, words in (
        ("closed:user=4", "'user=4' in trace"),
        ("open:rate=fast", "not a number"),
        ("open:rate=0", "rate is 0"),
        ("nothing", "is no file"),
        ("agents:turns=0", "turns 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(text, prompt=10, output=10, most=100)


def test_lengths_are_bounded() -> None:
    import random

    numbers = random.Random(0)
    drawn = [Lengths(mean=100, spread=2.0, most=300).draw(numbers) for _ in range(500)]
    assert min(drawn) >= 1 and max(drawn) == 300
    assert Job(0.0, 1, 1).session == -1
