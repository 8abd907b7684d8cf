"""Quantisation-aware distillation: train the quantised student on its BF16 teacher's logits.

The forward pass sees every quantised matrix as its decoded codes, by the same functions that write
the file; the backward pass goes straight through to float32 weights. Block scales are chosen anew
each step ("dynamic"), or stay those that rounding the teacher gave ("frozen"), and only weights
move. Source: arXiv 2601.20088 (QAD); docs/numerics.md.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aprium.base.errors import QuantizeError
from aprium.base.records import Sample
from aprium.checkpoint.load import load_checkpoint, set_parameter
from aprium.checkpoint.save import save_checkpoint
from aprium.data.loader import Repeated
from aprium.model.linear import Matrix
from aprium.model.model import Block, HybridModel
from aprium.ops import fp8, nvfp4
from aprium.ops.nvfp4 import Encoded, Rule
from aprium.quantize.encode import FUSED
from aprium.quantize.streams import Stream, compare, normalise
from aprium.train.losses import LossConfig
from aprium.train.optim import OptimConfig
from aprium.train.policy_loss import PolicyLossConfig
from aprium.train.trainer import Trainer, TrainerConfig

_LOSS = LossConfig(
    ce_weight=0.0,
    mtp_weight=0.0,
    balance_weight=0.0,
    bias_rate=0.0,
    policy=PolicyLossConfig(distillation="full", direction="forward"),
)


@dataclass(frozen=True, kw_only=True)
class QadConfig:
    """How to distil: `steps` of about `tokens_per_step` tokens, peak learning rate `lr`.

    The rate warms up over a tenth of the steps and falls to a tenth by a cosine. Raises
    QuantizeError for a value out of range.
    """

    steps: int = 200
    lr: float = 1e-5
    tokens_per_step: int = 4096
    scales: Literal["dynamic", "frozen"] = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "lr", "tokens_per_step"):
            if getattr(self, name) <= 0:
                raise QuantizeError(f"{name} is {getattr(self, name)}: it must be positive")


class FakeQuant(nn.Module):
    """A weight [*lead, N, K] as its codes say, with gradients passed through unchanged.

    `fixed` holds block and global scales; None chooses them anew at each call by `rule`. `largest`
    gives the magnitude that matrices with one global scale share, by default the weight's own.
    """

    def __init__(
        self,
        fmt: str,
        rule: Rule,
        fixed: tuple[Tensor, Tensor] | None,
        largest: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.format, self._largest = fmt, largest
        self.rule: Rule = rule
        self.fixed = fixed

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Encoded | tuple[Tensor, Tensor]:
        """Return the stored form: `Encoded`, or FP8 codes and scale."""
        amax = self._largest() if self._largest is not None else None
        if self.format == "fp8":
            return fp8.encode(weight, amax=amax)
        if self.fixed is None:
            return nvfp4.encode(weight, self.rule, amax=amax)
        scale, scale_2 = self.fixed
        return Encoded(nvfp4.encode_with(weight, scale, scale_2), scale, scale_2)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the decoded values, as if they were `weight` for gradients."""
        stored = self.encode(weight)
        if isinstance(stored, Encoded):
            decoded = nvfp4.dequantize(*stored)
        else:
            decoded = fp8.dequantize(*stored)
        return weight + (decoded - weight).detach()


