"""The sandbox: what is right passes, and no hostile sample passes, escapes or survives its limit."""

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lori_trl import sandbox
from lori_trl.sandbox import isolation, run_program, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the samples attack Linux")

# What an ordinary user, a container without namespaces, and a kernel without Landlock and seccomp have to offer.
SETS = {
    "all": sandbox.LAYERS,
    "no namespaces": ("landlock", "seccomp"),
    "namespaces alone": ("pids", "mounts", "network", "nobody"),
}
DOUBLE = "def double(x):\n    "
DOUBLE_TEST = "def check(candidate):\n    assert candidate(20) == 40\n    assert candidate(-3) == -6\n"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """The folder of the scratch folders; empty again after every test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(params=SETS)
def layers(request, monkeypatch):
    available = sandbox._layers()
    chosen = tuple(layer for layer in SETS[request.param] if layer in available)
    if not chosen:
        pytest.skip("a hostile sample is not let loose on a machine that has none of these")
    monkeypatch.setattr(sandbox, "_layers", lambda: chosen)
    return chosen


def double(body, test=DOUBLE_TEST, **limits):
    """Run a sample whose function `double` has this body."""
    body = textwrap.dedent(body).strip().replace("\n", "\n    ")
    return run_program(DOUBLE + body, DOUBLE, test, "double", **limits)


def attempts(program, note="", **limits):
    """Run a sample whose `attempts()` lists what it could do though it should not: passed means nothing."""
    test = f"def check(candidate):\n    {note!r}\n    done = candidate()\n    assert done == [], repr(done)\n"
    return run_program(textwrap.dedent(program), "", test, "attempts", **limits)


# ---- Right and wrong programs

PROBLEMS = {
    "numbers": (
        "def add(a, b):\n    ",
        "return a + b",
        "assert candidate(2, 3) == 5\nassert candidate(.1, b=.2) == .1 + .2",
    ),
    "helper in the prompt": (
        "import math\n\ndef poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n"
        'def root(xs):\n    """Find x with poly(xs, x) = 0."""\n    ',
        "return -xs[0] / xs[1]",
        "assert math.fabs(poly([3, 2], candidate([3, 2]))) < 1e-9",
    ),
    "helper the other way round": (
        'def encode(s):\n    return s[::-1] + "!"\n\ndef decode(s):\n    """Undo encode."""\n    ',
        "return s[:-1][::-1]",
        "for s in ('', 'ab', 'é\\ud800'):\n    assert candidate(encode(s)) == s",
    ),
    "tuples are not lists": (
        "from typing import List, Tuple\n\ndef ends(xs: List[int]) -> Tuple[int, int]:\n    ",
        "return xs[0], xs[-1]",
        "assert candidate([1, 2, 3]) == (1, 3)\nassert candidate([1, 2, 3]) != [1, 3]",
    ),
    "None": ("def longest(xs):\n    ", "return max(xs, key=len, default=None)", "assert candidate([]) is None"),
    "floats": (
        "def through(x):\n    ",
        "return x",
        "import math\nfor x in (0.1, 1e300, 5e-324, float('inf'), -float('inf'), 2.0):\n"
        "    assert candidate(x) == x and type(candidate(x)) is float\n"
        "assert math.isnan(candidate(float('nan')))\nassert math.copysign(1, candidate(-0.0)) == -1",
    ),
    "great integers": ("def power(n):\n    ", "return 3 ** n", "assert candidate(30000) == 3 ** 30000"),
    "changes its argument": (
        "def sort(xs):\n    ",
        "xs.sort(); xs.append(xs)",
        "xs = [3, 1, 2]\nassert candidate(xs) is None\nassert xs[:3] == [1, 2, 3] and xs[3] is xs",
    ),
    "gives its argument back": (
        "def same(xs, ys):\n    ",
        "ys['k'] = xs; return xs",
        "xs, ys = [[0]], {}\nassert candidate(xs, ys) is xs and ys['k'] is xs and xs == [[0]]",
    ),
    "generators": (
        "def count(n):\n    ",
        "yield from range(n)",
        "assert list(candidate(3)) == [0, 1, 2]\nassert candidate(0) != []",
    ),
    "exceptions": (
        "def invert(x):\n    ",
        "class Mine(LookupError): pass\n    if x is None: raise Mine('none')\n    return 1 / x",
        "for given, error in ((0, ZeroDivisionError), (None, LookupError)):\n    try:\n        candidate(given)\n"
        "    except error:\n        continue\n    assert False",
    ),
    "state and own classes": (
        "def nth():\n    ",
        "STATE.n += 1; return STATE.n\n\n"
        "from dataclasses import dataclass\n@dataclass\nclass State:\n    n: 'int' = 0\n"
        "STATE = State()\nif __name__ == '__main__':\n    raise SystemExit\nprint('hello'); input = None",
        "assert [candidate(), candidate(), nth()] == [1, 2, 3]",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_right_programs_pass_and_empty_ones_fail(name):
    prompt, completion, asserts = PROBLEMS[name]
    test = "def check(candidate):\n" + textwrap.indent(asserts, "    ")
    entry_point = prompt.rpartition("def ")[2].partition("(")[0]
    assert run_program(prompt + completion, prompt, test, entry_point) == (True, "passed")
    assert not run_program(prompt + "return 'no'", prompt, test, entry_point).passed


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return x + x + (x < 0)", "failed: AssertionError"),
        ("return x +", "failed: SyntaxError: invalid syntax"),
        ("return y", "failed: NameError: name 'y' is not defined"),
        ("return x.y", "failed: AttributeError: 'int' object has no attribute 'y'"),
        ("class Own(Exception): pass\nraise Own('a\x1b[2Jb')", "failed: CandidateError: Own: a [2Jb"),
        ("return double(x)", "failed: RecursionError: maximum recursion depth exceeded"),
        ("return double", "failed: 'function' is no plain data"),
        ("import numpy", "failed: ModuleNotFoundError: No module named 'numpy'"),
    ],
)
def test_wrong_programs_fail_with_their_reason(body, reason):
    outcome = double(body)
    assert not outcome.passed and outcome.reason.startswith(reason)


def test_a_program_without_the_entry_point_fails():
    outcome = run_program("def other(x): return 2 * x", DOUBLE, DOUBLE_TEST, "double")
    assert outcome == (False, "failed: NameError: the program defines no 'double'")


def test_outcomes_come_in_the_order_of_the_programs():
    sleep = "import time\ndef f(): time.sleep({})"
    programs = [(sleep.format(0.3 - n / 10), "", f"def check(f):\n f()\n assert {n} % 2", "f") for n in range(4)]
    assert [outcome.passed for outcome in run_programs(programs, workers=2)] == [False, True, False, True]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@given(PLAIN)
@settings(max_examples=50, deadline=None)
def test_plain_data_crosses_unchanged(value):
    (back,) = sandbox._unpack(sandbox.json.loads(sandbox.json.dumps(sandbox._pack([value], []))), [])
    assert back == value and repr(back) == repr(value)


# ---- Forging a verdict

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
        sys.modules["__main__"]._judge = lambda *args: (True, "passed")
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
def test_no_forgery_passes(name, layers):
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
    assert double("return 'x' * 2**25", test.format("1")).reason.startswith("failed: 335")


def test_the_sample_holds_no_copy_of_the_tests(monkeypatch):
    monkeypatch.setattr(sandbox, "_layers", lambda: ())  # so that /proc/self/mem can be read
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


# ---- Limits


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "while True: print('x' * 10000)",
        "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_an_endless_program_is_ended(body, layers):
    begin = time.monotonic()
    assert double(body, timeout=0.5) == (False, "timed out")
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "body",
    ["return len(bytearray(2**33))", "xs = [0]\nwhile True: xs += xs", "return iter(lambda: 'x' * 2**20, 1)"],
)
def test_memory_is_limited(body, layers):
    assert double(body, timeout=20, memory_bytes=2**27) == (False, "memory")


def test_the_default_limit_refuses_8_gib():
    assert double("return len(bytearray(8 * 2**30))") == (False, "memory")


def test_the_least_memory_is_enough_for_a_small_program():
    assert double("return 2 * x", memory_bytes=2**26).passed


@pytest.mark.parametrize("body", ["return 'x' * 2**26", "raise ValueError('x' * 2**26)", "return b'x' * 2**24"])
def test_answers_have_a_greatest_size(body):
    outcome = double(body, timeout=20)
    assert not outcome.passed and len(outcome.reason) < 300


def test_files_have_a_greatest_size(layers):
    program = f"""
        def attempts():
            written = 0
            try:
                with open("big", "wb", 0) as file:
                    for _ in range(100):
                        written += file.write(bytes(2**20))
            except OSError:
                pass
            with open("small", "w") as file:
                file.write("x")
            assert 0 < written <= {sandbox.MAX_FILE_BYTES}, written
            return []
    """
    assert attempts(program) == (True, "passed")


# ---- Escapes


def test_only_the_scratch_folder_can_be_written(tmp_path, layers):
    tmp_path.chmod(0o777)
    for folder in tmp_path.parents:
        if folder.stat().st_mode & 1 == 0 and folder.stat().st_uid == os.getuid() and "pytest" in folder.name:
            folder.chmod(0o755)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    program = f"""
        import os
        def attempts():
            done = []
            open("inside", "w").write("x")
            assert os.listdir() == ["inside"]
            os.remove("inside")
            for path in ({str(tmp_path / "escaped")!r}, {str(secret)!r}, "/tmp/lori-escaped", "/var/tmp/lori-escaped",
                         "/dev/shm/lori-escaped", "../escaped", os.path.dirname(os.__file__) + "/lori_escaped.py"):
                try:
                    open(path, "a").close()
                    done.append(path)
                except OSError:
                    pass
            for what in (open, os.remove, os.truncate):
                try:
                    what({str(secret)!r}, *[0] * (what is os.truncate))
                    done.append(what.__name__)
                except OSError:
                    pass
            for what in (os.symlink, os.link, os.rename):
                try:
                    what({str(secret)!r}, "inside")
                    open("inside").read()
                    done.append(what.__name__)
                except OSError:
                    pass
            return done
    """
    assert attempts(program) == (True, "passed")
    assert secret.read_text() == "secret" and sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "secret"]
    assert not Path("/tmp/lori-escaped").exists() and not Path("/dev/shm/lori-escaped").exists()


def test_no_network(layers):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(f"\0lori-{os.getpid()}")
        local.listen()
        server.settimeout(0.1)
        local.settimeout(0.1)
        program = f"""
            import socket
            def attempts():
                done = []
                for family, kind, address in (
                    (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", {server.getsockname()[1]})),
                    (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 53)),
                    (socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 53)),
                    (socket.AF_UNIX, socket.SOCK_STREAM, "\\0lori-{os.getpid()}"),
                ):
                    try:
                        connection = socket.socket(family, kind)
                        connection.settimeout(0.2)
                        connection.connect(address)
                        connection.send(b"x")
                        done.append(str(address))
                    except OSError:
                        pass
                return done
        """
        assert attempts(program) == (True, "passed")
        for listener in (server, local):
            with pytest.raises(TimeoutError):
                listener.accept()


FORKS = """
    import ctypes, os, time
    ctypes.CDLL(None).prctl(15, b"lori-escapee", 0, 0, 0)
    def attempts():
        done = 0
        for turn in range(25):
            try:
                pid = os.fork()
            except OSError:
                continue
            if pid == 0:
                os.setsid()
                try:
                    grandchild = os.fork()
                except OSError:
                    grandchild = 1
                if grandchild and turn % 2:
                    os._exit(0)
                time.sleep(60)
                os._exit(0)
            done += 1
        return [done] if done else []
