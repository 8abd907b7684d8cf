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
    """Look at environments, tasks that a program can grade, and serve them."""


@env.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """List environments, what they are, and their parameters."""
    from aprium.envs.registry import ENVIRONMENTS

    if as_json:
        rows = {
            name: {
                "description": entry.words,
                "parameters": dict(entry.parameters),
                "needs": entry.needs,
            }
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
        for key in ("domain", *entry.needs):
            del fields[key]
        if "words" in fields and isinstance(fields["words"], tuple):
            fields["words"] = f"{len(fields['words'])} words"
        said = ", ".join(
            [f"{key} must be given" for key in entry.needs]
            + [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
        )
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


@env.command()
@click.argument("name")
@click.option("-n", "--count", default=100, show_default=True, help="Tasks to write.")
@click.option("--held-out", is_flag=True, help="Of those to test on.")
@click.option("--seed", default=0, show_default=True, help="Of the tasks that are drawn.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a parameter.")
def rows(name: str, count: int, held_out: bool, seed: int, settings: tuple[str, ...]) -> None:
    """Write tasks of environment NAME as rows of NeMo-Gym's data files, one JSON object a line.

    No two are alike. What grades them is `aprium env serve NAME`.
    """
    from aprium.envs.family import distinct
    from aprium.envs.gym import write_row

    if count < 1:
        raise click.UsageError(f"--count {count}: write one task at least")
    for task in distinct(_make(name, settings), count, seed=seed, held_out=held_out):
        click.echo(json.dumps(write_row(task)))


@env.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a parameter.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", default=8100, show_default=True, help="0 for any that is free.")
@click.option("--model-url", help="Who plays in /run: a server with /v1/responses.")
@click.option("--model", help="The model's name there.")
@click.option("--api-key", envvar="APRIUM_API_KEY", help="Its key (env: APRIUM_API_KEY).")
@click.option(
    "--return-token-ids/--no-return-token-ids",
    default=True,
    help="Ask it for token ids. Not NeMo-Gym's own servers, which are configured for that.",
)
@click.option("--max-turns", default=32, show_default=True, help="Of the model, in an episode.")
@click.option(
    "--max-tokens", default=32_768, show_default=True, help="That a call reads and writes."
)
@click.option("--deadline", default=600.0, show_default=True, help="Seconds of an episode.")
@click.option("--max-rollouts", default=64, show_default=True, help="Played at a time in /run.")
def serve(
    names: tuple[str, ...],
    settings: tuple[str, ...],
    host: str,
    port: int,
    max_rollouts: int,
    **options: Any,
) -> None:
    """Serve environments by NeMo-Gym's protocol, as resources server and agent server in one.

    /seed_session, a route for each tool and /verify for agents elsewhere; /run for whole rollouts
    with the model at --model-url. There are no keys: whoever reaches the address may use it.
    """
    if settings and len(names) > 1:
        raise click.UsageError("--set is for one environment: serve them one by one")
    configure_logging()
    from aprium.base.listen import listen
    from aprium.envs.env import Limits
    from aprium.envs.gym_agent import ModelServer
    from aprium.envs.gym_server import create_app, serve

    limits = Limits(
        max_turns=options["max_turns"],
        max_tokens=options["max_tokens"],
        deadline_s=options["deadline"],
    )
    model = None
    if options["model_url"] is not None:
        model = ModelServer(
            url=options["model_url"],
            model=options["model"],
            key=options["api_key"],
            return_token_ids=options["return_token_ids"],
        )
    families = [_make(name, settings) for name in names]
    app = create_app(families, model, limits, max_rollouts=max_rollouts)
    serve(app, listen(host, port))
