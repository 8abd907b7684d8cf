"""The queue's bounds, places a key, and predicted waits."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.errors import OverloadError
from aprium.serve.admission import Admission, Limits


def admission(seats: int = 2, **limits: Any) -> Admission:
    stats = SimpleNamespace(num_running=0, num_waiting=0)
    engine: Any = SimpleNamespace(
        stats=lambda: stats, config=SimpleNamespace(max_num_seqs=seats), now=stats
    )
    return Admission(engine, Limits(**limits))


def test_the_queue_is_bounded_in_requests() -> None:
    gate = admission(queued_requests=1)
    tickets = [gate.enter("") for _ in range(3)]
    assert gate.num_queued == 1
    with pytest.raises(OverloadError, match="1 requests are waiting") as caught:
        gate.enter("")
    assert caught.value.reason == "queue"
    assert gate.refused == {"queue": 1}
    tickets[0].release()
    tickets[0].release()
    gate.enter("")


def test_the_queue_is_bounded_in_tokens() -> None:
    gate = admission(seats=1, queued_tokens=100)
    first = gate.enter("")
    gate.add_tokens(first, 5000)  # nobody waits, so any length will do
    first.start()
    second = gate.enter("")
    gate.add_tokens(second, 80)
    third = gate.enter("")
    with pytest.raises(OverloadError, match="80 tokens are waiting"):
        gate.add_tokens(third, 21)
    gate.add_tokens(third, 20)
    assert gate.num_queued_tokens == 100


def test_places_of_a_key() -> None:
    gate = admission(requests_per_key=2)
    held = [gate.enter("a"), gate.enter("a"), gate.enter("b")]
    with pytest.raises(OverloadError, match="2 requests under way") as caught:
        gate.enter("a")
    assert caught.value.reason == "key"
    held[0].release()
    gate.enter("a")


def test_an_engine_that_is_full_of_memory_has_fewer_places() -> None:
    gate = admission(seats=8, queued_requests=0)
    [gate.enter("") for _ in range(3)]
    stats = gate._engine.stats()
    stats.num_running, stats.num_waiting = 2, 1
    assert gate.num_queued == 1
    with pytest.raises(OverloadError):
        gate.enter("")


def test_waits_are_predicted_from_how_long_requests_took() -> None:
    gate = admission(seats=2)
    for _ in range(200):
        gate.learn(10.0)
    assert gate.predict_wait_s() == 0
    [gate.enter("") for _ in range(2)]
    assert gate.predict_wait_s() == pytest.approx(5)
    [gate.enter("") for _ in range(2)]
    assert gate.predict_wait_s() == pytest.approx(15)
    gate.limits = Limits(queued_requests=2)
    with pytest.raises(OverloadError) as caught:
        gate.enter("")
    assert caught.value.retry_s == pytest.approx(15)


def test_a_ticket_that_is_handed_on_outlives_its_block() -> None:
    gate = admission()
    with gate.enter("") as ticket:
        ticket.handed = True
    assert gate.num_requests == 1
    with pytest.raises(ValueError, match="x"), ticket:
        raise ValueError("x")
    assert gate.num_requests == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.booleans()), max_size=40))
def test_nothing_is_lost(steps: list[tuple[str, int, bool]]) -> None:
    gate = admission(queued_requests=3, requests_per_key=4)
    held = []
    for share, sequences, leave in steps:
        if leave and held:
            held.pop(0).release()
            continue
        before = gate.num_queued
        try:
            held.append(gate.enter(share, sequences))
        except OverloadError:
            assert before >= 3 or sum(t.share == share for t in held) == 4
    for ticket in held:
        ticket.release()
    assert (gate.num_requests, gate.num_queued, gate.predict_wait_s()) == (0, 0, 0)
    assert not gate._by_share


def test_bursts_never_pass_together() -> None:
    gate = admission(seats=1, queued_requests=4)

    async def one() -> bool:
        try:
            gate.enter("")
        except OverloadError:
            return False
        await asyncio.sleep(0)
        return True

    async def many() -> list[bool]:
        return await asyncio.gather(*(one() for _ in range(50)))

    assert sum(asyncio.run(many())) == 5
