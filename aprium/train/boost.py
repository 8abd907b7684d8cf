"""Boost a prediction head: train it alone, on what the model itself writes, to draft further ahead.

The backbone, the embeddings and the projection are frozen, and their own distributions are the
targets: forward KL at temperature T, times T squared. The head is applied `steps` times with the
same weights, as the engine does when it drafts. What it reads in place of a hidden state is, from
the second step on, drawn row by row from what earlier steps made for that row, so that it learns
from its own errors at every distance. Source: docs/training.md (MTP boosting of Nemotron 3 Ultra).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aprium.base.config import load_toml, require_finite
from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.base.records import Request, Sample, SamplingParams
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import load_checkpoint
from aprium.data.loader import Loader, Repeated
from aprium.data.sources import DataConfig, Mixture, Text, heldout_samples
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.engine.speculative import SpeculativeConfig
from aprium.model.model import HybridModel, Routing
from aprium.ops.logprob import kl_divergence
from aprium.parallel.mesh import require_one_process
from aprium.train.batch import Batch
from aprium.train.losses import LossConfig, Losses, Teacher, Whole, sum_balance
from aprium.train.optim import OptimConfig
from aprium.train.pretrain import export, recipe_text, write_json
from aprium.train.sft import identity, open_model, read_text
from aprium.train.trainer import Trainer, TrainerConfig, make_output

log = get_logger("train")
_BATCH = 32  # sequences that the model writes at a time


@dataclass(frozen=True, kw_only=True)
class BoostConfig:
    """A recipe.

    `checkpoint` is a directory, a hub id or pico. `steps` is how often the head is applied,
    `temperature` that of both distributions. Prompts are what comes before the first learnt token
    of samples drawn from `data`; the model continues `rollouts` of them at temperature 1 by at
    most `max_tokens`, and what it wrote is learnt. With 0 rollouts the samples are learnt as they
    are. `probes` held-out prompts measure the acceptance of drafts before and after; where nothing
    is held out it is not measured. AdamW trains the head, so `optim.muon_lr` is refused.
    """

    output: Path
    data: DataConfig
    trainer: TrainerConfig
    checkpoint: str = "pico"
    tokens_per_step: int = 4096
    steps: int = 7
    temperature: float = 2.0
    rollouts: int = 1000
    max_tokens: int = 128
    probes: int = 64
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-4, schedule="cosine", final_fraction=0.1)
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        require_finite(self)
        ranges = (
            *(("steps", 1, 16), ("max_tokens", 1, None)),
            *(("rollouts", 0, None), ("probes", 0, None)),
        )
        for name, low, high in ranges:
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                bound = f"in {low}..{high}" if high else f"at least {low}"
                raise ConfigError(f"{name} is {value}: it must be {bound}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}: it must be positive")
        if self.optim.muon_lr not in (None, OptimConfig.muon_lr):
            raise ConfigError(
                f"optim.muon_lr is {self.optim.muon_lr}: the head is trained with adamw, which has "
                "no use for it; leave it out, and set optim.lr"
            )
        longest = self.data.max_length + (self.max_tokens if self.rollouts else 0)
        if self.tokens_per_step < longest:
            raise ConfigError(
                f"tokens_per_step is {self.tokens_per_step}: it must be at least {longest}, "
                "data.max_length and max_tokens together"
            )


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Path | None:
    """Boost by the TOML file `recipe`, continuing where an earlier run of it stopped.

    Returns the directory of the exported checkpoint, or None when asked to stop before the end.
    Raises ConfigError, DataError or CheckpointError.
    """
    require_one_process("aprium boost-mtp")
    config = load_toml(BoostConfig, recipe, overrides)
    config.trainer.use_threads()
    path = resolve(config.checkpoint)
    text = read_text(path)
    model = open_model(path, text)
    if not model.config.num_mtp_layers:
        raise CheckpointError(f"{path} has no prediction head: there is nothing to boost")
    make_output(config.output)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for name, parameter in model.named_parameters():
        # The selection bias of the head's router is not trained by gradients, here as elsewhere.
        trained = name.startswith("mtp.") and not name.endswith("e_score_correction_bias")
        parameter.requires_grad_(trained)
    probes = _probes(config, text)
    source = Loader(config.data, text, tokens_per_batch=config.tokens_per_step)
    if config.rollouts:
        mixture = Mixture(config.data, text)
        prompts = [_prompt(mixture.draw()[1]) for _ in range(config.rollouts)]
        source = Repeated(
            _write(path, prompts, config),
            tokens_per_batch=config.tokens_per_step,
            seed=config.trainer.seed,
        )
    trainer = Trainer(
        model,
        source,
        [],
        output=config.output,
        optim=dataclasses.replace(config.optim, muon_lr=None),
        loss=LossConfig(bias_rate=0.0),
        config=config.trainer,
        recipe=recipe_text(config),
        identity=identity(path, None, model.mesh),
        objective=Objective(config.steps, config.temperature, config.trainer.seed),
    )
    if not trainer.run():
        log.info("stopped at step %d: the same command continues", trainer.progress.step)
        return None
    for parameter in trainable:
        parameter.requires_grad_(True)  # an export leaves what is not trained in its own dtype
    directory = export(model, path, config.output / "model")
    if probes:
        measured = {
            "before": measure(path, probes, config.steps, config.max_tokens),
            "after": measure(directory, probes, config.steps, config.max_tokens),
        }
        write_json(config.output / "acceptance.json", measured)
        log.info("accepted by position: %s", measured)
    return directory


class Objective:
    """The loss of the head's `steps` recursive predictions, in the place of the trainer's own.

    It draws with a generator seeded by `seed` and the batch's tokens, so that a resumed run draws
    the same.
    """

    def __init__(self, steps: int, temperature: float, seed: int) -> None:
        self._steps, self._temperature, self._seed = steps, temperature, seed

    def __call__(
        self,
        model: HybridModel,
        batch: Batch,
        config: LossConfig,
        teacher: Teacher | None = None,
        *,
        whole: Whole | None = None,
        recompute: bool = False,
    ) -> Losses:
        """Return the mean over steps of the divergence; `mtp` is that of the last step."""
        parts, routing = self.by_step(model, batch, whole, recompute)
        count = None if whole is None else int(whole.samples)
        balance = sum_balance(routing, batch.layout, num_samples=count) / self._steps
        mean = torch.stack(parts).mean()
        return Losses(
            total=mean + config.balance_weight * balance,
            ce=float(mean.detach()),  # what a run shows as its loss
            kl=float(mean.detach()),
            mtp=float(parts[-1].detach()),
            balance=float(balance.detach()),
            logprobs=torch.zeros(0),
            predicted=torch.zeros(0, dtype=torch.long),
            routing=list(routing),
        )

    def by_step(
        self,
        model: HybridModel,
        batch: Batch,
        whole: Whole | None = None,
        recompute: bool = False,
    ) -> tuple[list[Tensor], list[Routing]]:
        """Return the divergence of each step over the total weight, and the routing.

        In the head's row t stand a hidden state for t and the token t + 1; the row is about token
        t + 2, for which the backbone's row t + 1 is the target.
        """
        layout, scale = batch.layout, 1 / self._temperature
        with torch.no_grad():
            real = model(batch.tokens, layout)
        seed = (self._seed * 1_000_003 + int(batch.tokens.sum())) % (1 << 62)
        generator = torch.Generator().manual_seed(seed)
        rows = batch.predicted(2) - 2
        weights = batch.ce_weight[rows + 2]
        norm = weights.sum().clamp(min=1e-9) if whole is None else whole.weight
        next_tokens = batch.tokens.roll(-1).where(batch.remaining() > 1, 0)
        starts = layout.positions == 0
        routing: list[Routing] = []
        made: list[Tensor] = []  # what each step made in the place of the hidden states
        parts = []
        for step in range(self._steps):
            hidden = real
            if made:
                choice = torch.randint(len(made), (real.shape[0],), generator=generator)
                drawn = torch.stack(made)[choice, torch.arange(real.shape[0])]
                # The first row of a document has nothing before it to be drafted from.
                hidden = torch.where(starts.unsqueeze(1), real, drawn)
            ahead = model.predict(
                hidden, next_tokens, layout, routing=routing, depth=step, recompute=recompute
            )
            divergence = kl_divergence(
                ahead[rows] * scale, model.head_weight, real[rows + 1] * scale, model.head_weight
            )
            parts.append((divergence * weights).sum() / norm * self._temperature**2)
            made.append(ahead.roll(1, 0))
        return parts, routing


def _probes(config: BoostConfig, text: Text) -> list[tuple[int, ...]]:
    """Return the prompts that measure acceptance; none where nothing is held out, which is told."""
    samples = heldout_samples(config.data, text) if config.probes else []
    if config.probes and not samples:
        log.warning(
            "probes is %d and no source of data holds anything out: the acceptance of drafts will "
            "not be measured",
            config.probes,
        )
    return [_prompt(sample) for sample in samples][: config.probes]


def _prompt(sample: Sample) -> tuple[int, ...]:
    """Return the tokens before the first that is learnt, at least one."""
    learnt = [t for t, weight in enumerate(sample.ce_weight) if weight]
    return sample.tokens[: max(1, learnt[0] if learnt else len(sample.tokens))]


def _write(path: Path, prompts: Sequence[tuple[int, ...]], config: BoostConfig) -> list[Sample]:
    """Let the model continue `prompts`; the samples are kept in a file for a resumed run."""
    file = config.output / "rollouts.jsonl"
    key = {
        "checkpoint": str(path),
        "prompts": hash(tuple(prompts)),  # of integers: the same in every process
        "max_tokens": config.max_tokens,
    }
    if file.exists():
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if lines and lines[0] == key:
            return [_written(line["prompt"], line["tokens"]) for line in lines[1:]]
    engine = _engine(path, config.data.max_length + config.max_tokens)
    found = _generate(engine, prompts, config.max_tokens, temperature=1.0)
    lines = [
        {"prompt": list(prompt), "tokens": found[i]} for i, prompt in enumerate(prompts) if found[i]
    ]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in (key, *lines)), encoding="utf-8")
    partial.replace(file)
    log.info("%d continuations of %d tokens", len(lines), sum(len(x["tokens"]) for x in lines))
    return [_written(line["prompt"], line["tokens"]) for line in lines]


def _written(prompt: Sequence[int], tokens: Sequence[int]) -> Sample:
    weights = (0.0,) * len(prompt) + (1.0,) * len(tokens)
    return Sample(tokens=(*prompt, *tokens), ce_weight=weights, domain="written")


def measure(
    path: Path, prompts: Sequence[tuple[int, ...]], drafts: int, max_tokens: int
) -> dict[str, Any]:
    """Return how often drafts of checkpoint `path` are accepted, greedy, by their position.

    `tokens_per_step` is 1 and the chances that the drafts up to each position are all accepted.
    """
    longest = max(len(prompt) for prompt in prompts) + max_tokens
    speculative = SpeculativeConfig(num_speculative_tokens=drafts, adaptive=False)
    engine = _engine(path, longest, speculative)
    _generate(engine, prompts, max_tokens, temperature=0.0)
    stats = engine.stats()
    compared, accepted = stats.drafts_compared, stats.drafts_accepted
    rates = [a / c if c else 0.0 for a, c in zip(accepted, compared, strict=True)]
    reached, tokens = 1.0, 1.0
    for rate in rates:
        reached *= rate
        tokens += reached
    return {"by_position": rates, "compared": list(compared), "tokens_per_step": tokens}


def _engine(path: Path, longest: int, speculative: SpeculativeConfig | None = None) -> Engine:
    config = EngineConfig(
        model=str(path),
        max_num_seqs=_BATCH,
        max_model_len=longest,
        enable_prefix_caching=False,
        speculative=speculative,
    )
    return Engine(config, load_checkpoint(path))


def _generate(
    engine: Engine, prompts: Sequence[tuple[int, ...]], max_tokens: int, *, temperature: float
) -> list[list[int]]:
    """Continue each prompt, with its number for a seed."""
    found: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i)
        engine.add(Request(id=str(i), tokens=prompt, params=params))
    while engine.has_work:
        for delta in engine.step():
            found[int(delta.id)] += delta.tokens
    return found
