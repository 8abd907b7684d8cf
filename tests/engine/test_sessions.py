"""Sessions: exact continuation, forks, files, and turns resumed after a crash."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aprium import LLM, SamplingParams, Session
from aprium.base.errors import ConfigError, EngineError, RequestError, SessionError
from aprium.base.records import Message
from aprium.engine.sessions import Running

GREEDY = SamplingParams(temperature=0, max_tokens=40)
SAMPLED = SamplingParams(temperature=0.9, max_tokens=150, seed=3, ignore_eos=True)
QUIET = {"enable_thinking": False}


@pytest.fixture(scope="module")
def llm():
    with LLM("pico", max_num_seqs=4, max_model_len=1024) as model:
        yield model


def test_a_session_says_what_the_whole_conversation_would(llm):
    session = Session(llm, messages=[{"role": "system", "content": "Be brief."}])
    first = session.chat("What is 3 + 4?", GREEDY, chat_template_kwargs=QUIET)
    second = session.chat("And 5 + 1?", GREEDY, chat_template_kwargs=QUIET)
    assert [m.role for m in session.messages] == [
        "system", "user", "assistant", "user", "assistant"
    ]  # fmt: skip
    assert session.messages[2].content == first.text
    with LLM("pico", enable_prefix_caching=False, max_model_len=1024) as plain:
        (expected,) = plain.generate([*session.messages[:-1]], GREEDY, chat_template_kwargs=QUIET)
    assert (second.tokens, second.logprobs) == (expected.tokens, expected.logprobs)
    assert session.tokens == (*second.prompt_tokens, *second.tokens)


def test_plain_tokens_go_on_exactly_where_they_stopped(llm):
    params = dataclasses.replace(GREEDY, ignore_eos=True, max_tokens=50)
    (whole,) = llm.generate("Once upon a time", dataclasses.replace(params, max_tokens=150))
    session = Session(llm)
    found = session.generate("Once upon a time", params).tokens
    for _ in range(2):
        turn = session.generate((), params)
        assert turn.reused >= len(turn.prompt_tokens) - 2
        found += turn.tokens
    assert found == whole.tokens


def test_forks_share_the_past_and_part_ways(llm):
    session = Session(llm)
    session.generate("The cat sat on the mat and looked at the " * 4, GREEDY)
    twins = [session.fork(), session.fork(f"fork-{os.getpid()}")]
    said = [t.generate(" dog", GREEDY) for t in twins]
    assert said[0].tokens == said[1].tokens
    assert twins[0].tokens == twins[1].tokens != session.tokens
    assert all(turn.reused > 32 for turn in said)
    twins[0].delete()
    with pytest.raises(SessionError, match="create it first"):
        twins[0].generate(" bird", GREEDY)
    assert twins[1].generate(" bird", GREEDY).finish is not None


def test_a_file_has_the_state_in_it(llm, tmp_path):
    session = Session(llm)
    session.generate(
        "A long text that is worth keeping, for it has many words in it. " * 3, SAMPLED
    )
    path = session.save(tmp_path / "s.aprium")
    expected = session.fork().generate(" More.", GREEDY)
    with LLM("pico", max_num_seqs=4, max_model_len=1024) as other:
        loaded = Session.load(other, path)
        assert loaded.tokens == session.tokens and loaded.id == session.id
        found = loaded.generate(" More.", GREEDY)
        assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)
        assert found.reused >= len(session.tokens) - 2
        with pytest.raises(SessionError, match="already"):
            Session.load(other, path)
    with LLM("pico", activation_dtype="bfloat16", max_model_len=1024) as other:
        loaded = Session.load(other, path, "again")
        assert loaded.generate(" More.", GREEDY).reused == 0  # computed anew in its own precision
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SessionError, match="damaged"):
        Session.load(llm, path, "third")


def test_what_cannot_be_is_refused(llm, tmp_path):
    session = Session(llm)
    with pytest.raises(RequestError, match="fork it"):
        session.generate("a", dataclasses.replace(GREEDY, n=2))
    with pytest.raises(SessionError, match="no turn to resume"):
        session.resume()
    with pytest.raises(SessionError, match="session_dir"):
        session.save()
    with pytest.raises(SessionError, match="letters, digits"):
        Session(llm, "../up")
    with pytest.raises(SessionError, match="cannot be read"):
        Session.load(llm, tmp_path / "none")
    llm.sessions.begin(session.id, Running(prompt=(1,), params=GREEDY))
    with pytest.raises(SessionError, match="is answering"):
        session.generate("a", GREEDY)
    with pytest.raises(SessionError, match="is answering"):
        session.delete()


def test_the_least_recently_used_goes_first_and_one_that_answers_never(tmp_path):
    options = {"session_dir": tmp_path, "max_sessions": 3, "max_model_len": 256}
    with LLM("pico", **options) as llm:
        for name in "abc":
            Session(llm, name)
        Session(llm, "a").generate("One", GREEDY)  # used again, so that b is the oldest
        Session(llm, "d")
        assert {r.id for r in llm.sessions.all()} == {"a", "c", "d"}
        assert not [*tmp_path.glob("b.*")]
        llm.sessions.get("c")
        llm.sessions.begin("a", Running(prompt=(1,), params=GREEDY, turn=1))
        Session(llm, "e")
        Session(llm, "f")
        assert {r.id for r in llm.sessions.all()} == {"a", "e", "f"}
        for name in "ef":
            llm.sessions.begin(name, Running(prompt=(1,), params=GREEDY))
        with pytest.raises(SessionError, match="all 3 sessions") as caught:
            Session(llm, "g")
        assert caught.value.reason == "full" and not [*tmp_path.glob("g.*")]
        llm.sessions.end(llm.sessions.get("e"), None)
        assert llm.sessions.fork("a", "h").tokens == llm.sessions.get("a").tokens
        assert {r.id for r in llm.sessions.all()} == {"a", "f", "h"}
        (tmp_path / "z.session.json").mkdir()
        llm.sessions.end(llm.sessions.get("f"), None)
        with pytest.raises(SessionError, match="cannot be written"):
            Session(llm, "z")
        assert {r.id for r in llm.sessions.all()} == {"a", "f", "h"}  # nobody went for nothing
        (tmp_path / "z.session.json").rmdir()
    with LLM("pico", **options | {"max_sessions": 1}) as llm:  # all are there until one comes
        assert len(llm.sessions.all()) == 3
        Session(llm, "i")
        assert [r.id for r in llm.sessions.all()] == ["i"]
        assert {path.name for path in tmp_path.glob("*.json*")} == {"i.session.json"}
    with pytest.raises(ConfigError, match="max_sessions is 0"):
        LLM("pico", max_sessions=0)


def test_what_is_acknowledged_is_on_the_disk(llm, tmp_path, monkeypatch):
    """Every file that a turn leaves was synced before it got its name, and the name after."""
    done: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def note_sync(handle):
        done.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        sync(handle)

    def note_replace(self, target):
        done.append(("name", Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with LLM("pico", session_dir=tmp_path / "kept", max_model_len=256) as other:
        session = Session(other, "s")
        done.clear()
        session.generate("One two", GREEDY)
        kinds = [(kind, name.split(".")[1] if "." in name else name) for kind, name in done]
        own = [pair for pair in kinds if pair[1] in ("running", "session", "kept")]
        written = [("sync", "{}"), ("name", "{}"), ("sync", "kept")]
        expected = [(k, n.format(part)) for part in ("running", "session") for k, n in written]
        assert own == expected
        done.clear()
        session.delete()
        assert done == [("sync", "kept")] and not [*(tmp_path / "kept").glob("s.*")]


def test_sessions_of_a_directory_are_there_again(tmp_path):
    options = {"session_dir": tmp_path, "max_model_len": 512}
    with LLM("pico", **options) as llm:
        session = Session(llm, "kept", messages=[Message(role="user", content="Hi")])
        first = session.generate("One two three four five six seven eight nine ten. " * 3, GREEDY)
        Session(llm, "gone").delete()
    with LLM("pico", **options) as llm:
        assert [r.id for r in llm.sessions.all()] == ["kept"]
        again = Session(llm, "kept")
        assert again.tokens == (*first.prompt_tokens, *first.tokens)
        assert again.messages[0].content == "Hi"
        assert again.generate(" eleven", GREEDY).reused > 32


CRASH = """
import sys
from aprium import LLM, SamplingParams, Session
llm = LLM("pico", session_dir=sys.argv[1], max_model_len=2048)
session = Session(llm, "s")
print("begun", flush=True)
session.generate("Tell a story. " * 10, SamplingParams(temperature=0.9, max_tokens=1200,
                 ignore_eos=True, seed=3), )
