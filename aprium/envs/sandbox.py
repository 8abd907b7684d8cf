"""Run programs that nobody trusts: isolated, limited, and gone afterwards.

A program gets namespaces of its own (files, processes, network, IPC), a file tree of the system's
programs and a small /work in memory, no rights, and limits on time, memory, processes and output.
It sees no file of this machine's users, no other process and no network. Linux alone offers this,
to root or where unprivileged user namespaces are allowed; elsewhere it is refused, never run bare.
It shares this machine's kernel: it is a fence around what a model writes, not around an attacker
with an exploit of the kernel.
"""

import contextlib
import functools
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aprium.base.errors import TaskError

PYTHON = ("/python/bin/python3", "-s", "-B")
_INIT = Path(__file__).with_name("sandbox_init.py")
_UIDS = (1 << 20, 1 << 30)  # where nobody's are, one at random for each program
_ENVIRONMENT = {
    "PATH": "/python/bin:/usr/bin:/bin",
    "HOME": "/work",
    "LANG": "C.UTF-8",
    "PYTHONPATH": "/packages/own:/packages/all",  # where graders are shown them
    "PYTHONHASHSEED": "0",  # the same order of sets every time
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What a program may use: seconds on the clock and of CPU, bytes, and processes.

    `memory_bytes` holds for each process, `disk_bytes` for all files in /work together;
    `output_bytes` for either stream.
    """

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    file_bytes: int = 8 << 20
    output_bytes: int = 1 << 20
    processes: int = 8
    open_files: int = 64

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise TaskError(f"sandbox limit {name} is {getattr(self, name)}: give more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended.

    `stop` is "exit" with the status in `exit_code` (negative: the signal that killed it), or
    "time" or "output" at a limit. What it wrote is text, cut at the limit.
    """

    stop: Literal["exit", "time", "output"]
    exit_code: int | None
    stdout: str
    stderr: str
    wall_s: float
    cpu_s: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with status 0."""
        return self.stop == "exit" and self.exit_code == 0


def run(
    command: Sequence[str],
    *,
    files: Mapping[str, str] | None = None,
    stdin: str = "",
    limits: SandboxLimits | None = None,
) -> Outcome:
    """Run `command` in a sandbox with `files` in /work, where it starts, and wait for its end.

    The command's first word is a path inside; `PYTHON` is this interpreter, with its standard
    library. Raises TaskError where programs cannot be isolated, or a file lies outside /work.
    """
    reason = why_not()
    if reason is not None:
        raise TaskError(reason)
    return _run(tuple(command), dict(files or {}), stdin, limits or SandboxLimits())


def run_python(
    source: str, *, stdin: str = "", limits: SandboxLimits | None = None, **files: str
) -> Outcome:
    """Run a Python program in a sandbox; `files` are more files, by name without `.py`."""
    named = {f"{name}.py": text for name, text in files.items()}
    return run((*PYTHON, "main.py"), files={"main.py": source, **named}, stdin=stdin, limits=limits)


@functools.cache
def why_not() -> str | None:
    """Return one sentence why programs cannot be isolated here, or None where they can."""
    advice = "run as root, or allow unprivileged user namespaces (sysctl user.max_user_namespaces)"
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "programs can be isolated only on Linux with unshare (package util-linux)"
    try:
        found = _run((*PYTHON, "-c", "print(6 * 7)"), {}, "", SandboxLimits())
    except TaskError as error:
        return f"programs cannot be isolated here ({error}): {advice}"
    if found.stdout.strip() != "42":
        said = found.stderr.strip().splitlines()[-1:] or [found.stop]
        return f"programs cannot be isolated here ({said[0]}): {advice}"
    return None


@contextlib.contextmanager
def started(
    command: Sequence[str], shown: Mapping[str, str], limits: SandboxLimits
) -> Iterator["subprocess.Popen[bytes]"]:
    """Give a program that runs in a sandbox until the end of the block, to talk to over its pipes.

    `shown` are more directories that it may read, by their paths inside. `limits` on the clock and
    on output are the caller's to keep. Raises TaskError where programs cannot be isolated.
    """
    reason = why_not()
    if reason is not None:
        raise TaskError(reason)
    with tempfile.TemporaryDirectory(prefix="aprium-sandbox-") as root:
        spec = _spec(root, tuple(command), {}, limits, shown)
        with _memory_file(json.dumps(spec)) as told:
            ear, mouth = os.pipe()
            try:
                process = _spawn(told, mouth, subprocess.PIPE, subprocess.DEVNULL)
            finally:
                os.close(mouth)
        try:
            yield process
        finally:
            _kill(process)
            os.close(ear)


def _run(
    command: tuple[str, ...], files: dict[str, str], stdin: str, limits: SandboxLimits
) -> Outcome:
    for name in files:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise TaskError(f"file {name!r} does not lie in /work: give a plain relative name")
    with tempfile.TemporaryDirectory(prefix="aprium-sandbox-") as root:
        return _start(_spec(root, command, files, limits, {}), stdin, limits)


def _spec(
    root: str,
    command: tuple[str, ...],
    files: dict[str, str],
    limits: SandboxLimits,
    shown: Mapping[str, str],
) -> dict[str, Any]:
    """Return what `sandbox_init` is told; `root` is an empty directory to mount the tree on."""
    uid = _UIDS[0] + secrets.randbelow(_UIDS[1] - _UIDS[0]) if os.geteuid() == 0 else None
    return {
        "root": root,
        "uid": uid,
        "interpreter": sys.base_prefix,
        "shown": dict(shown),
        "command": list(command),
        "environment": _ENVIRONMENT,
        "files": files,
        "disk_bytes": limits.disk_bytes,
        "limits": _rlimits(limits),
    }


def _rlimits(limits: SandboxLimits) -> dict[str, int]:
    return {
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_MEMLOCK": 0,
    }


def _spawn(told: int, mouth: int, stdin: int, stderr: int) -> "subprocess.Popen[bytes]":
    """Start the first process of a sandbox, which reads `told` and reports to `mouth`."""
    unshare = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
    unshare += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    interpreter = os.path.realpath(sys.executable)
    try:
        return subprocess.Popen(
            [*unshare, interpreter, "-I", "-S", "-c", _INIT.read_text(), str(told), str(mouth)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=(told, mouth),
            start_new_session=True,
        )
    except OSError as error:
        raise TaskError(f"unshare: {error.strerror}") from error


def _start(spec: dict[str, Any], stdin: str, limits: SandboxLimits) -> Outcome:
    """Start a sandbox and watch it to its end."""
    begun = time.monotonic()
    with _memory_file(json.dumps(spec)) as told, _memory_file(stdin) as given:
        ear, mouth = os.pipe()
        try:
            process = _spawn(told, mouth, given, subprocess.PIPE)
        except TaskError:
            os.close(ear)
            raise
        finally:
            os.close(mouth)
    try:
        stop, streams = _watch(process, begun + limits.wall_s, limits.output_bytes)
    finally:
        _kill(process)
    with os.fdopen(ear) as file:
        report = json.loads(file.read() or "{}")
    return _outcome(stop, streams, report, time.monotonic() - begun)


def _outcome(
    stop: Literal["exit", "time", "output"],
    streams: list[bytes],
    report: dict[str, Any],
    wall_s: float,
) -> Outcome:
    stdout, stderr = (text.decode("utf-8", "replace") for text in streams)
    if "refused" in report:
        raise TaskError(report["refused"])
    if stop == "exit" and "exit" not in report:
        said = stderr.strip().splitlines()
        raise TaskError(said[-1] if said else "the sandbox ended before its program")
    return Outcome(
        stop=stop,
        exit_code=report.get("exit") if stop == "exit" else None,
        stdout=stdout,
        stderr=stderr,
        wall_s=wall_s,
        cpu_s=report.get("cpu_s"),
    )


@contextlib.contextmanager
def _memory_file(text: str) -> Any:
    """Give the descriptor of a file in memory that holds `text`, at its beginning."""
    descriptor = os.memfd_create("sandbox")
    try:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(descriptor, data) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _watch(
    process: "subprocess.Popen[bytes]", deadline: float, most: int
) -> tuple[Literal["exit", "time", "output"], list[bytes]]:
    """Read both streams until the process ends, and say what ended it."""
    assert process.stdout is not None and process.stderr is not None
    streams = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as selector:
        for index, pipe in enumerate((process.stdout, process.stderr)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, index)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "time", [bytes(s[:most]) for s in streams]
            for key, _ in selector.select(left):
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fileobj)
                streams[key.data] += piece
                if len(streams[key.data]) > most:
                    return "output", [bytes(s[:most]) for s in streams]
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "time", [bytes(s) for s in streams]
    return "exit", [bytes(s) for s in streams]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the sandbox: with unshare its process 1 dies, and with that every process in it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
