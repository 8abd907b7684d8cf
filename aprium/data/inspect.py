"""What a mixture looks like to the trainer: packed samples with their weights, and figures.

The samples come from the loader that training uses, with the same seed, so the packs shown are the
first ones of a run.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text as Styled

from aprium.base.config import from_dict, read_toml
from aprium.base.errors import DataError
from aprium.base.records import Sample
from aprium.checkpoint.hub import resolve
from aprium.data.loader import Loader
from aprium.data.rows import Rows
from aprium.data.sources import DataConfig, Families, SourceConfig, Text
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

_TOKENS, _MAX_LENGTH = 4096, 512


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to look at: mixtures by name, the directory of the tokenizer, and tokens a pack."""

    mixtures: Mapping[str, DataConfig]
    tokenizer: Path
    tokens: int


def read(
    source: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    tokens: int | None = None,
) -> Plan:
    """Read a recipe, or a file of samples as a mixture of its own.

    `tokenizer` is needed where the recipe names neither that nor a checkpoint. Raises ConfigError
    or DataError.
    """
    if source.suffix != ".toml":
        if overrides:
            raise DataError(f"{source} is no recipe: overrides can be given to a TOML file only")
        if tokenizer is None:
            raise DataError(f"{source} does not say how it is tokenised: give --tokenizer")
        data = DataConfig(sources=(_source_of(source),), max_length=max_length or _MAX_LENGTH)
        return Plan(mixtures={"data": data}, tokenizer=resolve(tokenizer), tokens=tokens or _TOKENS)
    if max_length is not None:
        raise DataError("a recipe has its own max_length: change it by --set data.max_length=N")
    recipe = read_toml(source, overrides)
    tables = {"data": recipe.get("data")}
    if isinstance(recipe.get("alternate"), dict):
        tables["alternate.data"] = recipe["alternate"].get("data")
    mixtures = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise DataError(f"{source} has no table {name}: there is nothing to inspect")
        mixtures[name] = from_dict(DataConfig, table, where=name)
    found = tokenizer or recipe.get("tokenizer") or recipe.get("checkpoint")
    if found is None:
        raise DataError(f"{source} names neither tokenizer nor checkpoint: give --tokenizer")
    size = tokens or recipe.get("tokens_per_step", _TOKENS)
    if not isinstance(size, int) or not isinstance(found, str):
        raise DataError(
            f"{source}: tokens_per_step must be an integer, and tokenizer or checkpoint a string; "
            f"they are {size!r} and {found!r}"
        )
    return Plan(mixtures=mixtures, tokenizer=resolve(found), tokens=size)


def _source_of(file: Path) -> SourceConfig:
    row = Rows([file], ("messages", "text", "tokens", "weights"))[0]
    if "messages" in row.data:
        return SourceConfig(kind="chat", name=file.stem, path=file)
    if "text" in row.data:
        return SourceConfig(kind="text", name=file.stem, path=file)
    if {"tokens", "weights"} <= row.data.keys():
        return SourceConfig(kind="samples", name=file.stem, path=file)
    raise DataError(f"{row.where}: it has neither 'text' nor 'messages' nor 'tokens' and 'weights'")


def inspect(
    plan: Plan, families: Families, *, packs: int, measure: int, console: Console
) -> dict[str, Any]:
    """Show the first `packs` packs of each mixture and figures over `measure`; return the figures.

    With 0 packs nothing is printed.
    """
    if measure < 1:
        raise DataError(f"figures over {measure} packs: measure at least one")
    text = Text(Tokenizer.load(plan.tokenizer), ChatTemplate.load(plan.tokenizer), families)
    found = {}
    for name, data in plan.mixtures.items():
        loader = Loader(data, text, tokens_per_batch=plan.tokens)
        drawn = [loader.next_batch() for _ in range(max(packs, measure))]
        for number, pack in enumerate(drawn[:packs], 1):
            _show(pack, f"{name}, pack {number}", plan.tokens, text.tokenizer, console)
        found[name] = figures(drawn[:measure], data, plan.tokens)
        if packs:
            _table(name, found[name], console)
    return found


def figures(packs: list[list[Sample]], data: DataConfig, budget: int) -> dict[str, Any]:
    """Count `packs`: efficiency, lengths, and tokens, learnt tokens and shares by source."""
    samples = [sample for pack in packs for sample in pack]
    total = sum(len(sample.tokens) for sample in samples)
    weights = {source.name: source.weight for source in data.sources}
    by_source = {}
    origins = [_origin(sample.domain, weights) for sample in samples]
    for name, weight in weights.items():
        mine = [s for s, origin in zip(samples, origins, strict=True) if origin == name]
        tokens = sum(len(s.tokens) for s in mine)
        learnt = sum(1 for s in mine for w in s.ce_weight if w)
        by_source[name] = {
            "samples": len(mine),
            "tokens": tokens,
            "learnt": learnt,
            "share": tokens / total,
            "wanted": weight / sum(weights.values()),
        }
    lengths = [len(sample.tokens) for sample in samples]
    return {
        "packs": len(packs),
        "efficiency": total / (budget * len(packs)),
        "samples": len(samples),
        "tokens": total,
        "learnt_share": sum(s["learnt"] for s in by_source.values()) / total,
        "median_length": statistics.median(lengths),
        "longest": max(lengths),
        "sources": by_source,
    }


def _origin(domain: str, names: Iterable[str]) -> str:
    """Return the source of a domain, which goes on with the family where that is of tasks."""
    return max((n for n in names if f"{domain}/".startswith(f"{n}/")), key=len)


def _show(
    pack: list[Sample], title: str, budget: int, tokenizer: Tokenizer, console: Console
) -> None:
    """Print a pack: a rule before each sample, what is learnt in colour."""
    size = sum(len(sample.tokens) for sample in pack)
    console.print(Rule(f"[bold]{title}: {len(pack)} samples, {size} of {budget} tokens"))
    for sample in pack:
        learnt = sum(1 for weight in sample.ce_weight if weight)
        head = f"{sample.domain}  {len(sample.tokens)} tokens, {learnt} learnt"
        console.print(Rule(head, style="dim", align="left"))
        console.print(styled(sample, tokenizer))


def styled(sample: Sample, tokenizer: Tokenizer) -> Styled:
    """Return a sample's text, in green what is learnt, dim what is only shown."""
    out, begin = Styled(), 0
    weights = [bool(weight) for weight in sample.ce_weight]
    for end in range(1, len(weights) + 1):
        if end == len(weights) or weights[end] != weights[begin]:
            piece = tokenizer.decode(sample.tokens[begin:end], skip_special_tokens=False)
            out.append(piece, style="bold green" if weights[begin] else "dim")
            begin = end
    return out


def _table(name: str, found: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"{name}: figures of {found['packs']} packs", title_justify="left")
    for column in ("source", "samples", "tokens", "share", "wanted", "learnt tokens"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source, row in found["sources"].items():
        shares = f"{row['share']:.1%}", f"{row['wanted']:.1%}"
        learnt = f"{row['learnt']:,}"
        table.add_row(source, f"{row['samples']:,}", f"{row['tokens']:,}", *shares, learnt)
    console.print(table)
    console.print(
        f"efficiency {found['efficiency']:.1%}, learnt {found['learnt_share']:.1%} of "
        f"{found['tokens']:,} tokens; samples of {found['median_length']:.0f} tokens in the median "
        f"and {found['longest']} at most",
        highlight=False,
    )
