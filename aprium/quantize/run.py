"""The whole of `aprium quantize`: samples, choice of formats, encoding, distillation, report."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aprium.base.errors import QuantizeError
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import choose_load, load_checkpoint
from aprium.quantize import auto, pipeline, qad, samples
from aprium.quantize.pipeline import Result
from aprium.quantize.recipes import Recipe
from aprium.quantize.report import write_report

_SEARCH_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to calibrate and measure on, and what to do beside rounding.

    `calibration` and `heldout` are files as `samples.read_samples` takes; without the first the
    model writes its own samples, without the second every fourth sample is held out. `budget` in
    bits a weight replaces the recipe's formats by a search. `distil` trains afterwards.
    """

    calibration: Path | None = None
    heldout: Path | None = None
    num_samples: int = 64
    length: int = 256
    evaluate: bool = True
    budget: float | None = None
    distil: qad.QadConfig | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("num_samples", 2), ("length", 2)):
            if getattr(self, name) < least:
                raise QuantizeError(f"{name} is {getattr(self, name)}: it must be at least {least}")


def run(
    source: str,
    target: Path,
    recipe: Recipe,
    options: Options,
    *,
    say: Callable[[str], None],
) -> Result:
    """Quantise the model `source` names into directory `target`, and write the report there.

    `say` takes what is worth showing on the way. Raises QuantizeError, DataError, CheckpointError.
    """
    path, begun = resolve(source), time.monotonic()
    plan = pipeline.read_source(path, target)
    size = sum(tensor.end - tensor.start for tensor in plan.tensors.values())
    if (options.budget is not None or options.distil is not None) and choose_load(size) == "mmap":
        raise QuantizeError(
            f"{path} does not fit into memory, which a search or distillation needs: leave out the "
            "budget and distillation"
        )
    needed = recipe.needs_inputs(asdict(recipe.formats).values())
    needed |= options.budget is not None or options.distil is not None
    calibration: list[list[int]] = []
    heldout: list[list[int]] = []
    if needed or options.evaluate:
        calibration, heldout = _samples(path, options)
    more: dict[str, Any] = {}
    formats = None
    if options.budget is not None:
        choices = _search(path, calibration, recipe, options.budget)
        formats = auto.formats_of(choices)
        more["choices"] = [asdict(choice) for choice in choices]
        say(auto.render(choices))
    result = pipeline.quantize(
        path,
        target,
        recipe,
        calibration=calibration,
        heldout=heldout if options.evaluate else [],
        formats=formats,
    )
    if options.distil is not None:
        more |= {"before_distillation": result.quality, "distillation": asdict(options.distil)}
        quality = qad.distil(
            path, target, recipe.rule, options.distil, samples=calibration, heldout=heldout
        )
        result = replace(result, quality=quality)
    result = replace(result, seconds=time.monotonic() - begun)
    write_report(target, result, **more)
    return result


def _search(
    path: Path, samples: list[list[int]], recipe: Recipe, budget: float
) -> list[auto.Choice]:
    """Search formats with the model in memory, which is let go of afterwards."""
    model = load_checkpoint(path, load="memory").model
    return auto.search(model, samples[:_SEARCH_SAMPLES], recipe, budget)


def _samples(path: Path, options: Options) -> tuple[list[list[int]], list[list[int]]]:
    """Return what to calibrate on and what to measure on."""
    sizes = {"count": options.num_samples, "length": options.length}
    if options.calibration is None:
        found = samples.write_samples(path, **sizes)
    else:
        found = samples.read_samples(options.calibration, path, **sizes)
    if options.heldout is None:
        return samples.split(found)
    return found, samples.read_samples(options.heldout, path, **sizes)
