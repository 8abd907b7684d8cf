"""The Python faces: prompts in every form, order, streams, stop strings, failure, closing."""

import asyncio
import gc
import threading
import time

import pytest

import aprium
from aprium.base.errors import ConfigError, EngineError, RequestError, TemplateError
from aprium.base.records import Message, SamplingParams
from aprium.checkpoint.load import Checkpoint
from aprium.engine.client import LLM, AsyncEngine
from aprium.engine.config import EngineConfig

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(text_toy):
    with LLM(text_toy, max_model_len=256, max_num_seqs=8, seed=5) as model:
        yield model


@pytest.fixture
def engine(text_toy):
    config = EngineConfig(model="toy", max_model_len=256, max_num_seqs=8)
    made = AsyncEngine(config, text_toy)
    yield made
    asyncio.run(made.close())


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_the_public_names():
    assert aprium.LLM is LLM and aprium.SamplingParams is SamplingParams


def test_prompts_of_every_kind_and_their_order(llm):
    messages = [Message(role="user", content="hi"), {"role": "assistant", "content": "yo"}]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    rendered += "<|im_start|>assistant\n"
    outputs = llm.generate(["hi", [1, 2, 3], messages], GREEDY)
    assert outputs[0].prompt_tokens == (16 + ord("h"), 16 + ord("i"))
    assert outputs[1].prompt_tokens == (1, 2, 3)
    assert list(outputs[2].prompt_tokens) == llm.tokenizer.encode(rendered)
    for i, prompt in enumerate(("hi", [1, 2, 3], messages)):
        (single,) = llm.generate(prompt, GREEDY)
        assert (single.tokens, single.logprobs) == (outputs[i].tokens, outputs[i].logprobs)
        assert single.text == llm.tokenizer.decode(single.tokens)
        assert single.finish == "length" and len(single.tokens) == len(single.logprobs) == 10
    assert llm.generate([]) == []


def test_template_switches_reach_the_template(llm):
    message = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    off, on = (
        llm.generate(message, GREEDY, chat_template_kwargs={"enable_thinking": value})[0]
        for value in (False, True)
    )
    assert on.prompt_tokens == (*off.prompt_tokens, 12)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("", "empty"),
        ([[]], "empty"),
        ([1, 900], "900"),
        ([["a"]], "must all be"),
        ([[1, "a"]], "must all be"),
        ([1.5], "1.5]? is not a prompt"),
        ([{"content": "x"}], "no role"),
        ([{"role": "user", "content": 3}], "content 3"),
        ([{"role": "user", "content": [{"image_url": "x"}]}], "reads text only"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "function name"),
        ([1] * 300, "300 tokens"),
    ],
)
def test_bad_prompts_are_refused_by_the_call(llm, prompt, match):
    with pytest.raises(RequestError, match=match):
        llm.generate(prompt, GREEDY)
    if not (prompt and isinstance(prompt[0], list)):
        with pytest.raises(RequestError, match=match):
            llm.stream(prompt, GREEDY)


def test_nothing_runs_when_one_of_many_is_refused(llm):
    before = llm.stats()
    with pytest.raises(RequestError):
        llm.generate([[1, 2], [900]], GREEDY)
    assert llm.stats().prompt_tokens == before.prompt_tokens


def test_params_one_each_or_one_for_all(llm):
    short = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    a, b = llm.generate([[1], [1]], [GREEDY, short])
    assert a.tokens[:3] == b.tokens and len(a.tokens) == 10
    with pytest.raises(RequestError, match="1 params for 2 prompts"):
        llm.generate([[1], [2]], [GREEDY])


def test_n_continuations_follow_each_other_and_obey_the_seed(llm):
    params = SamplingParams(max_tokens=6, temperature=1.5, n=3, seed=4, ignore_eos=True)
    outputs = llm.generate([[1, 2], [3]], params)
    assert [o.index for o in outputs] == [0, 1, 2, 0, 1, 2]
    assert [o.prompt_tokens for o in outputs] == [(1, 2)] * 3 + [(3,)] * 3
    assert len({o.tokens for o in outputs[:3]}) == 3
    assert [o.tokens for o in llm.generate([1, 2], params)] == [o.tokens for o in outputs[:3]]
    one = SamplingParams(max_tokens=6, temperature=1.5, seed=4, ignore_eos=True)
    assert llm.generate([1, 2], one)[0].tokens == outputs[0].tokens


def test_end_tokens_of_the_tokenizer_end_the_text(llm):
    # The model is random: ask for very random sampling until an end token falls.
    params = SamplingParams(max_tokens=200, temperature=20.0, n=8, seed=1)
    ended = [o for o in llm.generate([1, 2, 3], params) if o.finish == "stop"]
    assert ended
    for output in ended:
        assert output.tokens[-1] in (2, 11) and output.stop_reason == output.tokens[-1]
        assert not {2, 11} & set(output.tokens[:-1])
        assert output.text == llm.tokenizer.decode(output.tokens[:-1])


