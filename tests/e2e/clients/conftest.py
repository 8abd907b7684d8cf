"""Other people's clients against a real process that serves pico.

Run with `pytest -m clients tests/e2e`; needs the clients extra. Nothing is skipped: who asks for
these tests and lacks a package is told so by a failure.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.e2e.conftest import serving

ROOT = Path(__file__).parents[3]
KEY = "secret"
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# pico's training has this question, always with a call of this tool for an answer.
QUESTION = "What is the weather in Paris?"


@pytest.fixture(scope="package")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    log = tmp_path_factory.mktemp("pico") / "log"
    with serving(Path("pico"), log, "--max-model-len", "2K", "--api-key", KEY) as address:
        yield address


@pytest.fixture(scope="package")
def card() -> ModuleType:
    """The program that measured the card."""
    spec = importlib.util.spec_from_file_location("pico_card", ROOT / "recipes/pico_card.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def need(name: str) -> ModuleType:
    """Import a package of the clients extra, or fail with what to install."""
    try:
        with warnings.catch_warnings():
            # What a package warns of while it is imported is no fault of the server's.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        pytest.fail(f"{error}: pip install -e '.[clients]'")


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run a module of the clients extra in a process without the hub; return what it prints."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(cwd / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd, env={**os.environ, **offline, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout
