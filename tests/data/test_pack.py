"""Packing loses nothing, keeps the budget, never doubles, and resumes where it was."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.errors import DataError
from aprium.base.records import Sample
from aprium.data.pack import Packer


def sample(number: int, length: int) -> Sample:
    return Sample(tokens=(number,) * length, ce_weight=(0.0,) + (1.0,) * (length - 1), domain="d")


@given(
    st.lists(st.integers(1, 50), max_size=80),
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(0, 80),
)
def test_nothing_lost_budget_kept_and_resumed(
    lengths: list[int], num_open: int, num_waiting: int, cut: int
) -> None:
    def packs(stop: int | None) -> list[list[Sample]]:
        packer, found = Packer(50, num_open, num_waiting, seed=1), []
        for number, length in enumerate(lengths):
            if number == stop:
                state = json.loads(json.dumps(packer.state_dict()))
                packer = Packer(50, num_open, num_waiting, seed=1)
                packer.load_state_dict(state, lambda a: sample(a[0], lengths[a[0]]))
            given_out = packer.add(sample(number, length), (number,))
            found += [given_out] if given_out is not None else []
        return found + list(packer.flush())

    found = packs(None)
    assert all(0 < sum(len(s.tokens) for s in pack) <= 50 for pack in found)
    placed = sorted((s.tokens[0], len(s.tokens)) for pack in found for s in pack)
    assert placed == list(enumerate(lengths))
    assert packs(cut) == found


@given(st.lists(st.integers(1, 20), max_size=80), st.integers(1, 6), st.integers(0, 4))
def test_a_smaller_budget_than_the_run_began_with_is_kept(
    lengths: list[int], num_open: int, num_waiting: int
) -> None:
    def packed(packer: Packer, begin: int, end: int) -> list[list[Sample]]:
        given_out = [packer.add(sample(i, lengths[i]), (i,)) for i in range(begin, end)]
        return [pack for pack in given_out if pack is not None]

    half, count = len(lengths) // 2, len(lengths)
    first, second = (Packer(budget, num_open, num_waiting) for budget in (50, 20))
    before = packed(first, 0, half)
    second.load_state_dict(first.state_dict(), lambda a: sample(a[0], lengths[a[0]]))
    after = [*packed(second, half, count), *second.flush()]
    assert all(0 < sum(len(s.tokens) for s in pack) <= 20 for pack in after)
    placed = sorted(s.tokens[0] for pack in before + after for s in pack)
    assert placed == list(range(count))


@given(st.lists(st.integers(0, 5), max_size=60))
def test_no_pack_holds_a_sample_twice(numbers: list[int]) -> None:
    packer, found = Packer(40, 3), []
    for number in numbers:
        given_out = packer.add(sample(number, number + 3))
        found += [given_out] if given_out is not None else []
    found += packer.flush()
    for pack in found:
        assert len({s.tokens for s in pack}) == len(pack)
    assert sorted(s.tokens[0] for pack in found for s in pack) == sorted(numbers)


def test_packs_are_full_on_a_mixture_with_a_long_tail() -> None:
    rng = random.Random(0)
    packer, filled = Packer(4096), []
    for number in range(12000):
        length = min(4096, max(16, int(rng.lognormvariate(6, 1))))
        given_out = packer.add(sample(number, length))
        if given_out is not None:
            filled.append(sum(len(s.tokens) for s in given_out))
    assert sum(filled) / (4096 * len(filled)) > 0.97


def test_packs_are_given_out_in_another_order() -> None:
    def order(num_waiting: int) -> list[int]:
        packer = Packer(10, 1, num_waiting, seed=3)
        found = [packer.add(sample(i, 10)) for i in range(40)]
        packs = [*filter(None, found), *packer.flush()]
        return [pack[0].tokens[0] for pack in packs]

    assert order(0) == list(range(40))
    assert order(8) != list(range(40)) and sorted(order(8)) == list(range(40))


def test_too_long_a_sample_is_refused() -> None:
    with pytest.raises(DataError, match="51 tokens does not fit the budget of 50"):
        Packer(50).add(sample(0, 51))