def test_a_stop_string_ends_the_generation_in_the_engine_too(llm):
    (free,) = llm.generate("hello", LONG)
    letters = [llm.tokenizer.decode([t]) for t in free.tokens]
    # Two neighbouring plain letters, so that the string spans tokens.
    at = next(
        i for i in range(4, 140) if all(x.isascii() and len(x) == 1 for x in letters[i : i + 2])
    )
    stop = letters[at] + letters[at + 1]
    before = llm.stats()
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, stop=(stop,))
    shown = [c.text for c in llm.stream("hello", params)]
    (done,) = llm.generate("hello", params)
    assert done.finish == "stop" and done.stop_reason == stop
    assert done.text == free.text[: free.text.index(stop)] == shown[-1]
    assert done.tokens == free.tokens[: len(done.tokens)] and len(done.tokens) <= at + 2
    assert all(done.text.startswith(text) for text in shown)
    wait_until(lambda: llm.stats().num_aborted == before.num_aborted + 2)
    assert llm.stats().num_running == 0


def test_stream_grows_to_what_generate_gives(llm):
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=9, n=2, ignore_eos=True)
    whole = llm.generate([5, 6], params)
    last = {}
    for completion in llm.stream([5, 6], params):
        earlier = last.get(completion.index)
        if earlier is not None:
            assert earlier.finish is None
            assert completion.tokens[:-1] == earlier.tokens
            assert completion.text.startswith(earlier.text)
        last[completion.index] = completion
    for index in (0, 1):
        assert last[index].finish == "length"
        assert (last[index].tokens, last[index].text) == (whole[index].tokens, whole[index].text)
        assert last[index].logprobs == whole[index].logprobs


def test_closing_a_stream_stops_the_generation(llm):
    before = llm.stats().num_aborted
    stream = llm.stream([1, 2], LONG)
    next(stream)
    stream.close()
    wait_until(lambda: llm.stats().num_aborted == before + 1 and not llm.stats().num_running)


def test_score_is_the_prompt_and_generation_agrees(llm):
    (output,) = llm.generate([7, 8, 9], GREEDY)
    scores = llm.score([7, 8, 9, *output.tokens])
    assert scores[0] is None and len(scores) == 13
    assert tuple(scores[3:]) == output.logprobs  # bit for bit: prefill equals decode
    assert llm.score("hello") == llm.score(llm.tokenizer.encode("hello"))


def test_the_models_own_defaults_apply_without_params(text_toy):
    greedy = {"temperature": 0.0, "top_k": None}
    changed = Checkpoint(
        path=text_toy.path,
        config=text_toy.config,
        quant=text_toy.quant,
        model=text_toy.model,
        generation_config=greedy,
    )
    with LLM(changed, max_model_len=64) as model:
        stop = SamplingParams(temperature=0, max_tokens=5)
        short = model.generate([1, 2], stop)[0].tokens
        assert model.generate([1, 2], None)[0].tokens[: len(short)] == short
        assert [c.tokens for c in model.stream([1, 2])][-1][: len(short)] == short


def test_a_model_without_a_tokenizer_takes_ids(toy):
    with LLM("toy", load_format="dummy", max_model_len=64) as model:
        assert model.tokenizer is None
        (output,) = model.generate([1, 2], GREEDY)
        assert output.text == "" and len(output.tokens) == 10
        for prompt in ("hi", [{"role": "user", "content": "hi"}]):
            with pytest.raises(RequestError, match="no tokenizer files"):
                model.generate(prompt, GREEDY)
        with pytest.raises(RequestError, match="stop_token_ids"):
            model.generate([1], SamplingParams(stop="x"))


def test_unknown_options_are_named():
    with pytest.raises(ConfigError, match="max_seqs"):
        LLM("toy", load_format="dummy", max_seqs=3)


def test_closed_is_closed(toy):
    model = LLM(toy, max_model_len=64)
    stream = model.stream([1], SamplingParams(max_tokens=60, ignore_eos=True))
    next(stream)
    model.close()
    model.close()
    with pytest.raises(EngineError, match="was closed"):
        list(stream)
    with pytest.raises(EngineError, match="was closed"):
        model.generate([1], GREEDY)


def test_a_forgotten_model_ends_its_thread(toy):
    model = LLM(toy, max_model_len=64)
    thread = model._owner._thread
    assert thread.is_alive()
    del model
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_failure_fails_everyone_with_the_cause_and_stays(toy):
    model = LLM(toy, max_model_len=64)

    def broken(plan):
        raise ZeroDivisionError("by chance")

    model._engine.runner.run = broken
    with pytest.raises(EngineError, match="ZeroDivisionError: by chance") as caught:
        model.generate([[1], [2]], GREEDY)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineError, match="by chance"):
        model.generate([1], GREEDY)
    assert not model._owner._thread.is_alive()
    model.close()


def test_an_idle_engine_does_not_spin(llm):
    llm.generate([1], GREEDY)
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.1


