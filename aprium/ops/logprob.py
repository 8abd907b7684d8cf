"""Log-probabilities of tokens from hidden states, without the logits of all positions.

Logits exist for one chunk of rows at a time. Source: the
chunked cross-entropy that training libraries use (arXiv 2411.09009 for the memory argument).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from aprium.ops.matmul import linear

# Logits held at a time: rows x vocabulary values of float32.
_CHUNK_VALUES = 1 << 23


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the natural-log probability of each target under softmax(hidden @ weight.T).

    `hidden` [R, D], `weight` [V, D], `targets` int64 [R], or [R, K] for several of each row.
    Returns float32 (float64 for float64 input) of the shape of `targets`, differentiable in
    `hidden` and `weight`.
    """
    if targets.dim() == 1:
        return token_logprobs(hidden, weight, targets.unsqueeze(1)).squeeze(1)
    return _TokenLogprobs.apply(hidden, weight, targets)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        out, norms = [], []
        for rows, wanted in _chunks(hidden, weight, targets):
            logits = _wide(linear(rows, weight))
            norm = logits.logsumexp(-1)
            out.append(logits.gather(1, wanted) - norm.unsqueeze(1))
            norms.append(norm)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(norms))
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, norms = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=norms.dtype)
        done = 0
        for rows, wanted in _chunks(hidden, weight, targets):
            part = slice(done, done + rows.shape[0])
            grad = grads[0][part]
            # d logprob / d logits = onehot - softmax.
            wide = _wide(linear(rows, weight)).sub_(norms[part].unsqueeze(1)).exp_()
            wide.mul_(-grad.sum(1, keepdim=True)).scatter_add_(1, wanted, grad)
            grad_hidden[part] = (wide @ weight.to(wide.dtype)).to(hidden.dtype)
            grad_weight.addmm_(wide.T, rows.to(wide.dtype))
            done = part.stop
        return grad_hidden, grad_weight.to(weight.dtype), None


def weighted_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of log-probabilities times `factors`, and the log-probabilities.

    They are natural logarithms of each target's probability under softmax(hidden @ weight.T).
    `hidden` [R, D], `weight` [V, D], `targets` int64 [R], `factors` [R]. Returns float32 (float64
    for float64 input): the sum [], differentiable in `hidden` and `weight`, and [R], which is not.
    As the factors are known, gradients are made beside the logits, which are made once.
    """
    return _WeightedLogprob.apply(hidden, weight, targets, factors)


class _WeightedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(hidden.new_empty(0)).dtype
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty_like(hidden)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=wide)
        logprobs, done = factors.new_empty(factors.shape, dtype=wide), 0
        for rows, wanted in _chunks(hidden, weight, targets):
            part = slice(done, done + rows.shape[0])
            done = part.stop
            logits = _wide(linear(rows, weight))
            norm = logits.logsumexp(-1, keepdim=True)
            picked = logits.gather(1, wanted.unsqueeze(1))
            logprobs[part] = (picked - norm).squeeze(1)
            if grad_hidden is None and grad_weight is None:
                continue
            # d logprob / d logits = onehot - softmax.
            factor = factors[part].unsqueeze(1).to(wide)
            grad = (
                logits.sub_(norm).exp_().mul_(-factor).scatter_add_(1, wanted.unsqueeze(1), factor)
            )
            if grad_hidden is not None:
                narrow = grad.to(hidden.dtype)
                torch.mm(narrow, weight.to(hidden.dtype), out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, rows.to(wide))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(logprobs)
        return (logprobs * factors).sum(), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grads[0].to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grads[0]).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None


def log_normalizers(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) of each row, float32 (float64 for float64 input) [R].

    `hidden` [R, D], `weight` [V, D]; differentiable in both. The backward pass makes the logits
    again.
    """
    size = max(1, _CHUNK_VALUES // weight.shape[0])
    rows = hidden.split(size)
    return torch.cat([checkpoint(_normalizers, r, weight, use_reentrant=False) for r in rows])


def _normalizers(rows: Tensor, weight: Tensor) -> Tensor:
    return _wide(linear(rows, weight)).logsumexp(-1)


def kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """Return KL(teacher || student) over the whole vocabulary for each row, in nats.

    `hidden` [R, D] and `weight` [V, D] are the student's, `teacher_hidden` [R, D'] and
    `teacher_weight` [V, D'] the teacher's. `reverse` gives KL(student || teacher). Returns float32
    [R], differentiable in the student's.
    """
    return _KLDivergence.apply(hidden, weight, teacher_hidden, teacher_weight, reverse)


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        reverse: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.reverse = reverse
        out = []
        for rows, wanted in _chunks(hidden, weight, teacher_hidden):
            teacher = _wide(linear(wanted, teacher_weight)).log_softmax(-1)
            student = _wide(linear(rows, weight)).log_softmax(-1)
            first, second = (student, teacher) if reverse else (teacher, student)
            out.append((first.exp() * (first - second)).sum(-1))
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grads[0].dtype)
        done = 0
        for rows, wanted in _chunks(hidden, weight, teacher_hidden):
            part = slice(done, done + rows.shape[0])
            wide, logits = (
                _wide(linear(rows, weight)),
                _wide(linear(wanted, teacher_weight)),
            )
            if ctx.reverse:
                # d KL / d logits = p (log p - log q - KL), p of the student, q of the teacher.
                student = wide.log_softmax(-1)
                wide = student.exp()
                gap = student - logits.log_softmax(-1)
                wide *= gap - (wide * gap).sum(-1, keepdim=True)
            else:
                # d KL / d logits = softmax of the student - softmax of the teacher.
                wide = wide.softmax(-1) - logits.softmax(-1)
            wide *= grads[0][part].unsqueeze(1)
            grad_hidden[part] = (wide @ weight.to(wide.dtype)).to(hidden.dtype)
            grad_weight.addmm_(wide.T, rows.to(wide.dtype))
            done = part.stop
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> zip:
    size = max(1, _CHUNK_VALUES // weight.shape[0])
    return zip(hidden.split(size), targets.split(size), strict=True)
