"""Teachers: adapters over one base against merged checkpoints, memory, bad servers, routes."""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from aprium import LLM
from aprium.base.errors import CheckpointError, ConfigError, EngineError
from aprium.base.records import TeacherScores, Trajectory
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.save import save_checkpoint
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.model.layout import Layout
from aprium.model.model import HybridModel
from aprium.quantize import pipeline, recipes
from aprium.quantize.merge import merge
from aprium.rl import residents
from aprium.rl.teachers import (
    RemoteConfig,
    TeacherConfig,
    Teachers,
    TeachersConfig,
    load_models,
)
from aprium.serve.app import create_app
from aprium.serve.service import ServeConfig
from aprium.text.tokenizer import Tokenizer
from aprium.train import lora
from aprium.train.lora import LoraConfig
from tests.family import write_tokenizer

TEXTS = ("What is 27 + 58?", "Spell the word plum.", "The snake sees the stone near the river.")


def trajectory(text: str, domain: str = "a") -> Trajectory:
    tokens = tuple(Tokenizer.load(PICO_DIR).encode(text))
    count = len(tokens) - 1
    return Trajectory(
        task=f"{domain}/1",
        domain=domain,
        tokens=tokens,
        sampled=(False, *(True,) * count),
        logprobs=(0.0,) * len(tokens),
        weight_spans=((0, count),),
    )


def scores(
    config: TeachersConfig,
    routes: Mapping[str, str | None],
    items: Iterable[Trajectory],
    **options: Any,
) -> tuple[list[TeacherScores | None], Teachers]:
    """Score all of `items` at once, and close."""

    async def run() -> tuple[list[TeacherScores | None], Teachers]:
        teachers = Teachers(config, student="pico", routes=routes, **options)
        try:
            return list(await asyncio.gather(*map(teachers.score, items))), teachers
        finally:
            await teachers.close()

    return asyncio.run(run())


def expected(model: Path, items: Sequence[Trajectory]) -> list[tuple[float, ...]]:
    with LLM(model, load="memory") as llm:
        found = [llm.score(item.tokens) for item in items]
    return [(0.0, *(v for v in values if v is not None)) for values in found]


