"""The chat format of pico, for episodes of a scripted policy."""

import pytest

from aprium.checkpoint.hub import PICO_DIR
from aprium.envs.dialogue import ChatFormat
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    return ChatFormat(tokenizer=Tokenizer.load(PICO_DIR), template=ChatTemplate.load(PICO_DIR))
