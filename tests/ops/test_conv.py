"""Packed causal convolution against torch's conv1d, sequence by sequence, and its tail."""

import pytest
import torch

from aprium.ops.conv import causal_conv, conv_tail


def one_sequence(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    kernel = weight.shape[1]
    padded = torch.nn.functional.pad(x.T[None], (kernel - 1, 0))
    out = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=x.shape[1])
    return out[0].T


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 7], [1, 1, 1, 1], [13]])
def test_packed_and_continued(lengths: list[int], kernel: int) -> None:
    channels = 5
    weight, bias = torch.randn(channels, kernel), torch.randn(channels)
    before = [torch.randn(n, channels) for n in (0, 1, 2, 6)[: len(lengths)]]
    fresh = [torch.randn(n, channels) for n in lengths]
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    sizes = torch.tensor(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    positions = torch.arange(sum(lengths)) - starts[ids]

    packed = causal_conv(torch.cat(fresh), weight, None, positions)
    expected = torch.cat([one_sequence(x, weight, None) for x in fresh])
    torch.testing.assert_close(packed, expected)

    zeros = torch.zeros(kernel - 1, channels)
    tails = torch.stack([torch.cat((zeros, x))[-(kernel - 1) :] for x in before])
    found = causal_conv(torch.cat(fresh), weight, bias, positions, tails[ids])
    whole = [torch.cat(pair) for pair in zip(before, fresh, strict=True)]
    expected = torch.cat(
        [one_sequence(x, weight, bias)[-n:] for x, n in zip(whole, lengths, strict=True)]
    )
    torch.testing.assert_close(found, expected)
    new = conv_tail(torch.cat(fresh), starts, sizes, tails)
    for tail, sequence in zip(new, whole, strict=True):
        assert torch.equal(tail, torch.cat((zeros, sequence))[-(kernel - 1) :])
