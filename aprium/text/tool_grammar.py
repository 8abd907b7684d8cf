r"""Tool schemas to a grammar in which every call can be parsed and fits its tool's schema.

The grammar is Lark text in llguidance's dialect and speaks of characters, not of tokens, like the
parser (`text/parse`) whose counterpart it is: what it admits, the parser reads as a call of an
offered tool with the required parameters, each of its declared type. Values of strings are free
text without anything that would end a value; what is neither text nor a plain number is JSON.

Parameters come in any order. Of more than `_ANY_ORDER` an optional one may come again, which the
parser ignores; of more required ones than that, those come as declared.
"""

import json
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import llguidance

from aprium.base.errors import RequestError
from aprium.text.values import json_text, json_value, parameters_of, type_of, types_of

_ANY_ORDER = 4
_NAME = re.compile(r"[^<>\n]{1,128}")
_END = '"\\n</parameter>\\n"'
# A value may not hold what the parser takes for its end.
_STOPS = (
    r"<\/parameter>|\n<parameter=[^<>\n]+>|<\/function>\s*(<\/?tool_call>|<function=)"
    r"|\n<\/tool_call>"
)
_FREE = rf"FREE: /(?s:.*)/ & ~/(?s:.*)({_STOPS})(?s:.*)/"
_SPACE = r"[\s\x1c-\x1f]*"
# Texts that the parser reads as something else where a parameter may be that as well as a string.
_OTHER = {
    "null": rf"{_SPACE}(?i:null|none){_SPACE}",
    "boolean": rf"{_SPACE}(?i:true|false){_SPACE}",
    "integer": rf"{_SPACE}[-+\d._eE]+{_SPACE}",
    "number": rf"{_SPACE}[-+\d._eE]+{_SPACE}",
    "object": rf"{_SPACE}[\[{{(\\#](?s:.*)",
    "array": rf"{_SPACE}[\[{{(\\#](?s:.*)",
}
# Numbers without bounds have at most as many digits as are kept.
_PLAIN = {
    "null": "null",
    "boolean": "true|false",
    "integer": r"-?(0|[1-9][0-9]{0,17})",
    "number": r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][-+]?[0-9]{1,2})?",
}
_NUMERIC = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_LOGIC = {"not", "if", "then", "else", "allOf"}
_WHOLE = {
    *_LOGIC, "anyOf", "oneOf", "patternProperties", "dependentRequired", "dependentSchemas",
    "minProperties", "maxProperties", "propertyNames", "$ref",
}  # fmt: skip


class Level(IntEnum):
    """How much of a schema a grammar keeps to: all, what is known, or only the types."""

    STRICT = 0
    LENIENT = 1
    TYPES = 2


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    required: bool,
    parallel: bool = True,
    thinking: bool = False,
    answer: bool = False,
    levels: Sequence[Level] | None = None,
) -> str:
    """Return a grammar of answers that may call `tools`, in the OpenAI form.

    With `required` there is nothing but calls, else text may stand before and between them, or,
    with `answer`, a grammar of that name may be followed instead. Without `parallel` there is at
    most one call, which ends the answer. With `thinking` it begins inside reasoning, which ends
    with its tag or with a call, or may be all there is where nothing else is asked for. `levels`
    has one for each tool. Raises RequestError for a tool that cannot be called, or cannot be kept
    to at its level.
    """
    levels = levels or [Level.STRICT] * len(tools)
    rules: list[str] = []
    names = []
    for number, (tool, level) in enumerate(zip(tools, levels, strict=True)):
        names.append(_Tool(rules, number, tool, level).write())
    calls = " | ".join(f"{_literal(f'{name}>', '')} after{i}" for i, name in enumerate(names))
    rules.append(f'call: "\\n<function=" ({calls})')
    if parallel:
        more = '("\\n<tool_call>" call)* "\\n"?' if required or answer else "(head call)* tail"
    else:
        more = '"\\n"?'
    first = '"<tool_call>" call' if required or answer else "head call"
    begins = f"{first} {more}" if required or answer or not parallel else more
    gap = '("\\n" "\\n"?)? ' if required or answer else ""
    options = [f"{gap}{begins}"]
    if answer:
        options.append(f"{gap}@answer")
    elif not required and not parallel:
        options.append("tail")
    body = " | ".join(options)
    if thinking:
        rules += [f"body: {body}", reasoning_rule(names)]
        out = " | ".join(f"out{i} after{i} {more}" for i in range(len(names)))
        rules += [
            f"out{i}[lazy]: /(?s:.*)<tool_call>\\s{{0,64}}<function={_quote(name)}>/"
            for i, name in enumerate(names)
        ]
        body = f"reason body | {out}"
        if not required and not answer:
            body += " | unfinished"  # it may end anywhere, then
    rules += [
        "head[lazy]: /(?s:.*)<tool_call>/",
        "tail: TAIL",
        "TAIL: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/",
        _FREE,
    ]
    return "\n".join([f"start: {body}", *rules])