"""


def escapees():
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += [comm.parent.name] * (comm.read_text().strip() == "lori-escapee")
        except OSError:
            continue
    return found


@pytest.mark.parametrize("names", [(), ("pids",)], ids=str)
def test_nothing_outlives_a_sample_that_forks(names, monkeypatch):
    if not set(names) <= set(sandbox._layers()) or os.getuid() != 0:
        pytest.skip("only root may fork here, RLIMIT_NPROC stops the others")
    monkeypatch.setattr(sandbox, "_layers", lambda: names)
    outcome = attempts(FORKS, timeout=20)
    assert outcome == (False, "failed: AssertionError: [25]")
    assert escapees() == []


def test_nothing_outlives_the_caller(tmp_path):
    """Killed outright, the caller cannot clean up; the kernel ends what it started."""
    if "pids" not in sandbox._layers():
        pytest.skip("without a process namespace the sample alone ends with the caller")
    program = textwrap.dedent(FORKS).replace("return [done]", "time.sleep(60); return [done]")
    call = f"_run({program!r}, '', 'def check(f): f()', 'attempts', 60, 2**30, ('pids',))"
    command = [sys.executable, "-c", f"from lori_trl.sandbox import _run; {call}"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}) as caller:
        until(lambda: len(escapees()) > 1)
        caller.kill()
    until(lambda: escapees() == [])


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sample_cannot_fork():
    assert attempts(FORKS) == (True, "passed")
    assert escapees() == []


def test_nothing_outlives_a_sample_that_forks_and_waits(monkeypatch):
    monkeypatch.setattr(sandbox, "_layers", lambda: ())
    program = FORKS.replace("return [done]", "time.sleep(60); return [done]")
    assert attempts(program, timeout=2).reason == ("timed out" if os.getuid() == 0 else "passed")
    assert escapees() == []


def test_other_processes_are_out_of_reach(layers, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "the-token-of-the-user")
    program = f"""
        import ctypes, os, resource
        def attempts():
            done = [name for name in os.environ if name != "LC_CTYPE"]
            try:
                done += os.listdir("/proc")
            except OSError:
                pass
            libc = ctypes.CDLL(None)
            libc.ptrace.argtypes = [ctypes.c_long] * 4
            word = ctypes.create_string_buffer(8)
            vector = (ctypes.c_size_t * 2)(ctypes.addressof(word), 8)
            for other in {{os.getppid(), {os.getpid()}}} - {{0}}:
                done += ["ptrace"] * (libc.ptrace(16, other, 0, 0) == 0)  # PTRACE_ATTACH
                done += ["kill"] * (libc.kill(other, 0) == 0)
                done += ["memory"] * (libc.process_vm_readv(other, vector, 1, vector, 1, 0) > 0)
            done += ["setuid"] * (libc.setuid(0) == 0)
            done += ["chroot"] * (libc.chroot(b".") == 0)
            done += ["mount"] * (libc.mount(b"none", b".", b"tmpfs", 0, None) == 0)
            for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
                try:
                    resource.setrlimit(limit, (2**40, 2**40))
                    done.append(f"limit {{limit}}")
                except (ValueError, OSError):
                    pass
            return done
    """
    assert attempts(program) == (True, "passed")


def test_system_calls_that_no_program_needs_are_refused():
    program = """
        import ctypes, threading
        def attempts():
            libc = ctypes.CDLL(None)
            done = [name for name in ("fork", "getpgrp") if getattr(libc, name)() >= 0]
            done += ["unshare"] * (libc.unshare(0x10000000) == 0)
            done += ["prctl"] * (libc.prctl(15, b"other", 0, 0, 0) == 0)
            done += ["memfd_create"] * (libc.memfd_create(b"hidden", 0) >= 0)
            done += ["shmget"] * (libc.shmget(0, 4096, 0o600) >= 0)
            try:
                threading.Thread(target=print).start()
                done.append("thread")
            except RuntimeError:
                pass
            return done
    """
    assert attempts(program) == (True, "passed")


# ---- What the machine cannot do is said


def test_isolation_names_what_enforces_each_promise(monkeypatch):
    monkeypatch.setattr(sandbox, "_layers", lambda: ("landlock", "seccomp"))
    assert isolation()["no network"] == ("seccomp",)
    assert isolation()["no writes outside the scratch folder"] == ("landlock",)
    monkeypatch.setattr(sandbox, "_layers", lambda: ())
    assert set(isolation().values()) == {()}


def test_a_machine_without_isolation_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    sandbox._layers.cache_clear()
    assert sandbox._layers() == () and "does not hold generated code to: no network; no writes" in caplog.text
    sandbox._layers.cache_clear()


def test_windows_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    sandbox._layers.cache_clear()
    with pytest.raises(NotImplementedError, match="sys.platform='win32'"):
        run_program("", "", "", "f")
    sandbox._layers.cache_clear()


def test_a_layer_that_fails_stops_the_run(tmp_path, monkeypatch):
    """Fail closed: what worked in the trial and is refused now must not be left out."""
    mark = tmp_path / "ran"
    broken = tmp_path / "sandbox.py"
    text = Path(sandbox.__file__).read_text()
    broken.write_text(text.replace("1, 4, 22, 36, 38", "1, 4, 22, 36, 9999"))
    monkeypatch.setattr(sandbox, "_layers", lambda: ())
    monkeypatch.setattr(sandbox, "__file__", str(broken))
    with pytest.raises(RuntimeError, match=r"nothing was run: OSError: .*prctl\(9999\)"):
        run_program(f"open({str(mark)!r}, 'w')", "", "def check(f): pass", "f")
    assert not mark.exists()


@pytest.mark.parametrize("limits", [{"timeout": 0}, {"timeout": float("nan")}, {"memory_bytes": 1000}])
def test_limits_out_of_range_are_refused(limits):
    ((name, given),) = limits.items()
    with pytest.raises(ValueError, match=f"`{name}={given}`"):
        run_program("", "", "", "f", **limits)
