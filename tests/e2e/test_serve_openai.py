"""`aprium serve` in a process of its own, asked by the official `openai` client.

The reference is transformers' `generate` in float32 on the same checkpoint.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import save_file

from aprium.text.chat import ChatTemplate
from aprium.text.parse import parse
from aprium.text.tokenizer import Tokenizer
from tests import family, modelopt_layout
from tests.e2e.conftest import SHAPE, greedy, load_reference, serving

PROMPTS = ["the quick brown", "what is 17 plus 4?", "number", "é", "over the lazy dog " * 12]
GREEDY: dict[str, Any] = {
    "temperature": 0,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--served-model-name", "tiny", "--max-model-len", "1K", "--no-enable-prefix-caching")
    with serving(checkpoint, log, *flags) as found:
        yield found


def connect(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with connect(address) as found:
        yield found


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    """What transformers says after each prompt, 24 tokens."""
    model, tokenizer = load_reference(checkpoint), Tokenizer.load(checkpoint)
    prompts = [*PROMPTS, chat_prompt(checkpoint)]
    return {text: greedy(model, tokenizer.encode(text), 24) for text in prompts}


def chat_prompt(checkpoint: Path) -> str:
    from aprium.base.records import Message

    return ChatTemplate.load(checkpoint).render([Message(role="user", content="what is 4?")])


def test_completions_equal_transformers(
    client: openai.OpenAI, expected: dict[str, list[int]], checkpoint: Path
) -> None:
    tokenizer = Tokenizer.load(checkpoint)

    def ask(prompt: str) -> list[int]:
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, **GREEDY)
        (choice,) = reply.choices
        assert choice.finish_reason == "length"
        assert reply.usage is not None and reply.usage.completion_tokens == 24
        ids = choice.token_ids  # type: ignore[attr-defined]
        assert choice.text == tokenizer.decode(ids)
        return ids

    def ask_streaming(prompt: str) -> list[int]:
        chunks = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=24, stream=True, **GREEDY
        )
        return [t for chunk in chunks for t in chunk.choices[0].token_ids]  # type: ignore[attr-defined]

    with ThreadPoolExecutor(10) as pool:
        whole = list(pool.map(ask, PROMPTS))
        mixed = [pool.submit(f, p) for p in PROMPTS for f in (ask, ask_streaming)]
        results = [future.result() for future in mixed]
    assert whole == [expected[prompt] for prompt in PROMPTS]
    assert results == [expected[prompt] for prompt in PROMPTS for _ in range(2)]


def test_chat_equals_transformers(
    client: openai.OpenAI, expected: dict[str, list[int]], checkpoint: Path
) -> None:
    ids = expected[chat_prompt(checkpoint)]
    parsed = parse(Tokenizer.load(checkpoint).decode(ids), thinking=True)
    messages: Any = [{"role": "user", "content": "what is 4?"}]
    options: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 24, **GREEDY}
    reply = client.chat.completions.create(**options)
    message: Any = reply.choices[0].message
    assert reply.choices[0].token_ids == ids  # type: ignore[attr-defined]
    assert (message.reasoning, message.content) == (parsed.reasoning, parsed.content)
    reasoning = content = ""
    for chunk in client.chat.completions.create(stream=True, **options):
        delta: Any = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning", None) or ""
        content += delta.content or ""
    assert (reasoning or None, content or None) == (parsed.reasoning, parsed.content)


def test_stop_strings_never_leak(
    client: openai.OpenAI, expected: dict[str, list[int]], checkpoint: Path
) -> None:
    prompt = PROMPTS[0]
    text = Tokenizer.load(checkpoint).decode(expected[prompt])
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    before = text[: text.find(stop)]
    options: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "stop": stop}
    whole = client.completions.create(**options, **GREEDY).choices[0]
    assert (whole.text, whole.finish_reason) == (before, "stop")
    assert whole.stop_reason == stop  # type: ignore[attr-defined]
    chunks = list(client.completions.create(stream=True, **options, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == before


def test_sampling_is_reproducible_and_scored(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny", "prompt": "number", "max_tokens": 12, "n": 3, "seed": 7, "logprobs": 2
    }  # fmt: skip
    one, two = (client.completions.create(temperature=0.9, **options) for _ in range(2))
    assert [c.text for c in one.choices] == [c.text for c in two.choices]
    assert len({c.text for c in one.choices}) == 3
    for choice in one.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert all(value < 0 for value in choice.logprobs.token_logprobs)
    echoed = client.completions.create(
        model="tiny", prompt=[20, 30, 40], max_tokens=0, echo=True, logprobs=1
    )
    scores = echoed.choices[0].logprobs
    assert scores is not None and scores.token_logprobs is not None
    assert scores.token_logprobs[0] is None
    assert len(scores.token_logprobs) == 3


def test_errors_reach_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context of 1024"):
        client.completions.create(model="tiny", prompt=[20] * 2000)
    with pytest.raises(openai.BadRequestError, match="vocabulary of 400"):
        client.completions.create(model="tiny", prompt=[4000])
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here: use tiny"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="regex guide cannot be used") as caught:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "x"}],
            extra_body={"guided_regex": "("},
        )
    assert caught.value.param == "guided_regex"
    assert [m.id for m in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="there is no route /v1/images"):
        client.images.generate(model="tiny", prompt="x")


def test_embeddings(client: openai.OpenAI) -> None:
    reply = client.embeddings.create(model="tiny", input=["the quick brown", "number"])
    again = client.embeddings.create(model="tiny", input="number", encoding_format="float")
    assert len(reply.data[0].embedding) == SHAPE.hidden_size
    assert sum(x * x for x in reply.data[0].embedding) == pytest.approx(1, abs=1e-5)
    assert reply.data[1].embedding == pytest.approx(again.data[0].embedding, abs=1e-6)
    assert reply.data[0].embedding != pytest.approx(reply.data[1].embedding, abs=1e-3)


def test_biases_steer(client: openai.OpenAI, expected: dict[str, list[int]]) -> None:
    """The likeliest token barred at every place, another one forced."""
    prompt = PROMPTS[0]
    first = expected[prompt][0]
    options: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 4, **GREEDY}
    barred = client.completions.create(**options, logit_bias={str(first): -100}).choices[0]
    assert first not in barred.token_ids  # type: ignore[attr-defined]
    forced = client.completions.create(**options, logit_bias={"77": 100}).choices[0]
    assert forced.token_ids == [77] * 4  # type: ignore[attr-defined]


def test_a_disconnect_stops_the_generation(checkpoint: Path, tmp_path: Path) -> None:
    """One sequence at a time: while it runs nobody else is served, so it must have stopped."""
    flags = ("--max-num-seqs", "1", "--api_key", "secret", "--disable-uvicorn-access-log")
    with (
        serving(checkpoint, tmp_path / "log", *flags) as address,
        connect(address, "secret") as client,
    ):
        options: dict[str, Any] = {
            "model": str(checkpoint), "prompt": "number", "max_tokens": 4000, **GREEDY
        }  # fmt: skip
        with pytest.raises(openai.AuthenticationError):
            connect(address, "wrong").models.list()
        started = time.monotonic()
        stream = client.completions.create(stream=True, **options)
        first = next(iter(stream))
        step_s = time.monotonic() - started
        stream.close()
        assert first.choices[0].text is not None
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(**options)
        started = time.monotonic()
        client.completions.create(**{**options, "max_tokens": 1})
        waited = time.monotonic() - started
        # Two generations of 4000 steps, had they gone on, would take thousands of steps.
        assert waited < max(3.0, 20 * step_s)


@pytest.mark.parametrize("scheme", ["nvfp4", "fp8"])
def test_quantised_checkpoints_equal_dequantised_weights(scheme: str, tmp_path: Path) -> None:
    values = modelopt_layout.write(tmp_path / scheme, SHAPE, scheme)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    family.write_tokenizer(tmp_path / scheme)
    reference = load_reference(plain)
    tokenizer = Tokenizer.load(tmp_path / scheme)
    with (
        serving(
            *(tmp_path / scheme, tmp_path / "log"),
            *("--quantization", "modelopt", "--activation-dtype", "float32"),
        ) as address,
        connect(address) as client,
    ):
        for prompt in PROMPTS[:3]:
            reply = client.completions.create(
                model=str(tmp_path / scheme), prompt=prompt, max_tokens=12, **GREEDY
            )
            ids = reply.choices[0].token_ids  # type: ignore[attr-defined]
            assert ids == greedy(reference, tokenizer.encode(prompt), 12)