def write_adapter(
    base: Path, directory: Path, targets: tuple[str, ...], seed: int, size: float = 0.05
) -> Path:
    model = load_checkpoint(base, load="memory").model
    adapter = lora.attach(model, LoraConfig(r=4, alpha=8.0, targets=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapter.parameters().values():
            value.copy_(torch.randn(value.shape, generator=generator) * size)
    lora.save(adapter, directory, base=base)
    return directory


@pytest.fixture(scope="module", params=["bf16", "nvfp4-all"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bf16":
        return PICO_DIR
    path = tmp_path_factory.mktemp("base") / "quantised"
    samples = [Tokenizer.load(PICO_DIR).encode(text) for text in TEXTS]
    pipeline.quantize(PICO_DIR, path, recipes.read(request.param), calibration=samples)
    return path


def test_adapters_over_one_base_score_as_their_merged_checkpoints_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_adapter(base, tmp_path / "one", ("attention_qkv", "mamba_in", "expert"), 1)
    two = write_adapter(base, tmp_path / "two", ("shared_expert", "mlp", "k_proj"), 2)
    for adapter in (one, two):
        merge(base, adapter, tmp_path / f"{adapter.name}-merged", requantize=base != PICO_DIR)
    opened, switched = [], []
    for name, seen in (("open", opened), ("switch", switched)):
        real = getattr(residents.Base, name)

        async def spy(self, *args, real=real, seen=seen):
            seen.append(args)
            await real(self, *args)

        monkeypatch.setattr(residents.Base, name, spy)
    config = TeachersConfig(
        teachers=(
            TeacherConfig(name="one", checkpoint=str(base), adapter=one),
            TeacherConfig(name="two", checkpoint=str(base), adapter=two),
            TeacherConfig(name="plain", checkpoint=str(base)),
        )
    )
    routes = {"a": "one", "b": "two", "c": "plain"}
    items = [trajectory(text, domain) for text in TEXTS for domain in ("a", "b", "c", "a")]
    found, teachers = scores(config, routes, items)
    # The base was opened once, and changed once for each of the three, not for each trajectory.
    assert len(opened) == 1 and len(switched) == 3
    for domain, model in (("a", "one-merged"), ("b", "two-merged"), ("c", None)):
        mine = [i for i, item in enumerate(items) if item.domain == domain]
        model = base if model is None else tmp_path / model
        wanted = expected(model, [items[i] for i in mine])
        assert [found[i].logprobs for i in mine] == wanted  # type: ignore[union-attr]
    assert {name: row["scored"] for name, row in teachers.figures().items()} == {
        "one": 6, "two": 3, "plain": 3
    }  # fmt: skip


def test_memory_holds_one_base_and_no_copy_of_it_for_its_adapters(tmp_path: Path) -> None:
    adapters = [
        write_adapter(PICO_DIR, tmp_path / str(i), ("mamba_in", "expert"), i) for i in range(3)
    ]
    config = TeachersConfig(
        teachers=tuple(
            TeacherConfig(name=path.name, checkpoint="pico", adapter=path) for path in adapters
        ),
        max_model_len=128,
    )

    async def run() -> None:
        routes = {"a": "0", "b": "1", "c": "2"}
        teachers = Teachers(config, student="pico", routes=routes)
        sizes, engines = [], set()
        for domain in ("a", "b", "c", "a"):
            await teachers.score(trajectory(TEXTS[0], domain))
            (resident,) = teachers._residents._open.values()
            assert resident._engine is not None
            model = await resident._engine.call(lambda engine: engine.checkpoint.model)
            sizes.append(sum(p.nbytes for p in model.parameters()))
            engines.add(id(resident._engine))
        assert len(engines) == 1 and set(sizes) == {sizes[0]}
        assert sizes[0] <= teachers.resident_bytes
        await teachers.close()
        assert teachers.resident_bytes == 0

    asyncio.run(run())


def test_the_least_recently_used_is_closed_where_memory_is_short(tmp_path: Path) -> None:
    model = load_checkpoint("pico").model
    for name in ("x", "y"):
        write = tmp_path / name
        save_checkpoint(model, write, dtype=torch.bfloat16)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (write / file).write_bytes((PICO_DIR / file).read_bytes())
    listed = tuple(TeacherConfig(name=name, checkpoint=str(tmp_path / name)) for name in ("x", "y"))
    routes = {"a": "x", "b": "y", "c": "self"}
    items = [trajectory(TEXTS[0], domain) for domain in "abcabc"]

    async def run(memory_bytes: int | None) -> tuple[list[int], list[TeacherScores | None]]:
        config = TeachersConfig(teachers=listed, max_model_len=128, memory_bytes=memory_bytes)
        teachers = Teachers(config, student="pico", routes=routes)
        counts, found = [], []
        for item in items:
            found.append(await teachers.score(item))
            counts.append(len(teachers._residents._open))
            assert memory_bytes is None or teachers.resident_bytes <= memory_bytes
        if memory_bytes is None:
            assert list(teachers._residents._open) == [tmp_path / "x", tmp_path / "y", PICO_DIR]
        size = teachers.resident_bytes
        await teachers.close()
        return [*counts, size], found

    (*counts, size), found = asyncio.run(run(None))
    assert counts == [1, 2, 3, 3, 3, 3]
    (*counts, _), again = asyncio.run(run(size * 3 // 4))
    assert counts == [1, 2, 2, 2, 2, 2] and again == found
    with pytest.raises(ConfigError, match="memory_bytes is 1000: raise it"):
        asyncio.run(run(1000))


def test_teachers_that_name_one_directory_are_one_engine_and_self_is_the_student() -> None:
    config = TeachersConfig(
        teachers=(
            TeacherConfig(name="one", checkpoint="pico"),
            TeacherConfig(name="two", checkpoint=str(PICO_DIR)),
        ),
        default="self",
        top=3,
    )

    async def run() -> None:
        routes = {"a": "one", "b": "two", "c": None}
        teachers = Teachers(config, student=PICO_DIR, routes=routes)
        found = [await teachers.score(trajectory(TEXTS[1], domain)) for domain in "abc"]
        assert len(teachers._residents._open) == 1
        await teachers.close()
        names = [s.teacher for s in found if s]
        assert names == ["one", "two", "self"]
        first, second, third = (s for s in found if s)
        assert first.logprobs == second.logprobs == third.logprobs
        assert len(first.top) == len(first.logprobs) and first.top[0] == {}
        for value, top in zip(first.logprobs[1:], first.top[1:], strict=True):
            assert len(top) == 3 and list(top.values()) == sorted(top.values(), reverse=True)
            assert value <= max(top.values()) + 1e-6

    asyncio.run(run())


def test_models_of_teachers_are_loaded_once_each_with_their_adapters(tmp_path: Path) -> None:
    adapter = write_adapter(PICO_DIR, tmp_path / "x", ("mlp",), 0)
    config = TeachersConfig(
        teachers=(
            TeacherConfig(name="x", checkpoint="pico", adapter=adapter),
            TeacherConfig(name="y", checkpoint="pico"),
        )
    )
    found = load_models(config, "pico", {"a": "x", "b": "y", "c": "self", "d": "x"})
    assert found["a"] is found["d"] and found["b"] is found["c"] is not found["a"]
    assert not any(p.requires_grad for model in found.values() for p in model.parameters())
    merge(PICO_DIR, adapter, tmp_path / "merged")
    tokens = torch.tensor(trajectory(TEXTS[0]).tokens)
    layout = Layout.packed([len(tokens)])
    merged = load_checkpoint(tmp_path / "merged").model
    with torch.no_grad():
        mine, plain, wanted = (
            model.logits(model(tokens, layout)) for model in (found["a"], found["b"], merged)
        )
    # The merged weights are rounded to BF16, which is far less than what the adapter changes.
    assert (mine - wanted).abs().max() < 0.1 * (plain - wanted).abs().max()
    with pytest.raises(ConfigError, match="the teacher of 'a' is none"):
        load_models(config, "pico", {"a": None})


def test_models_of_adapters_share_their_base_within_the_bound_of_memory(
    base: Path, tmp_path: Path
) -> None:
    targets = ("mlp", "expert", "mamba_in")
    listed = tuple(
        TeacherConfig(
            name=str(i),
            checkpoint=str(base),
            adapter=write_adapter(base, tmp_path / str(i), targets, i),
        )
        for i in range(2)
    )
    routes = {"a": "0", "b": "1", "c": "plain"}
    config = TeachersConfig(
        teachers=(*listed, TeacherConfig(name="plain", checkpoint=str(base))), memory_bytes=1 << 30
    )
    found = load_models(config, "pico", routes)

    def held(model: HybridModel) -> dict[int, int]:
        return {p.data_ptr(): p.nbytes for n, p in model.named_parameters() if "lora_" not in n}

    assert held(found["a"]) == held(found["b"]) == held(found["c"])
    # Each has its own factors all the same: what a model of it alone says.
    tokens = torch.tensor(trajectory(TEXTS[0]).tokens)
    layout = Layout.packed([len(tokens)])
    for name, domain in (("0", "a"), ("1", "b"), ("plain", "c")):
        alone = load_models(config, "pico", {"x": name})["x"]
        with torch.no_grad():
            mine, wanted = (m.logits(m(tokens, layout)) for m in (found[domain], alone))
        assert torch.equal(mine, wanted)
    size = sum(held(found["c"]).values())
    factors = sum(p.nbytes for n, p in found["a"].named_parameters() if "lora_" in n)
    enough = replace(config, memory_bytes=size + 2 * factors + 1000)  # files have a few more
    load_models(enough, "pico", routes)
    short = replace(config, memory_bytes=size + factors)
    with pytest.raises(ConfigError, match=r"teacher '1' .* take \d+ bytes .*memory_bytes is"):
        load_models(short, "pico", routes)


def test_a_server_scores_as_the_engine_here_does() -> None:
    items = [trajectory(text) for text in TEXTS]
    remote = RemoteConfig(url="http://there", model="pico")
    local = TeachersConfig(teachers=(TeacherConfig(name="t", checkpoint="pico"),), top=2)
    there = TeachersConfig(teachers=(TeacherConfig(name="t", remote=remote),), top=2)
    wanted, _ = scores(local, {"a": "t"}, items)

    async def run(config: TeachersConfig) -> list[TeacherScores | None]:
        engine = AsyncEngine(EngineConfig(model="pico", max_model_len=256))
        transport = httpx2.ASGITransport(app=create_app(engine, ServeConfig(names=("pico",))))
        teachers = Teachers(config, student="pico", routes={"a": "t"}, transport=transport)
        try:
            return list(await asyncio.gather(*map(teachers.score, items)))
        finally:
            await teachers.close()
            await engine.close()

    assert asyncio.run(run(there)) == wanted
    plain = TeachersConfig(teachers=there.teachers)
    without = asyncio.run(run(plain))
    assert [s.logprobs for s in without if s] == [s.logprobs for s in wanted if s]
    assert all(s.top == () for s in without if s)


class Server:
    """A server that answers scores of -1, in the manner of `behaviours`, the last for ever."""

    def __init__(self, *behaviours: str, ids: Sequence[int] | None = None) -> None:
        self.behaviours, self.ids, self.asked = list(behaviours), ids, 0

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            if self.ids is None:
                return httpx2.Response(404, json={"detail": "Not Found"})
            return httpx2.Response(200, json={"tokens": self.ids})
        self.asked += 1
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        if behaviour == "slow":
            await asyncio.sleep(5)
        if behaviour == "gone":
            raise httpx2.ConnectError("no route")
        if behaviour.isdigit():
            return httpx2.Response(int(behaviour), json={"error": {"message": "not now"}})
        values = [None] + [-1.0] * len(body["prompt"])
        choice = {"text": "", "logprobs": {"token_logprobs": values}}
        return httpx2.Response(200, json={"choices": [choice if behaviour == "well" else {}]})


def ask(
    server: Server, *, retries: int = 2, count: int = 1, **options: Any
) -> list[TeacherScores | None]:
    remote = RemoteConfig(url="http://there", model="m", retries=retries, timeout_s=0.2)
    config = TeachersConfig(teachers=(TeacherConfig(name="t", remote=remote),), **options)
    items = [trajectory(TEXTS[0])] * count
    transport = httpx2.MockTransport(server)
    return scores(config, {"a": "t"}, items, transport=transport)[0]


@pytest.mark.parametrize("first", ["500", "gone", "slow", "429", "503"])
def test_what_a_server_fails_at_is_asked_again(first: str) -> None:
    server = Server(first, first, "well")
    (found,) = ask(server)
    assert found is not None and set(found.logprobs[1:]) == {-1.0} and found.logprobs[0] == 0.0
    assert server.asked == 3


@pytest.mark.parametrize("behaviour", ["500", "gone", "slow", "400", "empty"])
def test_a_server_that_fails_costs_scores_and_not_the_trajectory(behaviour: str) -> None:
    server = Server(behaviour)
    assert ask(server, retries=1, count=3) == [None] * 3
    assert server.asked == (3 if behaviour == "400" else 6)  # what is refused stays refused
    with pytest.raises(EngineError, match="'t' has failed 2 times in a row"):
        ask(server, retries=0, count=3, max_failures=2)


def test_a_server_that_works_now_and_then_has_not_failed() -> None:
    server = Server(*("500", "well") * 6)
    found = ask(server, retries=0, count=8, max_failures=2, max_batch=1)
    assert sum(s is None for s in found) == 4


def test_vocabularies_must_be_the_same(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    config = TeachersConfig(teachers=(TeacherConfig(name="t", checkpoint=str(tmp_path)),))
    with pytest.raises(ConfigError, match=f"teacher 't' .{tmp_path}. is not the student's") as told:
        Teachers(config, student="pico", routes={"a": "t"})
    assert str(PICO_DIR) in str(told.value) and "token " in str(told.value)
    with pytest.raises(ConfigError, match=r"'t' .m at http://there. has other ids"):
        ask(Server("well", ids=[1, 2, 3]))


def test_routes_are_checked() -> None:
    config = TeachersConfig(teachers=(TeacherConfig(name="t", checkpoint="pico"),))
    with pytest.raises(ConfigError, match=r"'a' has teacher 'u', which is not there.* t, self"):
        Teachers(config, student="pico", routes={"a": "u"})
    strict = TeachersConfig(teachers=config.teachers, strict=True)
    with pytest.raises(ConfigError, match=r"'b' has no teacher and teachers.strict"):
        Teachers(strict, student="pico", routes={"a": "t", "b": None})
    with pytest.raises(ConfigError, match="leave one of the two out"):
        TeachersConfig(default="self", strict=True)
    found, teachers = scores(config, {"a": None}, [trajectory(TEXTS[0])])
    assert found == [None] and teachers.figures() == {}
    with pytest.raises(ConfigError, match="no domain 'z'"):
        scores(config, {"a": "t"}, [trajectory(TEXTS[0], "z")])
    for fields in ({}, {"checkpoint": "pico", "remote": RemoteConfig(url="http://x", model="m")}):
        with pytest.raises(ConfigError, match="either checkpoint or remote"):
            TeacherConfig(name="t", **fields)
    with pytest.raises(ConfigError, match="no NO_SUCH_KEY: set it"):
        remote = RemoteConfig(url="http://x", model="m", key_variable="NO_SUCH_KEY")
        scores(TeachersConfig(teachers=(TeacherConfig(name="t", remote=remote),)), {"a": "t"}, [])


def test_what_is_too_long_for_a_teacher_has_no_scores() -> None:
    config = TeachersConfig(
        teachers=(TeacherConfig(name="t", checkpoint="pico"),), max_model_len=16
    )
    items = [trajectory("plum"), trajectory(TEXTS[0] * 3)]
    found, teachers = scores(config, {"a": "t"}, items)
    assert found[0] is not None and found[1] is None
    assert teachers.figures()["t"]["lost"] == 1


def test_a_damaged_adapter_fails_who_waits_for_it_and_nobody_else(tmp_path: Path) -> None:
    write_adapter(PICO_DIR, tmp_path / "x", ("mlp",), 0)
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(b"1234")
    config = TeachersConfig(
        teachers=(
            TeacherConfig(name="x", checkpoint="pico", adapter=tmp_path / "x"),
            TeacherConfig(name="y", checkpoint="pico"),
        )
    )

    async def run() -> list[Any]:
        teachers = Teachers(config, student="pico", routes={"a": "x", "b": "y"})
        items = [trajectory(TEXTS[0], domain) for domain in "aba"]
        try:
            return await asyncio.gather(*map(teachers.score, items), return_exceptions=True)
        finally:
            await teachers.close()

    first, second, third = asyncio.run(run())
    assert isinstance(first, CheckpointError) and isinstance(third, CheckpointError)
    assert isinstance(second, TeacherScores)