def distil(
    source: Path,
    target: Path,
    rule: Rule,
    config: QadConfig,
    *,
    samples: Sequence[Sequence[int]],
    heldout: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Train the quantised checkpoint in `target` against the one in `source` it was made from.

    `target` is replaced by the result, which has the same formats; `rule` chooses dynamic scales.
    Returns the quality on `heldout` as `streams.compare` does. Raises QuantizeError when `target`
    was not made of `source` in ModelOpt's layout.
    """
    teacher = load_checkpoint(source, load="memory")
    stored = load_checkpoint(target, load="memory")
    if not stored.quant.formats or stored.quant.layout != "modelopt":
        raise QuantizeError(f"{target} has no quantised matrices in ModelOpt's layout to train")
    if stored.config != teacher.config:
        raise QuantizeError(f"{target} was not made of {source}: their shapes differ")
    teacher.model.requires_grad_(False)
    student = _student(teacher.model, stored.model, rule, config.scales)
    facts = [str(source), rule, asdict(config), list(samples), _digest(stored.model)]
    output = _output(target.absolute(), facts)
    texts = [
        Sample(tokens=tuple(s), ce_weight=(0.0,) + (1.0,) * (len(s) - 1), domain="calibration")
        for s in samples
    ]
    trainer = Trainer(
        student,
        Repeated(
            texts,
            tokens_per_batch=max(config.tokens_per_step, *(len(s) for s in samples)),
            open_packs=4,
            seed=config.seed,
        ),
        [],
        output=output,
        optim=OptimConfig(
            lr=config.lr,
            muon_lr=None,
            weight_decay=0.0,
            schedule="cosine",
            warmup_steps=max(1, config.steps // 10),
            final_fraction=0.1,
        ),
        loss=_LOSS,
        config=TrainerConfig(
            steps=config.steps,
            eval_every=config.steps,
            checkpoint_every=max(1, config.steps // 4),
            seed=config.seed,
        ),
        teacher=teacher.model,
    )
    if not trainer.run():
        raise QuantizeError(f"stopped at step {trainer.progress.step}: the same command continues")
    _store(stored.model, student)
    save_checkpoint(stored, target)
    shutil.rmtree(output)
    return evaluate(teacher.model, load_checkpoint(target).model, heldout)


def _output(target: Path, facts: list[Any]) -> Path:
    """Return where the trainer works beside `target`; what another run left there is removed."""
    output = target.parent / f".{target.name}.qad"
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = output / "key"
    if not file.exists() or file.read_text(encoding="utf-8") != key:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        file.write_text(key, encoding="utf-8")
    return output


def _digest(stored: HybridModel) -> str:
    """Return a digest of the formats and scales that training starts from."""
    digest = hashlib.sha256()
    for name, matrix in _quantised(stored).items():
        digest.update(f"{name} {matrix.format}".encode())
        digest.update(matrix.pick("weight_scale").view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _student(teacher: HybridModel, stored: HybridModel, rule: Rule, scales: str) -> HybridModel:
    """Return the teacher in float32, its forward pass quantised as `stored` is."""
    student = HybridModel(teacher.config, dtype=torch.float32)
    student.load_state_dict(teacher.state_dict())
    quantised = _quantised(stored)
    for name, matrix in quantised.items():
        fixed = None
        if scales == "frozen" and matrix.format != "fp8":
            fixed = (matrix.pick("weight_scale").detach(), matrix.pick("weight_scale_2").detach())
        owner, _, leaf = name.rpartition(".")
        largest = None
        if leaf in FUSED:
            mixer = student.get_submodule(owner)
            largest = _shared(mixer, [f for f in FUSED if f"{owner}.{f}" in quantised])
        fake = FakeQuant(str(matrix.format), rule, fixed, largest)
        parametrize.register_parametrization(student.get_submodule(name), "weight", fake)
    for name, parameter in student.named_parameters():
        if name.startswith("mtp."):  # the loss does not reach it
            parameter.requires_grad_(False)
    return student


def _shared(mixer: nn.Module, leaves: Sequence[str]) -> Callable[[], Tensor]:
    """Return what gives the largest magnitude of the weights of `leaves` together, as trained."""

    def largest() -> Tensor:
        weights = dict(mixer.named_parameters())
        trained = (  # a matrix that has no parametrization yet has its weight itself
            weights.get(f"{leaf}.parametrizations.weight.original", weights.get(f"{leaf}.weight"))
            for leaf in leaves
        )
        return torch.stack([w.detach().abs().max() for w in trained if w is not None]).max()

    return largest


def _quantised(model: HybridModel) -> dict[str, Matrix]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Matrix) and module.format is not None
    }


@torch.no_grad()
def _store(stored: HybridModel, student: HybridModel) -> None:
    """Put the student's weights into the stored model, encoded where that is quantised."""
    quantised = _quantised(stored)
    for name in quantised:
        module = student.get_submodule(name)
        (fake,) = module.parametrizations["weight"]  # type: ignore[index]
        encoded = fake.encode(module.parametrizations["weight"].original)  # type: ignore[index]
        leaves = ("weight", "weight_scale", "weight_scale_2")
        for leaf, value in zip(leaves[: len(encoded)], encoded, strict=True):
            set_parameter(stored, f"{name}.{leaf}", value)
    encoded_names = tuple(f"{name}." for name in quantised)
    mine = dict(student.named_parameters())
    for name, parameter in list(stored.named_parameters()):
        if not name.startswith(encoded_names) and name in mine:
            set_parameter(stored, name, mine[name].detach().to(parameter.dtype))


def evaluate(
    reference: HybridModel, other: HybridModel, samples: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Compare two loaded models on `samples` as `streams.compare` does."""
    streams = []
    for model in (reference, other):
        stream = Stream.start(samples, model.backbone.embeddings.weight)
        for block in model.backbone.layers:
            assert isinstance(block, Block)
            stream.advance(block)
        normalise(stream, model.backbone.norm_f)
        streams.append(stream)
    return compare(streams[0], streams[1], reference.head_weight, other.head_weight)
