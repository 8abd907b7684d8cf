"""From the flags of `aprium serve` to a running server.

Everything that can be wrong with a command line is found before a model is loaded, which may take
minutes: flags, files, the address.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from aprium.base.config import from_dict
from aprium.base.errors import ApriumError, CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.base.records import RECOMMENDED_SAMPLING, SamplingParams
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import read_plan
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.engine import load
from aprium.model.config import QuantConfig
from aprium.serve.app import ServeConfig, create_app
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
logger = get_logger("serve")


def launch(model: str, flags: Mapping[str, Any]) -> None:
    """Serve `model` until told to stop; `flags` are the values by name.

    Raises ApriumError when a flag, a file, the address or the checkpoint cannot be used.
    """
    if flags["download-dir"]:
        os.environ["HF_HUB_CACHE"] = flags["download-dir"]
    config = engine_config(model, flags)
    listener = _listen(flags["host"], flags["port"])
    try:
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
        engine = AsyncEngine(config, load(config))
        if engine.tokenizer is None:
            raise CheckpointError(
                f"{directory} has no tokenizer.json: copy the tokenizer files of the checkpoint "
                "into that directory"
            )
        engine.template = chat_template or engine.template
        serve = ServeConfig(
            names=tuple(flags["served-model-name"] or (model,)),
            api_keys=_api_keys(flags),
            template_kwargs=flags["default-chat-template-kwargs"] or {},
            sampling=sampling,
            thinking_budget=thinking.thinking_budget,
            thinking_message=thinking.thinking_message,
        )
        _run(engine, serve, listener, flags)
    finally:
        listener.close()


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


def _api_keys(flags: Mapping[str, Any]) -> tuple[str, ...]:
    given = tuple(flags["api-key"] or ())
    named = (os.environ.get(name) for name in ("APRIUM_API_KEY", "VLLM_API_KEY"))
    return given or tuple(key for key in named if key)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; uvicorn begins to listen when the model is there."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}; choose another --host or --port"
        ) from error
    return listener


def _run(
    engine: AsyncEngine, serve: ServeConfig, listener: socket.socket, flags: Mapping[str, Any]
) -> None:
    level = flags["uvicorn-log-level"]
    try:
        config = uvicorn.Config(
            create_app(engine, serve),
            log_level=level,
            access_log=not flags["disable-uvicorn-access-log"],
            ssl_keyfile=flags["ssl-keyfile"],
            ssl_certfile=flags["ssl-certfile"],
            timeout_graceful_shutdown=flags["shutdown-timeout"],
        )
        config.load()
    except (KeyError, OSError) as error:
        raise ConfigError(
            f"the HTTP server cannot start: {error}; check --uvicorn-log-level ({level}), "
            "--ssl-keyfile and --ssl-certfile"
        ) from error
    host, port = listener.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    scheme = "https" if config.is_ssl else "http"
    logger.info(
        "serving %s on %s://%s:%d (context %d tokens)",
        serve.names[0], scheme, place, port, engine.max_model_len,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
