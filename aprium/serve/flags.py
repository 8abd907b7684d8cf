"""The flags of `aprium serve`, spelled as `vllm serve` spells them, as data.

People bring command lines from other engines and other versions. A flag is taken, or accepted
because it asks for nothing this engine does otherwise, or refused in one sentence that says what
to do instead; a flag is never silently without effect on the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aprium.base.errors import UnsupportedError

Kind = Literal["text", "int", "float", "count", "switch", "json", "words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag.

    `kind`: "count" is an integer with an optional k, K, m or M (1000 or 1024 each); "switch" has a
    --no- form; "words" may be given several times. `accepts` lists the only values that can be
    had, `remedy` says what to do about another. `takes` False marks a flag without effect here.
    """

    name: str
    kind: Kind = "text"
    help: str = ""
    default: Any = None
    accepts: tuple[str, ...] | None = None
    remedy: str = ""
    takes: bool = True


_REASONING = ("nemotron_v3", "nano_v3", "super_v3", "ultra_v3", "nemotron_3")
_QUANTIZATIONS = (
    "modelopt", "modelopt_fp4", "modelopt_mixed", "nvfp4", "fp4", "fp8", "compressed_tensors"
)  # fmt: skip
_ONE_PROCESS = "this engine runs in one process on one machine, leave the flag out or give 1"
_STATE = "convolution tails are kept in float32, use --mamba-ssm-cache-dtype for the states"

