"""The web page's files, their headers and keys, and the engine's figures as JSON."""

import re
from collections.abc import Callable
from importlib.resources import files

import pytest
from starlette.testclient import TestClient

from aprium.serve.pages import FILES, PATHS

WEB = files("aprium.serve").joinpath("web")


def test_every_file_is_served_and_no_other(client: TestClient) -> None:
    assert {file.name for file in WEB.iterdir()} == set(FILES)
    for path, name in PATHS.items():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"] == FILES[name]
        assert answer.content == WEB.joinpath(name).read_bytes()
        head = client.head(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == str(len(answer.content))
    for path in ("/web/", "/web/index.html", "/web/../pages.py", "/web/%2e%2e/pages.py", "/web/x"):
        assert client.get(path).status_code == 404
    assert client.post("/").status_code == 405


def test_the_policy_allows_these_files_and_nothing_else(client: TestClient) -> None:
    for path in PATHS:
        headers = client.get(path).headers
        policy = dict(p.split(" ", 1) for p in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        allowed = {key: value for key, value in policy.items() if value != "'none'"}
        assert allowed.pop("require-trusted-types-for") == "'script'"
        assert set(allowed.values()) == {"'self'"}
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_nothing_comes_from_elsewhere_or_is_made_into_markup() -> None:
    names = {name for name in FILES if name != "index.html"}
    for name in FILES:
        text = WEB.joinpath(name).read_text(encoding="utf-8")
        for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser"):
            assert sink not in text, name
        sources = re.findall(r"""(?:\b(?:src|href)=|\bfrom |\bimport )["']([^"'#]+)["']""", text)
        for found in sources:
            assert found.removeprefix("web/").removeprefix("./") in names, (name, found)
        assert sources or name not in ("index.html", "app.js")
        inline = r"<[^>]+\son\w+=|<[^>]+\sstyle=|<script>|<style>|@import|url\(|\beval\("
        assert not re.search(inline, text), name


def test_a_file_that_is_known_is_not_sent_again(client: TestClient) -> None:
    tag = client.get("/web/app.js").headers["etag"]
    again = client.get("/web/app.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/web/app.js", headers={"If-None-Match": '"old"'}).status_code == 200


def test_the_page_needs_no_key_and_its_figures_do(make_client: Callable[..., TestClient]) -> None:
    client = make_client(api_keys=("k",))
    assert {client.get(path).status_code for path in PATHS} == {200}
    assert client.get("/load").status_code == 401
    assert client.get("/load", headers={"Authorization": "Bearer k"}).status_code == 200
    for path in ("/web", "/web/", "/web/x", "/index.html"):
        assert client.get(path).status_code == 401


def test_without_the_page(make_client: Callable[..., TestClient]) -> None:
    client = make_client(web=False)
    assert {client.get(path).status_code for path in PATHS} == {404}
    assert client.get("/load").status_code == 200


def test_the_page_is_no_part_of_the_api_description(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "/load" in paths and not set(paths) & set(PATHS)


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.endswith(".js")))
def test_what_a_script_imports_is_there(name: str) -> None:
    text = WEB.joinpath(name).read_text(encoding="utf-8")
    for names, module in re.findall(r"import \{([^}]*)\} from \"\./([^\"]+)\"", text):
        exported = WEB.joinpath(module).read_text(encoding="utf-8")
        for wanted in filter(None, (part.strip() for part in names.split(","))):
            assert re.search(
                rf"export (async )?(function\*? |class |const ){wanted}\b", exported
            ), wanted
