"""Typed errors: every one names the offending value and the remedy.

Raised at boundaries (user, file and network input); inside, the code asserts. `cli.main` prints
the message of an `ApriumError` as one line, and the HTTP surface turns it into a JSON error.
"""

from typing import Literal


class ApriumError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(ApriumError):
    """A configuration value, key or file cannot be used."""


class CheckpointError(ApriumError):
    """A checkpoint is missing, damaged, or does not match its configuration."""


class TemplateError(ApriumError):
    """A chat template is missing, fails to compile, or refuses the messages given."""


class RequestError(ApriumError):
    """A request asks for something that cannot be done (HTTP 400)."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedError(ApriumError):
    """A flag or feature that other engines have and this one does not."""


class SessionError(ApriumError):
    """A session cannot be had.

    It is not there ("unknown") or in use ("busy"), its file cannot be used ("file"), or there is no
    room for another ("full").
    """

    def __init__(self, message: str, reason: Literal["unknown", "busy", "file", "full"]) -> None:
        super().__init__(message)
        self.reason = reason


class EngineError(ApriumError):
    """The engine has failed or has been closed; the message carries the cause."""


class OverloadError(ApriumError):
    """A request is turned away for now: the "queue" is full, its "key" has its share, or "closing".

    `retry_s` is after how many seconds a place is likely to be free.
    """

    def __init__(
        self, message: str, reason: Literal["queue", "key", "closing"], retry_s: float
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_s = retry_s


class DataError(ApriumError):
    """A training source or sample cannot be used."""


class QuantizeError(ApriumError):
    """A tensor, recipe or budget cannot be quantised as asked."""


class TaskError(ApriumError):
    """A task, its family or what grades it cannot be had: a parameter, a package, isolation."""
