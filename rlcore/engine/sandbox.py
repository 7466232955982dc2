"""A program and its tests in a process with limits. Run as a script, `python -I sandbox.py`, never imported.

The job comes as JSON on the standard input: program; tests, a text that runs after the program in the same namespace,
or cases, pairs of input and expected output; seconds of CPU time; memory in bytes. The answer is one byte, 1 or 0.

The supervisor forks one child per run and outlives it. As subreaper it inherits every process that the child leaves
behind, also one in a session of its own, and kills them all before it answers. This guards against accidents and
against programs that try to look right; it is no wall against an attacker.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
NOBODY = 65534
# Bytes that a program may write, per file; its output is one.
MOST_OUTPUT = 1 << 20
# A program that sleeps uses no CPU time: it ends after this many times its seconds.
PATIENCE = 3


def main() -> None:
    job = json.loads(sys.stdin.read())
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if "cases" in job:
        passed = all(output_is(job, given, expected) for given, expected in job["cases"])
    else:
        passed = reaches_the_end(job)
    sys.stdout.write("1" if passed else "0")


def output_is(job: dict[str, Any], given: str, expected: str) -> bool:
    """Whether the program, with `given` on its standard input, ends well and prints `expected`."""
    ended_well, output = run(job, given, lambda: execute(job["program"], {"__name__": "__main__"}))
    return ended_well and lines_of(output) == lines_of(expected)


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def reaches_the_end(job: dict[str, Any]) -> bool:
    """Whether program and tests run to their end: shown by a random word that they are not told, so that neither
    sys.exit(0) nor os._exit(0) passes."""
    word = os.urandom(16)
    read, write = os.pipe()

    def both() -> None:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        execute(job["program"], namespace)
        execute(job["tests"], namespace)
        os.write(write, word)

    run(job, "", both)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        return answer.read(len(word)) == word


def execute(text: str, namespace: dict[str, Any]) -> None:
    exec(compile(text, "<answer>", "exec"), namespace)


def run(job: dict[str, Any], given: str, work: Callable[[], None]) -> tuple[bool, str]:
    """Does `work` in a child with limits; returns whether it exited with 0, and what it printed."""
    # Without names: a program could put links in the place of files that the next run would then write through.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as source, tempfile.TemporaryFile() as sink:
        source.write(given)
        source.seek(0)
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                for file, number in ((source, 0), (sink, 1), (sink, 2)):
                    os.dup2(file.fileno(), number)
                limit(job)
                work()
                sys.stdout.flush()
                os._exit(0)
            except SystemExit as stop:
                sys.stdout.flush()
                os._exit(0 if stop.code in (None, 0) else 1)
            except BaseException:
                os._exit(1)
        ended_well = wait(child, PATIENCE * job["seconds"])
        kill_all(child)
        sink.seek(0)
        return ended_well, sink.read(MOST_OUTPUT).decode(errors="replace")


def limit(job: dict[str, Any]) -> None:
    """The limits of the child; as root it becomes nobody first, whom the limit on processes binds."""
    if os.getuid() == 0 and readable_to_nobody():
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    seconds = max(1, int(job["seconds"] + 0.999))
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, MOST_OUTPUT),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS knows some of them in name alone
            resource.setrlimit(kind, (most, most))


def readable_to_nobody() -> bool:
    """Whether the standard library can be imported without root's rights."""
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")]
    os.seteuid(NOBODY)
    readable = all(os.access(place, os.R_OK | os.X_OK, effective_ids=True) for place in places if place)
    os.seteuid(0)
    return readable


def wait(child: int, seconds: float) -> bool:
    """Whether the child exits with 0 within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.002)
    return False


def kill_all(child: int) -> None:
    """Kills the child's group, then whatever it left behind, until there is no descendant."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while True:
        with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
            for pid in map(int, file.read().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return


def prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
