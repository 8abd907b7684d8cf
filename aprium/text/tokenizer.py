"""Text to token ids and back: a checkpoint's own `tokenizer.json`, with an incremental decoder.

The family's tokenizers are byte-level BPE, so a token is a run of bytes and decoding is exact
whatever the split: ids become bytes, and bytes become text when a character is complete. The end
tokens are gathered from every file that names one, because the tokenizer's own (11) is not the
only one generation stops on (2 and 11).

Does not render conversations (`text/chat`) and does not look for tags in text (`text/parse`).
"""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from aprium.base.errors import CheckpointError

# Tags that are part of what the model says: `text/parse` reads them, so they survive
# `skip_special_tokens` even where a tokenizer marks them special.
_SPOKEN = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})


def _byte_of_letter() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for.

    Printable bytes stand for themselves; the others are numbered on from 256 (the GPT-2 table).
    """
    table, extra = {}, 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            table[chr(byte)] = byte
        else:
            table[chr(extra)] = byte
            extra += 1
    return table


_BYTE = _byte_of_letter()


class Tokenizer:
    """The tokenizer of one checkpoint; safe to share between threads.

    `eos_token_ids` are all ids that end a generation; `special_ids` those that `decode` leaves out.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: Sequence[int] = ()) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise CheckpointError(
                f"tokenizer.json decodes with {type(backend.decoder).__name__}: only byte-level "
                "tokenizers, as every checkpoint of this family has, can be used"
            )
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(
            id for id, token in added.items() if token.special and token.content not in _SPOKEN
        )

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read the tokenizer of the checkpoint in `directory`.

        Raises CheckpointError when `tokenizer.json` is missing or damaged.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist: copy tokenizer.json and tokenizer_config.json of the "
                "checkpoint into that directory"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        return cls(backend, _eos_token_ids(Path(directory), backend))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Turn `text` into token ids; `add_special_tokens` adds those the file asks for."""
        # A lone surrogate (from a JSON escape) has no UTF-8 form: it becomes a question mark.
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return self._backend.encode(clean, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        Ids beyond the vocabulary give no text. Special tokens are left out by default, but never
        the reasoning and tool-call tags.
        """
        pieces = (self._piece(id, skip_special_tokens) for id in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """Return an incremental decoder whose pieces add up to `decode` of all ids."""
        return TextStream(self, skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes token `id` stands for (none for an id beyond the vocabulary)."""
        if id not in self._bytes:
            token = self._backend.id_to_token(id) or ""
            letters = [_BYTE.get(letter) for letter in token]
            plain = [byte for byte in letters if byte is not None]
            # An added token may hold letters outside the table (a space); it stands for itself.
            complete = len(plain) == len(letters)
            self._bytes[id] = bytes(plain) if complete else token.encode("utf-8")
        return self._bytes[id]

    def end_text(self, id: int) -> str:
        """Return how a token that ends a generation is spelled, "" for any other."""
        return self.decode([id], skip_special_tokens=False) if id in self.eos_token_ids else ""

    def id_of(self, token: str) -> int | None:
        """Return the id of `token` spelled as in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    def first_difference(self, other: "Tokenizer") -> int | None:
        """Return the lowest id that is another token in `other`, None where all are the same."""
        mine, others = self._backend.id_to_token, other._backend.id_to_token
        count = max(self.vocab_size, other.vocab_size)
        return next((id for id in range(count) if mine(id) != others(id)), None)

    def _piece(self, id: int, skip_special_tokens: bool) -> bytes:
        if skip_special_tokens and id in self.special_ids:
            return b""
        return self.token_bytes(id)


class TextStream:
    """Decode ids as they come; never gives half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids and return the text they complete."""
        return self._utf8.decode(b"".join(self._tokenizer._piece(id, self._skip) for id in ids))

    def flush(self) -> str:
        """Return what is left: U+FFFD for a character that was cut off, else nothing."""
        return self._utf8.decode(b"", final=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in JSON file `path`, {} when there is no such file.

    Raises CheckpointError when it holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}: a JSON object is needed")
    return data


def _eos_token_ids(directory: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """Return the union of the end tokens named by the checkpoint's files, in first-seen order."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        value = read_json(path).get("eos_token_id")
        for id in value if isinstance(value, list) else [value]:
            if id is None:
                continue
            if isinstance(id, bool) or not isinstance(id, int):
                raise CheckpointError(f"{path}: eos_token_id is {value!r}: ids must be integers")
            found.append(id)
    token = read_json(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and (id := backend.token_to_id(token)) is not None:
        found.append(id)
    return list(dict.fromkeys(found))
