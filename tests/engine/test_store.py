"""Snapshots beyond the slots: whole or not there, within budgets, the same bits after a restart."""

import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.engine import prefix
from aprium.engine import store as module
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


@settings(max_examples=60)
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


def test_a_store_that_gave_up_what_a_slot_still_has_does_no_harm(pico):
    engine = engine_of(pico, prefix_cache_ram_bytes=1000)  # less than one snapshot
    for i in range(3):
        last = deltas_of(engine, Request(id=str(i), tokens=prompt(1), params=GREEDY))[2]
    assert last.reused == 149


def test_keys_of_other_salts_never_meet():
    tokens = [10, 20, 30]
    assert prefix._key(tokens, "") != prefix._key(tokens[1:], "\n\0\0\0")
    assert len({prefix._key(tokens, salt) for salt in ("", "a", "aa", "b")}) == 4


def test_the_same_key_twice_counts_once():
    store = SnapshotStore(ram_bytes=10 * SIZE)
    for _ in range(3):
        store.put(meta("a"), tensors(1))
    assert store.ram_used == SIZE


def test_a_long_chain_is_given_up_without_recursion():
    store = SnapshotStore(ram_bytes=10**9)
    for i in range(3000):
        store.put(meta(str(i), str(i - 1) if i else None, 3 * i), tensors(i))
    store.drop("0")
    assert store.ram_used == 0 and not [*store.entries()]


def test_a_writer_survives_what_cannot_be_written(tmp_path, monkeypatch):
    store = SnapshotStore(ram_bytes=0, directory=tmp_path)
    packed = module.pack
    monkeypatch.setattr(module, "pack", lambda *a: (_ for _ in ()).throw(MemoryError()))
    store.put(meta("a"), tensors(1))
    for _ in range(1000):
        if "a" not in store._unwritten:
            break
        threading.Event().wait(0.005)
    monkeypatch.setattr(module, "pack", packed)
    store.put(meta("b"), tensors(2))
    store.close()
    assert (tmp_path / "b.snapshot").exists() and not (tmp_path / "a.snapshot").exists()


def test_states_of_old_weights_are_not_kept_for_new_ones(pico, tmp_path):
    other = load_checkpoint(PICO_DIR)
    changed = {
        name: p.detach() * 0.5
        for name, p in other.model.named_parameters()
        if name in ("lm_head.weight", "backbone.layers.0.mixer.in_proj.weight")
    }
    engine = engine_of(other, prefix_cache_dir=tmp_path, max_num_batched_tokens=40)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    engine.add(Request(id="a", tokens=prompt(1), params=params))
    engine.step()
    engine.update_weights(changed)  # in the middle of the prompt
    said = [t for _ in iter(lambda: engine.has_work, False) for d in engine.step()
            for t in d.tokens]  # fmt: skip
    longer = (*prompt(1), *said, 30, 31)
    found = deltas_of(engine, Request(id="b", tokens=longer, params=GREEDY))
    engine.close()
    assert found[2].reused == 0
    fresh = engine_of(other, enable_prefix_caching=False)
    assert found[:2] == deltas_of(fresh, Request(id="b", tokens=longer, params=GREEDY))[:2]
