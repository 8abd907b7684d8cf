"""Packing loses nothing, keeps the budget, and resumes where it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.errors import DataError
from aprium.base.records import Sample
from aprium.data.pack import Packer


def sample(number: int, length: int) -> Sample:
    return Sample(tokens=(number,) * length, ce_weight=(0.0,) + (1.0,) * (length - 1), domain="d")


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 6), st.integers(0, 80))
def test_nothing_lost_and_budget_kept(lengths: list[int], num_open: int, cut: int) -> None:
    packer, bins = Packer(50, num_open), []
    for number, length in enumerate(lengths):
        if number == cut:
            state = packer.state_dict()
            packer = Packer(50, num_open)
            packer.load_state_dict(state)
        given_out = packer.add(sample(number, length))
        if given_out is not None:
            bins.append(given_out)
    bins += packer.flush()
    assert all(0 < sum(len(s.tokens) for s in b) <= 50 for b in bins)
    found = sorted((s.tokens[0], len(s.tokens)) for b in bins for s in b)
    assert found == list(enumerate(lengths))


def test_bins_are_full_on_a_mixture() -> None:
    packer, bins = Packer(1000), []
    for number in range(3000):
        given_out = packer.add(sample(number, 20 + number * 7919 % 100))
        if given_out is not None:
            bins.append(sum(len(s.tokens) for s in given_out))
    assert sum(bins) / (1000 * len(bins)) > 0.97


def test_too_long_a_sample_is_refused() -> None:
    with pytest.raises(DataError, match="51 tokens does not fit the budget of 50"):
        Packer(50).add(sample(0, 51))
