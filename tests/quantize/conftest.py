"""A small checkpoint to quantise, and token sequences."""

import random
from pathlib import Path

import pytest

from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.save import save_checkpoint
from aprium.text.tokenizer import Tokenizer

TEXT = [
    f"{a} {verb} the {b} near the {c}."
    for a in ("A snake", "The teacher", "My brother", "A plum")
    for verb in ("sees", "finds", "takes")
    for b, c in (("stone", "river"), ("bread", "window"))
]


@pytest.fixture(scope="session")
def samples() -> list[list[int]]:
    tokenizer = Tokenizer.load(PICO_DIR)
    return [tokenizer.encode(text) for text in TEXT]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy shape with random weights, in published layout."""
    path = tmp_path_factory.mktemp("toy")
    save_checkpoint(load_checkpoint("toy").model, path)
    return path


@pytest.fixture(scope="session")
def numbers() -> list[list[int]]:
    """Sequences for the toy shape, which has no tokenizer."""
    rng = random.Random(0)
    return [[rng.randrange(64) for _ in range(40)] for _ in range(8)]
