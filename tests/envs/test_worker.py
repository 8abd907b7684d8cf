"""Calls in a sandbox: values come back, what is late or dies is alone, nothing is left behind."""

import os
import time

import pytest

from aprium.base.errors import TaskError
from aprium.envs import sandbox
from aprium.envs.worker import Worker

pytestmark = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=sandbox.why_not() or "isolated"
)


def test_calls_and_what_goes_wrong() -> None:
    worker = Worker("time")
    try:
        assert worker.call("gmtime", 0)[0] == 1970
        with pytest.raises(ValueError, match="TypeError"):
            worker.call("sleep", "x")
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match=r"time.sleep took longer than 0.3 s"):
            worker.call("sleep", 60, limit_s=0.3)
        assert time.monotonic() - begun < 5
        assert worker.call("gmtime", 0)[0] == 1970
        with pytest.raises(ValueError, match="AttributeError"):
            worker.call("nothing")
    finally:
        worker.close()


def test_a_call_that_dies_and_one_that_is_isolated() -> None:
    worker = Worker("os")
    try:
        with pytest.raises(ValueError, match="died without a result"):
            worker.call("abort")
        with pytest.raises(ValueError, match="FileNotFoundError"):
            worker.call("listdir", "/etc/ssh")
        assert "home" not in worker.call("listdir", "/")
        # What is called in the process itself stays, what is called in a child does not.
        worker.call("putenv", "A", "1")
        worker.call("chdir", "/usr", forked=False)
        assert worker.call("getcwd") == "/usr"
        worker.call("chdir", "/")
        assert worker.call("getcwd") == "/usr"
        assert worker.call("getpid") != os.getpid()
    finally:
        worker.close()


def test_a_module_that_does_not_load() -> None:
    with pytest.raises(TaskError, match="No module named 'no_such_thing'"):
        Worker("no_such_thing").call("x")
