"""Token sequences to calibrate and measure on: from a file, or written by the model itself.

A model's own text, drawn at temperature 1 from the start of a user's turn, calibrates about as well
as real text and needs none. Source: arXiv 2410.17170 (self-calibration), 2406.08464 (the prompt).
"""

from collections.abc import Sequence
from pathlib import Path

from aprium.base.errors import ApriumError, DataError, TemplateError
from aprium.base.records import Message, SamplingParams
from aprium.data.conversation import Style, conversation
from aprium.data.rows import Row, Rows
from aprium.data.sources import Text, read_conversation
from aprium.engine.client import LLM
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

_MARK = "\ue000"  # stands for what a user says
_BATCH = 32


def read_samples(path: Path, model: Path, *, count: int, length: int) -> list[list[int]]:
    """Return up to `count` sequences of at most `length` tokens from `path`.

    A JSONL or Parquet file has a `text` or `messages` in every row; any other file is plain text,
    cut into pieces of `length`. `model` is the directory of tokenizer and template. Raises
    DataError.
    """
    tokenizer = Tokenizer.load(model)
    if path.suffix not in (".jsonl", ".parquet"):
        try:
            tokens = tokenizer.encode(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        found = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    else:
        text = Text(tokenizer, ChatTemplate.load(model))
        rows = Rows([path], ("messages", "tools", "text"))
        found = [_read_row(rows[i], text)[:length] for i in range(min(count, len(rows)))]
    found = [tokens for tokens in found if len(tokens) > 1][:count]
    if not found:
        raise DataError(f"{path} holds no text to calibrate on")
    return found


def _read_row(row: Row, text: Text) -> list[int]:
    if "messages" in row.data:
        try:
            messages, tools, _ = read_conversation(row.data["messages"], row.data.get("tools"))
            style = Style(learn="last")
            (sample,) = conversation(
                messages, text.tokenizer, text.template, "", tools=tools, style=style
            )
        except ApriumError as error:
            raise DataError(f"{row.where}: {error}") from error
        return list(sample.tokens)
    if "text" not in row.data:
        raise DataError(f"{row.where}: it has neither 'text' nor 'messages'")
    if not isinstance(row.data["text"], str):
        raise DataError(f"{row.where}: 'text' is {row.data['text']!r}, not a string")
    return text.tokenizer.encode(row.data["text"])


def write_samples(model: Path, *, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Let `model` write `count` sequences of `length` tokens, the same for the same `seed`.

    Raises DataError for a `length` that leaves no room after the prompt.
    """
    prompt = _prompt(model)
    room = length - len(prompt)
    if room < 1:
        raise DataError(f"samples of {length} tokens are too short: take more than {len(prompt)}")
    with LLM(model, max_model_len=length, max_num_seqs=_BATCH) as llm:
        completions = llm.generate(
            [prompt] * count,
            [
                SamplingParams(temperature=1.0, max_tokens=room, ignore_eos=True, seed=seed + i)
                for i in range(count)
            ],
        )
    return [[*prompt, *completion.tokens] for completion in completions]


def _prompt(model: Path) -> list[int]:
    """Return the tokens before a user's words."""
    try:
        text = ChatTemplate.load(model).render([Message(role="user", content=_MARK)], ())
    except TemplateError as error:
        raise DataError(
            f"the model cannot write its own samples ({error}): give a file to calibrate on, or "
            "measure nothing with a recipe that needs no calibration"
        ) from error
    return Tokenizer.load(model).encode(text.partition(_MARK)[0])


def split(samples: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Hold every fourth sequence out: what to calibrate on, and what to measure on."""
    kept = [tokens for i, tokens in enumerate(samples) if i % 4 != 3]
    held = [tokens for i, tokens in enumerate(samples) if i % 4 == 3]
    return (kept, held) if held else (list(samples), list(samples))
