"""Graders in a sandbox of their own: libraries that evaluate what a model wrote, or may never end.

Checkers of mathematics and puzzles parse, and some of them `eval`, an answer. So they run isolated,
as programs of a model do, with the installed packages to read. One process imports them once and
forks for each answer: nothing that one answer does is there for the next, and what is late or takes
too much memory is killed alone.
"""

import atexit
import contextlib
import importlib
import json
import os
import select
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aprium.base.errors import TaskError
from aprium.envs import sandbox

_LIMITS = sandbox.SandboxLimits(cpu_s=1 << 30, memory_bytes=4 << 30, processes=16)
_START_S = 60.0
_SLACK_S = 5.0  # for a reply to come after the worker's own time limit


class Worker:
    """Calls functions of `module` in a sandbox, one at a time, from any thread.

    It is started by the first call. Arguments and results are JSON values.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._life = contextlib.ExitStack()
        self._process: Any = None
        atexit.register(self.close)

    def call(
        self, function: str, *arguments: Any, limit_s: float = 5.0, forked: bool = True
    ) -> Any:
        """Return what `function` returns; unless `forked`, what it does to its process stays.

        Raises TimeoutError when it takes longer than `limit_s`, ValueError with its words when it
        raises, TaskError when it cannot be run at all.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            line = json.dumps([function, arguments, limit_s, forked]).encode() + b"\n"
            try:
                self._process.stdin.write(line)
                self._process.stdin.flush()
                kind, value = self._read(limit_s + _SLACK_S)
            except (OSError, TimeoutError) as error:
                self._stop()
                raise TaskError(f"the grader of {self._module} has died: {error}") from error
        if kind == "late":
            raise TimeoutError(f"{self._module}.{function} took longer than {limit_s:g} s")
        if kind == "raised":
            raise ValueError(value)
        return value

    def close(self) -> None:
        """Stop the process; a later call starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        command = (*sandbox.PYTHON, "-m", __name__, self._module)
        own = {f"/packages/own/{__name__.split('.')[0]}": str(Path(__file__).parents[1])}
        shown = own | {"/packages/all": sysconfig.get_path("purelib")}
        self._process = self._life.enter_context(sandbox.started(command, shown, _LIMITS))
        try:
            kind, value = self._read(_START_S)
        except (OSError, TimeoutError) as error:
            self._stop()
            raise TaskError(
                f"the grader of {self._module} does not start: {error}: are installed packages "
                "readable for others?"
            ) from error
        if kind != "ready":
            self._stop()
            raise TaskError(value)

    def _stop(self) -> None:
        self._life.close()
        self._process = None

    def _read(self, limit_s: float) -> tuple[str, Any]:
        """Return the next reply; raises TimeoutError or EOFError's kin when there is none."""
        pipe, deadline = self._process.stdout, time.monotonic() + limit_s
        buffer = b""
        while not buffer.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no word in {limit_s:g} s")
            piece = os.read(pipe.fileno(), 1 << 16)
            if not piece:
                raise ConnectionError("it ended")
            buffer += piece
        kind, value = json.loads(buffer)
        return kind, value


def _serve(module: str) -> None:
    """Answer calls on standard input until it ends."""
    mouth = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no reply
    try:
        functions = importlib.import_module(module)
        getattr(functions, "prepare", lambda: None)()
    except Exception as error:
        _reply(mouth, "failed", f"{type(error).__name__}: {error}")
        return
    _reply(mouth, "ready", None)
    for line in sys.stdin:
        name, arguments, limit_s, forked = json.loads(line)
        function = getattr(functions, name, None)
        if function is None:
            _reply(mouth, "raised", f"AttributeError: {module} has no {name}")
            continue
        call = _forked if forked else _called
        _reply(mouth, *call(function, arguments, limit_s))


def _called(function: Callable[..., Any], arguments: list[Any], limit_s: float) -> tuple[str, Any]:
    """Call `function` here; the caller kills this process when it takes too long."""
    try:
        return "value", function(*arguments)
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"[:1000]


def _forked(function: Callable[..., Any], arguments: list[Any], limit_s: float) -> tuple[str, Any]:
    """Call `function` in a child of this process and return what became of it."""
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ear)
        os.close(0)
        try:
            _reply(mouth, "value", function(*arguments))
        except BaseException as error:
            _reply(mouth, "raised", f"{type(error).__name__}: {error}"[:1000])
        os._exit(0)
    os.close(mouth)
    buffer, deadline = b"", time.monotonic() + limit_s
    while not buffer.endswith(b"\n"):
        if not select.select([ear], [], [], max(0.0, deadline - time.monotonic()))[0]:
            break
        piece = os.read(ear, 1 << 16)
        if not piece:
            break
        buffer += piece
    os.close(ear)
    late = time.monotonic() >= deadline
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if buffer.endswith(b"\n"):
        kind, value = json.loads(buffer)
        return kind, value
    return ("late", None) if late else ("raised", "it died without a result")


def _reply(mouth: int, kind: str, value: Any) -> None:
    data = json.dumps([kind, value]).encode() + b"\n"
    while data:
        data = data[os.write(mouth, data) :]


if __name__ == "__main__":
    _serve(sys.argv[1])