FLAGS: tuple[Flag, ...] = (
    Flag(name="model", help="The model, instead of the argument."),
    Flag(name="served-model-name", kind="words", help="Names the model answers to."),
    Flag(name="host", default="127.0.0.1", help="Address to listen on."),
    Flag(name="port", kind="int", default=8000, help="Port to listen on; 0 takes a free one."),
    Flag(name="api-key", kind="words", help="Keys that let a client in (env: APRIUM_API_KEY)."),
    Flag(name="api-key-file", help="File of such keys, one a line."),
    Flag(
        name="control-key",
        kind="words",
        help="Keys for routes that change the engine (env: APRIUM_CONTROL_KEY); none: closed.",
    ),
    Flag(name="control-key-file", help="File of such keys, one a line."),
    Flag(
        name="allowed-hosts",
        kind="words",
        help="Host names requests may use; default without keys on loopback: its names.",
    ),
    Flag(
        name="allowed-origins",
        kind="words",
        help="Origins of web pages elsewhere whose scripts may use the server; default: none.",
    ),
    Flag(
        name="max-num-queued-reqs",
        kind="int",
        help="Sequences that may wait for a place; more get 503. Default: no limit.",
    ),
    Flag(
        name="max-num-queued-tokens",
        kind="count",
        help="Tokens of prompts that may wait; more get 503. Default: no limit.",
    ),
    Flag(
        name="max-requests-per-key",
        kind="int",
        help="Requests that a key may have under way; more get 429. Default: no limit.",
    ),
    Flag(
        name="stable-prompts",
        kind="switch",
        default=True,
        help="Take lines out of system prompts that change with every request; sort tools' keys.",
    ),
    Flag(
        name="max-stored-responses",
        kind="int",
        default=256,
        help="Responses of /v1/responses that are kept; the oldest goes first.",
    ),
    Flag(
        name="sse-keep-alive",
        kind="float",
        default=10.0,
        help="Seconds without an event after which a stream gets a comment; 0: never.",
    ),
    Flag(
        name="otlp-endpoint",
        help="Send traces to this OpenTelemetry collector (OTLP over HTTP), such as "
        "http://localhost:4318; needs the extra otel.",
    ),
    Flag(name="ssl-keyfile", help="Private key for HTTPS."),
    Flag(name="ssl-certfile", help="Certificate for HTTPS."),
    Flag(
        name="dtype",
        default="auto",
        accepts=("auto", "float32", "float", "bfloat16"),
        remedy="use auto, float32 or bfloat16",
        help="Dtype of activations: auto (float32), float32 or bfloat16.",
    ),
    Flag(
        name="activation-dtype",
        accepts=("auto", "float32", "bfloat16", "int8"),
        remedy="use auto, float32, bfloat16 or int8",
        help="What kernels round the inputs of matrix products to; auto follows the weights.",
    ),
    Flag(
        name="load",
        accepts=("auto", "memory", "mmap"),
        remedy="use auto, memory or mmap",
        help="Read weights into memory, or mmap them; auto reads what fits.",
    ),
    Flag(name="max-model-len", kind="count", help="Longest sequence (32768, 32K); default: fits."),
    Flag(name="max-num-seqs", kind="int", help="Most sequences computed together."),
    Flag(name="max-num-batched-tokens", kind="count", help="Most tokens of one step."),
    Flag(name="block-size", kind="int", help="Tokens of one page of keys and values."),
    Flag(name="kv-cache-memory-bytes", kind="count", help="Memory for keys and values."),
    Flag(name="enable-chunked-prefill", kind="switch", help="Compute prompts in pieces."),
    Flag(name="seed", kind="int", help="Seed of requests that bring none."),
    Flag(
        name="load-format",
        default="auto",
        accepts=("auto", "safetensors", "dummy"),
        remedy="checkpoints are read from safetensors, or use dummy for random weights",
        help="auto, safetensors, or dummy for random weights.",
    ),
    Flag(name="download-dir", help="Where checkpoints from the hub are kept."),
    Flag(name="chat-template", help="A Jinja file to use instead of the checkpoint's template."),
    Flag(
        name="default-chat-template-kwargs",
        kind="json",
        help="Switches of the template where a request sets none, as JSON.",
    ),
    Flag(
        name="reasoning-budget",
        kind="int",
        help="Tokens that reasoning may have where a request says nothing; -1: no limit.",
    ),
    Flag(
        name="reasoning-budget-message",
        default="",
        help="Text that is written before reasoning is ended by its budget.",
    ),
    Flag(
        name="generation-config",
        default="auto",
        help="Sampling where a request says nothing: auto (the checkpoint's), vllm, or a folder.",
    ),
    Flag(name="override-generation-config", kind="json", help="Sampling put over that, as JSON."),
    Flag(
        name="quantization",
        accepts=_QUANTIZATIONS,
        remedy="weights run in the format the checkpoint has, leave the flag out",
        help="What the checkpoint must be quantised with; it is found out anyway.",
    ),
    Flag(name="enable-web", kind="switch", default=True, help="Serve the web page at /."),
    Flag(name="uvicorn-log-level", default="info", help="Log level of the HTTP server."),
    Flag(
        name="enable-log-requests",
        kind="switch",
        default=True,
        help="Log one line of JSON a request, with counts and times but nothing of what was said.",
    ),
    Flag(name="disable-log-requests", kind="switch", help="The same as --no-enable-log-requests."),
    Flag(
        name="shutdown-timeout",
        kind="int",
        default=25,
        help="Seconds that requests under way get at the end.",
    ),
    # What follows is accepted because it asks for what happens anyway, or for a choice that other
    # hardware has.
    Flag(
        name="reasoning-parser",
        accepts=_REASONING,
        remedy="the family's reasoning tags are always parsed, leave the flag out",
        takes=False,
    ),
    Flag(
        name="tool-call-parser",
        accepts=("qwen3_coder", "qwen3_xml"),
        remedy="the family's tool calls are always parsed, leave the flag out",
        takes=False,
    ),
    Flag(name="reasoning-parser-plugin", takes=False),
    Flag(name="reasoning-config", takes=False),
    Flag(name="structured-outputs-config", takes=False),
    Flag(name="guided-decoding-backend", takes=False),
    Flag(name="enable-auto-tool-choice", kind="switch", takes=False),
    Flag(name="trust-remote-code", kind="switch", takes=False),
    Flag(name="tensor-parallel-size", accepts=("1",), remedy=_ONE_PROCESS, takes=False),
    Flag(name="pipeline-parallel-size", accepts=("1",), remedy=_ONE_PROCESS, takes=False),
    Flag(name="data-parallel-size", accepts=("1",), remedy=_ONE_PROCESS, takes=False),
    Flag(
        name="enable-prefix-caching",
        kind="switch",
        default=True,
        help="Go on from states kept of earlier prompts that begin alike.",
    ),
    Flag(
        name="snapshot-memory-bytes",
        kind="count",
        help="Memory for states kept of prompts, also as 2G; default: up to 32 states.",
    ),
    Flag(
        name="snapshot-interval",
        kind="count",
        default=4096,
        help="Tokens of a long prompt between states kept for its length alone.",
    ),
    Flag(
        name="prefix-cache-ram-bytes",
        kind="count",
        help="Memory for copies of states, also as 2G; 0: none; default: up to 2 GiB.",
    ),
    Flag(
        name="prefix-cache-dir",
        help="Directory for copies of states, which outlive the server.",
    ),
    Flag(
        name="prefix-cache-disk-bytes",
        kind="count",
        help="Most that directory may hold, also as 50G; default: no limit.",
    ),
    Flag(name="session-dir", help="Directory for sessions, which outlive the server."),
    Flag(
        name="max-sessions",
        kind="int",
        default=1024,
        help="Sessions that are kept; the least recently used that is not answering goes first.",
    ),
    Flag(
        name="memory-utilization",
        kind="float",
        help="Share of the machine's memory that may be in use; default: half of what is free.",
    ),
    Flag(name="gpu-memory-utilization", kind="float", help="The same, by its name elsewhere."),
    Flag(
        name="speculative-config",
        kind="json",
        help='Draft tokens: {"method": "mtp", "num_speculative_tokens": 5}, or "ngram".',
    ),
    Flag(
        name="kv-cache-dtype",
        default="auto",
        accepts=("auto", "float32", "bfloat16", "fp8", "fp8_e4m3"),
        remedy="use auto (that of activations), float32, bfloat16 or fp8",
        help="Dtype of keys and values: auto (that of activations), float32, bfloat16 or fp8.",
    ),
    Flag(
        name="mamba-ssm-cache-dtype",
        default="auto",
        accepts=("auto", "float32", "float16", "fp8"),
        remedy="use auto (float32), float32, float16 or fp8",
        help="Dtype of recurrent states between steps: auto (float32), float32, float16 or fp8.",
    ),
    Flag(
        name="enable-mamba-cache-stochastic-rounding",
        kind="switch",
        default=True,
        help="Round narrower recurrent states to either neighbour by chance, not to the nearest.",
    ),
    Flag(name="mamba-cache-dtype", accepts=("auto", "float32"), remedy=_STATE, takes=False),
    Flag(
        name="mamba-cache-mode",
        accepts=("none",),
        remedy="states are kept at ends of messages with --enable-prefix-caching, leave it out",
        takes=False,
    ),
    Flag(
        name="cpu-offload-gb",
        accepts=("0", "0.0"),
        remedy="the weights are in main memory already, leave the flag out",
        takes=False,
    ),
    Flag(
        name="device",
        accepts=("auto", "cpu"),
        remedy="this engine computes on the CPU, leave the flag out",
        takes=False,
    ),
    Flag(name="runner", accepts=("auto", "generate"), remedy="models only generate", takes=False),
    Flag(name="task", accepts=("auto", "generate"), remedy="models only generate", takes=False),
    Flag(name="swap-space", takes=False),
    Flag(name="mamba-backend", takes=False),
    Flag(name="mamba-ssu-algorithm", takes=False),
    Flag(name="moe-backend", takes=False),
    Flag(name="linear-backend", takes=False),
    Flag(name="attention-backend", takes=False),
    Flag(name="max-cudagraph-capture-size", takes=False),
    Flag(name="compilation-config", takes=False),
    Flag(name="enforce-eager", kind="switch", takes=False),
    Flag(name="enable-flashinfer-autotune", kind="switch", takes=False),
    Flag(name="async-scheduling", kind="switch", takes=False),
    Flag(name="disable-uvicorn-access-log", kind="switch", takes=False),
    Flag(name="disable-log-stats", kind="switch", takes=False),
)

