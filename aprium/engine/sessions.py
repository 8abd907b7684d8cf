"""Conversations that outlive their requests: continued, forked, saved, loaded, resumed.

A session is its messages, the tokens of its last turn, and a hold on the snapshot that these lead
to; the state itself is the prefix cache's, so forks share pages and a session of any length costs
one recurrent state beside its keys and values. With a directory every turn is written down when it
ends, and while it runs the tokens so far, so that after a crash it is gone on with: from the last
snapshot on disk, with the same random numbers, to the same tokens.

`Sessions` is the book of them, for any thread; what it has for a caller is in `Session`
(`engine/conversation`) and in the server's routes.
"""

import dataclasses
import json
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError, SessionError
from aprium.base.records import Completion, Message, SamplingParams
from aprium.engine.engine import Engine
from aprium.engine.owner import Owner
from aprium.engine.prefix import Node
from aprium.engine.store import pack, unpack

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST_BYTES = 32
_FORMAT = 1
NOTE_EVERY = 64  # generated tokens between two notes of a running turn


@dataclass(kw_only=True)
class Running:
    """A turn that has begun: what was asked, and what was said so far.

    `messages` are the new ones; `options` what else the prompt was made of (tools, switches).
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    messages: list[Message] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    generated: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(kw_only=True)
class SessionRecord:
    """What a session is; `tokens` are prompt and answer of its last turn.

    `running` is a turn that was cut off, or is under way while `busy`.
    """

    id: str
    cache_salt: str = ""
    messages: list[Message] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    created: int = 0
    parent: str | None = None
    running: Running | None = None
    busy: bool = False
    node: Node | None = None  # what it holds in the prefix cache

    @property
    def interrupted(self) -> bool:
        """Whether its last turn was cut off and can be resumed."""
        return self.running is not None and not self.busy


class Sessions:
    """The sessions of one engine; those written to `directory` earlier are there again."""

    def __init__(self, owner: Owner, directory: Path | None) -> None:
        self._owner, self._directory = owner, directory
        self._lock = threading.Lock()
        self._records: dict[str, SessionRecord] = {}
        self._noted: dict[str, int] = {}  # generated tokens written down
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                paths = sorted(directory.glob("*.session.json"))
            except OSError as error:
                raise ConfigError(f"session_dir {directory} cannot be used: {error}") from error
            for path in paths:
                record = _read_record(path)
                record.running = _read_running(self._running_path(record.id))
                self._records[record.id] = record

    @property
    def keep_every(self) -> int:
        """Generated tokens between two snapshots of a running turn; 0 where nothing outlives it."""
        return 0 if self._directory is None else NOTE_EVERY

    def create(
        self, id: str | None = None, messages: Sequence[Message] = (), cache_salt: str = ""
    ) -> SessionRecord:
        """Begin a session, which may have `messages` already."""
        record = SessionRecord(
            id=id or uuid.uuid4().hex,
            cache_salt=cache_salt,
            messages=list(messages),
            created=int(time.time()),
        )
        return self._add(record)

    def get(self, id: str) -> SessionRecord:
        """Return the session `id`; raises SessionError where there is none."""
        record = self._records.get(id)
        if record is None:
            raise SessionError(f"there is no session {id!r}: create it first", "unknown")
        return record

    def check_idle(self, record: SessionRecord) -> None:
        """Raise SessionError where the session is answering."""
        if record.busy:
            raise SessionError(f"session {record.id!r} is answering: wait, or fork it", "busy")

    def all(self) -> list[SessionRecord]:
        """Return all sessions, the oldest first."""
        return sorted(self._records.values(), key=lambda r: (r.created, r.id))

    def fork(self, id: str, new_id: str | None = None) -> SessionRecord:
        """Begin a session with all that `id` has up to its last full turn."""
        source = self.get(id)
        record = SessionRecord(
            id=new_id or uuid.uuid4().hex,
            cache_salt=source.cache_salt,
            messages=list(source.messages),
            tokens=source.tokens,
            created=int(time.time()),
            parent=id,
        )
        self._add(record)
        self._hold(record)
        return record

    def delete(self, id: str) -> None:
        """Forget a session, its files too; what others share of its state stays."""
        with self._lock:
            record = self.get(id)
            self.check_idle(record)
            del self._records[id]
        record.tokens = ()
        self._hold(record)
        if self._directory is not None:
            self._path(id).unlink(missing_ok=True)
            self._running_path(id).unlink(missing_ok=True)

    def begin(self, id: str, running: Running) -> SessionRecord:
        """Begin a turn, or go on with one that was cut off; the session is busy until it ends."""
        with self._lock:
            record = self.get(id)
            self.check_idle(record)
            record.busy, record.running = True, running
        self._noted[id] = len(running.generated)
        if self._directory is not None:
            data = dataclasses.asdict(running) | {"generated": (), "logprobs": ()}
            lines = [data]
            if running.generated:
                lines.append({"tokens": running.generated, "logprobs": running.logprobs})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            _write(self._running_path(id), text.encode())
        return record

    def note(self, record: SessionRecord, completion: Completion) -> None:
        """Write down what a running turn has come to, now and then."""
        before = self._noted.get(record.id, 0)
        if self._directory is None or len(completion.tokens) - before < NOTE_EVERY:
            return
        line = {"tokens": completion.tokens[before:], "logprobs": completion.logprobs[before:]}
        with self._running_path(record.id).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._noted[record.id] = len(completion.tokens)

    def end(
        self, record: SessionRecord, completion: Completion | None, answer: Message | None = None
    ) -> None:
        """End a turn with what it came to; None leaves it cut off, to be resumed or not."""
        running = record.running
        assert running is not None
        self._noted.pop(record.id, None)
        if completion is not None:
            record.tokens = (*running.prompt, *completion.tokens)
            record.messages += [*running.messages, *([answer] if answer else ())]
            record.running = None
            self._hold(record)
            if self._directory is not None:
                self.save(record.id)
                self._running_path(record.id).unlink(missing_ok=True)
        record.busy = False

    def save(self, id: str, path: Path | None = None) -> Path:
        """Write a session down: to `path` in one file with its state, else to the directory.

        Raises SessionError where there is neither, or it cannot be written.
        """
        record = self.get(id)
        if path is None and self._directory is None:
            raise SessionError(
                "there is no directory for sessions: set session_dir (--session-dir), or give a "
                "path",
                "file",
            )
        header = {
            "format": _FORMAT, "id": id, "cache_salt": record.cache_salt,
            "messages": [dataclasses.asdict(m) for m in record.messages],
            "tokens": record.tokens, "created": record.created, "parent": record.parent,
        }  # fmt: skip
        target = self._path(id) if path is None else path
        try:
            if path is None:
                _write(target, json.dumps(header).encode())
                return target
            call = self._owner.call(lambda engine: _export(engine, record))
            name, state = call.result()
            body = json.dumps(header | {"fingerprint": name}).encode() + b"\n" + state
            _write(target, body + blake2b(body, digest_size=_DIGEST_BYTES).digest())
        except OSError as error:
            raise SessionError(f"{target} cannot be written: {error}", "file") from error
        return target

    def load(self, path: Path, id: str | None = None) -> SessionRecord:
        """Take up a session that `save` wrote to `path`, under its own id or another.

        Its state is used where weights and settings are the same, else computed again. Raises
        SessionError for a file that is damaged, or an id that is taken.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SessionError(f"{path} cannot be read: {error}", "file") from error
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        line, _, state = body.partition(b"\n")
        if blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
            raise SessionError(f"{path} is damaged, or not a saved session", "file")
        header = json.loads(line)
        record = _record(header)
        record.id = id or record.id
        self._add(record)
        self._owner.call(lambda engine: _import(engine, header["fingerprint"], state)).result()
        self._hold(record)
        return record

    def _add(self, record: SessionRecord) -> SessionRecord:
        if not _NAME.fullmatch(record.id):
            raise SessionError(
                f"{record.id!r} cannot name a session: use up to 64 letters, digits, - and _",
                "file",
            )
        with self._lock:
            if record.id in self._records:
                raise SessionError(f"there is a session {record.id!r} already", "busy")
            self._records[record.id] = record
        if self._directory is not None:
            self.save(record.id)
        return record

    def _hold(self, record: SessionRecord) -> None:
        """Hold the longest snapshot of the session's tokens, rather than the one held before."""
        before, tokens, salt = record.node, record.tokens, record.cache_salt

        def swap(engine: Engine) -> Node | None:
            return engine.hold(tokens, salt, before)

        record.node = self._owner.call(swap).result()

    def _path(self, id: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{id}.session.json"

    def _running_path(self, id: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{id}.running.jsonl"


def _export(engine: Engine, record: SessionRecord) -> tuple[str, bytes]:
    """Return the fingerprint and the state of a session, empty where none is kept."""
    found = engine.export_state(record.tokens, record.cache_salt)
    return engine.fingerprint(), b"" if found is None else pack(*found)


def _import(engine: Engine, fingerprint: str, state: bytes) -> None:
    """Give a saved state to `engine`, if it is one of the same weights and settings."""
    if state and fingerprint == engine.fingerprint():
        found = unpack(state)
        if found is not None:
            engine.import_state(*found)


def _record(header: Mapping[str, Any]) -> SessionRecord:
    return SessionRecord(
        id=header["id"],
        cache_salt=header["cache_salt"],
        messages=[from_dict(Message, m) for m in header["messages"]],
        tokens=tuple(header["tokens"]),
        created=header["created"],
        parent=header["parent"],
    )


def _read_record(path: Path) -> SessionRecord:
    try:
        return _record(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise SessionError(
            f"{path} is damaged ({error}): remove it, and start again", "file"
        ) from error


def _read_running(path: Path) -> Running | None:
    """Read the notes of a turn that was cut off, up to the last that is whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        running = from_dict(Running, json.loads(lines[0]))
    except (OSError, ValueError, IndexError, ConfigError):
        return None
    for text in lines[1:]:
        try:
            line = json.loads(text)
            running.generated += tuple(line["tokens"])
            running.logprobs += tuple(line["logprobs"])
        except (ValueError, KeyError, TypeError):
            break
    return running


def _write(path: Path, data: bytes) -> None:
    """Write a file that is either there whole or not at all, for its owner alone."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_bytes(data)
    partial.replace(path)
