"""Chromium over real server processes, and what tests do to a page.

`pico` answers; `noise` is the same with random weights, which thinks until it is told to stop, and
wants a key. Run with `pytest -m browser`; needs the browser extra and a Chromium on the path.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aprium.checkpoint.hub import resolve
from tests.e2e.conftest import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
KEY = "secret"
DESK = {"width": 1200, "height": 760}


@pytest.fixture(scope="package")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("pico")
    draft = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}')
    greedy = ("--override-generation-config", '{"temperature": 0}')
    with serving(Path("pico"), path / "log", "--session-dir", str(path), *draft, *greedy) as found:
        yield found


@pytest.fixture(scope="package")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("noise") / "log"
    flags = ("--load-format", "dummy", "--api-key", KEY, "--served-model-name", "noise")
    greedy = ("--override-generation-config", '{"temperature": 0}')
    with serving(resolve("pico"), log, *flags, *greedy) as found:
        yield found


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page; an error in its console fails the test."""
    contexts, errors = [], []

    def note(message: Any) -> None:
        asked_for = re.search("40[14]|TrustedHTML", message.text)  # tests ask for these
        if message.type in ("error", "warning") and not asked_for:
            errors.append(message.text)

    def make(address: str, key: str = "", ready: bool = True, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        if key:
            page.add_init_script(f"sessionStorage.setItem('aprium.key', '{key}')")
        page.goto(address)
        if ready:
            until(page, "document.getElementById('model').textContent")
        return page

    yield make
    for context in contexts:
        context.close()
    assert not errors


def until(page: Any, expression: str, arg: Any = None) -> None:
    """Wait until `expression` holds; the page's policy lets nothing in it do that."""
    for _ in range(400):
        if page.evaluate(expression, arg):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not in 20 s: {expression}")