def test_many_threads_share_one_model(llm):
    expected = [llm.generate([i, i + 1], GREEDY)[0] for i in range(6)]
    got = [None] * 6

    def ask(i):
        got[i] = llm.generate([i, i + 1], GREEDY)[0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(g.tokens, g.logprobs) for g in got] == [(e.tokens, e.logprobs) for e in expected]


async def collect(engine, tokens, params):
    last = {}
    async for completion in engine.generate(tokens, params):
        last[completion.index] = completion
    return [last[i] for i in sorted(last)]


def test_async_many_at_once_equal_one_by_one(engine, llm):
    prompts = [[i, 2 * i, 3] for i in range(10)]

    async def main():
        return await asyncio.gather(*(collect(engine, p, GREEDY) for p in prompts))

    for prompt, (got,) in zip(prompts, asyncio.run(main()), strict=True):
        (expected,) = llm.generate(prompt, GREEDY)
        assert (got.text, got.tokens, got.logprobs) == (
            expected.text,
            expected.tokens,
            expected.logprobs,
        )
        assert got.finish == "length" and got.timings.total_s > 0


def test_async_n_and_attributes(engine):
    params = SamplingParams(max_tokens=5, n=3, seed=1, ignore_eos=True)
    outputs = asyncio.run(collect(engine, [1], params))
    assert [o.index for o in outputs] == [0, 1, 2]
    assert all(o.finish == "length" for o in outputs)
    assert engine.max_model_len == 256 and engine.failed is None
    assert engine.tokenizer is not None and engine.template is not None
    assert engine.config.model == "toy" and engine.generation_config == {}


def test_async_errors_come_from_the_call(engine):
    with pytest.raises(RequestError, match="empty"):
        engine.generate([], GREEDY)


def test_closing_the_iterator_aborts(engine):
    async def main():
        iterator = engine.generate([1, 2], LONG)
        await anext(iterator)
        await iterator.aclose()

    asyncio.run(main())
    wait_until(lambda: engine.stats().num_aborted == 1 and not engine.stats().num_running)


def test_cancelling_the_reader_aborts(engine):
    async def main():
        task = asyncio.create_task(collect(engine, [1, 2], LONG))
        while not engine.stats().num_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(lambda: engine.stats().num_aborted == 1 and not engine.stats().num_running)


def test_a_paused_engine_computes_no_step_whatever_it_is_told(engine):
    async def work():
        await engine.pause()
        readers = [asyncio.create_task(collect(engine, (i, 2, 3), GREEDY)) for i in (4, 5)]
        await asyncio.sleep(0.05)
        await engine.call(lambda _: None)
        waiting = engine.stats()
        await engine.pause(False)
        await asyncio.gather(*readers)
        return waiting

    waiting = asyncio.run(work())
    assert (waiting.num_steps, waiting.num_running, waiting.num_waiting) == (0, 0, 2)
    assert engine.stats().num_finished == 2


def test_a_slow_reader_misses_no_token(engine, llm):
    async def main():
        seen = []
        async for completion in engine.generate([3, 1], GREEDY):
            seen.append(completion)
            await asyncio.sleep(0.05)
        return seen

    seen = asyncio.run(main())
    assert seen[-1].tokens == llm.generate([3, 1], GREEDY)[0].tokens
    assert seen[-1].finish == "length" and len(seen) <= 10


def test_async_failure_reaches_all_readers(engine):
    async def main():
        iterators = [engine.generate([i], LONG) for i in (1, 2)]
        for iterator in iterators:
            await anext(iterator)

        def broken(plan):
            raise MemoryError("none left")

        engine._engine.runner.run = broken
        for iterator in iterators:
            with pytest.raises(EngineError, match="none left"):
                async for _ in iterator:
                    pass
        with pytest.raises(EngineError, match="none left"):
            engine.generate([1], LONG)

    asyncio.run(main())
    assert engine.failed is not None


def test_a_checkpoint_without_a_template_refuses_messages_only(text_toy, tmp_path):
    (tmp_path / "tokenizer.json").write_text((text_toy.path / "tokenizer.json").read_text())
    changed = type(text_toy)(
        path=tmp_path, config=text_toy.config, quant=text_toy.quant, model=text_toy.model
    )
    with LLM(changed, max_model_len=64) as model:
        assert model.generate("hi", GREEDY)[0].tokens
        with pytest.raises(TemplateError, match="no chat template"):
            model.generate([{"role": "user", "content": "hi"}], GREEDY)


def test_a_call_runs_between_steps_and_gives_back_result_or_error(text_toy):
    with LLM(text_toy, max_model_len=64) as llm:
        assert llm._owner.call(lambda engine: engine.max_model_len).result(10) == 64

        def refuse(engine):
            raise RequestError("not this")

        with pytest.raises(RequestError, match="not this"):
            llm._owner.call(refuse).result(10)
        assert llm.generate([1, 2], GREEDY)[0].finish == "length"  # the engine is well

        def fail(engine):
            raise KeyError("a bug")

        with pytest.raises(KeyError):
            llm._owner.call(fail).result(10)
        with pytest.raises(EngineError, match="a bug"):
            llm.generate([1, 2], GREEDY)
