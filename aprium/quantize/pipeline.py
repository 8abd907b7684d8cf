"""Quantise a checkpoint layer by layer: weights in, weights out, and the loss measured on the way.

Two streams of held-out samples pass through the model, one through the layers as they were and one
through the layers as they became, and a stream of calibration samples through the latter. At any
moment memory holds one layer (its weights, encoded, and decoded in float32) and the streams'
states with what the layer's matrices were given; the model may be larger than memory. What is done
is kept beside the target, and the same command continues from the last whole layer.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aprium.base.config import to_dict
from aprium.base.errors import CheckpointError, QuantizeError
from aprium.base.log import get_logger
from aprium.checkpoint.load import Plan, fill, read_plan
from aprium.checkpoint.names import parameter_of, tensor_table
from aprium.checkpoint.safetensors import (
    DTYPE_NAMES,
    Entry,
    MappedFile,
    MappedFiles,
    StoredTensor,
    read_header,
    write_directory,
    write_file,
)
from aprium.checkpoint.save import DEFAULT_SHARD_BYTES, move_directory, write_texts
from aprium.model.model import Block, HybridModel
from aprium.quantize.encode import Encoder, MatrixReport
from aprium.quantize.progress import progress
from aprium.quantize.recipes import Recipe, effective_bits, formats_of, quant_of
from aprium.quantize.streams import Inputs, Stream, compare, normalise

logger = get_logger("quantize")
_PROGRESS, _STATE = "progress.json", "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was done: effective bits a weight, bytes, loss on held-out samples, and each matrix.

    `quality` is what `streams.compare` returns; None when nothing was measured.
    """

    source: str
    recipe: dict[str, Any]
    bits: float
    bytes_before: int
    bytes_after: int
    seconds: float
    quality: dict[str, float] | None
    matrices: tuple[MatrixReport, ...]


def quantize(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    calibration: Sequence[Sequence[int]] = (),
    heldout: Sequence[Sequence[int]] = (),
    formats: dict[str, str] | None = None,
) -> Result:
    """Quantise the checkpoint in directory `source` into directory `target`.

    `calibration` and `heldout` are token sequences; without held-out ones no loss is measured.
    `formats` by module replace those that `recipe` gives. Raises QuantizeError when the recipe
    needs calibration and there is none, or when `source` is quantised already; CheckpointError
    for files that cannot be read or written.
    """
    plan = read_source(source, target)
    chosen = formats_of(recipe, plan.config) if formats is None else formats
    if not chosen:
        raise QuantizeError(
            "no matrix of this model gets a format: choose another recipe or budget"
        )
    if recipe.needs_inputs(chosen.values()) and not calibration:
        raise QuantizeError("this recipe needs calibration samples: give some")
    used = calibration if recipe.needs_inputs(chosen.values()) else ()
    work = _Work(plan, target.absolute(), recipe, chosen, [list(s) for s in used])
    try:
        return work.run([list(s) for s in heldout if len(s) > 1])
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error


def read_source(source: Path, target: Path) -> Plan:
    """Read the headers of `source`; refuse one that is quantised or is `target` itself."""
    plan = read_plan(source)
    if plan.quant.formats:
        raise QuantizeError(
            f"{source} is quantised already: make a BF16 checkpoint of it first, with "
            "`aprium convert --to bf16`"
        )
    if source.resolve() == target.resolve():
        raise QuantizeError(f"{target} is the source itself: name another directory to write")
    return plan


