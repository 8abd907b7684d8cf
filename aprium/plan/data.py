"""The planner's tables: dated TOML files, a source for every figure, and a user's own over them.

`tables/hardware.toml`, `prices.toml`, `models.toml`, `published.toml` and `constants.toml` come
with the package. A file of the user replaces keys of any of them, as in `[hardware.h100-sxm]` with
`bandwidth_tb_s = 3.0`.
"""

import functools
import tomllib
from pathlib import Path
from typing import Any

from aprium.base.errors import ConfigError

TABLES = ("hardware", "prices", "models", "published", "constants")
_FOLDER = Path(__file__).parent / "tables"


@functools.cache
def load_data(name: str) -> dict[str, Any]:
    """Return one of the package's tables; do not change what is returned."""
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def load_overrides(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read a user's file of replacements: table -> keys.

    Raises ConfigError when it cannot be read or names a table that there is not.
    """
    if path is None:
        return {}
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for table, values in data.items():
        if table not in TABLES or not isinstance(values, dict):
            known = ", ".join(f"[{name}.…]" for name in TABLES)
            raise ConfigError(f"{path}: {table!r} is no table of the planner: use {known}")
    return data


def merged(name: str, overrides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the table `name` with the user's values put over it, nested tables key by key."""
    return _merge(load_data(name), overrides.get(name, {}))


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in over.items():
        old = found.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            value = _merge(old, value)
        found[key] = value
    return found
