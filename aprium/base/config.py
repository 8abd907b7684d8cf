"""Configuration: plain nested values in, frozen dataclasses out, and back.

A `Config` dataclass sits at the top of the file that uses it, and bigger ones contain smaller
ones. TOML files and command-line overrides are read through `from_dict`, so that no option is
stated twice; an unknown key is an error that names the known ones.
"""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from aprium.base.errors import ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], data: Mapping[str, Any], *, where: str = "") -> T:
    """Build dataclass `cls` from nested plain values.

    Nested dataclasses take mappings, `tuple[X, ...]` takes lists, an int is taken for a float, and
    false for None where a field may be that and is no switch, since TOML has no null.
    `where` is the dotted path put in front of names in messages. Raises ConfigError on an unknown
    or missing key or a value of the wrong type.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a table, found {data!r}")
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"unknown key {prefix}{key}: the known ones are {known}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, prefix + key) for key, value in data.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"missing key {prefix}{name}")
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration dataclass into nested plain values that `from_dict` reads back.

    Fields that are None are left out, since TOML has no null.
    """
    return _plain(config)


def require_finite(config: Any, where: str = "", *, infinite: tuple[str, ...] = ()) -> None:
    """Raise ConfigError for a float of dataclass `config` that is NaN or infinite.

    Fields named in `infinite` may be inf. `where` is the dotted path of the table.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, float) or math.isfinite(number):
                continue
            if number != math.inf or f.name not in infinite:
                name = f"{where}.{f.name}" if where else f.name
                raise ConfigError(f"{name} is {value}: it must be a finite number")


def require_seed(value: int, where: str) -> None:
    """Raise ConfigError for a seed that PyTorch's generators do not take."""
    if not -(2**63) <= value < 2**64:
        raise ConfigError(f"{where} is {value}: it must lie in -2**63..2**64-1")


def load_toml(cls: type[T], path: str | Path, overrides: Mapping[str, Any] | None = None) -> T:
    """Read TOML file `path` into dataclass `cls`.

    `overrides` maps dotted keys ("trainer.steps") to values that replace the file's. Raises
    ConfigError when the file is missing, is not TOML, or does not fit `cls`.
    """
    return from_dict(cls, read_toml(path, overrides))


def read_toml(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read TOML file `path` as plain values, with `overrides` as `load_toml` puts them in."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for dotted, value in (overrides or {}).items():
        table = data
        *parents, last = dotted.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"override {dotted!r}: {parent!r} is not a table in {path}")
        table[last] = value
    return data


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert plain `value` to type `hint`, or raise ConfigError naming `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            choices = ", ".join(repr(a) for a in args)
            raise ConfigError(f"{where} is {value!r}: it must be one of {choices}")
        return value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return _convert_sequence(origin, args, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return (
            value
            if isinstance(value, typing.cast(type, hint))
            else from_dict(typing.cast(type, hint), value, where=where)
        )
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and origin is None and isinstance(value, hint):
        if hint is int and isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}: it must be an integer")
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where} is {value!r}: it must be of type {name}")


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in args and (value is None or (value is False and bool not in args)):
        return None
    options = [a for a in args if a is not type(None)]
    if len(options) == 1:
        return _convert(options[0], value, where)
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError:
            continue
    names = " or ".join(getattr(a, "__name__", str(a)) for a in options)
    raise ConfigError(f"{where} is {value!r}: it must be of type {names}")


def _convert_sequence(origin: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if len(value) != len(args):
            raise ConfigError(f"{where} has {len(value)} values: it must have {len(args)}")
        pairs = zip(args, value, strict=True)
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(pairs))
    return origin(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
