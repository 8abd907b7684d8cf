"""Structured output: facts in prose, to be written as JSON, YAML, TOML or CSV that is right.

JSON must also be valid by the schema that is shown. One code fence around the document is allowed.
"""

import csv
import io
import json
import random
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.env import Env, SingleTurn
from aprium.envs.family import optional
from aprium.envs.task import Task, say

_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)\n?```", re.DOTALL)
_ALIAS = re.compile(r"(?:^|[\s\[{,:-])[&*]\w", re.MULTILINE)
_MAX_TEXT = 50_000
_NAMES = ("lamp", "chair", "kettle", "desk", "clock", "mirror", "basket", "ladder", "stove", "rug")
_TAGS = ("new", "heavy", "fragile", "round", "wooden", "cheap", "rare", "blue")
_SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "count": {"type": "integer", "minimum": 0},
                    "price": {"type": "number"},
                    "in_stock": {"type": "boolean"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["name", "count", "price", "in_stock", "tags"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}


def _reject(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return pairs as a mapping; raises ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _read_json(text: str) -> Any:
    value = json.loads(text, parse_constant=_reject, object_pairs_hook=_unique)
    optional("jsonschema").Draft202012Validator(_SCHEMA).validate(value)
    return value


def _read_yaml(text: str) -> Any:
    # Aliases of aliases are how a few lines become gigabytes.
    if _ALIAS.search(text):
        raise ValueError("aliases are not allowed")
    yaml = optional("yaml")
    _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    return yaml.safe_load(text)


def _check_keys(node: Any) -> None:
    """Raise ValueError where a mapping has a key twice, of which the library takes the last."""
    for child in node.value if isinstance(node.value, list) else ():
        for part in child if isinstance(child, tuple) else (child,):
            _check_keys(part)
    if any(isinstance(child, tuple) for child in node.value):
        _unique([(key.value, None) for key, _ in node.value])


def _read_csv(text: str) -> Any:
    rows = list(csv.reader(io.StringIO(text.strip()), strict=True))
    header, *body = rows
    if header != ["name", "count", "price", "in_stock", "tags"]:
        raise ValueError("the header is another")
    return {
        "items": [
            {
                "name": name,
                "count": int(count),
                "price": float(price),
                "in_stock": {"true": True, "false": False}[in_stock],
                "tags": tags.split(";") if tags else [],
            }
            for name, count, price, in_stock, tags in body
        ]
    }


def _write_yaml(value: Any) -> str:
    return optional("yaml").safe_dump(value, sort_keys=False)


def _write_toml(value: Any) -> str:
    lines = []
    for item in value["items"]:
        lines.append("[[items]]")
        lines += [f"{key} = {json.dumps(field)}" for key, field in item.items()]
    return "\n".join(lines)


def _write_csv(value: Any) -> str:
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(("name", "count", "price", "in_stock", "tags"))
    for i in value["items"]:
        stock = "true" if i["in_stock"] else "false"
        writer.writerow((i["name"], i["count"], i["price"], stock, ";".join(i["tags"])))
    return sheet.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """A format: how to ask for it, read and write it."""

    words: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]


FORMATS: dict[str, _Format] = {
    "json": _Format(
        words=f"a JSON document that is valid by this schema:\n{json.dumps(_SCHEMA)}\n",
        read=_read_json,
        write=lambda value: json.dumps(value, indent=1),
    ),
    "yaml": _Format(
        words="a YAML document: a mapping with the key items, a list of mappings with the keys "
        "name, count, price, in_stock and tags (a list).",
        read=_read_yaml,
        write=_write_yaml,
    ),
    "toml": _Format(
        words="a TOML document: an array of tables items, each with the keys name, count, price, "
        "in_stock and tags (an array).",
        read=tomllib.loads,
        write=_write_toml,
    ),
    "csv": _Format(
        words="a CSV table with the header name,count,price,in_stock,tags where in_stock is true "
        "or false and tags are joined by semicolons.",
        read=_read_csv,
        write=_write_csv,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """Lists of up to `items` things in `formats` (empty for all)."""

    formats: tuple[str, ...] = ()
    items: int = 4
    domain: str = "structured"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for name in self.formats:
            if name not in FORMATS:
                raise TaskError(f"no format {name!r}: choose of {', '.join(FORMATS)}")
        if not 1 <= self.items <= len(_NAMES):
            raise TaskError(f"items is {self.items}: it must be 1 to {len(_NAMES)}")

    def draw(self, rng: random.Random) -> Task:
        """Make a list and say it in prose."""
        name = rng.choice(self.formats or tuple(FORMATS))
        names = rng.sample(_NAMES, rng.randint(1, self.items))
        items = [
            {
                "name": rng.choice((thing, f"{thing}, large", f'{thing} "Nova"')),
                "count": rng.randint(0, 40),
                "price": rng.randint(100, 9999) / 100,
                "in_stock": rng.random() < 0.5,
                "tags": rng.sample(_TAGS, rng.randint(0, 3)),
            }
            for thing in names
        ]
        prose = " ".join(_sentence(item) for item in items)
        text = (
            f"{prose}\n\nWrite this, in this order and with tags in the order given, as "
            f"{FORMATS[name].words} Answer with nothing but the document."
        )
        value = {"items": items}
        return Task(
            domain=self.domain,
            key=f"{name} {prose}",
            messages=(say(text, role="user"),),
            data={"format": name, "value": value},
            solution=(say(f"```{name}\n{FORMATS[name].write(value)}\n```"),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one document."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return nothing, prose around it, half, other values, another format, and it twice."""
        name, value = task.data["format"], task.data["value"]
        write = FORMATS[name].write
        first, *rest = value["items"]
        other = {"items": [{**first, "count": first["count"] + 1}, *rest]}
        less = {"items": [{**first, "in_stock": not first["in_stock"]}, *rest]}
        wrong_format = FORMATS["json" if name in ("csv", "toml") else "toml"].write(value)
        good = write(value).rstrip()
        texts = ["", f"Here it is: {good}", good[: len(good) // 2], wrong_format]
        texts += [write(other), write(less), f"{good}\n{good}"]
        return [(say(text),) for text in texts]


def _sentence(item: Mapping[str, Any]) -> str:
    tags = f"tags {', '.join(item['tags'])}" if item["tags"] else "no tags"
    stock = "in stock" if item["in_stock"] else "not in stock"
    return f"{item['name']}: count {item['count']}, price {item['price']}, {stock}, {tags}."


def _grade(task: Task, reply: Message) -> dict[str, float]:
    text = (reply.content or "").strip()
    fence = _FENCE.fullmatch(text)
    text = fence[1] if fence else text
    expected, name = task.data["value"], task.data["format"]
    parses, found = False, None
    if 0 < len(text) <= _MAX_TEXT:
        try:
            found, parses = FORMATS[name].read(text), True
        except TaskError:
            raise
        except Exception:  # whatever a parser says of text that is none
            parses = False
    right = parses and _same(found, expected)
    return {"reward": float(right), "parses": float(parses)}


def _same(found: Any, expected: Any) -> bool:
    """Compare values and their types, an integer being a number too but true none."""
    if isinstance(expected, dict):
        keys = isinstance(found, dict) and found.keys() == expected.keys()
        return keys and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        long = isinstance(found, list) and len(found) == len(expected)
        return long and all(map(_same, found, expected))
    if isinstance(expected, float):
        number = isinstance(found, int | float) and not isinstance(found, bool)
        return number and found == expected
    return type(found) is type(expected) and found == expected
