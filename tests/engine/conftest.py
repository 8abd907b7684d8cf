"""A toy model with random weights, with and without a byte-level tokenizer beside it."""

import dataclasses

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from aprium.checkpoint.load import load_checkpoint

SPECIAL = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 10))]
SPECIAL += ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{{ '<think>' if enable_thinking else '' }}"
)


@pytest.fixture(scope="session")
def toy():
    """The toy preset, random weights; no files, so no tokenizer."""
    return load_checkpoint("toy", load_format="dummy")


@pytest.fixture(scope="session")
def text_toy(toy, tmp_path_factory):
    """The same model with a tokenizer: ids 0 to 15 special, 16 + b the byte b."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    byte_of = {c: b for b, c in _byte_letters().items()}
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    vocab |= {letter: 16 + byte_of[letter] for letter in letters}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    directory = tmp_path_factory.mktemp("toy")
    backend.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return dataclasses.replace(toy, path=directory)


def _byte_letters():
    """The table of byte-level BPE: byte -> letter."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain}
    return table | {b: chr(256 + i) for i, b in enumerate(others)}
