"""Prefix reuse: the same bits as without, reasons that are true, nothing leaked."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.engine import prefix
from aprium.engine.cache import Cache
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.engine.memory import page_bytes, slot_bytes
from aprium.engine.prefix import PrefixCache
from aprium.engine.speculative import SpeculativeConfig
from aprium.text.chat import ChatTemplate
from aprium.text.messages import read_message
from aprium.text.tokenizer import Tokenizer
from tests.engine.test_engine import run

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SYSTEM = "Answer in a few words. Say nothing that was not asked for, and never say it twice."
TURNS = ("Spell the word plum.", "What is 3 + 4?", "Who are you?", "Reverse the word stone.")


@pytest.fixture(scope="module")
def pico():
    return load_checkpoint(PICO_DIR)


def engine_of(pico, **options):
    options = {"max_num_seqs": 4, "max_model_len": 512, "block_size": 8} | options
    if "num_snapshots" in options:
        options["snapshot_bytes"] = options.pop("num_snapshots") * slot_bytes(pico.config)
    return Engine(EngineConfig(model="pico", **options), pico)


def deltas_of(engine, request):
    """Return what a request gave, with its last delta."""
    engine.add(request)
    tokens, logprobs, last = [], [], None
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.tokens
            logprobs += delta.logprobs
            last = delta
        engine.scheduler.check()
    return tokens, logprobs, last


@pytest.fixture(scope="module")
def conversation(pico):
    """The prompts of a growing conversation, each with the replies of the plain engine."""
    tokenizer, template = Tokenizer.load(PICO_DIR), ChatTemplate.load(PICO_DIR)
    plain = engine_of(pico, enable_prefix_caching=False)
    messages, turns = [{"role": "system", "content": SYSTEM}], []
    for i, text in enumerate(TURNS):
        messages.append({"role": "user", "content": text})
        prompt = template.render([read_message(m) for m in messages], (), enable_thinking=False)
        tokens = tuple(tokenizer.encode(prompt))
        said, logprobs, _ = deltas_of(plain, Request(id=str(i), tokens=tokens, params=GREEDY))
        turns.append((tokens, said, logprobs))
        reply = tokenizer.decode([t for t in said if t not in plain.eos_token_ids])
        messages.append({"role": "assistant", "content": reply})
    return turns


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 5, "block_size": 3},
        {"block_size": 64},
        {"kv_cache_dtype": "bfloat16"},
        {"speculative": SpeculativeConfig(num_speculative_tokens=3, adaptive=False)},
        {"speculative": SpeculativeConfig(method="ngram", prompt_lookup_min=1)},
    ],
    ids=str,
)
def test_every_turn_goes_on_from_the_one_before(pico, conversation, options):
    engine = engine_of(pico, **options)
    exact = "kv_cache_dtype" not in options
    for i, (tokens, said, logprobs) in enumerate(conversation):
        found, scores, last = deltas_of(engine, Request(id=str(i), tokens=tokens, params=GREEDY))
        if exact:
            assert (found, scores) == (said, logprobs)
        before = len(conversation[i - 1][0]) if i else 0
        # All but the opening of the last reply, which the template writes anew, is known.
        assert last.reused >= before - 40 and (i == 0) == (last.reused == 0)
        assert last.why_not_more == (prefix.NO_SNAPSHOT if i else prefix.FIRST_TIME)
    assert engine.stats().prefix_tokens_reused > 0


def end_of_messages(tokens):
    """Return how many of `tokens` there are up to the end of the last message."""
    return len(tokens) - tokens[::-1].index(11)


def test_the_same_prompt_again_computes_what_follows_its_last_message(pico, conversation):
    tokens, said, logprobs = conversation[2]
    engine = engine_of(pico)
    for i in range(3):
        found, scores, last = deltas_of(engine, Request(id=str(i), tokens=tokens, params=GREEDY))
        assert (found, scores) == (said, logprobs)
        assert last.reused == (end_of_messages(tokens) if i else 0)
    assert last.why_not_more == prefix.NO_SNAPSHOT


def test_a_prompt_without_messages_is_kept_to_its_last_token_but_one(pico):
    generator = random.Random(5)
    tokens = tuple(generator.randrange(20, 500) for _ in range(100))
    engine = engine_of(pico)
    first = deltas_of(engine, Request(id="a", tokens=tokens, params=GREEDY))
    again = deltas_of(engine, Request(id="b", tokens=tokens, params=GREEDY))
    assert again[:2] == first[:2] and again[2].reused == 99
    assert again[2].why_not_more == prefix.LAST_TOKEN


def test_a_snapshot_is_taken_where_prompts_part_and_on_a_grid(pico):
    generator = random.Random(6)
    trunk = tuple(generator.randrange(20, 500) for _ in range(200))
    engine = engine_of(pico, snapshot_interval=128)
    reused = []
    for i in range(3):
        request = Request(id=str(i), tokens=(*trunk[:180], 20 + i, 7), params=GREEDY)
        last = deltas_of(engine, request)[2]
        reused.append((last.reused, last.why_not_more))
    assert reused == [
        (0, prefix.FIRST_TIME), (128, prefix.NO_SNAPSHOT), (180, prefix.DIVERGED)
    ]  # fmt: skip


def test_the_end_of_an_answer_is_kept(pico):
    generator = random.Random(7)
    tokens = tuple(generator.randrange(20, 500) for _ in range(40))
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    engine = engine_of(pico)
    said = deltas_of(engine, Request(id="a", tokens=tokens, params=params))[0]
    longer = (*tokens, *said, 30, 31)
    found = deltas_of(engine, Request(id="b", tokens=longer, params=params))
    plain = engine_of(pico, enable_prefix_caching=False)
    assert found[2].reused == 99
    assert found[:2] == deltas_of(plain, Request(id="b", tokens=longer, params=params))[:2]


def test_copies_wait_for_a_step_that_is_run(pico, conversation):
    tokens, said, logprobs = conversation[2]
    engine = engine_of(pico, max_num_batched_tokens=512)
    engine.add(Request(id="a", tokens=tokens, params=GREEDY))
    while engine.scheduler.sequences["a"].num_computed < end_of_messages(tokens):
        engine.step()
    engine.abort("a")
    assert engine.step() == []
    found, scores, last = deltas_of(engine, Request(id="b", tokens=tokens, params=GREEDY))
    assert (found, scores) == (said, logprobs) and last.reused == end_of_messages(tokens)


def test_salts_keep_tenants_apart(pico, conversation):
    tokens = conversation[1][0]
    engine = engine_of(pico)
    request = Request(id="a", tokens=tokens, params=GREEDY, cache_salt="one")
    deltas_of(engine, request)
    _, _, last = deltas_of(engine, dataclasses.replace(request, id="b", cache_salt="two"))
    assert (last.reused, last.why_not_more) == (0, prefix.SALT)
    _, _, last = deltas_of(engine, dataclasses.replace(request, id="c"))
    assert last.reused == end_of_messages(tokens)


def test_scored_prompts_are_read_in_full(pico, conversation):
    tokens = conversation[1][0]
    params = dataclasses.replace(GREEDY, prompt_logprobs=0, max_tokens=2)
    plain = run(
        engine_of(pico, enable_prefix_caching=False),
        [Request(id="s", tokens=tokens, params=params)],
    )
    engine = engine_of(pico)
    deltas_of(engine, Request(id="first", tokens=tokens, params=GREEDY))
    assert run(engine, [Request(id="s", tokens=tokens, params=params)]) == plain


def test_evicted_snapshots_are_told(pico, conversation):
    engine = engine_of(pico, num_snapshots=1, prefix_cache_ram_bytes=0)
    first, other = conversation[0][0], conversation[3][0]
    deltas_of(engine, Request(id="a", tokens=first, params=GREEDY))
    generator = random.Random(1)
    noise = tuple(generator.randrange(20, 500) for _ in range(len(other)))
    deltas_of(engine, Request(id="b", tokens=noise, params=GREEDY))
    _, _, last = deltas_of(engine, Request(id="c", tokens=first, params=GREEDY))
    assert (last.reused, last.why_not_more) == (0, prefix.EVICTED)


@settings(max_examples=20)
@given(st.data())
def test_any_mix_gives_the_bits_of_the_plain_engine(pico, data):
    """Prompts that share beginnings, few pages, few snapshots, aborts, preemption, drafts."""
    seed = data.draw(st.integers(0, 10**6))
    generator = random.Random(seed)
    trunk = [generator.randrange(20, 500) for _ in range(40)]
    for place in (9, 17, 30):
        trunk[place] = 11  # an end of a message
    requests = []
    for i in range(10):
        cut = generator.randrange(1, 40)
        tail = [generator.randrange(20, 500) for _ in range(generator.randrange(1, 12))]
        params = SamplingParams(
            temperature=generator.choice((0, 0.9)),
            seed=i,
            max_tokens=generator.randrange(1, 14),
            ignore_eos=True,
        )
        requests.append(Request(id=str(i), tokens=(*trunk[:cut], *tail), params=params))
    plain = run(engine_of(pico, enable_prefix_caching=False), requests)
    page = generator.choice((3, 4, 8))
    longest = 66
    spec = SpeculativeConfig(num_speculative_tokens=3, adaptive=False)
    engine = engine_of(
        pico,
        block_size=page,
        max_model_len=longest,
        num_snapshots=generator.randrange(1, 6),
        max_num_batched_tokens=generator.choice((6, 20, 200)),
        kv_cache_bytes=(-(-longest // page) + generator.randrange(12))
        * page_bytes(pico.config, page, torch.float32),
        speculative=generator.choice((None, spec)),
    )
    found = {r.id: [] for r in requests}
    waiting, aborted = list(requests), set()
    while waiting or engine.has_work:
        if waiting and generator.random() < 0.5:
            engine.add(waiting.pop())
        for delta in engine.step():
            found[delta.id] += delta.tokens
        engine.scheduler.check()
        if generator.random() < 0.03:
            victim = generator.choice(requests).id
            if engine.abort(victim) is not None:
                aborted.add(victim)
    for request in requests:
        if request.id not in aborted:
            assert found[request.id] == plain[request.id]["tokens"]
    prefixes = engine.scheduler.prefixes
    while prefixes.evict():
        engine.scheduler.check()
    stats = engine.stats()
    assert stats.pages_free == stats.pages_total and stats.slots_free == stats.slots_total


def test_tree_splits_and_finds():
    cache = Cache(num_pages=40, page_size=4, num_slots=8)
    tree = PrefixCache(cache, 5)
    slot, pages = cache.admit("s", 20)
    tokens = list(range(20))
    tree.take(tokens[:10], "", slot, pages, False)
    tree.take(tokens[:6], "", slot, pages, False)
    tree.take([*tokens[:8], 99, 98], "", slot, pages, False)
    tree.check()
    cache.check()
    assert tree.find(tokens, "").length == 10
    assert tree.find(tokens[:10], "").length == 6
    assert tree.find([*tokens[:8], 99, 98, 5], "").length == 10
    for prompt, salt, length, why in (
        ([*tokens[:8], 50], "", 6, prefix.NO_SNAPSHOT),
        ([7, 7], "", 0, prefix.FIRST_TIME),
        (tokens, "other", 0, prefix.SALT),
        ([*tokens[:10], 50, 51], "", 10, prefix.DIVERGED),
    ):
        match = tree.find(prompt, salt)
        assert (match.length, match.why) == (length, why)
    # 6 = one full page shared, one copied in part; the full page has two owners more.
    node = tree.find(tokens[:7], "").node
    assert node.pages[0] == pages[0] and node.pages[1] not in pages
    cache.release("s")
    cache.check()
    assert tree.find(tokens, "").length == 10
