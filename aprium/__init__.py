"""Aprium: run, serve and train hybrid Mamba-Transformer mixture-of-experts language models."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aprium.base.records import Completion, Guide, Message, SamplingParams
    from aprium.engine.client import LLM, AsyncEngine
    from aprium.engine.config import EngineConfig
    from aprium.engine.conversation import Session
    from aprium.engine.engine import Engine

_EXPORTS = {
    "LLM": "aprium.engine.client",
    "AsyncEngine": "aprium.engine.client",
    "Engine": "aprium.engine.engine",
    "EngineConfig": "aprium.engine.config",
    "Session": "aprium.engine.conversation",
    "SamplingParams": "aprium.base.records",
    "Guide": "aprium.base.records",
    "Message": "aprium.base.records",
    "Completion": "aprium.base.records",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineConfig",
    "Guide",
    "Message",
    "SamplingParams",
    "Session",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import a public name from the file that defines it, on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'aprium' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
