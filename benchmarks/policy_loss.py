"""The policy's losses beside those of TRL on the same arrays: values and gradients, not time.

Prints a JSON line a case: the largest difference of the loss and of its gradient, over random
arrays in float64. TRL's own functions are called: `pip install trl datasets` first. A `note` says
where an option of theirs is counted otherwise.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from aprium.base.records import Trajectory
from aprium.ops.logprob import kl_divergence
from aprium.rl.credit import CreditConfig, OverlongConfig, shaped_rewards
from aprium.train.policy_loss import (
    PolicyLossConfig,
    PolicyTokens,
    k3,
    loss_weights,
    policy_losses,
)

PLAIN = PolicyLossConfig(mismatch="none", sequence_bound=None, advantage_clip=None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What we are asked for and what TRL is."""

    ours: PolicyLossConfig
    theirs: dict[str, Any] = field(default_factory=dict)
    beta: float = 0.0
    note: str = ""


def cases() -> dict[str, Case]:
    """Return the cases by name."""
    off = PolicyLossConfig(
        mismatch="truncate", mismatch_low=0.0, mismatch_high=2.0, sequence_bound=None
    )
    icepop = replace(off, mismatch="icepop", mismatch_low=0.5)
    return {
        "grpo": Case(ours=replace(PLAIN, normalise="sequences"), theirs={"loss_type": "grpo"}),
        "token mean (bnpo)": Case(ours=PLAIN, theirs={"loss_type": "bnpo"}),
        "dapo": Case(ours=PLAIN, theirs={"loss_type": "dapo"}),
        "dr_grpo": Case(
            ours=replace(PLAIN, normalise="fixed", fixed_length=32),
            theirs={"loss_type": "dr_grpo"},
        ),
        "dual clip (delta)": Case(
            ours=replace(PLAIN, dual_clip=1.5), theirs={"loss_type": "bnpo", "delta": 1.5}
        ),
        "gspo": Case(
            ours=replace(PLAIN, ratio="sequence", normalise="sequences"),
            theirs={"loss_type": "grpo", "level": "sequence"},
        ),
        "cispo": Case(
            ours=replace(PLAIN, surrogate="cispo", eps_low=1.0, eps_high=0.5),
            theirs={"loss_type": "cispo", "epsilon_high": 1.5},
            note="their epsilon_high is the bound of the ratio, ours is above 1",
        ),
        "truncated importance": Case(ours=off, theirs={"loss_type": "bnpo"}),
        "icepop": Case(ours=icepop, theirs={"loss_type": "bnpo"}),
        "k3 to a reference": Case(ours=PLAIN, theirs={"loss_type": "bnpo"}, beta=0.05),
    }


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Completions of B sequences padded to T, all float64 [B, T], and their advantages [B]."""

    logprobs: Tensor
    old: Tensor
    sampling: Tensor
    reference: Tensor
    mask: Tensor
    advantages: Tensor


def draw(seed: int) -> Arrays:
    """Return random arrays in which a tenth of the ratios are clipped."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 32)

    def near(x: Tensor, spread: float) -> Tensor:
        return x + spread * torch.randn(shape, generator=generator, dtype=torch.float64)

    old = -2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.1
    lengths = torch.randint(1, 33, (6,), generator=generator)
    mask = (torch.arange(32) < lengths[:, None]).double()
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    return Arrays(
        logprobs=near(old, 0.2).requires_grad_(),
        old=old,
        sampling=near(old, 0.3),
        reference=near(old, 0.5),
        mask=mask,
        advantages=advantages,
    )


def ours(arrays: Arrays, case: Case) -> Tensor:
    """Return our loss of the arrays."""
    where = arrays.mask.nonzero(as_tuple=True)
    sequences, count = where[0], len(arrays.mask)
    zeros = torch.zeros_like(arrays.old[where])
    tokens = PolicyTokens(
        logprobs=arrays.logprobs[where],
        advantages=arrays.advantages[sequences],
        behaviour=arrays.sampling[where],
        prox=arrays.old[where],
        kl_weights=zeros,
        teacher=zeros,
        sequences=sequences,
        num_sequences=count,
    )
    weights, norm = loss_weights(torch.ones_like(zeros), sequences, count, case.ours)
    losses = policy_losses(tokens, case.ours)[0]
    penalty = k3(tokens.logprobs, arrays.reference[where]).mean()
    return (losses * weights).sum() / norm + case.beta * penalty


