"""Snapshots beyond the slots: whole or not there, within budgets, the same bits after a restart."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.engine import prefix
from aprium.engine.prefix import Meta
from aprium.engine.store import SnapshotStore, fingerprint, join, pack, unpack
from tests.engine.test_prefix import deltas_of, engine_of

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SIZE = 4 * 3 * 4  # bytes of what `tensors` makes


def tensors(seed):
    return {"ssm": torch.full((4, 3), float(seed))}


def meta(key, parent=None, start=0, count=3):
    return Meta(key, parent, "", start + count, tuple(range(count)), False)


@pytest.fixture(scope="module")
def pico():
    return load_checkpoint(PICO_DIR)


def prompt(seed, count=150):
    generator = random.Random(seed)
    return tuple(generator.randrange(20, 500) for _ in range(count))


def test_a_packed_snapshot_comes_back_and_a_damaged_one_does_not():
    kinds = {
        "a": torch.randn(3, 5),
        "b": torch.randn(2).to(torch.bfloat16),
        "c": torch.arange(7, dtype=torch.uint8),
    }
    data = pack(meta("k"), kinds)
    found, back = unpack(data)
    assert found == meta("k") and back.keys() == kinds.keys()
    assert all(torch.equal(back[name], kinds[name]) for name in kinds)
    for at in {0, 1, len(data) // 2, len(data) - 1}:
        broken = bytearray(data)
        broken[at] ^= 1
        assert unpack(bytes(broken)) is None
    assert unpack(data[:-1]) is None and unpack(b"") is None


def test_the_oldest_goes_first_and_what_depends_on_it():
    store = SnapshotStore(ram_bytes=3 * SIZE)
    store.put(meta("a"), tensors(1))
    store.put(meta("b", "a", 3), tensors(2))
    store.put(meta("x"), tensors(3))
    assert [part.start for part in store.fetch("b")] == [0, 3]
    store.put(meta("y"), tensors(4))  # x is the oldest: b and its parent were used
    assert [store.has(key) for key in "abxy"] == [True, True, False, True]
    store.drop("a")
    assert [store.has(key) for key in "abxy"] == [False, False, False, True]
    assert store.ram_used == SIZE
    store.put(meta("c", "b", 6), tensors(5))  # what it builds on is gone
    assert not store.has("c")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_budgets_hold_whatever_comes(data, room):
    store = SnapshotStore(ram_bytes=room * SIZE)
    keys = []
    for i in range(data.draw(st.integers(1, 25))):
        parent = data.draw(st.sampled_from([None, *keys]))
        if parent is not None and not store.has(parent):
            parent = None
        length = store._metas[parent].length if parent else 0
        store.put(meta(str(i), parent, length), tensors(i))
        keys.append(str(i))
        key = data.draw(st.sampled_from(keys))
        if store.has(key):
            parts = store.fetch(key)
            assert float(parts[-1].tensors["ssm"][0, 0]) == int(key)
            assert parts[0].start == 0
        assert store.ram_used <= room * SIZE
        assert store.ram_used == SIZE * len(store._ram)


def test_files_outlive_the_store_and_obey_their_budget(tmp_path):
    store = SnapshotStore(ram_bytes=0, directory=tmp_path / "s")
    for i, key in enumerate("abc"):
        store.put(meta(key, "ab"[i - 1] if i else None, 3 * i), tensors(i))
    assert float(store.fetch("c")[-1].tensors["ssm"][0, 0]) == 2
    store.close()
    again = SnapshotStore(ram_bytes=0, directory=tmp_path / "s")
    assert [m.key for m in again.entries()] == ["a", "b", "c"]
    assert join(again.fetch("c"))["ssm"].tolist() == tensors(2)["ssm"].tolist()
    again.close()
    size = again.disk_used // 3
    small = SnapshotStore(ram_bytes=0, directory=tmp_path / "s", disk_bytes=2 * size)
    small.put(meta("d"), tensors(9))
    small.close()
    assert 0 < small.disk_used <= 2 * size and small.has("d")
    assert len([*(tmp_path / "s").glob("*.snapshot")]) == len([*small.entries()])
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "s").glob("*.snapshot")} == {0o600}


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone", "swap"])
def test_a_damaged_file_is_one_that_is_not_there(tmp_path, harm):
    store = SnapshotStore(ram_bytes=0, directory=tmp_path)
    store.put(meta("a"), tensors(1))
    store.put(meta("b", "a", 3), tensors(2))
    store.close()
    store = SnapshotStore(ram_bytes=0, directory=tmp_path)
    path = tmp_path / "a.snapshot"
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-40] ^= 4
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes((tmp_path / "b.snapshot").read_bytes())
    assert store.fetch("b") is None
    assert not store.has("a") and not store.has("b") and store.num_damaged == 1
    store.close()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="prefix_cache_dir"):
        SnapshotStore(ram_bytes=0, directory=tmp_path / "file" / "x")


def test_other_weights_or_settings_have_another_name(pico):
    name = fingerprint(pico.model, 1)
    assert fingerprint(pico.model, 1) == name != fingerprint(pico.model, 2)
    weight = pico.model.backbone.layers[0].mixer.in_proj.weight
    with torch.no_grad():
        before = weight[0, 0].clone()
        weight[0, 0] += 1
        assert fingerprint(pico.model, 1) != name
        weight[0, 0] = before
    assert fingerprint(pico.model, 1) == name


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_evicted_prefix_is_loaded_with_the_same_bits(pico, tmp_path, where):
    options = {"num_snapshots": 1, "snapshot_interval": 64}
    if where == "disk":
        options |= {"prefix_cache_dir": tmp_path, "prefix_cache_ram_bytes": 0}
    engine = engine_of(pico, **options)
    first = deltas_of(engine, Request(id="a", tokens=prompt(1), params=GREEDY))
    deltas_of(engine, Request(id="b", tokens=prompt(2), params=GREEDY))
    again = deltas_of(engine, Request(id="c", tokens=prompt(1), params=GREEDY))
    assert again[:2] == first[:2] and again[2].reused == 149
    stats = engine.stats()
    assert stats.num_restored == 1 and stats.num_stored >= 4
    assert (stats.disk_bytes > 0) == (where == "disk")
    engine.close()


@pytest.mark.parametrize("kv", ["auto", "bfloat16", "fp8"])
def test_a_restart_finds_what_was_stored(pico, tmp_path, kv):
    options = {"prefix_cache_dir": tmp_path, "kv_cache_dtype": kv}
    before = engine_of(pico, **options)
    first = deltas_of(before, Request(id="a", tokens=prompt(1), params=GREEDY))
    before.close()
    after = engine_of(pico, **options)
    again = deltas_of(after, Request(id="a", tokens=prompt(1), params=GREEDY))
    assert again[:2] == first[:2] and again[2].reused == 149
    after.close()
    other = engine_of(pico, **options | {"activation_dtype": "bfloat16"})
    last = deltas_of(other, Request(id="a", tokens=prompt(1), params=GREEDY))[2]
    assert last.reused == 0  # states of another precision are not ours
    other.close()


def test_damage_on_disk_is_a_miss_and_never_a_wrong_token(pico, tmp_path):
    options = {"prefix_cache_dir": tmp_path, "snapshot_interval": 64}
    engine = engine_of(pico, **options)
    first = deltas_of(engine, Request(id="a", tokens=prompt(1), params=GREEDY))
    engine.close()
    files = sorted(tmp_path.glob("*/*.snapshot"))
    assert len(files) >= 3
    generator = random.Random(0)
    for path in files:
        data = bytearray(path.read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
    engine = engine_of(pico, **options)
    again = deltas_of(engine, Request(id="a", tokens=prompt(1), params=GREEDY))
    assert again[:2] == first[:2] and again[2].reused == 0
    assert again[2].why_not_more in (prefix.DAMAGED, prefix.FIRST_TIME)
    engine.close()