def reasoning_rule(names: Sequence[str] = ()) -> str:
    """Return a rule `reason`: reasoning and its closing tag, without a call of a tool `names`.

    With names another rule, `unfinished`, is reasoning that has neither.
    """
    if not names:
        return "reason[lazy]: /(?s:.*)<\\/think>/"
    header = f"<tool_call>\\s{{0,64}}<function=({'|'.join(map(_quote, names))})>"
    return (
        "reason[lazy]: REASON\n"
        f"REASON: /(?s:.*)<\\/think>/ & ~/(?s:.*){header}(?s:.*)/\n"
        "unfinished: UNFINISHED\n"
        f"UNFINISHED: /(?s:.*)/ & ~/(?s:.*)(<\\/think>|{header})(?s:.*)/"
    )


class _Tool:
    """Writes the rules of one tool: `after{number}` is what follows its name in a call."""

    def __init__(
        self, rules: list[str], number: int, tool: Mapping[str, Any], level: Level
    ) -> None:
        self._rules, self._number, self._level = rules, number, level
        self._name, self._schemas = parameters_of(tool)
        root = tool.get("function", tool).get("parameters")
        self._root: Mapping[str, Any] = root if isinstance(root, Mapping) else {}
        if not _NAME.fullmatch(self._name):
            raise RequestError(
                f"tool name {self._name!r} cannot stand in a call: use at most 128 characters "
                "without <, > and line breaks",
                param="tools",
            )

    def write(self) -> str:
        """Add the rules; return the tool's name."""
        required = self._root.get("required")
        required = set(required) if isinstance(required, list) else set()
        if self._level == Level.STRICT:
            for key in (_WHOLE & {*self._root}) or (required - {*self._schemas}):
                raise self._refusal(f"{key!r} at the top of its parameters cannot be kept to")
        keys = [key for key in self._schemas if _NAME.fullmatch(key)]
        for key in {*self._schemas} - {*keys}:
            if self._level == Level.STRICT:
                raise self._refusal(f"parameter {key!r} cannot stand in a call")
        for i, key in enumerate(keys):
            self._rules.append(
                f"{self._of('p', i)}: {_literal(f'<parameter={key}>')} {self._of('v', i)}"
            )
            self._value(self._of("v", i), key, self._schemas[key])
        self._order(keys, required & {*keys})
        return self._name

    def _of(self, kind: str, index: int) -> str:
        return f"{kind}{self._number}_{index}"

    def _refusal(self, why: str) -> RequestError:
        return RequestError(f"tool {self._name!r}: {why}", param="tools")

    def _order(self, keys: Sequence[str], required: set[str]) -> None:
        """Add rules for parameters in any order, the required ones all there."""
        end = '"</function>\\n</tool_call>"'
        if not keys and self._takes_any():
            self._rules += [
                f'after{self._number}: "\\n" {self._of("x", 0)}* {end}',
                f'{self._of("x", 0)}: "<parameter=" /[^<>\\n]{{1,64}}/ ">\\n" {self._of("y", 0)}',
                f"{self._of('y', 0)}[lazy]: FREE {_END}",
            ]
            return
        tracked = {*keys} if len(keys) <= _ANY_ORDER else required
        ordered = len(tracked) > _ANY_ORDER
        states: dict[frozenset[str], str] = {}
        open_states = [frozenset(tracked)]
        states[open_states[0]] = self._of("s", 0)
        while open_states:
            left = open_states.pop()
            waiting = next((key for key in keys if key in left & required), None)
            options = [] if left & required else [end]
            for i, key in enumerate(keys):
                if key in tracked and (key not in left or (ordered and key != waiting)):
                    continue
                then = left - {key}
                if then not in states:
                    states[then] = self._of("s", len(states))
                    open_states.append(then)
                options.append(f"{self._of('p', i)} {states[then]}")
            self._rules.append(f"{states[left]}: {' | '.join(options)}")
        self._rules.append(f'after{self._number}: "\\n" {states[frozenset(tracked)]}')

    def _takes_any(self) -> bool:
        """Whether parameters of any name are welcome, as strings."""
        extra = self._root.get("additionalProperties", True)
        return extra is True or (isinstance(extra, Mapping) and types_of(extra) == {"string"})

    def _value(self, rule: str, key: str, schema: Any) -> None:
        """Add `rule`: a value of `schema`, and the end of the parameter."""
        schema = schema if isinstance(schema, Mapping) else {}
        kinds = types_of(schema)
        if self._level == Level.TYPES:
            kinds &= {*_OTHER, "string"}
            schema = {"type": sorted(kinds)} if kinds else {}
            kinds = kinds or {"string"}
        if "enum" in schema or "const" in schema:
            self._choices(rule, key, schema, schema)
        elif kinds == {"string"}:
            self._rules.append(self._text(rule, key, schema, ()))
        elif "string" in kinds:
            self._mixed(rule, key, schema, kinds)
        elif len(kinds) == 1 and kinds <= {*_PLAIN} and not _NUMERIC & {*schema}:
            self._rules.append(f"{rule}: /{_PLAIN[next(iter(kinds))]}/ {_END}")
        else:
            self._rules.append(f"{rule}: {rule}j {_END}")
            self._rules.append(f"{rule}j: {self._json(schema)}")

    def _choices(
        self, rule: str, key: str, schema: Mapping[str, Any], whole: Mapping[str, Any]
    ) -> None:
        """Add `rule` for the values that `schema`, a part of `whole`, lists."""
        values = [schema["const"]] if "const" in schema else schema["enum"]
        texts = [_spelled(v, schema, whole) for v in (values if isinstance(values, list) else ())]
        found = [_quote(text) for text in texts if text is not None]
        if not found:
            raise self._refusal(f"no value of parameter {key!r} can stand in a call")
        self._rules.append(f"{rule}[lazy]: /{'|'.join(found)}/ {_END}")

    def _text(self, rule: str, key: str, schema: Mapping[str, Any], others: Sequence[str]) -> str:
        """Return `rule` for a free text that is not read as one of the types `others`."""
        parts = ["FREE", *(f"~/{_OTHER[kind]}/" for kind in others)]
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if type(low) is int and type(high) in (int, type(None)) and (low or high is not None):
            parts.append(f"/(?s:.{{{low},{'' if high is None else high}}})/")
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            found = _anywhere(pattern)
            if found is not None:
                parts.append(f"/{found}/")
            elif self._level == Level.STRICT:
                raise self._refusal(f"pattern {pattern!r} of {key!r} cannot be kept to: {_HOW}")
        if self._level == Level.STRICT and (logic := _LOGIC & {*schema}):
            raise self._refusal(f"{min(logic)!r} of {key!r} cannot be kept to")
        terminal = rule.upper()
        return f"{rule}[lazy]: {terminal} {_END}\n{terminal}: {' & '.join(parts)}"

    def _mixed(self, rule: str, key: str, schema: Mapping[str, Any], kinds: set[str]) -> None:
        """Add `rule` for what may be a string or something else, as the parser tells them apart."""
        combined = schema.get("anyOf") or schema.get("oneOf")
        options = [o for o in combined if isinstance(o, Mapping)] if combined else [schema]
        others = sorted(kinds & {*_OTHER})
        names = []
        for option in options:
            found = types_of(option)
            if {"enum", "const"} & {*option}:
                names.append(f"{rule}t{len(names)}")
                self._choices(names[-1], key, option, schema)
                continue
            if "string" in found:
                names.append(f"{rule}t{len(names)}")
                self._rules.append(self._text(names[-1], key, option, others))
            for kind in sorted(found & {*_PLAIN}) if not _NUMERIC & {*option} else ():
                # One terminal with its end, as the texts beside it are.
                names.append(f"{rule}t{len(names)}")
                self._rules.append(f"{names[-1]}[lazy]: /{_PLAIN[kind]}/ {_END}")
            if nested := sorted(found & {"object", "array"}):
                names.append(f"{rule}t{len(names)}")
                self._rules.append(f"{names[-1]}: {names[-1]}j {_END}")
                only = option if combined and len(found) == 1 else {**option, "type": nested}
                self._rules.append(f"{names[-1]}j: {self._json(only)}")
        self._rules.append(f"{rule}: {' | '.join(names)}")

    def _json(self, schema: Mapping[str, Any]) -> str:
        """Return JSON text of `schema` as a part of a rule."""
        kinds = schema.get("type")
        known = {
            "type": sorted(types_of({"type": kinds})) if isinstance(kinds, list)
            else next(iter(types_of({"type": kinds})))
        } if kinds is not None else {}  # fmt: skip
        defs = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        lenient = self._level != Level.STRICT
        options = {"whitespace_pattern": WHITESPACE, "lenient": lenient, "coerce_one_of": lenient}
        return "%json " + json_text({**defs, **schema, **known, "x-guidance": options})