_PREFIX = "states are kept at ends of messages, not on a grid; leave the flag out"
_ROUNDING = "the generator of stochastic rounding is PyTorch's own, leave the flag out"
_ADAPTERS = "adapters are not supported, merge them into the checkpoint first"

# Flag -> what to do instead. The --no- form of each is accepted, since it asks for nothing.
REFUSED: dict[str, str] = {
    "mamba-block-size": _PREFIX,
    "prefix-match-unit": _PREFIX,
    "enable-mamba-fine-grained-prefix-cache": _PREFIX,
    "mamba-cache-philox-rounds": _ROUNDING,
    "enable-expert-parallel": "all experts run in one process, leave the flag out",
    "cpu-offload-params": "the weights are in main memory already, leave the flag out",
    "enable-lora": _ADAPTERS,
    "lora-modules": _ADAPTERS,
    "max-lora-rank": _ADAPTERS,
    "max-loras": _ADAPTERS,
    "tokenizer": "put the tokenizer's files into the checkpoint's directory instead",
    "tokenizer-mode": "the checkpoint's tokenizer.json is used, leave the flag out",
    "revision": "download that revision and give its directory as the model",
    "hf-overrides": "edit a copy of the checkpoint's config.json instead",
    "otlp-traces-endpoint": "give --otlp-endpoint, with the address of an OTLP collector over HTTP",
    "config": "write the flags on the command line",
    "middleware": "put a proxy in front of the server instead",
}

