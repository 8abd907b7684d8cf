"""From the flags of `aprium serve` to a running server.

Everything that can be wrong with a command line is found before a model is loaded, which may take
minutes: flags, files, the address.
"""

import json
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from aprium.base.config import from_dict
from aprium.base.errors import ApriumError, CheckpointError, ConfigError
from aprium.base.listen import listen, place_of
from aprium.base.log import get_logger
from aprium.base.records import RECOMMENDED_SAMPLING, SamplingParams
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import read_plan
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.engine import load
from aprium.model.config import QuantConfig
from aprium.serve.admission import Limits
from aprium.serve.app import create_app
from aprium.serve.keys import read_keys
from aprium.serve.server import Server
from aprium.serve.service import ServeConfig
from aprium.serve.tracing import open_tracer
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import read_json

# Flag -> field of EngineConfig, for those passed on as they are.
_ENGINE_FIELDS = {
    "activation-dtype": "activation_dtype",
    "kv-cache-dtype": "kv_cache_dtype",
    "mamba-ssm-cache-dtype": "mamba_ssm_cache_dtype",
    "enable-mamba-cache-stochastic-rounding": "mamba_cache_stochastic_rounding",
    "memory-utilization": "memory_utilization",
    "enable-prefix-caching": "enable_prefix_caching",
    "snapshot-memory-bytes": "snapshot_bytes",
    "snapshot-interval": "snapshot_interval",
    "prefix-cache-ram-bytes": "prefix_cache_ram_bytes",
    "prefix-cache-dir": "prefix_cache_dir",
    "prefix-cache-disk-bytes": "prefix_cache_disk_bytes",
    "session-dir": "session_dir",
    "max-sessions": "max_sessions",
    "speculative-config": "speculative",
    "load": "load",
    "max-model-len": "max_model_len",
    "max-num-seqs": "max_num_seqs",
    "max-num-batched-tokens": "max_num_batched_tokens",
    "block-size": "block_size",
    "kv-cache-memory-bytes": "kv_cache_bytes",
    "enable-chunked-prefill": "enable_chunked_prefill",
    "seed": "seed",
}
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
logger = get_logger("serve")


def launch(model: str, flags: Mapping[str, Any]) -> None:
    """Serve `model` until told to stop; `flags` are the values by name.

    Raises ApriumError when a flag, a file, the address or the checkpoint cannot be used.
    """
    listener = listen(flags["host"], flags["port"])
    try:
        engine, serve = make_engine(model, flags)
        _run(engine, serve, listener, flags)
    finally:
        listener.close()


def make_engine(model: str, flags: Mapping[str, Any]) -> tuple[AsyncEngine, ServeConfig]:
    """Load `model` as `flags` ask for it; what can be wrong with them is found before."""
    if flags["download-dir"]:
        os.environ["HF_HUB_CACHE"] = flags["download-dir"]
    config = engine_config(model, flags)
    if config.load_format == "dummy" and not Path(model).is_dir():
        raise ConfigError(
            f"{model} has no tokenizer to serve random weights with: give a directory that "
            "holds config.json and the tokenizer files"
        )
    directory = resolve(model)
    _check_quantization(flags["quantization"], directory)
    template = flags["chat-template"]
    chat_template = ChatTemplate.load(directory, template) if template else None
    sampling = sampling_defaults(directory, flags)
    thinking = thinking_defaults(flags)
    guards = guard_options(flags)
    endpoint = flags["otlp-endpoint"]
    if endpoint is not None:
        open_tracer(endpoint).close()  # what can be wrong with it is found now
    engine = AsyncEngine(config, load(config))
    if engine.tokenizer is None:
        raise CheckpointError(
            f"{directory} has no tokenizer.json: copy the tokenizer files of the checkpoint "
            "into that directory"
        )
    engine.template = chat_template or engine.template
    return engine, ServeConfig(
        names=tuple(flags["served-model-name"] or (model,)),
        template_kwargs=flags["default-chat-template-kwargs"] or {},
        sampling=sampling,
        thinking_budget=thinking.thinking_budget,
        thinking_message=thinking.thinking_message,
        web=flags["enable-web"],
        stable_prompts=flags["stable-prompts"],
        log_requests=flags["enable-log-requests"] and not flags["disable-log-requests"],
        max_stored_responses=flags["max-stored-responses"],
        keep_alive_s=flags["sse-keep-alive"],
        otlp_endpoint=endpoint,
        **guards,
    )


def engine_config(model: str, flags: Mapping[str, Any]) -> EngineConfig:
    """Return the configuration of the engine that `flags` ask for."""
    given = {field: flags[name] for name, field in _ENGINE_FIELDS.items()}
    if given["memory_utilization"] is None:
        given["memory_utilization"] = flags["gpu-memory-utilization"]
    return from_dict(
        EngineConfig,
        {
            "model": model,
            "dtype": "float32" if flags["dtype"] == "float" else flags["dtype"],
            "load_format": "dummy" if flags["load-format"] == "dummy" else "auto",
            **{field: value for field, value in given.items() if value is not None},
        },
    )


