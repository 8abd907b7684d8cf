"""Logging set-up: one line a record to standard error, at the level of `APRIUM_LOG_LEVEL`."""

import logging
import os
import sys

from aprium.base.errors import ConfigError


def get_logger(name: str) -> logging.Logger:
    """Return the logger `aprium.<name>`."""
    return logging.getLogger(f"aprium.{name}")


def configure_logging(level: str | None = None) -> None:
    """Send `aprium` records to standard error.

    `level` is a logging level name; without it `APRIUM_LOG_LEVEL`, else INFO.
    Raises ConfigError on an unknown level.
    """
    name = (level or os.environ.get("APRIUM_LOG_LEVEL") or "INFO").upper()
    if name not in logging.getLevelNamesMapping():
        raise ConfigError(f"unknown log level {name!r}: use DEBUG, INFO, WARNING or ERROR")
    root = logging.getLogger("aprium")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)
    root.setLevel(name)
    root.propagate = False
