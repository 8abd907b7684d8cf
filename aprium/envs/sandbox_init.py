"""What runs first inside a sandbox: builds a small file tree, gives up every right, runs a program.

`envs.sandbox` starts this text with `unshare`, as process 1 of namespaces of its own. It imports
nothing but the standard library, and reads what to do from an open file. Process 1 outlives the
program, so that killing everything in sight ends the program alone.
"""

import contextlib
import ctypes
import json
import os
import resource
import sys

_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_KEPT = {os.ST_NOEXEC: 8, os.ST_NOATIME: 1024, os.ST_NODIRATIME: 2048, os.ST_RELATIME: 1 << 21}
_SECUREBITS, _NO_NEW_PRIVS, _CAPBSET_DROP = 28, 38, 24
_LOCKED_NOROOT = 0x2F  # root is nobody special, no way back
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    texts = [text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*texts, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def _show(source: str, target: str) -> None:
    """Make `source` visible at `target`, read-only."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(source, target, "", _BIND | _REC)
    # Flags that the source has may not be lost on the way.
    flags = os.statvfs(target).f_flag
    kept = sum(flag for bit, flag in _KEPT.items() if flags & bit)
    nodev = 0 if source.startswith("/dev/") else _NODEV
    _mount("", target, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | nodev | kept)


def _build(spec: dict) -> None:
    """Mount the file tree and go into it: the system's programs, the interpreter, and /work."""
    root, owner = spec["root"], spec["uid"]
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            _show(path, root + path)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
        _show(path, root + path)
    _show(spec["interpreter"], root + "/python")
    for path, source in spec["shown"].items():
        _show(source, root + path)
    os.mkdir(root + "/work")
    options = f"size={spec['disk_bytes']},nr_inodes=4096,mode=700"
    _mount("tmpfs", root + "/work", "tmpfs", _NOSUID | _NODEV, options)
    for name, text in spec["files"].items():
        path = f"{root}/work/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        if owner is not None:
            os.chown(path, owner, owner)
    if owner is not None:
        os.chown(root + "/work", owner, owner)
    _mount("", root, "", _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chroot(root)
    os.chdir("/work")


def _give_up_rights(spec: dict) -> None:
    for capability in range(64):
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0)
    _check(_libc.prctl(_SECUREBITS, _LOCKED_NOROOT, 0, 0, 0), "securebits")
    if spec["uid"] is not None:
        os.setgroups([])
        os.setresgid(spec["uid"], spec["uid"], spec["uid"])
        os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    for name, value in spec["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _run(spec: dict) -> None:
    """Become the program; never returns."""
    try:
        os.setsid()
        _give_up_rights(spec)
        os.execve(spec["command"][0], spec["command"], spec["environment"])
    except BaseException as error:
        os.write(2, f"cannot run {spec['command'][0]}: {error}\n".encode())
    os._exit(126)


def main() -> None:
    """Do what the file with descriptor argv[1] says; report to descriptor argv[2]."""
    report = int(sys.argv[2])
    os.set_inheritable(report, False)
    with os.fdopen(int(sys.argv[1])) as file:
        spec = json.load(file)
    try:
        _build(spec)
    except OSError as error:
        os.write(report, json.dumps({"refused": str(error)}).encode())
        return
    child = os.fork()
    if child == 0:
        _run(spec)
    # Process 1 holds no pipe, or its reader would wait for it.
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    while True:
        process, status = os.wait()
        if process == child:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = os.waitstatus_to_exitcode(status)
    cpu_s = used.ru_utime + used.ru_stime
    os.write(report, json.dumps({"exit": code, "cpu_s": cpu_s}).encode())


if __name__ == "__main__":
    main()
