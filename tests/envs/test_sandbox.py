"""Hostile programs stay in the sandbox, and well-meant ones get what they need."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from aprium.base.errors import TaskError
from aprium.envs import sandbox
from aprium.envs.sandbox import Outcome, SandboxLimits, run, run_python

SHORT = SandboxLimits(wall_s=1.0, cpu_s=1, memory_bytes=256 << 20)

needs_isolation = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=sandbox.why_not() or "isolated"
)


def python(source: str, limits: SandboxLimits | None = None, **more: str) -> Outcome:
    return run_python(source, limits=limits or SandboxLimits(wall_s=5, cpu_s=3), **more)


@needs_isolation
def test_a_program_runs_with_input_files_and_status() -> None:
    source = "import sys, helper\nprint(helper.double(int(input())))\nprint('!', file=sys.stderr)"
    found = python(source, stdin="21\n", helper="def double(x): return 2 * x")
    assert (found.stdout, found.stderr, found.ok) == ("42\n", "!\n", True)
    found = python("import pathlib, sys\npathlib.Path('a.txt').write_text('x' * 1000)\nsys.exit(3)")
    assert (found.stop, found.exit_code) == ("exit", 3) and not found.ok
    assert run(("/bin/cat", "deep/a.txt"), files={"deep/a.txt": "hé"}).stdout == "hé"
    assert "cannot run /bin/nothing" in run(("/bin/nothing",)).stderr


@needs_isolation
@pytest.mark.parametrize(
    "source",
    [
        "open('/etc/shadow').read()",
        "open('/etc/passwd').read()",
        "open('/root/.bashrc').read()",
        "open('/proc/1/environ').read()",
        "open('/proc/self/mem').read()",
        f"open({str(Path(__file__))!r}).read()",
        "open('/dev/kmsg').read()",
        "open('/usr/x', 'w')",
        "open('/x', 'w')",
        "open('/python/bin/x', 'w')",
        "import socket; socket.create_connection(('127.0.0.1', 22), 2)",
        "import socket; socket.create_connection(('1.1.1.1', 53), 2)",
        "import socket; socket.getaddrinfo('pypi.org', 443)",
        "import os; os.setuid(0)",
        "import os; os.chroot('/work')",
        "import os; os.kill(1, 9); os.kill(os.getppid(), 15); open('/alive/not')",
        "import os; os.chmod('/', 0o777)",
        "import os; os.link('/python/bin/python3', '/work/p')",
        "import os; os.mknod('/work/sda', 0o60666, os.makedev(8, 0))",
        "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (99, 99))",
        "import ctypes as c; assert c.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes as c; assert c.CDLL(None).unshare(0x00020000) == 0",
        "import ctypes as c; assert c.CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, b'') == 0",
        "import ctypes as c; assert c.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    ],
)
def test_what_is_not_allowed_fails(source: str) -> None:
    found = python(source)
    assert found.stop == "exit" and found.exit_code == 1 and "error" in found.stderr.lower()


@needs_isolation
def test_nothing_of_this_machine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    found = python(
        "import os, glob\nprint(sorted(os.environ))\nprint(os.listdir('/work'), os.listdir('/'))\n"
        "print(os.getuid() != 0, os.getpid() < 5, [os.path.exists(f'/dev/fd/{n}') for n in (3,)])\n"
        "import socket\nprint([n for _, n in socket.if_nameindex()])\n"
        "for n in range(3, 64):\n"
        "  try: print('open', n, os.fstat(n))\n"
        "  except OSError: pass"
    )
    lines = found.stdout.splitlines()
    assert "hunter2" not in found.stdout and "SECRET" not in lines[0]
    assert lines[1].startswith("['main.py'] ") and "tmp" not in lines[1] and "home" not in lines[1]
    assert lines[2] == "True True [False]"
    assert lines[3] == "['lo']" and len(lines) == 4, found


@needs_isolation
def test_an_endless_loop_ends() -> None:
    begun = time.monotonic()
    found = python("while True: pass", SandboxLimits(wall_s=20, cpu_s=1))
    assert found.exit_code in (-9, -24) and time.monotonic() - begun < 15
    found = python("import time; print('x', flush=True); time.sleep(60)", SHORT)
    assert (found.stop, found.stdout, found.exit_code) == ("time", "x\n", None)


@needs_isolation
def test_a_memory_bomb_fails() -> None:
    found = python("x = bytearray(1 << 30)", SHORT)
    assert found.exit_code == 1 and "MemoryError" in found.stderr


@needs_isolation
def test_a_fork_bomb_ends_and_leaves_nobody() -> None:
    bomb = "while True:\n  try: os.fork()\n  except OSError: time.sleep(9)"
    begun = time.monotonic()
    found = python("import os, time\n" + bomb, SHORT)
    assert found.stop == "time" and time.monotonic() - begun < 10
    assert not _running("main.py")
    found = python(
        "import os, time\nn = 0\ntry:\n  while n < 99:\n    if os.fork() == 0: time.sleep(9)\n"
        "    n += 1\nexcept OSError: print(n)",
        SandboxLimits(processes=5, wall_s=5),
    )
    assert found.stop == "exit" and int(found.stdout) < 5
    assert not _running("main.py")


def _running(word: str) -> list[str]:
    """Return command lines of sandboxed interpreters that live on; the kernel may take a moment."""
    for _ in range(100):
        if not (lines := _command_lines(word)):
            break
        time.sleep(0.02)
    return lines


def _command_lines(word: str) -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if line.startswith("/python/bin/python3") and word in line:
            lines.append(line)
    return lines


@needs_isolation
def test_a_daemon_dies_with_its_program() -> None:
    source = (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n"
        "  os._exit(0)\nprint('parent is done')"
    )
    begun = time.monotonic()
    found = python(source)
    assert found.ok and found.stdout == "parent is done\n" and time.monotonic() - begun < 4
    assert not _running("main.py")


@needs_isolation
def test_killing_everybody_ends_the_program_alone() -> None:
    found = python("import os; os.kill(-1, 9)")
    assert found.stop == "exit" and not _running("main.py")
    found = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert (found.stop, found.exit_code) == ("exit", -9)


@needs_isolation
def test_huge_output_and_files_are_cut() -> None:
    limits = SandboxLimits(wall_s=5, output_bytes=100_000, file_bytes=200_000, disk_bytes=1 << 20)
    found = python("while True: print('x' * 10000)", limits)
    assert found.stop == "output" and len(found.stdout) == 100_000
    found = python("open('a', 'wb').write(b'x' * 300_000)", limits)
    assert not found.ok
    source = "for i in range(99): open(str(i), 'wb').write(b'x' * 100_000)"
    found = python(source, limits)
    assert found.exit_code == 1 and "No space left" in found.stderr


def test_isolation_is_had_where_namespaces_are() -> None:
    """Else a broken sandbox would only skip the tests of it."""
    flags = ["--mount", "--net", "--pid", "--ipc", "--uts", "--fork"]
    flags += [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    mounts = "mount -t tmpfs none /tmp"
    try:
        tried = subprocess.run(["unshare", *flags, "sh", "-c", mounts], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if tried.returncode:
        pytest.skip(f"no namespaces: {tried.stderr.decode()}")
    assert sandbox.why_not() is None


def test_files_outside_and_bad_limits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("../x", "/etc/x", ""):
        with pytest.raises(TaskError, match=r"does not lie in /work|isolated"):
            run(("/bin/true",), files={name: ""})
    with pytest.raises(TaskError, match="wall_s is 0"):
        SandboxLimits(wall_s=0)


def test_no_isolation_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.why_not.cache_clear()
    try:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(TaskError, match="only on Linux with unshare"):
            run(("/bin/true",))
        sandbox.why_not.cache_clear()
        monkeypatch.undo()
        monkeypatch.setattr(sandbox, "_run", _refuse)
        with pytest.raises(TaskError, match=r"isolated here .*mount: no.* allow unprivileged"):
            run(("/bin/true",))
    finally:
        sandbox.why_not.cache_clear()


def _refuse(*arguments: object) -> Outcome:
    raise TaskError("mount: no")
