"""Hidden states of packed samples on their way through a model, one layer after another.

A `Stream` is what lies between two layers; a layer moves it on and may be watched while it does:
`Inputs` then holds what every matrix of the layer was given. Sequences stay whole and go through
a layer a few thousand tokens at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aprium.model.layout import Layout
from aprium.model.linear import Linear
from aprium.model.model import Block, Context, MoE, Routing
from aprium.ops.matmul import linear

_STEP_TOKENS = 4096
_LOGITS = 1 << 24  # held at a time, of each stream


@dataclass
class Stream:
    """Packed samples: tokens int64 [T], hidden float32 [T, D], lengths of the sequences."""

    tokens: Tensor
    hidden: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def start(samples: Sequence[Sequence[int]], table: Tensor) -> "Stream":
        """Embed `samples` with the token `table` [V, D]."""
        tokens = torch.tensor([token for sample in samples for token in sample])
        hidden = F.embedding(tokens, table).float()
        return Stream(tokens, hidden, tuple(len(sample) for sample in samples))

    def copy(self) -> "Stream":
        """Return a stream that goes its own way from here."""
        return Stream(self.tokens, self.hidden.clone(), self.lengths)

    def parts(self) -> dict[str, Tensor]:
        """Return all of it as tensors."""
        return {
            "tokens": self.tokens,
            "hidden": self.hidden,
            "lengths": torch.tensor(self.lengths),
        }

    @staticmethod
    def from_parts(tensors: Mapping[str, Tensor], key: str) -> "Stream | None":
        """Undo `parts`, whose names have `key` and a full stop before them; None if not there."""
        if f"{key}.tokens" not in tensors:
            return None
        lengths = tuple(tensors[f"{key}.lengths"].tolist())
        return Stream(tensors[f"{key}.tokens"], tensors[f"{key}.hidden"], lengths)

    def steps(self) -> Iterator[tuple[slice, Layout]]:
        """Yield rows of whole sequences, a few thousand at a time, and how they lie."""
        begin = rows = 0
        group: list[int] = []
        for length in (*self.lengths, 0):
            if group and (not length or rows + length > _STEP_TOKENS):
                yield slice(begin, begin + rows), Layout.packed(group)
                begin, rows, group = begin + rows, 0, []
            if length:
                group.append(length)
                rows += length

    @torch.no_grad()
    def advance(self, block: Block, inputs: "Inputs | None" = None) -> None:
        """Move on through `block`, in place; `inputs` collects what its matrices are given."""
        for rows, layout in self.steps():
            routing: list[Routing] = []
            with _watch(block, inputs, routing):
                x = self.hidden[rows]
                self.hidden[rows] = block(x, Context(layout, None, 0, routing))


@dataclass
class Inputs:
    """What the matrices of one layer were given.

    `rows` float32 [T, K] by module name relative to the mixer; `experts` int64 [T, A] which experts
    each row of "experts" went to.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    experts: Tensor | None = None
    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, x: Tensor) -> None:
        """Note the rows `x` given to matrix `name`."""
        self.parts.setdefault(name, []).append(x.detach().float())

    def close(self) -> None:
        """Join what was noted step by step."""
        while self.parts:
            name, parts = self.parts.popitem()
            joined = torch.cat(parts)
            if name == "routing":
                self.experts = joined.long()
            else:
                self.rows[name] = joined

    def of_expert(self, expert: int) -> Tensor:
        """Return the rows [R, K] that `expert` was given."""
        assert self.experts is not None
        return self.rows["experts"][(self.experts == expert).any(1)]


@contextmanager
def _watch(block: Block, inputs: Inputs | None, routing: list[Routing]) -> Iterator[None]:
    """Note in `inputs` what the matrices of `block` are given while the context lasts."""
    if inputs is None:
        yield
        return
    mixer = block.mixer
    hooks = [
        module.register_forward_pre_hook(_note(inputs, name))
        for name, module in mixer.named_modules()
        if isinstance(module, Linear)
    ]
    if isinstance(mixer, MoE):
        hooks.append(_watch_experts(mixer, inputs))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for record in routing:
        inputs.add("routing", record.experts)


def _note(inputs: Inputs, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda module, given: inputs.add(name, given[0])


def _watch_experts(mixer: MoE, inputs: Inputs) -> torch.utils.hooks.RemovableHandle:
    """Routed experts are given the latent projection's output, or what the mixer is given."""
    if mixer.config.latent_size is not None:
        projection = mixer.fc1_latent_proj
        return projection.register_forward_hook(
            lambda module, given, out: inputs.add("experts", torch.as_tensor(out))
        )
    return mixer.register_forward_pre_hook(_note(inputs, "experts"))


def expert_hidden(rows: Tensor, up: Tensor) -> Tensor:
    """Return what the down projection of an expert is given: relu(rows up^T)^2."""
    return F.relu(linear(rows, up.to(rows.dtype))).square()


@torch.no_grad()
def compare(reference: Stream, other: Stream, head: Tensor, other_head: Tensor) -> dict[str, float]:
    """Compare the predictions of two streams that have passed all layers and the last norm.

    `head` and `other_head` [V, D] project each. Returns perplexity of the tokens under each, the
    mean KL divergence of `other` from `reference` in nats a token, and the share of tokens at which
    both have the same first choice.
    """
    total = {"before": 0.0, "after": 0.0, "kl": 0.0, "agree": 0.0}
    lengths = torch.tensor(reference.lengths)
    last = lengths.cumsum(0) - 1  # of each sequence: nothing comes after it
    wanted_rows = torch.ones(len(reference.tokens), dtype=torch.bool)
    wanted_rows[last] = False
    places = wanted_rows.nonzero().squeeze(1)
    count = len(places)
    for rows in places.split(max(1, _LOGITS // head.shape[0])):
        one, two = (
            linear(stream.hidden[rows], weight).float().log_softmax(-1)
            for stream, weight in ((reference, head), (other, other_head))
        )
        wanted = reference.tokens[rows + 1].unsqueeze(1)
        total["before"] -= float(one.gather(1, wanted).sum())
        total["after"] -= float(two.gather(1, wanted).sum())
        total["kl"] += float(F.kl_div(two, one, reduction="sum", log_target=True))
        total["agree"] += int((one.argmax(-1) == two.argmax(-1)).sum())
    mean = {name: value / count for name, value in total.items()}
    return {
        "perplexity_before": float(torch.tensor(mean["before"]).exp()),
        "perplexity_after": float(torch.tensor(mean["after"]).exp()),
        "logit_kl": mean["kl"],
        "same_first_choice": mean["agree"],
    }


def normalise(stream: Stream, norm: nn.Module) -> None:
    """Apply a norm to the whole stream, in place."""
    with torch.no_grad():
        stream.hidden = norm(stream.hidden)