_BY_NAME = {flag.name: flag for flag in FLAGS}


def prepare(arguments: Sequence[str]) -> list[str]:
    """Return a command line with one spelling of everything.

    Underscores in names become dashes; a list after a flag that takes several words becomes one
    flag a word, where the model is given elsewhere; --flag.key VALUE becomes a key of the flag's
    JSON. Raises UnsupportedError at a refused flag.
    """
    arguments = _join_keys(arguments)
    names = [_split(argument)[0] for argument in arguments]
    has_model = "model" in names or (bool(arguments) and not arguments[0].startswith("-"))
    prepared: list[str] = []
    repeated = ""  # the flag that further words belong to
    for argument, name in zip(arguments, names, strict=True):
        if name is None:
            follows = repeated and prepared[-1] != repeated and has_model
            prepared += [repeated, argument] if follows else [argument]
            continue
        base = name.split(".")[0]
        if base in REFUSED:
            raise UnsupportedError(f"--{base} is not supported: {REFUSED[base]}")
        if name.removeprefix("no-") in REFUSED:
            continue
        flag = _BY_NAME.get(name)
        repeated = f"--{name}" if flag is not None and flag.kind == "words" else ""
        prepared.append(f"--{name}" + "".join(argument.partition("=")[1:]))
    return prepared


def _join_keys(arguments: Sequence[str]) -> list[str]:
    """Gather --flag.key VALUE, or --flag.key=VALUE, into one JSON object a flag."""
    kept: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    rest = iter(arguments)
    for argument in rest:
        name, value = _split(argument)
        base, dot, key = (name or "").partition(".")
        flag = _BY_NAME.get(base)
        if not dot or flag is None or flag.kind != "json":
            kept.append(argument)
            continue
        text = value if "=" in argument else next(rest, "")
        found = objects.setdefault(base, {})
        try:
            found[key.replace("-", "_")] = json.loads(text)
        except ValueError:  # a bare word
            found[key.replace("-", "_")] = text
    for base, found in objects.items():
        kept.append(f"--{base}={json.dumps(found)}")
    return kept


def read(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the flags taken, by name, and the names of those without effect.

    `values` has, by flag name, what the command line gave (None where nothing). Raises
    UnsupportedError for a value that cannot be had.
    """
    taken: dict[str, Any] = {}
    ignored: list[str] = []
    for flag in FLAGS:
        value = values.get(flag.name)
        if value is None or value == ():
            if flag.takes:
                taken[flag.name] = flag.default
            continue
        # Names of parsers are spelled with - and with _.
        if flag.accepts is not None and not {value, value.replace("-", "_")} & {*flag.accepts}:
            raise UnsupportedError(f"--{flag.name} {value} is not supported: {flag.remedy}")
        if flag.takes:
            taken[flag.name] = _convert(flag, value)
        elif flag.accepts is None:
            ignored.append(flag.name)
    return taken, ignored


def _split(argument: str) -> tuple[str | None, str]:
    """Return the name of a flag, and what follows its `=`; the name of anything else is None."""
    if not argument.startswith("--") or argument == "--":
        return None, ""
    name, _, value = argument[2:].partition("=")
    return name.replace("_", "-"), value


def _convert(flag: Flag, value: Any) -> Any:
    if flag.kind == "count":
        return _count(flag.name, value)
    if flag.kind != "json":
        return value
    try:
        data = json.loads(value)
    except ValueError as error:
        raise UnsupportedError(f"--{flag.name} {value!r} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UnsupportedError(f"--{flag.name} {value!r} must be a JSON object")
    return data


def _count(name: str, text: str) -> int | None:
    """Read 32768, 32k (thousands) or 32K (1024s); "auto" and -1 leave the choice to the engine."""
    if text in ("auto", "-1"):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text)
    if match is None:
        raise UnsupportedError(f"--{name} {text!r} is not a number: write it as 32768 or 32K")
    base = 1024 if match[2].isupper() else 1000
    return int(float(match[1]) * base ** " kmg".index(match[2].lower() or " "))
