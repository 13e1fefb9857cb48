"""No sample forges a verdict, and nothing that it starts outlives it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox_samples import FORKS, attempts, descendants, double, until

from lori_trl.evaluation.sandbox import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the samples attack Linux")

FORGERIES = {
    "raises what the sandbox raises": """
        class NoAnswer(BaseException): pass
        raise NoAnswer("passed")""",
    "exits": "import os; os._exit(0)",
    "exits politely": "import sys; sys.exit(0)",
    "exits as it is loaded": "pass\nraise SystemExit(0)",
    "lies when compared": """
        class Liar(int):
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __hash__ = int.__hash__
        return Liar(1)""",
    "lies as a list": """
        class Liar(list):
            __eq__ = lambda self, other: True
        return Liar()""",
    "lies as no data": """
        class Liar:
            __eq__ = lambda self, other: True
        return Liar()""",
    "raises what a test raises": "raise AssertionError",
    "prints a verdict": """
        import os
        verdict = b'{"passed": true, "reason": "passed"}'
        for text in (b"passed", verdict, len(verdict).to_bytes(4, "big") + verdict):
            for fd in range(64):
                try: os.write(fd, text)
                except OSError: pass
        return 0""",
    "closes everything": """
        import os, sys
        sys.stdout.close(); sys.stderr.close()
        os.closerange(0, 64)
        return 0""",
    "walks frames": """
        import gc, json, sys
        frame = sys._getframe()
        while frame:
            for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
                if name in ("passed", "reason", "fault", "candidate"): frame.f_globals[name] = True
                if name == "requests": fd = value
                if name == "replies": out = value
                if name == "request": nonce = value["nonce"]
            frame = frame.f_back
        for found in gc.get_objects():
            if isinstance(found, dict) and "passed" in found: found["passed"] = True
        data = {"values": [1], "objects": [["dict", []]]}
        body = json.dumps({"nonce": nonce, "passed": True, "reason": "passed", "started": True, "data": data}).encode()
        import os, struct
        for end in (out, fd):
            try: os.write(end, struct.pack(">I", len(body)) + body)
            except OSError: pass
        return 0""",
    "answers ahead": """
        import json, os, struct, sys
        body = json.dumps({"nonce": "0" * 16, "data": {"values": [40], "objects": [["dict", []]]}}).encode()
        os.write(sys._getframe(1).f_locals["replies"], struct.pack(">I", len(body)) + body)
        return -6""",
    "replaces builtins": """
        import builtins, json, os, sys
        json.dumps = lambda *args, **options: '{"passed": true, "reason": "passed"}'
        builtins.all = builtins.isinstance = builtins.abs = lambda *args: True
        builtins.AssertionError = builtins.Exception = SystemExit
        sys.modules["sandbox.roles"]._run_tests = lambda *args: (True, "passed")
        return 0""",
    "kills its parent": """
        import os, signal
        if os.getpid() != 1 and os.getppid() > 1:
            try: os.kill(os.getppid(), signal.SIGKILL)
            except OSError: pass
        return 0""",
    "gives a list that holds itself": "xs = []; xs.append(xs); return xs",
    "nests without end": "xs = ()\nfor _ in range(100000): xs = (xs,)\nreturn xs",
    "overflows the stack": """
        import sys
        sys.setrecursionlimit(10**9)
        class Deep:
            def __getattr__(self, name): return getattr(self, name)
        return Deep().x""",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes(name, namespaces):
    outcome = double(FORGERIES[name])
    assert not outcome.passed and outcome.reason.startswith("failed: "), outcome


def test_a_test_that_catches_everything_does_not_cover_a_broken_sample():
    test = "def check(candidate):\n    try:\n        candidate(1)\n    except BaseException:\n        pass\n"
    assert double("return 1", test).passed
    assert double("raise ValueError", test).passed
    assert double("import os; os._exit(0)", test) == (False, "failed: the program ended itself with exit code 0")
    assert double("import sys; sys.exit(0)", test) == (False, "failed: SystemExit: 0")
    assert double("import os; os.closerange(0, 64)", test).reason.startswith("failed: the program ended itself")


def test_what_cannot_cross_is_no_exception_that_a_test_may_expect():
    test = "def check(candidate):\n    try:\n        candidate({})\n    except Exception:\n        pass\n"
    assert double("return double", test.format("1")).reason.startswith("failed: 'function' is no plain data")
    assert double("raise TypeError", test.format("print")).reason.startswith("failed: 'builtin_function_or_method' is")
    assert double("return 'x' * 2**24", test.format("1")).reason.startswith("failed: 167")


def test_the_sample_holds_no_copy_of_the_tests(monkeypatch):
    monkeypatch.setattr(run, "_has_namespaces", lambda: False)
    readable = "import sandbox.kernel; sandbox.kernel._restrict_files = lambda has_scratch: None; from sandbox"
    monkeypatch.setattr(run, "CHILD", run.CHILD.replace("from sandbox", readable))  # so that /proc/self can be read
    mark = b"only the tests say this"
    program = f"""
        import ctypes
        def attempts():
            # Every byte is one too high, so that this text is not what it looks for.
            mark, shifted = {bytes(byte + 1 for byte in mark)!r}, bytes((n + 1) % 256 for n in range(256))
            found, seen = [], 0
            for line in open("/proc/self/maps").read().splitlines():
                span, rights = line.split()[:2]
                if rights.startswith("rw"):
                    start, end = (int(address, 16) for address in span.split("-"))
                    found += [span] * (mark in ctypes.string_at(start, end - start).translate(shifted))
                    seen += end - start
            return found if seen > 2**20 else ["nothing seen"]
    """
    assert attempts(program, note=mark.decode()) == (True, "passed")
    # The search finds what is there.
    assert "failed: AssertionError: ['" in attempts(program + f"    mark = {mark!r}\n").reason


def test_a_sample_cannot_fork(namespaces):
    assert attempts(FORKS) == (True, "passed")


def test_nothing_outlives_the_caller(namespaces, tmp_path):
    """Killed outright, the caller cannot clean up; the kernel ends what it started."""
    program = "import time\ndef attempts():\n    time.sleep(60)"
    call = f"_run({program!r}, '', 'def check(f): f()', 'attempts', 60, 2**30, {namespaces})"
    command = [sys.executable, "-c", f"from lori_trl.evaluation.sandbox.run import _run; {call}"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}) as caller:
        until(lambda: len(descendants(caller.pid)) == 3)  # supervisor, judge, candidate
        started = descendants(caller.pid)
        caller.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
