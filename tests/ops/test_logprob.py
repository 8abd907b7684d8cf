"""Chunked log-probabilities against log_softmax, values and gradients, at awkward sizes."""

import pytest
import torch

from aprium.ops import logprob


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 1), (1, 7), (9, 13), (17, 64), (100, 3)])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int) -> None:
    monkeypatch.setattr(logprob, "_CHUNK_VALUES", 4 * vocab)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    scale = torch.randn(rows, generator=generator, dtype=torch.float64)
    total, found = logprob.weighted_logprob(hidden, weight, targets, scale)
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(total, (expected * scale).sum())
    ours = torch.autograd.grad(3 * total, (hidden, weight))
    theirs = torch.autograd.grad(3 * (expected * scale).sum(), (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_weight_keeps_its_dtype() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(11, 8).bfloat16().requires_grad_()
    targets, factors = torch.tensor([0, 1, 2, 10]), torch.ones(4)
    total, found = logprob.weighted_logprob(hidden, weight, targets, factors)
    assert found.dtype == total.dtype == torch.float32 and not found.requires_grad
    total.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [0, 1, 9])
def test_log_normalizers(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(logprob, "_CHUNK_VALUES", 4 * 7)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    found = logprob.log_normalizers(hidden, weight)
    torch.testing.assert_close(found, (hidden @ weight.T).logsumexp(-1))
    assert torch.autograd.gradcheck(logprob.log_normalizers, (hidden, weight))


def test_several_targets_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "_CHUNK_VALUES", 4 * 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (9, 3), generator=generator)
    targets[4] = 2  # the same one several times
    found = logprob.token_logprobs(hidden, weight, targets)
    torch.testing.assert_close(found, (hidden @ weight.T).log_softmax(-1).gather(1, targets))
    assert torch.autograd.gradcheck(
        lambda h, w: logprob.token_logprobs(h, w, targets), (hidden, weight)
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_divergence_of_whole_vocabularies(
    monkeypatch: pytest.MonkeyPatch, rows: int, reverse: bool
) -> None:
    monkeypatch.setattr(logprob, "_CHUNK_VALUES", 4 * 7)
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    head = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    found = logprob.kl_divergence(hidden, weight, theirs, head, reverse=reverse)
    student, teacher = (hidden @ weight.T).log_softmax(-1), (theirs @ head.T).log_softmax(-1)
    first, second = (student, teacher) if reverse else (teacher, student)
    expected = (first.exp() * (first - second)).sum(-1)
    torch.testing.assert_close(found, expected)
    scale = torch.randn(rows, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * scale).sum(), (hidden, weight))
    plain = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_is_asked_for_gets_gradients() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8, requires_grad=True)
    targets, factors = torch.tensor([0, 1, 2, 10]), torch.ones(4)
    logprob.weighted_logprob(hidden, weight, targets, factors)[0].backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not logprob.weighted_logprob(hidden, weight, targets, factors)[0].requires_grad
