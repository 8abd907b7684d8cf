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
import itertools
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
from aprium.base.files import remove_durably, write_durably
from aprium.base.log import get_logger
from aprium.base.records import Completion, Message, SamplingParams
from aprium.engine.engine import Engine, check_salt
from aprium.engine.owner import Owner
from aprium.engine.prefix import Node
from aprium.engine.store import pack, unpack

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST_BYTES = 32
_FORMAT = 1
NOTE_EVERY = 64  # generated tokens between two notes of a running turn
KEEP_EVERY = 256  # and between two snapshots of its state, which are larger


@dataclass(kw_only=True)
class Running:
    """A turn that has begun: what was asked, and what was said so far.

    `messages` are the new ones; `options` what else the prompt was made of (tools, switches).
    `turn` is the number of turns before it.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    messages: list[Message] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    generated: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    turn: int = 0


@dataclass(kw_only=True)
class SessionRecord:
    """What a session is; `tokens` are prompt and answer of its last turn, one of `turns`.

    Only its `owner` may have it (a server's client; empty: anybody). `running` is a turn that was
    cut off, or is under way while `busy`. `used` grows with every use.
    """

    id: str
    cache_salt: str = ""
    owner: str = ""
    messages: list[Message] = field(default_factory=list)
    tokens: tuple[int, ...] = ()
    turns: int = 0
    created: int = 0
    parent: str | None = None
    running: Running | None = None
    busy: bool = False
    used: int = 0
    node: Node | None = None  # what it holds in the prefix cache

    @property
    def interrupted(self) -> bool:
        """Whether its last turn was cut off and can be resumed."""
        return self.running is not None and not self.busy


class Sessions:
    """The sessions of one engine; those written to `directory` earlier are there again.

    There are at most `limit`: where another begins, the one that was not used for longest goes, its
    files too, of those that are not answering.
    """

    def __init__(self, owner: Owner, directory: Path | None, limit: int) -> None:
        self._owner, self._directory, self._limit = owner, directory, limit
        self._lock = threading.Lock()
        self._uses = itertools.count(1)
        self._records: dict[str, SessionRecord] = {}
        self._noted: dict[str, int] = {}  # generated tokens written down
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                paths = sorted(directory.glob("*.session.json"), key=lambda p: p.stat().st_mtime)
            except OSError as error:
                raise ConfigError(f"session_dir {directory} cannot be used: {error}") from error
            for path in paths:
                record = _read_record(path)
                record.used = next(self._uses)
                running = _read_running(self._running_path(record.id))
                if running is not None and running.turn >= record.turns:  # not one that ended
                    record.running = running
                self._records[record.id] = record

    @property
    def keep_every(self) -> int:
        """Generated tokens between two snapshots of a running turn; 0 where nothing outlives it."""
        return 0 if self._directory is None else KEEP_EVERY

    def create(
        self,
        id: str | None = None,
        messages: Sequence[Message] = (),
        cache_salt: str = "",
        owner: str = "",
    ) -> SessionRecord:
        """Begin a session, which may have `messages` already."""
        check_salt(cache_salt)
        record = SessionRecord(
            id=id or uuid.uuid4().hex,
            cache_salt=cache_salt,
            owner=owner,
            messages=list(messages),
            created=int(time.time()),
        )
        return self._add(record)

    def get(self, id: str, owner: str | None = None) -> SessionRecord:
        """Return the session `id`; raises SessionError where `owner` (None: anybody) has none."""
        record = self._records.get(id)
        if record is None or owner not in (None, record.owner):
            raise SessionError(f"there is no session {id!r}: create it first", "unknown")
        record.used = next(self._uses)
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
            owner=source.owner,
            messages=list(source.messages),
            tokens=source.tokens,
            turns=source.turns,
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
        self._forget(record)

    def _forget(self, record: SessionRecord) -> None:
        """Give up what a session holds, and its files."""
        record.tokens = ()
        self._hold(record)
        if self._directory is not None:
            remove_durably(self._path(record.id), self._running_path(record.id))

    def begin(self, id: str, running: Running) -> SessionRecord:
        """Begin a turn, or go on with one that was cut off; the session is busy until it ends."""
        with self._lock:
            record = self.get(id)
            self.check_idle(record)
            if running.turn != record.turns:
                raise SessionError(f"session {id!r} has moved on: ask again", "busy")
            before = record.running
            record.busy, record.running = True, running
        self._noted[id] = len(running.generated)
        try:
            if self._directory is not None:
                write_durably(self._running_path(id), _running_text(running).encode())
        except OSError as error:
            record.running, record.busy = before, False
            raise SessionError(f"session {id!r} cannot be written: {error}", "file") from error
        return record

    def note(self, record: SessionRecord, completion: Completion) -> None:
        """Write down what a running turn has come to, now and then."""
        before = self._noted.get(record.id, 0)
        if self._directory is None or len(completion.tokens) - before < NOTE_EVERY:
            return
        line = {"tokens": completion.tokens[before:], "logprobs": completion.logprobs[before:]}
        if record.running is not None:
            record.running.generated = completion.tokens
            record.running.logprobs = completion.logprobs
        with self._running_path(record.id).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._noted[record.id] = len(completion.tokens)

    def end(
        self, record: SessionRecord, completion: Completion | None, answer: Message | None = None
    ) -> None:
        """End a turn with what it came to; None leaves it cut off, to be resumed or not."""
        running = record.running
        self._noted.pop(record.id, None)
        try:
            if completion is not None and running is not None:
                record.tokens = (*running.prompt, *completion.tokens)
                record.messages += [*running.messages, *([answer] if answer else ())]
                record.turns += 1
                record.running = None
                self._hold(record)
                if self._directory is not None:
                    self.save(record.id)
                    self._running_path(record.id).unlink(missing_ok=True)
        finally:
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
            "owner": record.owner, "turns": record.turns,
        }  # fmt: skip
        target = self._path(id) if path is None else path
        try:
            if path is None:
                write_durably(target, json.dumps(header).encode())
                return target
            call = self._owner.call(lambda engine: _export(engine, record))
            name, state = call.result()
            body = json.dumps(header | {"fingerprint": name}).encode() + b"\n" + state
            write_durably(target, body + blake2b(body, digest_size=_DIGEST_BYTES).digest())
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
        try:
            header = json.loads(line)
            record, name = _record(header), header["fingerprint"]
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise SessionError(f"{path} is not a saved session: {error!r}", "file") from error
        record.id = id or record.id
        self._owner.call(lambda engine: _import(engine, name, state)).result()
        self._add(record)
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
            dropped = self._make_room()
            record.used = next(self._uses)
            self._records[record.id] = record
        try:
            if self._directory is not None:
                self.save(record.id)
        except SessionError:
            with self._lock:
                del self._records[record.id]
                self._records |= {old.id: old for old in dropped}
            raise
        for old in dropped:
            get_logger("engine").info("session %s is dropped: there are %d", old.id, self._limit)
            self._forget(old)
        return record

    def _make_room(self) -> list[SessionRecord]:
        """Take out the idle sessions that have to go for another; raises SessionError."""
        idle = sorted((r for r in self._records.values() if not r.busy), key=lambda r: r.used)
        count = max(len(self._records) - self._limit + 1, 0)
        if count > len(idle):
            raise SessionError(
                f"all {self._limit} sessions (max_sessions) are answering: wait for one, or delete "
                "one",
                "full",
            )
        for record in idle[:count]:
            del self._records[record.id]
        return idle[:count]

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
        owner=header["owner"],
        turns=header["turns"],
    )


def _running_text(running: Running) -> str:
    """Return what is noted of a turn that begins; the tokens lie outside of it, being many."""
    fixed = dataclasses.replace(running, prompt=(), generated=(), logprobs=())
    head = dataclasses.asdict(fixed) | {"prompt": running.prompt}
    lines = [head]
    if running.generated:
        lines.append({"tokens": running.generated, "logprobs": running.logprobs})
    return "".join(json.dumps(line) + "\n" for line in lines)


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