"""


def test_a_killed_turn_is_resumed_to_the_same_tokens(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    notes = tmp_path / "s.running.jsonl"
    stop = threading.Event()
    for _ in range(3000):
        if notes.exists() and len(notes.read_text().splitlines()) >= 8:
            break
        assert process.poll() is None, "it came to its end before it could be killed"
        stop.wait(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    params = SamplingParams(temperature=0.9, max_tokens=1200, ignore_eos=True, seed=3)
    with LLM("pico", session_dir=tmp_path, max_model_len=2048) as llm:
        session = Session(llm, "s")
        assert session.interrupted and not session.tokens
        resumed = session.resume()
        assert llm.stats().num_restored >= 1 and not session.interrupted
        assert resumed.reused > 300  # from a snapshot, not from the first token
    with LLM("pico", enable_prefix_caching=False, max_model_len=2048) as plain:
        (expected,) = plain.generate("Tell a story. " * 10, params)
    assert resumed.tokens == expected.tokens and resumed.logprobs == expected.logprobs
    assert resumed.text == expected.text


def test_a_failed_engine_leaves_a_turn_to_resume(tmp_path):
    llm = LLM("pico", session_dir=tmp_path, max_model_len=512)
    session = Session(llm, "s")
    run, steps = llm._engine.runner.run, []

    def fail(plan):
        steps.append(plan)
        if len(steps) > 90:
            raise RuntimeError("on purpose")
        return run(plan)

    llm._engine.runner.run = fail
    with pytest.raises(EngineError, match="on purpose"):
        session.generate("Tell a story.", SAMPLED)
    assert session.interrupted
    llm.close()
    with LLM("pico", session_dir=tmp_path, max_model_len=512) as llm:
        resumed = Session(llm, "s").resume()
        (expected,) = llm.generate("Tell a story.", SAMPLED)
    assert resumed.tokens == expected.tokens


def test_idle_sessions_do_not_keep_others_from_the_cache():
    with LLM("pico", max_model_len=512, max_num_seqs=2) as llm:
        sessions = [Session(llm) for _ in range(40)]
        for i, session in enumerate(sessions):
            session.generate([20 + i, *range(40, 90)], GREEDY)
        prompt = [*range(100, 180)]
        reused = [llm.generate([prompt], GREEDY)[0].reused for _ in range(2)]
        assert reused == [0, 79]


@pytest.mark.parametrize("length", [60, 84, 148, 290])
def test_the_end_of_an_answer_is_kept_whatever_its_length(tmp_path, length):
    params = dataclasses.replace(GREEDY, ignore_eos=True, max_tokens=length)
    with LLM("pico", session_dir=tmp_path, max_model_len=1024) as llm:
        session = Session(llm)
        session.generate([*range(40, 140)], params)
        assert session.generate((), params).reused >= 100 + length - 2


def test_a_turn_that_cannot_be_written_leaves_the_session_free(tmp_path):
    with LLM("pico", session_dir=tmp_path, max_model_len=512) as llm:
        session = Session(llm, "s")
        session.generate([5, 6, 7], GREEDY)
        tmp_path.rename(tmp_path.with_name("away"))
        with pytest.raises(SessionError, match="cannot be written"):
            session.generate((), GREEDY)
        tmp_path.with_name("away").rename(tmp_path)
        assert not session.interrupted and session.generate((), GREEDY).finish


def test_a_turn_that_ended_is_not_one_to_resume(tmp_path):
    with LLM("pico", session_dir=tmp_path, max_model_len=512) as llm:
        session = Session(llm, "s")
        notes = tmp_path / "s.running.jsonl"
        save = llm.sessions.save

        def save_and_keep(id, path=None):
            found = save(id, path)
            left.append(notes.read_bytes())
            return found

        left: list[bytes] = []
        llm.sessions.save = save_and_keep
        session.generate([5, 6, 7], GREEDY)
        notes.write_bytes(left[0])  # as if the process had ended between the two
    with LLM("pico", session_dir=tmp_path, max_model_len=512) as llm:
        assert not Session(llm, "s").interrupted


def test_a_turn_of_a_session_that_has_moved_on_is_refused(llm):
    session = Session(llm)
    session.generate([5, 6, 7], GREEDY)
    with pytest.raises(SessionError, match="moved on"):
        llm.sessions.begin(session.id, Running(prompt=(1,), params=GREEDY, turn=0))