def sampling_defaults(directory: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling for requests that say nothing, as --generation-config asks for it."""
    source = flags["generation-config"]
    if source == "vllm":
        config: Mapping[str, Any] = {}
    elif source == "auto":
        config = read_json(directory / "generation_config.json")
    else:
        path = Path(source) / "generation_config.json"
        if not path.is_file():
            raise ConfigError(
                f"--generation-config {source}: there is no {path}; give auto, vllm or a folder"
            )
        config = read_json(path)
    config = {**config, **(flags["override-generation-config"] or {})}
    found = {name: config[name] for name in RECOMMENDED_SAMPLING if config.get(name) is not None}
    try:
        SamplingParams(**found)
    except ApriumError as error:
        raise ConfigError(f"the default sampling cannot be used: {error}") from error
    return found


def thinking_defaults(flags: Mapping[str, Any]) -> SamplingParams:
    """Return parameters with the budget of reasoning, and the message at its end, of `flags`."""
    budget = flags["reasoning-budget"]
    message = flags["reasoning-budget-message"]
    try:
        return SamplingParams(
            thinking_budget=None if budget == -1 else budget, thinking_message=message
        )
    except ApriumError as error:
        raise ConfigError(f"--reasoning-budget and its message cannot be used: {error}") from error


def _check_quantization(wanted: str | None, directory: Path) -> None:
    """Raise ConfigError unless the checkpoint is quantised as --quantization says."""
    if wanted is None:
        return
    quant = read_plan(directory).quant
    formats = set(quant.formats.values())
    if not _fits(wanted.replace("-", "_"), quant):
        found = ", ".join(sorted(formats)) or "none"
        raise ConfigError(
            f"--quantization {wanted}: the weights in {directory} have {found}; leave the flag out"
        )


def _fits(wanted: str, quant: QuantConfig) -> bool:
    formats = set(quant.formats.values())
    if wanted == "fp8":
        return "fp8" in formats
    if wanted == "compressed_tensors":
        return bool(formats) and quant.layout == "compressed-tensors"
    if wanted in ("modelopt", "modelopt_mixed"):
        return bool(formats) and quant.layout == "modelopt"
    return bool(formats & {"nvfp4", "w4a16_nvfp4"})


def guard_options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ServeConfig that keep clients out, or down to what they may have."""
    keys = _keys(flags, "api-key", ("APRIUM_API_KEY", "VLLM_API_KEY"))
    control = _keys(flags, "control-key", ("APRIUM_CONTROL_KEY",))
    hosts = tuple(host.lower() for host in flags["allowed-hosts"] or ())
    if not hosts and not keys and flags["host"] in _LOOPBACK:
        hosts = _LOOPBACK  # a web page must not reach the server by another name for this machine
    limits = {
        "queued_requests": "max-num-queued-reqs",
        "queued_tokens": "max-num-queued-tokens",
        "requests_per_key": "max-requests-per-key",
    }
    least_values = {
        "max-num-queued-reqs": 0,
        "max-requests-per-key": 1,
        "max-stored-responses": 0,
        "sse-keep-alive": 0,
    }
    for name, least in least_values.items():
        if flags[name] is not None and not least <= flags[name] < math.inf:
            raise ConfigError(f"--{name} is {flags[name]}: it must be at least {least} and finite")
    if flags["max-requests-per-key"] is not None and not keys:
        raise ConfigError(
            f"--max-requests-per-key {flags['max-requests-per-key']}: there are no keys, give "
            "--api-key or --api-key-file, or bound the queue with --max-num-queued-reqs"
        )
    return {
        "api_keys": keys,
        "control_keys": control,
        "allowed_hosts": () if "*" in hosts else hosts,
        "allowed_origins": _origins(flags["allowed-origins"] or ()),
        "limits": Limits(**{field: flags[name] for field, name in limits.items()}),
    }


def _keys(flags: Mapping[str, Any], name: str, variables: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys given by flag, file or, where there are none, by environment."""
    given = tuple(flags[name] or ())
    if flags[f"{name}-file"]:
        given += read_keys(Path(flags[f"{name}-file"]))
    return given or tuple(key for v in variables if (key := os.environ.get(v)))


def _origins(given: Sequence[str]) -> tuple[str, ...]:
    """Return origins given as words, or as a JSON list."""
    found: list[str] = []
    for word in given:
        if not word.startswith("["):
            found.append(word)
            continue
        try:
            listed = json.loads(word)
        except ValueError as error:
            raise ConfigError(f"--allowed-origins {word} is not JSON: {error}") from error
        found += map(str, listed)
    return tuple(found)


def _run(
    engine: AsyncEngine, serve: ServeConfig, listener: socket.socket, flags: Mapping[str, Any]
) -> None:
    level = flags["uvicorn-log-level"]
    app = create_app(engine, serve)
    try:
        config = uvicorn.Config(
            app,
            http="h11",  # which bounds the size of headers
            ws="none",
            log_level=level,
            access_log=False,  # `serve/guard` writes a line that says more
            server_header=False,
            ssl_keyfile=flags["ssl-keyfile"],
            ssl_certfile=flags["ssl-certfile"],
        )
        config.load()
    except (KeyError, OSError) as error:
        raise ConfigError(
            f"the HTTP server cannot start: {error}; check --uvicorn-log-level ({level}), "
            "--ssl-keyfile and --ssl-certfile"
        ) from error
    scheme = "https" if config.is_ssl else "http"
    logger.info(
        "serving %s on %s://%s (context %d tokens)",
        serve.names[0], scheme, place_of(listener), engine.max_model_len,
    )  # fmt: skip
    Server(config, app.state.service, flags["shutdown-timeout"]).run(sockets=[listener])