# Between the parts of JSON: enough to indent, and not without end.
WHITESPACE = r"( |\r?\n[ \t]{0,32})?"
_HOW = "use one without look-around, and with ^ and $ only at its ends"


def _spelled(value: Any, schema: Mapping[str, Any], whole: Mapping[str, Any]) -> str | None:
    """Return the text that the parser reads as `value` of `schema`, a part of `whole`, or None."""
    text = value if isinstance(value, str) else json_text(value)
    kinds = types_of(schema)
    fits = type_of(value) in kinds or (type_of(value) == "integer" and "number" in kinds)
    read = json.loads(json_value(text, whole))
    same = read == value and type_of(read) == type_of(value)
    return text if fits and same and not re.search(_STOPS, text) else None


def _anywhere(pattern: str) -> str | None:
    """Return a JSON-schema `pattern` as one that matches whole texts; None if it cannot be had."""
    starts, ends = pattern.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$\Z", pattern))
    inner = pattern[starts : len(pattern) - ends]
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "", inner, flags=re.DOTALL)
    depth = 0
    for letter in bare:
        depth += (letter == "(") - (letter == ")")
        if letter in "^$" or (letter == "|" and depth == 0 and (starts or ends)):
            return None
    if "(?=" in bare or "(?!" in bare or "(?<" in bare:
        return None
    inner = llguidance.regex_to_lark(inner, "dw")
    return f"{'' if starts else '(?s:.*)'}({inner}){'' if ends else '(?s:.*)'}"


def _literal(text: str, end: str = "\n") -> str:
    return json.dumps(text + end, ensure_ascii=False)


def _quote(text: str) -> str:
    """Return a regular expression for `text`."""
    return re.sub(r"[^\w]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)
