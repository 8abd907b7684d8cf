"""The command line: parse, call one function, turn errors into one line.

Heavy packages are imported inside the commands, so that `--help` and `info` answer at once.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

import aprium
from aprium.base.errors import ApriumError, UnsupportedError
from aprium.base.log import configure_logging
from aprium.cli_env import env
from aprium.cli_train import (
    boost_mtp,
    data,
    merge_checkpoints,
    mopd,
    recipe_options,
    rl,
    setting,
    sft,
)

_ENGINE_OPTIONS = (
    *("dtype", "activation_dtype", "kv_cache_dtype", "mamba_ssm_cache_dtype"),
    *("speculative", "load", "max_model_len", "load_format"),
)
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _with_dashes(name: str) -> str:
    """Take `--max_tokens` for `--max-tokens`, as other engines do."""
    return name.replace("_", "-")


def _sampling_options(function: Any) -> Any:
    """Add the options of SamplingParams that every generating command has."""
    options = (
        click.option("--max-tokens", type=int, help="Most tokens to generate."),
        click.option("--temperature", type=float, help="0 is greedy; default: the model's own."),
        click.option("--top-p", type=float, help="Keep the likeliest tokens of this total share."),
        click.option("--top-k", type=int, help="Keep this many likeliest tokens."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
        click.option("--seed", type=int, help="Make the answer reproducible."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _engine_options(function: Any) -> Any:
    """Add the options of EngineConfig that commands which run a model once have."""
    options = (
        click.option("--dtype", default="auto", help="auto, float32 or bfloat16 activations."),
        click.option(
            "--activation-dtype",
            help="What kernels round matrix inputs to: auto, float32, bfloat16 or int8.",
        ),
        click.option("--kv-cache-dtype", help="Of keys and values: auto, float32, bfloat16, fp8."),
        click.option(
            "--mamba-ssm-cache-dtype", help="Of recurrent states: auto, float32, float16, fp8."
        ),
        click.option(
            "--speculative-config",
            "speculative",
            metavar="JSON",
            help='Draft tokens: {"method": "mtp", "num_speculative_tokens": 5}, or "ngram".',
        ),
        click.option("--load", help="auto, memory, or mmap to leave weights in the file."),
        click.option("--max-model-len", type=int, help="Longest sequence; default: the model's."),
        click.option("--load-format", default="auto", help="auto, or dummy for random weights."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group(context_settings={**_CONTEXT, "token_normalize_func": _with_dashes})
@click.version_option(aprium.__version__, prog_name="aprium")
def cli() -> None:
    """Run, serve and train hybrid Mamba-Transformer mixture-of-experts language models."""


@cli.command()
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("--system", help="A system message.")
@click.option("--no-thinking", is_flag=True, help="Answer without reasoning first.")
@click.option("--url", help="Talk to the OpenAI-compatible server here, as http://HOST:PORT.")
@click.option("--api-key", envvar="APRIUM_API_KEY", help="Its key (env: APRIUM_API_KEY).")
@_sampling_options
@_engine_options
def chat(
    words: tuple[str, ...],
    system: str | None,
    no_thinking: bool,
    url: str | None,
    api_key: str | None,
    **options: Any,
) -> None:
    """Talk to a model (pico when none is named), here or with --url on a server.

    With PROMPT answers once; without it holds a conversation. MODEL is a checkpoint directory, a
    hub id, or pico; with --url a name that the server has, the first when none is given. A single
    argument that is none of these is the prompt.
    """
    sampling, engine = _split(options)
    configure_logging("WARNING")
    if url is not None:
        model, prompt = _remote_model_and_prompt(words)
        from aprium.serve.remote import RemoteSpeaker

        with RemoteSpeaker(url, model=model, key=api_key, options=sampling) as speaker:
            _talk(speaker, prompt, not no_thinking, system)
        return
    model, prompt = _model_and_prompt(words)
    from aprium.engine.client import LLM
    from aprium.serve.terminal import LocalSpeaker

    with LLM(model, **engine) as llm:
        params = _params(llm, sampling, max_tokens=sampling.get("max_tokens"))
        _talk(LocalSpeaker(llm, params), prompt, not no_thinking, system)


def _talk(speaker: Any, prompt: str | None, thinking: bool, system: str | None) -> None:
    from aprium.serve.terminal import Chat, interact

    talk = Chat(speaker, thinking=thinking, system=system)
    if prompt is None:
        interact(talk)
    else:
        talk.ask(prompt)


def _remote_model_and_prompt(words: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Tell a server's model from the prompt: one word that has a space in it is a prompt."""
    if len(words) > 2:
        raise click.UsageError("give at most a model and a prompt; put a prompt in quotes")
    if len(words) == 2:
        return words[0], words[1]
    word = words[0] if words else None
    return (None, word) if word is None or " " in word or word.endswith("?") else (word, None)


