"""A tokenizer directory of the family's form."""

from pathlib import Path

import pytest

from aprium.text.tokenizer import Tokenizer
from tests import family


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family")
    family.write_tokenizer(path)
    family.write_generation_config(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)
