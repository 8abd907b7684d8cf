"""From the fields that ask for a form of the answer to a `Guide`: OpenAI's, vLLM's, llama.cpp's.

Every server has its own names for the same few things. One of them may be given; what is in it is
checked when it is compiled. No torch here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aprium.base.errors import RequestError
from aprium.base.records import Guide

# Field -> kind of guide, for those that hold its value.
GUIDE_FIELDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
}
_STRUCTURED = ("json", "regex", "choice", "grammar")
_OBJECT = {"type": "object"}


def read_guide(fields: Mapping[str, Any]) -> tuple[Guide | None, str | None]:
    """Return the guide that a body's `fields` ask for, and the field that does.

    Raises RequestError where there are two, or one that is not to be understood.
    """
    found: list[tuple[str, Guide]] = []
    response_format = fields.get("response_format")
    if response_format is not None:
        guide = _of_response_format(response_format)
        if guide is not None:
            found.append(("response_format", guide))
    structured = fields.get("structured_outputs")
    if structured:
        found.append(("structured_outputs", _of_structured_outputs(structured)))
    for name, kind in GUIDE_FIELDS.items():
        value = fields.get(name)
        if value is not None and value != "":
            found.append((name, _guide(name, kind, value)))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise RequestError(f"{names} both ask for a form: give one", param=found[1][0])
    return (found[0][1], found[0][0]) if found else (None, None)


def _guide(field: str, kind: str, value: Any) -> Guide:
    try:
        return Guide(kind=kind, value=value)
    except RequestError as error:
        raise RequestError(f"{field}: {error}", param=field) from error


def _of_response_format(value: Any) -> Guide | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _guide("response_format", "json", value.get("schema") or _OBJECT)
    given = value.get("json_schema") if isinstance(value, Mapping) else None
    if kind == "json_schema" and isinstance(given, Mapping):
        schema = given.get("schema", _OBJECT)
        if given.get("strict") is False and isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": {"lenient": True, "coerce_one_of": True}}
        return _guide("response_format", "json", schema)
    raise RequestError(
        f"response_format is {_short(value)}: use "
        '{"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}',
        param="response_format",
    )


def _of_structured_outputs(value: Any) -> Guide:
    given = value if isinstance(value, Mapping) else {}
    given = {key: v for key, v in given.items() if v is not None and v is not False}
    pattern = given.pop("whitespace_pattern", None)
    if given.get("json_object") is True:
        given["json"] = _OBJECT
        del given["json_object"]
    if len(given) != 1 or next(iter(given)) not in _STRUCTURED:
        raise RequestError(
            f"structured_outputs is {_short(value)}: give one of json, json_object, regex, choice "
            "and grammar, and nothing else but whitespace_pattern",
            param="structured_outputs",
        )
    ((kind, form),) = given.items()
    if pattern is not None and kind == "json":
        try:
            form = json.loads(form) if isinstance(form, str) else form
            form = {**form, "x-guidance": {"whitespace_pattern": pattern}}
        except (ValueError, TypeError) as error:
            raise RequestError(
                f"structured_outputs.json is no schema: {error}", param="structured_outputs"
            ) from error
    return _guide("structured_outputs", kind, form)


def read_tool_choice(value: Any, tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Return "auto", "none", "required" or the name of the tool to be called.

    Raises RequestError for a choice that there is not.
    """
    if value is None or value in ("auto", "none"):
        return value or "auto"
    if value != "required":
        function = value.get("function") if isinstance(value, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise RequestError(
                f"tool_choice is {_short(value)}: use auto, none, required, or "
                '{"type": "function", "function": {"name": ...}}',
                param="tool_choice",
            )
        value = name
    names = [tool["function"]["name"] for tool in tools or ()]
    if not names or value not in ("required", *names):
        raise RequestError(
            f"tool_choice asks for {value!r}, which is not among the tools: "
            f"{'offer it in tools' if names else 'give tools'}",
            param="tool_choice",
        )
    return value


def tools_guide(
    tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, answer: Guide | None
) -> Guide:
    """Return the guide of an answer that may call `tools`; `answer` is what else it may be."""
    beside = None
    if answer is not None and choice == "auto":
        beside = {"kind": answer.kind, "value": answer.value}
    value = {"tools": list(tools), "choice": choice, "parallel": parallel, "answer": beside}
    return Guide(kind="tools", value=value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