@cli.command()
@click.argument("model", default="pico")
@click.option("--prompt", required=True, multiple=True, help="Text to continue; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")
@click.option("--n", type=int, default=1, help="Continuations of each prompt.")
@click.option("--logprobs", type=int, help="Give this many alternatives at each token.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end token.")
@_sampling_options
@_engine_options
def generate(model: str, prompt: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Continue text as it is, without a chat template."""
    configure_logging("WARNING")
    from aprium.engine.client import LLM

    sampling, engine = _split(options)
    with LLM(model, **engine) as llm:
        params = _params(llm, sampling)
        completions = llm.generate(list(prompt), params)
    if not as_json:
        for completion in completions:
            click.echo(completion.text)
        return
    groups = [completions[i * params.n : (i + 1) * params.n] for i in range(len(prompt))]
    results = [
        {"prompt": text, "completions": [dataclasses.asdict(c) for c in group]}
        for text, group in zip(prompt, groups, strict=True)
    ]
    found = results[0] if len(results) == 1 else {"results": results}
    click.echo(json.dumps({"model": model, **found}, ensure_ascii=False))


class _ServeCommand(click.Command):
    """A command whose options are those of the flag table."""

    def __init__(self, **attributes: Any) -> None:
        from aprium.serve.flags import FLAGS

        super().__init__(**attributes)
        kinds: dict[str, dict[str, Any]] = {
            "int": {"type": int},
            "float": {"type": float},
            "switch": {"type": bool, "default": None},
            "words": {"multiple": True},
        }
        for flag in FLAGS:
            spelling = f"--{flag.name}" + (f"/--no-{flag.name}" if flag.kind == "switch" else "")
            note = "" if flag.default is None else f" [default: {flag.default}]"
            self.params.append(
                click.Option(
                    [spelling, flag.name.replace("-", "_")],
                    help=flag.help + note,
                    hidden=not flag.takes,
                    **kinds.get(flag.kind, {}),
                )
            )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Bring the command line to one spelling first; a refused flag ends it there."""
        from aprium.serve.flags import prepare

        return super().parse_args(ctx, prepare(args))


@cli.command(cls=_ServeCommand)
@click.argument("name", metavar="[MODEL]", required=False)
def serve(name: str | None, **values: Any) -> None:
    """Serve a model behind an OpenAI-compatible API.

    The flags are those of `vllm serve`. Those that ask for nothing this engine does otherwise are
    accepted without effect; the others are refused by name.
    """
    from aprium.serve.flags import read

    flags, ignored = read({key.replace("_", "-"): value for key, value in values.items()})
    if name and flags["model"] and name != flags["model"]:
        raise click.UsageError(f"the model is given twice: {name} and {flags['model']}")
    configure_logging()
    if ignored:
        names = ", ".join(f"--{flag}" for flag in ignored)
        click.echo(f"aprium: note: without effect here: {names}", err=True)
    from aprium.serve.launch import launch

    launch(name or flags["model"] or "pico", flags)


@cli.command(cls=_ServeCommand, name="run-batch")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def run_batch(source: Path, target: Path, **values: Any) -> None:
    """Answer a file of requests, in the form of OpenAI's batches, into another.

    A run that was stopped goes on with the same command. The model is --model (pico when none is
    named); the other flags are those of serve. Ends with status 1 when an answer is an error.
    """
    from aprium.serve.flags import read

    flags, _ = read({key.replace("_", "-"): value for key, value in values.items()})
    configure_logging()
    from aprium.serve.batch import run

    report = run(flags["model"] or "pico", flags, source, target)
    click.echo(
        f"{target}: {report.answered} answered, {report.failed} refused, "
        f"{report.done_before} answered before"
    )
    if report.failed:
        sys.exit(1)


@cli.command()
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(target: str, as_json: bool) -> None:
    """Say what a model costs: parameters, bytes, cache and state.

    TARGET is a preset (nano, super, ultra, lightning, pico, toy), a published quantised file
    (ultra-nvfp4, nano-fp8, ...), or a checkpoint directory.
    """
    from aprium.checkpoint.info import render_info

    click.echo(render_info(target, as_json=as_json))


@cli.command()
@click.argument("model", required=False)
@click.option("--gpu", multiple=True, help="Device, as in h100-sxm; with --search several.")
@click.option("--num", default=1, show_default=True, help="Devices.")
@click.option("--search", "searching", is_flag=True, help="Find the best deployments.")
@click.option("--max-num", default=16, show_default=True, help="Most devices to search.")
@click.option("--max-tpot", type=float, help="Search: most seconds between a user's tokens.")
@click.option("--max-ttft", type=float, help="Search, saturate: most seconds to the first token.")
@click.option("--precision", help="bf16, fp8, nvfp4 or a GGUF type; default: the widest that fits.")
@click.option("--context", type=int, help="Longest sequence; default: input and output.")
@click.option("--concurrency", type=int, help="Users at once.  [default: 16]")
@click.option("--input", "prompt", default=8192, show_default=True, help="Tokens of a prompt.")
@click.option("--output", default=1024, show_default=True, help="Tokens of an answer.")
@click.option("--reuse", default=0.0, help="Share of a prompt known from earlier requests.")
@click.option("--tp", type=int, help="Tensor parallelism; default: the best.")
@click.option("--pp", type=int, help="Pipeline parallelism.")
@click.option("--dp", type=int, help="Attention data parallelism; experts go over all ranks.")
@click.option("--ep/--no-ep", default=None, help="Whole experts on ranks, or slices of each.")
@click.option("--kv-dtype", help="Of keys and values: auto, fp8, bfloat16.")
@click.option("--state-dtype", help="Of recurrent states: float32, float16, fp8.")
@click.option("--drafts", type=int, help="Tokens drafted a step.")
@click.option("--acceptance", type=float, help="Chance that a draft is accepted.")
@click.option("--attention", help="dense: read the whole cache where a model would select.")
@click.option("--utilization", type=float, help="Share of the memory an engine may take.")
@click.option("--offload-gb", type=float, help="Experts in host memory, GB a device.")
@click.option("--price", type=float, help="Dollars a device and hour.")
@click.option("--reserve-gb", type=float, help="For graphs and framework; default: counted.")
@click.option(
    "--snapshots/--no-snapshots",
    default=None,
    help="Whether the engine keeps a state a draft; default: on GPUs.",
)
@click.option("--state-checkpoints", type=int, help="States kept for prefix reuse.")
@click.option("--licence", is_flag=True, help="Add NVIDIA AI Enterprise, which NIM needs.")
@click.option("--compare", is_flag=True, help="Beside other models, and what moves the order.")
@click.option("--train", help="Plan training: pretrain, sft, lora, rl or mopd.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of training.")
@click.option(
    "--simulate",
    "trace",
    metavar="TRACE",
    help="open:rate=2,requests=1000, closed:users=32, agents:users=8,turns=6, saturate, or a file.",
)
@click.option("--here", is_flag=True, help="Measure this machine and plan for it.")
@click.option("--data", type=click.Path(path_type=Path), help="TOML put over the tables.")
@click.option("--list-gpus", is_flag=True, help="List the devices and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with charts.")
def plan(model: str | None, **options: Any) -> None:
    """Say what fits where, how fast, for how much, before anything is bought or loaded.

    MODEL is a preset (nano, super, ultra, lightning), a published file (ultra-nvfp4), a checkpoint
    directory or GGUF file (exact bytes then), or glm-5, kimi-k2, qwen-3.5, deepseek-v4. Rates are
    predictions with a range: docs/planning.md says how they are made and where they fail.
    """
    from aprium.plan.command import run

    options["settings"] = dict(setting(text) for text in options["settings"])
    click.echo(run(model, options))


@cli.command()
@click.argument("model", default="pico")
@click.option("--prompt", default=512, help="Tokens of each prompt.")
@click.option("--generate", default=128, help="Tokens generated after each.")
@click.option("--batch", default="1,4,8", help="Sequences at once, with commas.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_engine_options
def bench(
    model: str, prompt: int, generate: int, batch: str, as_json: bool, **options: Any
) -> None:
    """Measure prefill and decode here, and what share of the machine's limits they reach.

    MODEL is a checkpoint directory or pico, or with --load-format dummy a preset. The planner's
    prediction for this machine, measured right after, is put beside.
    """
    sizes = _batches(batch)
    configure_logging("WARNING")
    from aprium.base.config import from_dict
    from aprium.engine import bench as benchmark
    from aprium.engine.config import EngineConfig
    from aprium.engine.engine import Engine
    from aprium.ops import _native
    from aprium.plan import here

    settings: dict[str, Any] = {"max_model_len": prompt + generate} | _split(options)[1]
    settings |= {"model": model, "max_num_seqs": max(sizes), "enable_prefix_caching": False}
    engine = Engine(from_dict(EngineConfig, settings))
    results = [
        benchmark.bench(engine, prompt=prompt, generate=generate, batch=size) for size in sizes
    ]
    device, rates = here.measure(), benchmark.as_json(results)
    predicted = here.predict(
        here.shape_of(model), device, prompt=prompt, generate=generate, batches=sizes
    )
    compared = here.comparison(device, predicted, rates)
    if as_json:
        facts = {"model": model, "isa": _native.isa(), "load": engine.checkpoint.load}
        click.echo(json.dumps(facts | {"results": rates, "prediction": compared}))
    else:
        click.echo(f"{benchmark.render(results)}\n{here.comparison_text(compared)}")


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
def transpose(directory: Path) -> None:
    """Lay a checkpoint's NVFP4 down projections out by columns, in a file beside it.

    Inputs of zero, which squared ReLU makes many of, then cost nothing in decoding; results keep
    their bits. Takes about half the size of the checkpoint on disk and nothing more in memory.
    """
    configure_logging()
    from aprium.checkpoint.load import read_plan
    from aprium.checkpoint.transposed import FILE, write_transposed

    count = write_transposed(directory, read_plan(directory).tensors)
    click.echo(f"{directory / FILE}: {count} matrices")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine can do: kernels, memory, bandwidth, and each model's bounds here.

    Ends with status 1 when kernels do not agree with PyTorch.
    """
    configure_logging("WARNING")
    from aprium.engine import doctor as doctor_

    facts = doctor_.diagnose()
    click.echo(json.dumps(facts, indent=2) if as_json else doctor_.render(facts))
    if not doctor_.agrees(facts):
        sys.exit(1)


def _batches(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise click.UsageError(f"--batch {text}: give positive numbers with commas, as in 1,4,8")
    return sizes


for command in (sft, rl, boost_mtp, merge_checkpoints, data, env, mopd):
    cli.add_command(command)


@cli.command()
@recipe_options
def pretrain(recipe: Path, settings: tuple[str, ...]) -> None:
    """Train a model from scratch, or go on with a run that was stopped."""
    configure_logging()
    from aprium.train.pretrain import run

    run(recipe, dict(setting(text) for text in settings))


@cli.command()
@click.argument("source", required=False)
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--recipe", default="nvfp4", show_default=True, help="A name, or a TOML file.")
@click.option("--list", "as_list", is_flag=True, help="List the recipes and stop.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--rule", help="Block scales: max, four_over_six or sweep; default: the recipe's.")
@click.option("--method", help="rtn or gptq; default: the recipe's.")
@click.option("--budget", type=float, help="Search formats for this many bits a weight.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="JSONL or text to calibrate on."
)
@click.option("--heldout", type=click.Path(path_type=Path), help="JSONL or text to measure on.")
@click.option("--samples", default=64, show_default=True, help="Most sequences to take.")
@click.option("--length", default=256, show_default=True, help="Most tokens of a sequence.")
@click.option("--no-evaluate", is_flag=True, help="Do not measure the loss.")
@click.option("--qad", is_flag=True, help="Distil from the unquantised model afterwards.")
@click.option("--qad-steps", default=200, show_default=True, help="Steps of distillation.")
@click.option("--qad-lr", default=1e-5, show_default=True, help="Its peak learning rate.")
@click.option(
    "--qad-scales",
    type=click.Choice(["frozen", "dynamic"]),
    default="frozen",
    show_default=True,
    help="Keep block scales, or choose them anew at each step.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def quantize(source: str | None, target: Path | None, **options: Any) -> None:
    """Quantise a BF16 checkpoint to NVFP4 and FP8, and measure what it costs.

    SOURCE is a directory, a hub id or pico; TARGET a directory that vLLM, SGLang, TensorRT-LLM and
    Aprium load, with report.json and report.html. Layers go through memory one at a time; a run
    that was stopped goes on with the same command. Without --calibration the model writes its own
    samples. Needs the size of the result twice on disk while it is assembled.
    """
    from aprium.quantize import recipes

    if options["as_list"]:
        for name in recipes.names():
            click.echo(f"{name:16} {recipes.read(name).description}")
        return
    if source is None or target is None:
        raise click.UsageError("name the model and the directory to write")
    configure_logging()
    overrides = dict(setting(text) for text in options["settings"])
    overrides |= {key: options[key] for key in ("rule", "method") if options[key] is not None}
    recipe = recipes.read(options["recipe"], overrides)
    from aprium.quantize import run
    from aprium.quantize.qad import QadConfig
    from aprium.quantize.report import summary

    distil = None
    if options["qad"]:
        scales = options["qad_scales"]
        distil = QadConfig(steps=options["qad_steps"], lr=options["qad_lr"], scales=scales)
    result = run.run(
        source,
        target,
        recipe,
        run.Options(
            calibration=options["calibration"],
            heldout=options["heldout"],
            num_samples=options["samples"],
            length=options["length"],
            evaluate=not options["no_evaluate"],
            budget=options["budget"],
            distil=distil,
        ),
        say=lambda text: click.echo(text, err=options["as_json"]),
    )
    if options["as_json"]:
        click.echo((target / "report.json").read_text(encoding="utf-8").strip())
        return
    for name, value in summary(result).items():
        click.echo(f"{name:44} {value}")
    click.echo(f"{'report':44} {target / 'report.html'}")


@cli.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", required=True, help="modelopt, compressed-tensors or bf16.")
def convert(source: str, target: Path, to: Any) -> None:
    """Rewrite a quantised checkpoint in another layout, or as BF16.

    Between the layouts of ModelOpt and compressed-tensors codes and block scales stay byte for
    byte; bf16 decodes every matrix.
    """
    configure_logging()
    from aprium.checkpoint.hub import resolve
    from aprium.quantize.convert import convert as convert_

    size = convert_(resolve(source), target, to)
    click.echo(f"{target}: {size / 1e6:,.1f} MB")


@cli.command(name="lora-merge")
@click.argument("base")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--requantize", is_flag=True, help="Keep the formats of a quantised base.")
@click.option("--rule", default="max", help="Block scales: max, four_over_six or sweep.")
def lora_merge(base: str, adapter: Path, target: Path, requantize: bool, rule: Any) -> None:
    """Add a LoRA adapter to its base model, as a checkpoint that every command opens.

    BASE is a directory, a hub id or pico; ADAPTER a directory as PEFT writes it. A quantised base
    becomes BF16. With --requantize its formats stay: the matrices that the adapter changes are
    encoded anew, and everything else is copied byte for byte.
    """
    configure_logging()
    from aprium.checkpoint.hub import resolve
    from aprium.quantize.merge import merge

    size = merge(resolve(base), adapter, target, requantize=requantize, rule=rule)
    click.echo(f"{target}: {size / 1e6:,.1f} MB")


def _model_and_prompt(words: tuple[str, ...]) -> tuple[str, str | None]:
    """Tell model from prompt: two words are both, one is whichever it can be."""
    from aprium.checkpoint.hub import HUB_ID
    from aprium.model.presets import PRESETS

    if len(words) > 2:
        raise click.UsageError("give at most a model and a prompt; put a prompt in quotes")
    if len(words) == 2:
        return words[0], words[1]
    if not words:
        return "pico", None
    (word,) = words
    names_model = word in PRESETS or Path(word).is_dir() or HUB_ID.match(word)
    return (word, None) if names_model else ("pico", word)


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the options given into those of sampling and those of the engine."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    engine = {name: given.pop(name) for name in _ENGINE_OPTIONS if name in given}
    if "speculative" in engine:
        try:
            engine["speculative"] = json.loads(engine["speculative"])
        except ValueError as error:
            text = engine["speculative"]
            raise click.UsageError(f"--speculative-config {text}: not JSON: {error}") from error
    return given, engine


def _params(llm: Any, sampling: dict[str, Any], **more: Any) -> Any:
    """Return the model's own sampling with the options given put over it."""
    from aprium.engine.client import default_params

    return dataclasses.replace(default_params(llm.generation_config), **(sampling | more))


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return the exit status."""
    try:
        cli.main(args=arguments, prog_name="aprium", standalone_mode=False)
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except UnsupportedError as error:
        click.echo(f"aprium: error: {error}", err=True)
        return 2
    except ApriumError as error:
        click.echo(f"aprium: error: {error}", err=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
