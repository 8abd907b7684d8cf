"""The page's Markdown, against markdown-it and against itself however the text comes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from markdown_it import MarkdownIt

pytestmark = pytest.mark.browser

RENDER = """async (texts) => {
  const { MarkdownView } = await import('/web/markdown.js');
  const strip = (node) => {
    for (const button of node.querySelectorAll('button')) button.remove();
    return node;
  };
  return texts.map((parts) => {
    const root = document.createElement('div');
    const view = new MarkdownView(root);
    for (const part of parts) view.update(part);
    return strip(root).innerHTML;
  });
}"""

TEXTS = [
    "one\ntwo\n\nthree",
    "# A\n\n## B `c` #\n\n###### D\nE",
    "*a* **b** ***c*** _d_ __e__ ~~f~~",
    "snake_case_name and 2*3*4 and 2 * 3 * 4",
    "**bold *inner* bold**",
    "a \\*b\\* \\\\ \\q",
    "`a` ``b ` c`` `` ` `` `open",
    "- a\n- b\n  - c\n  - d\n- e",
    "1. a\n2. b\n\n   c\n3. d",
    "3) x\n4) y",
    "- a\n\n- b",
    "* a\n* b\n\ntext",
    "> a\n> b\n>\n> - c",
    "---\n\n***\n\n_ _ _",
    "| a | b |\n|:--|--:|\n| 1 | `2` |\n| 3 | **4** |\n\nend",
    "```python\nx = 1 < 2\n\n# y\n```\nafter",
    "~~~\na\n~~~",
    "```\nopen\n  more",
    '[a](https://x.org/y "t") [b](/rel) <https://z.org>',
    "[c](javascript:alert(1)) [d](data:text/html,x) [e](vbscript:x)",
    "<b>raw</b> & <script>x</script>",
    "a  \nb\\\nc",
    "1. a\n   ```js\n   f()\n   ```\n2. b",
    "> ```\n> code\n> ```",
    "text\n- item\n- item",
    "text\n# heading",
    "**a",
    "!x [y] (z) [w](",
    "- [ ] todo\n- [x] done",
    "é **ü** ß",
]


def reference(text: str) -> str:
    markdown = MarkdownIt("commonmark", {"breaks": True, "html": False})
    return markdown.enable(["table", "strikethrough"]).render(text)


# HTML as nested tags and text, without what the two renderers do differently.
OUTLINE = """([html, reference]) => {
  const walk = (node) => {
    if (node.nodeType === 3) return node.data.replace(/\\s+/g, ' ');
    const names = {H1: 'H3', H2: 'H4', H3: 'H5', H4: 'H6', H5: 'H6', S: 'DEL'};
    const inner = [...node.childNodes].map(walk).join('').trim();
    const name = reference ? names[node.tagName] ?? node.tagName : node.tagName;
    if (['DIV', 'FIGURE', 'BODY', 'SPAN', 'TBODY', 'THEAD'].includes(name)) return inner;
    if (name === 'FIGCAPTION') return '';
    if (name === 'P' && node.parentNode.tagName === 'LI') return `${inner} `;
    const link = name === 'A' ? new URL(node.getAttribute('href'), 'https://none/') : null;
    if (link && link.host === 'none') return inner;
    return `<${name}${link ? ' ' + link.href : ''}>${inner}</${name}>`;
  };
  return walk(new DOMParser().parseFromString(html, 'text/html').body);
}"""


def outlines(page: Any, texts: list[str], reference: bool) -> list[str]:
    found = [page.evaluate(OUTLINE, [text, reference]) for text in texts]
    tags = r"\s*(</?(?:P|BR|LI|UL|OL|H\d|HR|BLOCKQUOTE|PRE|TABLE|T[RHD])\b[^>]*>)\s*"
    return [re.sub(" +", " ", re.sub(tags, r"\1", text)) for text in found]


def test_against_a_reference(pico: str, show: Callable[..., Any], browser: Any) -> None:
    page = show(pico)
    made = page.evaluate(RENDER, [[text] for text in TEXTS])
    scratch = browser.new_page()  # without the policy, which forbids to parse markup
    wanted = outlines(scratch, [reference(text) for text in TEXTS], True)
    found = outlines(scratch, made, False)
    scratch.close()
    pairs = zip(TEXTS, found, wanted, strict=True)
    different = [pair for pair in pairs if pair[1] != pair[2]]
    assert not different, different


def test_it_is_the_same_however_it_comes(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    for text in [*TEXTS, "\n\n".join(TEXTS)]:
        step = max(1, len(text) // 60)
        parts = [text[:end] for end in range(0, len(text), step)] + [text]
        whole, grown = page.evaluate(RENDER, [[text], parts])
        assert grown == whole, text
