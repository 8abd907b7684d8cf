"""The web page in Chromium: asking, thinking, tools, stopping, sessions, keys, figures, safety."""

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from tests.e2e.browser.conftest import KEY, until

pytestmark = pytest.mark.browser
PHONE: dict[str, Any] = {
    "viewport": {"width": 360, "height": 700}, "has_touch": True, "is_mobile": True
}  # fmt: skip


def send(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def wait_for_end(page: Any) -> None:
    until(page, "!document.querySelector('#send.stop, [aria-busy=true]')")


def ask(page: Any, text: str) -> str:
    """Send, wait for the end, and return what the last answer says."""
    before = page.locator(".answer").count()
    send(page, text)
    page.locator(".answer").nth(before).wait_for()
    wait_for_end(page)
    return page.locator(".answer").last.locator(".markdown").inner_text()


def never_ending(page: Any) -> None:
    """Let answers go on past their end, so that there is time to do something to them."""

    def change(route: Any) -> None:
        body = {**json.loads(route.request.post_data), "ignore_eos": True}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", change)


def test_ask_and_be_answered(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    assert page.locator("#welcome").is_visible()
    said = ask(page, "What is 2 + 3?")
    body = {"messages": [{"role": "user", "content": "What is 2 + 3?"}]}
    chat = httpx2.post(f"{pico}/v1/chat/completions", json=body).json()
    message = chat["choices"][0]["message"]
    assert said == message["content"]
    thinking = page.locator(".answer details.fold")
    assert not thinking.evaluate("node => node.open")  # folded
    assert not page.locator(".reasoning").is_visible()
    thinking.locator("summary").press("Enter")
    assert page.locator(".reasoning").inner_text().strip() == message["reasoning"].strip()
    assert page.locator("#welcome").is_hidden()
    assert "tokens" in page.locator(".figures").inner_text()
    assert f"{chat['usage']['total_tokens']} of 8,192" in page.locator("#context").inner_text()
    assert page.locator("#session-list .title").first.inner_text() == "What is 2 + 3?"
    assert page.evaluate("document.activeElement.id") != "body"


def test_a_conversation_is_there_again_after_a_reload(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    said = [ask(page, "Spell the word house."), ask(page, "What is 4 + 4?")]
    page.reload()
    page.locator(".answer").nth(1).wait_for()
    assert page.locator(".answer .markdown").all_inner_texts() == said
    assert page.locator(".user p").all_inner_texts() == ["Spell the word house.", "What is 4 + 4?"]


def test_settings_are_sent_and_kept(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    page.click("#open-settings")
    given = {"temperature": "0.5", "top_p": "0.9", "max_tokens": "40", "seed": "7"}
    for name, value in {**given, "thinking_budget": "8"}.items():
        page.fill(f"[name={name}]", value)
    page.fill("[name=system]", "Be brief.")
    page.click("#settings .primary")
    page.reload()
    until(page, "document.getElementById('model').textContent")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is 1 + 1?")
    body = sent.value.post_data_json
    assert {name: body[name] for name in given} == {k: float(v) for k, v in given.items()}
    assert body["thinking_token_budget"] == 8
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert [m["role"] for m in body["messages"]] == ["system", "user"] and "session" in body
    page.click("#open-settings")
    page.uncheck("[name=thinking]")
    page.fill("[name=tools]", "{")
    page.click("#settings .primary")
    assert page.locator("#settings").is_visible()  # what is wrong is not taken
    assert "not JSON" in page.locator("#tools-problem").inner_text()
    page.fill("[name=tools]", "")
    page.click("#settings .primary")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is 1 + 2?")
    body = sent.value.post_data_json
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "thinking_token_budget" not in body
    assert [m["role"] for m in body["messages"]] == ["user"]
    assert page.locator(".answer").last.locator(".thinking").is_hidden()


def test_a_refusal_is_told_and_can_be_tried_again(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    page.on("console", lambda message: None)
    body = {"error": {"message": "the queue is full", "type": "x", "param": None, "code": 503}}
    answers = iter([{"status": 200, "body": f"data: {json.dumps(body)}\n\n"}])

    def refuse(route: Any) -> None:
        answer = next(answers, None)
        route.fulfill(**answer) if answer else route.continue_()

    page.route("**/v1/chat/completions", refuse)
    ask(page, "What is 2 + 2?")
    note = page.locator(".note.failed")
    assert "the queue is full" in note.inner_text() and note.get_attribute("role") == "alert"
    note.get_by_role("button", name="Try again").click()
    page.locator(".figures").wait_for()
    assert page.locator(".answer").count() == 1 and page.locator(".note").is_hidden()


def test_a_tool_is_called_and_answers(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    page.click("#open-settings")
    page.click("#example")
    page.select_option("[name=tool_choice]", "required")
    page.click("#settings .primary")
    ask(page, "What is the weather in Rome?")
    call = page.locator(".call")
    assert call.locator("h3").inner_text() == "Calls get_weather"
    assert json.loads(call.locator("pre").inner_text()) == {"city": "Rome"}
    page.fill(".outcome textarea", '{"sky": "clear"}')
    page.click("#open-settings")
    page.select_option("[name=tool_choice]", "auto")
    page.click("#settings .primary")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Send result").click()
    (message,) = sent.value.post_data_json["messages"]
    assert (message["role"], message["content"]) == ("tool", '{"sky": "clear"}')
    page.locator(".answer").nth(1).wait_for()
    wait_for_end(page)
    page.reload()
    page.locator(".answer").nth(1).wait_for()
    shown = page.locator(".call").first.locator("pre").all_inner_texts()
    assert [json.loads(text) for text in shown] == [{"city": "Rome"}, {"sky": "clear"}]


def test_forks_retries_and_deletes(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    items = page.locator("#session-list li")
    first = ask(page, "Spell the word forest.")
    until(page, "document.querySelector('.title')?.textContent === 'Spell the word forest.'")
    number, address = items.count(), page.url
    page.click("#fork")
    until(page, "old => location.href !== old", arg=address)
    page.locator("#session-list .facts", has_text="fork").first.wait_for()
    assert items.count() == number + 1
    assert page.locator(".answer .markdown").all_inner_texts() == [first]
    ask(page, "What is 3 + 3?")
    fork = page.url
    page.goto(address)
    until(page, "document.querySelectorAll('.answer').length === 1")
    page.locator(".answer .retry").click()
    until(page, "old => location.href !== old", arg=address)
    page.locator(".figures").wait_for()
    assert page.locator(".answer .markdown").all_inner_texts() == [first]  # greedy: the same again
    page.goto(fork)
    until(page, "document.querySelectorAll('.answer').length === 2")
    before = items.count()
    current = page.locator("#session-list li", has=page.locator("[aria-current]"))
    current.hover()
    current.get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    assert items.count() == before
    current.get_by_role("button", name="Delete").click()
    page.locator("#confirm .danger").click()
    until(page, "n => document.querySelectorAll('#session-list li').length < n",
                           arg=before)  # fmt: skip
    assert page.locator("#welcome").is_visible() and items.count() == before - 1
    page.goto(fork)
    page.locator("#toast").wait_for()
    assert "there is no session" in page.locator("#toast").inner_text().lower()


def test_a_key_is_asked_for_and_kept_for_the_tab(noise: str, show: Callable[..., Any]) -> None:
    page = show(noise, ready=False)
    page.locator("#key[open]").wait_for()
    assert page.locator("#key-problem").is_hidden()
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    page.locator("#key-problem").wait_for()
    page.fill("#key-field", KEY)
    page.keyboard.press("Enter")
    until(page, "document.getElementById('model').textContent === 'noise'")
    assert page.evaluate("sessionStorage.getItem('aprium.key')") == KEY
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    assert KEY not in page.content()
    page.reload()
    until(page, "document.getElementById('model').textContent === 'noise'")
    assert page.locator("#key").is_hidden()
    page.click("#open-key")
    page.fill("#key-field", "")
    page.keyboard.press("Enter")  # forgets it, so that it is asked for again
    until(page, "sessionStorage.getItem('aprium.key') === null")
    page.locator("#key[open]").wait_for()
    page.keyboard.press("Escape")
    page.locator("#toast").wait_for()
    page.click("#to-live")
    page.locator("#key[open]").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Enter a key").click()
    page.fill("#key-field", KEY)
    page.keyboard.press("Enter")
    page.locator(".tiles b").first.wait_for()


def test_thinking_is_finished_and_the_answer_stopped(noise: str, show: Callable[..., Any]) -> None:
    page = show(noise, KEY)
    never_ending(page)
    send(page, "hi")
    answer = page.locator(".answer")
    until(page, "document.querySelector('.reasoning').textContent.length > 200")
    assert answer.get_attribute("aria-busy") == "true"
    assert page.locator(".markdown").inner_text() == ""
    page.get_by_role("button", name="Finish thinking").click()
    until(page, "document.querySelector('.markdown').textContent.length > 200")
    assert page.locator(".finish-thinking").is_hidden()
    thought = page.locator(".reasoning").text_content()
    page.fill("#message", "not sent yet")
    page.press("#message", "Enter")  # nothing is sent while an answer is under way
    assert page.locator(".user").count() == 1
    page.keyboard.press("Escape")
    page.locator(".note", has_text="Stopped.").wait_for()
    assert page.locator(".reasoning").text_content() == thought
    assert page.input_value("#message") == "not sent yet"
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(100):
        stats = httpx2.get(f"{noise}/load", headers=headers).json()["engine"]
        if not stats["num_running"]:
            break
        page.wait_for_timeout(50)
    assert stats["num_running"] == 0 and stats["num_aborted"] > 0
    # The next question carries what was said, so that the model knows what the reader saw.
    said = page.locator(".markdown").text_content()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.press("#message", "Enter")
    roles = [m["role"] for m in sent.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    sent_back = sent.value.post_data_json["messages"][1]["content"]
    one, other = ("".join(filter(str.isalnum, text))[:40] for text in (sent_back, said))
    assert one == other
    page.locator(".answer").nth(1).wait_for()
    page.locator("#send.stop").click()
    page.locator(".answer").nth(1).locator(".note").wait_for()


def test_a_stopped_answer_goes_on_to_the_same_words(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    never_ending(page)
    page.click("#open-settings")
    page.fill("[name=max_tokens]", "2000")
    page.click("#settings .primary")
    send(page, "Who are you?")
    until(page, "document.querySelector('.answer')?.textContent.length > 300")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Continue").wait_for()
    whole = ".reasoning, .markdown"
    before = "".join(page.locator(whole).all_text_contents())
    page.wait_for_timeout(500)  # the server has seen that nobody is there
    page.reload()
    page.locator(".note", has_text="cut off").wait_for()
    page.get_by_role("button", name="Continue").click()
    page.locator(".figures").wait_for()
    after = "".join(page.locator(whole).all_text_contents())
    assert len(after) > len(before) and after.startswith(before[:-20])
    assert "Cut off at the limit of tokens." in page.locator(".note").inner_text()
    assert "2,000 tokens" in page.locator(".figures").inner_text()


def test_a_reader_who_scrolled_up_stays(noise: str, show: Callable[..., Any]) -> None:
    page = show(noise, KEY)
    never_ending(page)
    page.click("#open-settings")
    page.uncheck("[name=thinking]")
    page.click("#settings .primary")
    send(page, "hi")
    distance = (
        "(n => n.scrollHeight - n.scrollTop - n.clientHeight)(document.getElementById('scroller'))"
    )
    until(page, "document.getElementById('scroller').scrollTop > 300")
    assert page.evaluate(distance) < 40 and page.locator("#jump").is_hidden()
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -250)
    page.locator("#jump").wait_for()
    top, height = page.evaluate("[scroller.scrollTop, scroller.scrollHeight]")
    until(page, "h => scroller.scrollHeight > h + 100", arg=height)
    assert page.evaluate("scroller.scrollTop") == top
    page.click("#jump")
    until(page, f"{distance} < 40")
    height = page.evaluate("scroller.scrollHeight")
    until(page, "h => scroller.scrollHeight > h + 100", arg=height)
    assert page.evaluate(distance) < 40
    page.keyboard.press("Escape")
    page.locator(".note").wait_for()


def test_nothing_jumps_while_an_answer_comes(noise: str, show: Callable[..., Any]) -> None:
    page = show(noise, KEY)
    never_ending(page)
    page.evaluate("""() => {
      window.shifts = [];
      new PerformanceObserver((list) => {
        for (const e of list.getEntries()) if (!e.hadRecentInput) window.shifts.push(e.value);
      }).observe({ type: "layout-shift", buffered: false });
    }""")
    send(page, "hi")
    until(page, "document.querySelector('.reasoning')?.textContent.length > 200")
    page.wait_for_timeout(700)
    places = """() => ['.user', '.fold summary', '#composer'].map(
      (s) => document.querySelector(s).getBoundingClientRect().top)"""
    before = page.evaluate(places)
    page.get_by_role("button", name="Finish thinking").click()
    until(page, "document.querySelector('.markdown').textContent.length > 50")
    assert page.evaluate(places) == before
    page.keyboard.press("Escape")
    assert sum(page.evaluate("window.shifts")) < 0.1


def test_everything_with_the_keyboard(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#message") == "one\ntwo"
    page.focus(".skip")
    page.keyboard.press("Shift+Tab")
    seen: list[Any] = []
    for _ in range(300):
        page.keyboard.press("Tab")
        found = page.evaluate("""() => {
          const node = document.activeElement, style = getComputedStyle(node);
          const name = node.getAttribute('aria-label') || node.labels?.[0]?.textContent
            || node.textContent.trim();
          const ring = style.outlineStyle !== 'none' || node.id === 'message';
          return [node.id || node.dataset.focus || node.className, name, ring];
        }""")
        if found in seen:
            break
        if found[0] == "":  # the page itself, between its end and its beginning
            continue
        seen.append(found)
    assert all(name and ring for _, name, ring in seen), seen
    order = [place for place, _, _ in seen]
    wanted = ["skip", "to-chat", "to-live", "open-key", "theme", "new", "message", "open-settings"]
    assert [place for place in order if place in wanted] == wanted
    assert page.evaluate("getComputedStyle(document.getElementById('composer')).borderColor")
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    page.locator("#settings[open]").wait_for()
    for _ in range(30):  # the focus stays in the dialog
        page.keyboard.press("Tab")
        assert page.evaluate(
            "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        )
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    assert page.evaluate("document.activeElement.id") == "open-settings"


def test_on_a_phone(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico, **PHONE)
    ask(page, "What is 5 + 5?")
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 360
    assert page.locator("#sidebar").is_hidden()
    page.tap("#menu")
    page.locator("#new").wait_for()
    assert page.locator("#menu").get_attribute("aria-expanded") == "true"
    assert page.evaluate("document.getElementById('main').inert")
    page.keyboard.press("Escape")
    until(page, "getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'")
    assert not page.evaluate("document.getElementById('main').inert")
    assert page.evaluate("document.activeElement.id") == "menu"
    page.tap("#menu")
    page.locator("#session-list .open").first.tap()
    until(page, "getComputedStyle(document.getElementById('sidebar')).visibility === 'hidden'")
    page.tap("#to-live")
    page.locator(".tiles b").first.wait_for()
    assert page.evaluate(width) == 360
    small = page.evaluate("""() => [...document.querySelectorAll('button, a')]
      .filter((n) => n.checkVisibility() && n.closest('header'))
      .map((n) => [n.id, n.getBoundingClientRect().height]).filter(([, h]) => h < 30)""")
    assert small == []


def test_light_and_dark(pico: str, show: Callable[..., Any]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = show(pico, color_scheme="light").evaluate(paper)
    page = show(pico, color_scheme="dark")
    dark = page.evaluate(paper)
    assert light != dark
    page.click("#theme")
    assert page.evaluate(paper) == light  # whatever the system has
    page.reload()
    assert page.evaluate(paper) == light
    page.click("#theme")
    assert page.evaluate(paper) == dark
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    assert page.evaluate(paper) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(pico: str, show: Callable[..., Any], scheme: str) -> None:
    """Text has a contrast of 4.5 to 1 at least (WCAG 2 AA) on what it stands on."""
    page = show(pico, color_scheme=scheme)
    pairs = page.evaluate("""() => {
      const probe = document.body.appendChild(document.createElement('i'));
      const color = (name) => {
        probe.style.color = `var(--${name})`;
        return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
      };
      const on = (text, ...grounds) => grounds.map((g) => [text, g, color(text), color(g)]);
      return [...on('text', 'paper', 'raised', 'sunken', 'tint'), ...on('on-accent', 'accent'),
        ...on('faint', 'paper', 'raised', 'sunken', 'tint'), ...on('bad', 'raised', 'paper'),
        ...on('accent', 'paper', 'tint')];
    }""")

    def luminance(color: list[float]) -> float:
        part = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in color]
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2]

    for text, ground, one, other in pairs:
        low, high = sorted((luminance(one), luminance(other)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_live_figures(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    ask(page, "What is 6 + 2?")
    page.click("#to-live")
    page.locator(".tiles b").first.wait_for()
    never = {"prompt": "the quick brown fox", "max_tokens": 3000, "ignore_eos": True}
    page.evaluate(
        "body => { for (let i = 0; i < 3; i++) fetch('/v1/completions', {method: 'POST', headers: "
        "{'Content-Type': 'application/json'}, body: JSON.stringify(body)}); }",
        never,
    )
    tile = page.locator(".tiles > div")
    until(
        page,
        "() => [...document.querySelectorAll('.tiles > div')]"
        ".some((tile) => /^Running3/.test(tile.textContent))",
    )
    until(
        page, "() => Number(document.querySelector('.tiles b').textContent.replace(',', '')) > 20"
    )
    names = tile.locator("dt").all_inner_texts()
    assert names == [
        "Generated", "Running", "Cache in use", "Prompts reused", "Drafts accepted", "Step"
    ]  # fmt: skip
    stats = httpx2.get(f"{pico}/load").json()["engine"]
    totals = dict(zip(page.locator("#live .totals dt").all_inner_texts(),
                      page.locator("#live .totals b").all_inner_texts(), strict=True))  # fmt: skip
    assert totals["Requests finished"] == f"{stats['num_finished']:,}"
    assert page.locator(".bar", has_text="Draft 1").count() == 1
    charts = page.locator(".chart svg")
    assert "running 3" in charts.nth(1).get_attribute("aria-label")
    until(page, "document.querySelector('.chart .line.a').getAttribute('d').includes('L')")
    page.click("#to-chat")
    page.locator(".answer").wait_for()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)
    assert asked == []  # only while the figures are shown


HOSTILE = """<img src=x onerror=alert(1)> <script>alert(2)</script> [a](javascript:alert(3))
![b](https://elsewhere.example/p.png) <a href="javascript:alert(4)">c</a>

```html
</code></pre><script>alert(5)</script>
```

<iframe src="https://elsewhere.example"></iframe> [d](https://ok.example/"onmouseover="alert(6))"""


def test_what_a_model_writes_is_only_text(pico: str, show: Callable[..., Any]) -> None:
    page = show(pico)
    outside: list[str] = []
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith(pico) else None)
    page.on("dialog", lambda dialog: outside.append(dialog.message))
    call = {"index": 0, "id": "i", "function": {"name": HOSTILE, "arguments": HOSTILE}}
    texts = [{"content": HOSTILE}, {"reasoning": HOSTILE}, {"tool_calls": [call]}]
    chunks = [{"id": "x", "choices": [{"delta": text, "finish_reason": None}]} for text in texts]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=body))
    ask(page, HOSTILE)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.wait_for_timeout(300)
    inside = page.locator(".turns").locator("img, script, iframe, [onerror], [onmouseover]")
    assert inside.count() == 0 and outside == []
    for link in page.locator(".turns a").all():
        assert link.get_attribute("href").startswith("https://")
        assert "noopener" in link.get_attribute("rel")
    assert "<script>alert(2)</script>" in page.locator(".markdown").inner_text()
    refused = page.evaluate("""() => {
      try { document.body.innerHTML = '<b>x</b>'; return false; } catch { return true; }
    }""")
    assert refused  # the policy itself stops markup from text
