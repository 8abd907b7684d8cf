"""Keys that let clients in: kept as hashes, compared in constant time, never written anywhere.

A hash is keyed by random bytes of this process, so it is of no use outside it, and a share of the
engine that is named after it tells nothing. Only sessions, which outlive the process, are marked
with a plain hash of the key that they belong to.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers

from aprium.base.errors import ConfigError

_SECRET = secrets.token_bytes(32)


class Keys:
    """A set of keys; empty it admits nobody, and is false."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def admits(self, key: str) -> bool:
        """Say whether `key` is one of them; takes as long either way."""
        given = _hash(key)
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return bool(key) and any(matches)


def key_of(headers: Headers) -> str:
    """Return the key that a request brings as Bearer token or, like Anthropic's, in `x-api-key`."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return given.strip()
    return headers.get("x-api-key", "").strip()


def share_of(headers: Headers) -> str:
    """Name the client that fair shares and limits are counted for; "" is everybody without key."""
    key = key_of(headers)
    return _hash(key).hex()[:16] if key else ""


def owner_of(headers: Headers) -> str:
    """Name the client whose sessions are its own; the same in the next process, and one-way."""
    key = key_of(headers)
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape")).hexdigest()[:32] if key else ""


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys in a file, one a line; lines that begin with # say something else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"the key file {path} has no key: write one a line")
    return keys


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), key=_SECRET).digest()
