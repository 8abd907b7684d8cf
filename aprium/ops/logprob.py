"""Log-probabilities of tokens from hidden states, without the logits of all positions.

Logits exist for one chunk of rows at a time. Source: the
chunked cross-entropy that training libraries use (arXiv 2411.09009 for the memory argument).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aprium.ops.matmul import linear

# Logits held at a time: rows x vocabulary values of float32.
_CHUNK_VALUES = 1 << 23


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


def kl_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Tensor:
    """Return KL(teacher || student) over the whole vocabulary for each row, in nats.

    `hidden` [R, D] and `weight` [V, D] are the student's, `teacher_hidden` [R, D'] and
    `teacher_weight` [V, D'] the teacher's. Returns float32 [R], differentiable in the student's;
    the backward pass makes the logits again.
    """
    return _KLDivergence.apply(hidden, weight, teacher_hidden, teacher_weight)


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        out = []
        for rows, wanted in _chunks(hidden, weight, teacher_hidden):
            teacher = _wide(linear(wanted, teacher_weight)).log_softmax(-1)
            student = _wide(linear(rows, weight)).log_softmax(-1)
            out.append((teacher.exp() * (teacher - student)).sum(-1))
        return torch.cat(out) if out else _wide(hidden.new_empty(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=grads[0].dtype)
        done = 0
        for rows, wanted in _chunks(hidden, weight, teacher_hidden):
            part = slice(done, done + rows.shape[0])
            # d KL / d logits = softmax of the student - softmax of the teacher.
            wide = _wide(linear(rows, weight)).softmax(-1)
            wide -= _wide(linear(wanted, teacher_weight)).softmax(-1)
            wide *= grads[0][part].unsqueeze(1)
            grad_hidden[part] = (wide @ weight.to(wide.dtype)).to(hidden.dtype)
            grad_weight.addmm_(wide.T, rows.to(wide.dtype))
            done = part.stop
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> zip:
    size = max(1, _CHUNK_VALUES // weight.shape[0])
    return zip(hidden.split(size), targets.split(size), strict=True)