class _Work:
    """One run: what is read, where parts go, and how far it is."""

    def __init__(
        self,
        plan: Plan,
        target: Path,
        recipe: Recipe,
        formats: dict[str, str],
        calibration: list[list[int]],
    ) -> None:
        self.plan, self.target, self.recipe, self.formats = plan, target, recipe, formats
        self.calibration = calibration
        self.quant = quant_of(recipe, formats)
        self.table = tensor_table(plan.config, self.quant)
        self.parts = target.parent / f".{target.name}.parts"
        with torch.device("meta"):
            self.model = HybridModel(plan.config)
        self.files = MappedFiles()

    def run(self, heldout: list[list[int]]) -> Result:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.parts.mkdir(exist_ok=True)
        state = self._resume(heldout)
        count = len(self.plan.config.layers)
        begun, spent = time.monotonic(), state.seconds
        with progress() as bar:
            task = bar.add_task("quantising", total=count, completed=state.done)
            for index in range(state.done, count):
                self._layer(index, state)
                state.done = index + 1
                state.seconds = spent + time.monotonic() - begun
                self._save(state)
                bar.update(task, completed=index + 1)
        quality = self._rest(state)
        size = self._assemble()
        shutil.rmtree(self.parts)
        return Result(
            source=str(self.plan.path),
            recipe=to_dict(self.recipe),
            bits=effective_bits(self.formats, self.plan.config),
            bytes_before=sum(t.end - t.start for t in self.plan.tensors.values()),
            bytes_after=size,
            seconds=spent + time.monotonic() - begun,
            quality=quality,
            matrices=tuple(state.reports),
        )

    def _layer(self, index: int, state: "_State") -> None:
        """Quantise layer `index` and move all streams through it."""
        name = f"backbone.layers.{index}"
        fill(self.model, self.plan.tensors, f"{name}.")
        block = self.model.get_submodule(name)
        assert isinstance(block, Block)
        seen = Inputs() if state.seen else None
        held = Inputs() if state.after else None
        if state.seen is not None and seen is not None:
            state.seen.copy().advance(block, seen)
            seen.close()
        if state.before is not None and state.after is not None and held is not None:
            state.after.copy().advance(block, held)
            held.close()
            state.before.advance(block)
        encoder = Encoder(self.recipe, self.formats)
        if self.recipe.kv_scales and block.kind == "attention":
            assert seen is not None
            encoder.tensors |= _kv_scales(block, f"{name}.mixer", seen)
        encoder.layer(block.mixer, f"{name}.mixer", index, seen, held)
        for stream in (state.seen, state.after):
            if stream is not None:
                stream.advance(block)
        state.reports += encoder.reports
        names = [n for n in self.table if n.startswith(f"{name}.")]
        self._write_part(f"layer-{index:05d}", self._complete(encoder.tensors, names))
        with torch.device("meta"):
            empty = HybridModel(self.plan.config).get_submodule(name)
        self.model.backbone.layers[index] = empty

    def _rest(self, state: "_State") -> dict[str, float] | None:
        """Write what lies outside the layers, quantise the head if asked, and measure."""
        config = self.plan.config
        encoder = Encoder(self.recipe, self.formats)
        fill(self.model, self.plan.tensors, "backbone.norm_f.")
        if not config.tie_embeddings:
            fill(self.model, self.plan.tensors, "lm_head.")
        fill(self.model, self.plan.tensors, "backbone.embeddings.")
        for stream in (state.seen, state.before, state.after):
            if stream is not None:
                normalise(stream, self.model.backbone.norm_f)
        head = self.model.head_weight
        if "lm_head" in self.formats:
            rows = [stream.hidden if stream else None for stream in (state.seen, state.after)]
            encoder.matrix(self.model.lm_head, "lm_head", *rows)
            state.reports += encoder.reports
        names = [name for name in self.table if not name.startswith("backbone.layers.")]
        self._write_part("rest", self._complete(encoder.tensors, names))
        if state.before is None or state.after is None:
            return None
        return compare(state.before, state.after, head, self.model.head_weight)

    def _complete(self, encoded: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors called `names`: encoded, or else as the source has them."""
        found = {}
        for name in names:
            value = encoded.get(name)
            found[name] = self._original(name) if value is None else value
        return found

    def _original(self, name: str) -> Tensor:
        """Return a tensor of the source, which may hold a layer's experts as one."""
        stored = self.plan.tensors.get(name)
        if stored is not None:
            return self.files.tensor(stored)
        parameter, expert = parameter_of(name)
        return self.files.tensor(self.plan.tensors[parameter.removesuffix(".weight")])[expert]

    def _write_part(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write `tensors` to a file of the work directory, which is whole when it has its name."""
        entries = [
            Entry(key, DTYPE_NAMES[value.dtype], tuple(value.shape))
            for key, value in tensors.items()
        ]
        partial = self.parts / f"{name}.partial"
        write_file(partial, entries, tensors.__getitem__)
        partial.replace(self.parts / f"{name}.safetensors")

    def _assemble(self) -> int:
        """Join the parts into a checkpoint in the target's place; return the bytes of tensors."""
        stored: dict[str, StoredTensor] = {}
        for part in (
            *sorted(self.parts.glob("layer-*.safetensors")),
            self.parts / "rest.safetensors",
        ):
            stored |= read_header(part)
        files = MappedFiles()
        complete = self.parts / "complete"
        shutil.rmtree(complete, ignore_errors=True)
        complete.mkdir()
        write_texts(self.plan.path, complete, self.quant, self.plan.config)
        ordered = [stored[name] for name in self.table]
        write_directory(
            complete,
            [Entry(t.name, t.dtype, t.shape) for t in ordered],
            lambda name: files.tensor(stored[name]),
            DEFAULT_SHARD_BYTES,
        )
        move_directory(complete, self.target)
        read_plan(self.target)  # what was written must load
        return sum(t.end - t.start for t in ordered)

    def _key(self, heldout: list[list[int]]) -> str:
        """Return a digest of all that decides the result, so that only the same run goes on."""
        files = sorted({tensor.file for tensor in self.plan.tensors.values()})
        facts = [
            *(str(self.plan.path.resolve()), to_dict(self.recipe), sorted(self.formats.items())),
            *(self.calibration, heldout),
            [(t.name, t.start, t.end) for t in self.plan.tensors.values()],
            [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _resume(self, heldout: list[list[int]]) -> "_State":
        """Return where an earlier run of the same command stopped, or the start."""
        key = self._key(heldout)
        file = self.parts / _PROGRESS
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                logger.info("going on after layer %d of an earlier run", kept["done"] - 1)
                return _State.load(kept, self.parts / kept["state"])
            logger.info("%s is of another run and is discarded", self.parts)
        shutil.rmtree(self.parts)
        self.parts.mkdir()
        fill(self.model, self.plan.tensors, "backbone.embeddings.")
        table = self.model.backbone.embeddings.weight
        seen = Stream.start(self.calibration, table) if self.calibration else None
        before = Stream.start(heldout, table) if heldout else None
        after = before.copy() if before else None
        with torch.device("meta"):
            self.model.backbone.embeddings = HybridModel(self.plan.config).backbone.embeddings
        return _State(key, seen, before, after)

    def _save(self, state: "_State") -> None:
        """Keep what the next layer starts from; the newest file counts once it is named."""
        name = f"state-{state.done:05d}.safetensors"
        streams = {key: s for key, s in state.streams().items() if s is not None}
        tensors = {
            f"{key}.{part}": t for key, s in streams.items() for part, t in s.parts().items()
        }
        entries = [Entry(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
        write_file(self.parts / name, entries, tensors.__getitem__)
        facts = {
            "key": state.key,
            "done": state.done,
            "seconds": state.seconds,
            "state": name,
            "reports": [asdict(report) for report in state.reports],
        }
        partial = self.parts / f"{_PROGRESS}.partial"
        partial.write_text(json.dumps(facts), encoding="utf-8")
        partial.replace(self.parts / _PROGRESS)
        for old in self.parts.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()


@dataclass
class _State:
    """Where a run is: layers done, the streams before the next one, and the reports so far."""

    key: str
    seen: Stream | None
    before: Stream | None
    after: Stream | None
    done: int = 0
    seconds: float = 0.0
    reports: list[MatrixReport] = field(default_factory=list)

    def streams(self) -> dict[str, Stream | None]:
        return {"seen": self.seen, "before": self.before, "after": self.after}

    @staticmethod
    def load(kept: dict[str, Any], file: Path) -> "_State":
        stored, mapped = read_header(file), MappedFile(file)
        tensors = {name: mapped.tensor(tensor).clone() for name, tensor in stored.items()}
        streams = {key: Stream.from_parts(tensors, key) for key in ("seen", "before", "after")}
        reports = [MatrixReport(**row) for row in kept["reports"]]
        return _State(
            kept["key"], **streams, done=kept["done"], seconds=kept["seconds"], reports=reports
        )


def _kv_scales(block: Block, name: str, seen: Inputs) -> dict[str, Tensor]:
    """Return the scales that make the largest key and value 448; on inputs before quantising."""
    found = {}
    for leaf, scale in (("k_proj", "k_scale"), ("v_proj", "v_scale")):
        module = block.mixer.get_submodule(leaf)
        with torch.no_grad():
            largest = float(module(seen.rows[leaf]).abs().max())
        found[f"{name}.{leaf}.{scale}"] = torch.tensor(largest / 448.0 or 1.0)
    return found