def theirs(arrays: Arrays, case: Case) -> Tensor:
    """Return the loss that TRL's trainer computes of the arrays."""
    from trl.trainer.grpo_trainer import GRPOTrainer  # type: ignore[import-not-found]

    values = {"epsilon_high": case.ours.eps_high, "delta": None, "level": "token", **case.theirs}
    ratio = (arrays.old - arrays.sampling).exp()
    if case.ours.mismatch == "truncate":
        ratio = ratio.clamp(max=case.ours.mismatch_high)
    elif case.ours.mismatch == "icepop":
        low, high = case.ours.mismatch_low, case.ours.mismatch_high
        ratio = ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
    trainer = SimpleNamespace(
        loss_type=values["loss_type"],
        importance_sampling_level=values["level"],
        epsilon_low=case.ours.eps_low,
        epsilon_high=values["epsilon_high"]
        if values["loss_type"] == "cispo"
        else case.ours.eps_high,
        args=SimpleNamespace(delta=values["delta"], use_bias_correction_kl=False),
        beta=case.beta,
        use_vllm=case.ours.mismatch != "none",
        vllm_importance_sampling_correction=True,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        max_completion_length=32,
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            arrays.logprobs,
            torch.zeros_like(arrays.old),
            None,
        ),
    )
    ids = torch.zeros(arrays.mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :0],
        "prompt_mask": ids[:, :0],
        "completion_ids": ids,
        "completion_mask": arrays.mask,
        "advantages": arrays.advantages,
        "old_per_token_logps": arrays.old,
        "ref_per_token_logps": arrays.reference,
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": arrays.mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def compare(seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a line for each case: the largest differences over `seeds` draws."""
    for name, case in cases().items():
        loss = gradient = scale = 0.0
        for seed in range(seeds):
            arrays = draw(seed)
            one, other = ours(arrays, case), theirs(arrays, case)
            found = [torch.autograd.grad(x, arrays.logprobs)[0] for x in (one, other)]
            loss = max(loss, abs(float(one.detach() - other.detach())))
            gradient = max(gradient, float((found[0] - found[1]).abs().max()))
            scale = max(scale, float(found[1].abs().max()))
        line = {"case": name, "loss": loss, "gradient": gradient, "largest_gradient": scale}
        yield line | ({"note": case.note} if case.note else {})
    yield from _divergences()
    yield _overlong()


def _divergences() -> Iterator[dict[str, Any]]:
    """Compare KL over the vocabulary with their generalised Jensen-Shannon divergence's ends."""
    from trl.experimental.gkd import GKDTrainer  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(0)
    hidden, wanted = (torch.randn(40, 16, generator=generator).double() for _ in range(2))
    heads = [torch.randn(50, 16, generator=generator).double() for _ in range(2)]
    hidden.requires_grad_()
    for reverse in (False, True):
        one = kl_divergence(hidden, heads[0], wanted, heads[1], reverse=reverse).mean()
        other = GKDTrainer.generalized_jsd_loss(
            (hidden @ heads[0].T)[None],
            (wanted @ heads[1].T)[None],
            labels=torch.zeros(1, 40, dtype=torch.int64),
            beta=float(reverse),
        )
        found = [torch.autograd.grad(x, hidden)[0] for x in (one, other)]
        yield {
            "case": f"full vocabulary, {'reverse' if reverse else 'forward'}",
            "loss": abs(float(one.detach() - other.detach())),
            "gradient": float((found[0] - found[1]).abs().max()),
            "largest_gradient": float(found[1].abs().max()),
        }


def _overlong() -> dict[str, Any]:
    """Compare the soft penalty of what comes near the limit."""
    from trl.rewards import get_soft_overlong_punishment  # type: ignore[import-not-found]

    theirs = get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=8)
    config = CreditConfig(overlong=OverlongConfig(limit=20, buffer=8))
    found = []
    for length in range(1, 30):
        episode = Trajectory(
            task="t",
            domain="d",
            tokens=(0,) * length,
            sampled=(True,) * length,
            logprobs=(0.0,) * length,
            weight_spans=((0, length),),
        )
        (one,) = shaped_rewards([episode], config)
        found.append(abs(one - theirs(completion_ids=[[0] * length])[0]))
    return {"case": "soft overlong penalty", "reward": max(found)}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    for line in compare(parser.parse_args().seeds):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
