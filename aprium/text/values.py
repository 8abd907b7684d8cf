"""Values of tool parameters: the text that a model writes, as JSON of the declared type.

A call of this family spells values out without quotes, so the parameter's JSON schema decides what
a text means, as `qwen3_coder` parsers do it. References into the schema's own definitions are
followed, since libraries write nested types that way.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 16  # of references and combinations


def parameters_of(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name of `tool` and the schemas of its parameters, references followed."""
    function = tool.get("function", tool)
    root = function.get("parameters")
    properties = root.get("properties") if isinstance(root, Mapping) else None
    if not isinstance(properties, Mapping):
        return function["name"], {}
    return function["name"], {key: _resolve(value, root, 0) for key, value in properties.items()}


def _resolve(schema: Any, root: Mapping[str, Any], depth: int) -> Any:
    """Put what `schema` refers to in its place, also in its combinations; not in what it holds."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, Mapping) else None
        if isinstance(target, Mapping):
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            return _resolve({**target, **rest}, root, depth + 1)
    combined = {
        key: [_resolve(option, root, depth + 1) for option in schema[key]]
        for key in ("anyOf", "oneOf", "allOf")
        if isinstance(schema.get(key), list)
    }
    resolved = {**schema, **combined}
    parts = combined.get("allOf")
    if parts and all(isinstance(part, Mapping) for part in parts):
        rest = {key: value for key, value in resolved.items() if key != "allOf"}
        keys = [key for part in (rest, *parts) for key in part if key not in _ANNOTATIONS]
        if len(keys) == len(set(keys)):
            resolved = {key: value for part in (*parts, rest) for key, value in part.items()}
    return resolved


_ANNOTATIONS = ("title", "description", "default", "examples")
_TYPE_NAMES = {
    "str": "string", "text": "string", "int": "integer", "float": "number", "double": "number",
    "bool": "boolean", "dict": "object", "list": "array", "none": "null",
}  # fmt: skip


def types_of(schema: Any) -> set[str]:
    """Return the JSON types that `schema` allows; nothing said means a string."""
    if not isinstance(schema, Mapping):
        return {"string"}
    named = schema.get("type")
    if named is not None:
        names = named if isinstance(named, list) else [named]
        return {_TYPE_NAMES.get(str(name).lower(), str(name).lower()) for name in names}
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list) and options:
            return set().union(*(types_of(option) for option in options))
    values = schema.get("enum") if "enum" in schema else [schema.get("const", "")]
    return {type_of(value) for value in values} if isinstance(values, list) else {"string"}


def type_of(value: Any) -> str:
    """Return the JSON type of a value."""
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return kinds.get(type(value), "string")


def json_value(text: str, schema: Any) -> str:
    """Return `text`, a value as the model wrote it, as JSON of its declared type.

    A value that does not fit its type is passed on as a string.
    """
    types = types_of(schema)
    word = text.strip()
    if word.lower() in ("null", "none") and ("null" in types or "string" not in types):
        return "null"
    if "boolean" in types and word.lower() in ("true", "false"):
        return word.lower()
    if types & {"integer", "number"} and (number := _number(word, "number" in types)) is not None:
        return number
    wanted = tuple(kind for name, kind in (("object", dict), ("array", list)) if name in types)
    if wanted:
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(word)
                if isinstance(value, wanted):
                    return json_text(value)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
    return json_text(text)


def _number(word: str, fraction: bool) -> str | None:
    """Return `word` as a JSON number, or None; `fraction` allows one that is not whole."""
    try:
        if re.fullmatch(r"[+-]?\d+", word, re.ASCII):
            return str(int(word))
        return _float(float(word), fraction)
    except (ValueError, OverflowError):
        return None


def _float(value: float, fraction: bool) -> str | None:
    if not fraction and value.is_integer():
        return str(int(value))
    return json.dumps(value, allow_nan=False) if fraction else None


def json_text(value: Any) -> str:
    """Write `value` as JSON that has a UTF-8 form."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate out of a JSON escape
        return json.dumps(value, allow_nan=False)
    return text
