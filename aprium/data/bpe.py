"""Train a byte-level BPE tokenizer with the family's special tokens, pattern and chat template.

The result is a directory that this package and transformers' `PreTrainedTokenizerFast` open. Words
are split as in tekken: at changes of case, digits singly, punctuation and white space in runs.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from aprium.base.errors import DataError
from aprium.data.rows import Row, Rows, find_files

SPECIAL = (
    "<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 10)),
    "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
)  # fmt: skip
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
TEMPLATE = Path(__file__).parent.parent / "pico_checkpoint" / "chat_template.jinja"
_LEAST = len(SPECIAL) + 256
_MOST = 1 << 20  # tokens; the largest published vocabularies have a quarter of it
_CHUNK = 1 << 12  # characters of a plain text, to the end of the line, that count as one text
_HELD_OUT = 50  # one text in so many is measured on


def train(
    files: Sequence[Path],
    output: Path,
    *,
    vocab_size: int,
    template: Path = TEMPLATE,
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """Train on `files` and write the tokenizer to directory `output`.

    Files are JSONL or Parquet with `text` or `messages`, or plain text; `max_bytes` of them are
    read. Returns figures: tokens, texts, bytes read, and, of more than one text, bytes a token on
    those held out: by a hash of theirs, or the last. Raises DataError.
    """
    counts = {"texts": 0, "bytes": 0}

    def counted() -> Iterator[str]:
        for text in read_texts(files, max_bytes):
            counts["texts"] += 1
            counts["bytes"] += len(text.encode())
            yield text

    held: list[str] = []
    backend = train_bpe(_hold_out(counted(), held), vocab_size)
    if not counts["bytes"]:
        raise DataError(f"{', '.join(map(str, files))}: no text to train on")
    try:
        write(backend, output, template)
    except OSError as error:
        raise DataError(f"cannot write the tokenizer to {output}: {error}") from error
    size = sum(len(text.encode()) for text in held)
    tokens = sum(len(encoding.ids) for encoding in backend.encode_batch(held))
    measured = {"bytes_per_token": round(size / tokens, 3)} if tokens else {}
    return {"vocab_size": backend.get_vocab_size(), **counts, **measured}


def _hold_out(texts: Iterable[str], held: list[str]) -> Iterator[str]:
    """Yield what to learn of `texts` and add the rest to `held`.

    Each side gets one if there are two.
    """
    learnt, last = 0, None
    for text in texts:
        if hashlib.sha256(text.encode()).digest()[0] < 256 // _HELD_OUT:
            held.append(text)
            continue
        if last is not None:
            learnt += 1
            yield last
        last = text
    if last is None and held:
        last = held.pop()
    if last is not None and learnt and not held:
        held.append(last)
    elif last is not None:
        yield last


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = PATTERN) -> Backend:
    """Return a byte-level BPE of at most `vocab_size` tokens.

    Raises DataError for too few or too many.
    """
    if vocab_size > _MOST:
        raise DataError(f"vocab_size is {vocab_size}: it must be at most {_MOST}")
    if vocab_size < _LEAST:
        raise DataError(
            f"vocab_size is {vocab_size}: it must be at least {_LEAST}, the bytes and "
            f"{len(SPECIAL)} special tokens"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    assert [backend.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    return backend


def write(
    backend: Backend, output: Path, template: Path, generation: dict[str, Any] | None = None
) -> None:
    """Write the files of a tokenizer as a published checkpoint has them.

    `generation` are further recommendations for sampling.
    """
    output.mkdir(parents=True, exist_ok=True)
    backend.save(str(output / "tokenizer.json"))
    shutil.copyfile(template, output / "chat_template.jinja")
    names = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }
    config = names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    ids = {"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}
    for name, data in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
        ("generation_config.json", ids | (generation or {})),
    ):
        (output / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_texts(files: Sequence[Path], max_bytes: int | None = None) -> Iterator[str]:
    """Yield the texts of `files` that are not empty, up to `max_bytes` of them in all.

    The last one is cut there, after a whole character. A lone surrogate becomes a question mark, as
    when the tokenizer is used.
    """
    left = sys.maxsize if max_bytes is None else max_bytes
    for file in (file for path in files for file in find_files(path)):
        for text in _texts(file):
            content = text.encode("utf-8", "replace")[:left]
            if clean := content.decode("utf-8", "ignore"):
                yield clean
            left -= len(content)
            if left <= 0:
                return


def _texts(file: Path) -> Iterator[str]:
    if file.suffix in (".jsonl", ".ndjson", ".parquet"):
        rows = Rows([file], ("text", "messages"))
        for number in range(len(rows)):
            yield from _of_row(rows[number])
        return
    try:
        with file.open(encoding="utf-8") as stream:
            while lines := stream.readlines(_CHUNK):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file} as text: {error}") from error


def _of_row(row: Row) -> Iterator[str]:
    """Yield what a row says: its text, or what its messages hold, tags left out."""
    if isinstance(row.data.get("text"), str):
        yield row.data["text"]
        return
    messages = row.data.get("messages")
    if not isinstance(messages, list):
        raise DataError(f"{row.where}: it has neither 'text' nor 'messages'")
    for message in messages:
        for name in ("reasoning", "reasoning_content", "content"):
            if isinstance(message, dict) and isinstance(message.get(name), str):
                yield message[name]
