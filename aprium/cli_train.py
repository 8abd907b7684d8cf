"""Commands of data and fine-tuning, which `cli` adds to its own; heavy packages inside them."""

import json
from pathlib import Path
from typing import Any

import click

from aprium.base.log import configure_logging


def setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE, where VALUE is TOML or else plain text."""
    import tomllib

    key, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text}: write KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def recipe_options(function: Any) -> Any:
    """Add the options of commands that run a recipe."""
    path = click.Path(path_type=Path)
    function = click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key."
    )(function)
    return click.option("--recipe", required=True, type=path, help="A TOML file.")(function)


@click.command()
@recipe_options
def sft(recipe: Path, settings: tuple[str, ...]) -> None:
    """Fine-tune a checkpoint on conversations or text, or go on with a run that was stopped.

    The result is written to OUTPUT/model, or with a [lora] table to OUTPUT/adapter, the held-out
    loss before and after to OUTPUT/heldout.json. recipes/sft-pico.toml and
    recipes/long-context-pico.toml are complete.
    """
    configure_logging()
    from aprium.train.sft import run

    directory = run(recipe, dict(setting(text) for text in settings))
    if directory is not None:
        click.echo(_what_next(directory))


def _what_next(directory: Path) -> str:
    """Say what to do with the result of a run."""
    if (directory / "adapter_config.json").exists():
        return f"{directory}: merge it with aprium lora-merge CHECKPOINT {directory} OUT"
    return f"{directory}: open it with aprium chat {directory}"


@click.command()
@recipe_options
def rl(recipe: Path, settings: tuple[str, ...]) -> None:
    """Let a checkpoint learn of what it earns in environments, or go on with a run.

    It plays episodes, groups of them are compared, and it is trained on its own tokens; with
    teachers (see aprium mopd) also on what they say of them. The result is written to OUTPUT/model,
    or with a [lora] table to OUTPUT/adapter, held-out accuracy before and after, beside that of the
    best constant answer, to OUTPUT/evaluation.json, and what became of every episode to
    OUTPUT/ledger.jsonl. recipes/rl-pico.toml is complete.
    """
    configure_logging()
    from aprium.rl.loop import run

    directory = run(recipe, dict(setting(text) for text in settings))
    if directory is not None:
        click.echo(_what_next(directory))


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--seeds", help="Run the graph once for each of these, as 0,1,2.")
@click.option("--until", metavar="NODE", help="Run this node and what it needs, and no more.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Nodes to run at a time, each in a process of its own.",
)
@click.option("--show", is_flag=True, help="Print the graph and what it costs; run nothing.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
def mopd(
    recipe: Path,
    seeds: str | None,
    until: str | None,
    jobs: int,
    show: bool,
    settings: tuple[str, ...],
) -> None:
    """Run rounds of distillation from many teachers, or go on with a run that was stopped.

    RECIPE is a TOML file of nodes: reinforcement learning and fine-tuning that make a student and
    its specialists, warm-ups, distillation of all specialists on the student's own rollouts, and
    again from there. Every node is a directory under OUTPUT, run once and evaluated on the same
    held-out tasks; OUTPUT/report.html shows the graph, OUTPUT/rounds.json has the figures.
    recipes/mopd-toy.toml is complete.
    """
    configure_logging("WARNING" if show else None)
    from rich.console import Console

    from aprium.base.config import load_toml
    from aprium.rl import costs, rounds
    from aprium.rl.lineage import RoundsConfig
    from aprium.rl.recovery import lines

    changes = dict(setting(text) for text in settings)
    if seeds is not None:
        changes["seeds"] = _numbers(seeds)
    config = load_toml(RoundsConfig, recipe, changes)
    console = Console()
    if show:
        console.print(_rows(costs.outline(config, until)))
        console.print("Tokens at most, the evaluation of each node included.", style="dim")
        return
    found = rounds.run_config(config, until=until, jobs=jobs)
    if found is None:
        click.echo("stopped: the same command continues")
        return
    for line in lines(found):
        click.echo(line)
    click.echo(f"{config.output / 'report.html'}: open it in a browser")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--seeds {text}: write whole numbers, as 0,1,2") from error


def _rows(rows: list[dict[str, str]]) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for name in rows[0]:
        amount = name in ("sampled", "scored", "trained")
        table.add_column(name, justify="right" if amount else "left", no_wrap=name != "from")
    for row in rows:
        table.add_row(*row.values())
    return table


@click.command(name="boost-mtp")
@recipe_options
def boost_mtp(recipe: Path, settings: tuple[str, ...]) -> None:
    """Train a checkpoint's prediction head on what it writes, so that more drafts are accepted.

    The model itself is not changed. The result is written to OUTPUT/model, the acceptance of
    drafts before and after, by position, to OUTPUT/acceptance.json.
    """
    configure_logging()
    from aprium.train.boost import run

    directory = run(recipe, dict(setting(text) for text in settings))
    if directory is not None:
        click.echo(f"{directory}: open it with aprium chat {directory}")


@click.command(name="merge-checkpoints")
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Where to.")
@click.option("--window", type=click.IntRange(2), help="Take the newest of them; default: all.")
@click.option(
    "--decay",
    type=click.Choice(["minus-sqrt", "uniform"]),
    default="minus-sqrt",
    show_default=True,
    help="The decay of the learning rate to emulate; uniform is a plain mean.",
)
@click.option("--like", help="The exported checkpoint whose layout and texts to take.")
def merge_checkpoints(
    directories: tuple[Path, ...], output: Path, window: int | None, decay: Any, like: str | None
) -> None:
    """Average checkpoints of one run, as if its learning rate had decayed at the end.

    DIRECTORIES are exported checkpoints or step-N of a run, oldest first, or a run, which stands
    for all of its. A run keeps trainer.keep_checkpoints of them.
    """
    configure_logging()
    from aprium.train.merge import merge

    for path, weight in merge(directories, output, window=window, decay=decay, like=like):
        click.echo(f"{weight:.4f}  {path}")
    click.echo(str(output))


@click.group()
def data() -> None:
    """Look at training data, and train tokenizers on it."""


@data.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--tokenizer", help="Checkpoint, or directory of tokenizer and chat template.")
@click.option(
    "--packs", type=click.IntRange(0), default=2, show_default=True, help="Packs to show."
)
@click.option(
    "--measure",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Packs to count figures over.",
)
@click.option(
    "--max-length", type=click.IntRange(2), help="Of a file: longest sample.  [default: 512]"
)
@click.option(
    "--tokens", type=click.IntRange(1), help="Tokens of a pack; default: the recipe's, or 4096."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures alone, as JSON.")
def inspect(source: Path, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Show packed samples as the trainer gets them, and count what a mixture is made of.

    SOURCE is a recipe (TOML with a data table) or a JSONL or Parquet file of text, messages, or
    tokens and weights. What is learnt is in colour, what is only shown is dim.
    """
    configure_logging("WARNING")
    from rich.console import Console

    from aprium.data import inspect as inspect_
    from aprium.envs import families

    plan = inspect_.read(
        source,
        overrides=dict(setting(text) for text in settings),
        tokenizer=options["tokenizer"],
        max_length=options["max_length"],
        tokens=options["tokens"],
    )
    figures = inspect_.inspect(
        plan,
        families,
        packs=0 if as_json else options["packs"],
        measure=options["measure"],
        console=Console(),
    )
    if as_json:
        click.echo(json.dumps(figures))


@data.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--vocab-size", required=True, type=int, help="Tokens in all, special ones too.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Directory.")
@click.option("--max-bytes", type=click.IntRange(1), help="Read no more text than this.")
def tokenizer(
    files: tuple[Path, ...], vocab_size: int, output: Path, max_bytes: int | None
) -> None:
    """Train a byte-level BPE tokenizer with the family's special tokens and chat template.

    FILES are text, JSONL or Parquet with text or messages, or glob patterns. One text in fifty is
    held out to measure bytes a token on.
    """
    configure_logging()
    from aprium.data.bpe import train

    figures = train(files, output, vocab_size=vocab_size, max_bytes=max_bytes)
    click.echo(json.dumps({"output": str(output)} | figures))
