"""Commands of environments, which `cli` adds to its own; heavy packages inside them."""

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from aprium.base.errors import TaskError
from aprium.base.log import configure_logging
from aprium.base.records import Message
from aprium.cli_train import setting

if TYPE_CHECKING:
    from aprium.envs.family import Family


def _environment_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what commands on one environment have."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--seed", default=0, show_default=True, help="Of the tasks that are drawn."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a parameter."
        ),
    ):
        function = option(function)
    return click.argument("name")(function)


def _make(name: str, settings: tuple[str, ...]) -> "Family":
    from aprium.envs.registry import make

    return make(name, dict(setting(text) for text in settings))


@click.group()
def env() -> None:
    """Look at environments: tasks that a program can grade."""


@env.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List environments, what they are, and their parameters."""
    from aprium.envs.registry import ENVIRONMENTS

    if as_json:
        rows = {
            name: {"description": entry.words, "parameters": dict(entry.parameters)}
            for name, entry in ENVIRONMENTS.items()
        }
        click.echo(json.dumps(rows))
        return
    width = max(map(len, ENVIRONMENTS))
    for name, entry in ENVIRONMENTS.items():
        click.echo(f"{name:<{width}}  {entry.words}")
        fields = {f.name: f.default for f in dataclasses.fields(entry.family)} | {
            **entry.parameters
        }
        del fields["domain"]
        if "words" in fields and isinstance(fields["words"], tuple):
            fields["words"] = f"{len(fields['words'])} words"
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())
        click.echo(f"{'':<{width}}  {click.style(said, dim=True)}")


@env.command()
@_environment_options
@click.option("--count", default=1, show_default=True, help="Tasks to show.")
@click.option("--held-out", is_flag=True, help="Of those to test on.")
def show(
    name: str, settings: tuple[str, ...], seed: int, as_json: bool, count: int, held_out: bool
) -> None:
    """Show tasks of environment NAME: what is asked, and the turns that solve it."""
    from aprium.envs.family import take

    family = _make(name, settings)
    for index in range(count):
        task = take(family, index, seed=seed, held_out=held_out)
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(task) | {"id": task.id}))
            continue
        click.secho(task.id, bold=True)
        if task.tools:
            tools = ", ".join(tool["function"]["name"] for tool in task.tools)
            click.secho(f"tools: {tools}", dim=True)
        for message in (*task.messages, *task.solution):
            _show(message)


def _show(message: Message) -> None:
    click.secho(f"[{message.role}]", fg="cyan" if message.role != "assistant" else "green")
    if message.reasoning:
        click.secho(message.reasoning, dim=True)
    if message.content:
        click.echo(message.content)
    for call in message.tool_calls:
        click.echo(f"{call.name}({call.arguments})")


@env.command()
@_environment_options
@click.option("--count", default=16, show_default=True, help="Tasks to grade answers of.")
@click.option("--baseline", is_flag=True, help="Also find the constant answer that earns most.")
def validate(
    name: str, settings: tuple[str, ...], seed: int, as_json: bool, count: int, baseline: bool
) -> None:
    """Grade known answers of environment NAME: solutions must get 1, wrong answers 0.

    With --baseline also says what one constant answer earns: a score is worth something only above
    it. Ends with an error when anything was graded wrongly.
    """
    configure_logging("WARNING")
    from aprium.envs import family as families

    family = _make(name, settings)
    if count < 1:
        raise click.UsageError(f"--count {count}: grade one task at least")
    found = families.validate(family, count=count, seed=seed)
    report = dataclasses.asdict(found)
    if baseline:
        answer, score = families.constant_baseline(family, count=count, seed=seed)
        report["baseline"] = {"answer": answer, "reward": score}
    if as_json:
        click.echo(json.dumps(report))
    else:
        solved = found.tasks - found.unsolved
        click.echo(f"{solved - len(found.gold_failed)} of {solved} solutions get 1")
        refused = found.wrong_tried - len(found.wrong_passed)
        click.echo(f"{refused} of {found.wrong_tried} wrong answers get 0")
        if found.unsolved:
            click.echo(f"{found.unsolved} tasks have no solution to try")
        if baseline:
            click.echo(f"the constant {answer!r} earns {score:.3f} on average")
    if not found.ok:
        first = (*found.gold_failed, *found.wrong_passed)[0]
        raise TaskError(f"{name} grades wrongly, the first time {first}")
