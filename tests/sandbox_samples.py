"""Programs for the tests of the sandbox."""

import textwrap
import time
from pathlib import Path

from lori_trl.evaluation.sandbox import run_program

DOUBLE = "def double(x):\n    "
DOUBLE_TEST = "def check(candidate):\n    assert candidate(20) == 40\n    assert candidate(-3) == -6\n"


def double(body, test=DOUBLE_TEST, **limits):
    """Run a sample whose function `double` has this body."""
    body = textwrap.dedent(body).strip().replace("\n", "\n    ")
    return run_program(DOUBLE + body, DOUBLE, test, "double", **limits)


def attempts(program, note="", **limits):
    """Run a sample whose `attempts()` lists what it could do though it should not: passed means nothing."""
    test = f"def check(candidate):\n    {note!r}\n    done = candidate()\n    assert done == [], repr(done)\n"
    return run_program(textwrap.dedent(program), "", test, "attempts", **limits)


FORKS = """
    import ctypes, os
    def attempts():
        done = []
        for fork in (os.fork, ctypes.CDLL(None).vfork):
            try:
                pid = fork()
            except OSError:
                continue
            if pid == 0:
                os._exit(0)
            done += [pid] * (pid > 0)
        return done
"""


def descendants(pid):
    """List the processes that a process has started, and those that these have."""
    children = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(file.parent.name))
    pids = [pid]
    for each in pids:
        pids += children.get(each, ())
    return pids[1:]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def system_calls(machine):
    """Read the kernel's table: name -> number, for `x86_64` or `aarch64`."""
    lines = Path(__file__).with_name("golden").joinpath("system_calls.tsv").read_text().splitlines()
    header, *rows = [line.split("\t") for line in lines if not line.startswith("#")]
    column = header.index(machine)
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}
