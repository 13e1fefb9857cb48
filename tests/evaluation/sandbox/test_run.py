"""What is right passes, what is wrong fails with its reason, and limits hold."""

import sys
import textwrap
import time

import pytest
from sandbox_samples import DOUBLE, DOUBLE_TEST, attempts, double

from lori_trl.evaluation.sandbox import check_isolation, kernel, run, run_program, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the samples attack Linux")

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
def test_an_endless_program_is_ended(body, namespaces):
    begin = time.monotonic()
    assert double(body, timeout=0.3) == (False, "timed out")
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "body",
    ["return len(bytearray(2**33))", "xs = [0]\nwhile True: xs += xs", "return iter(lambda: 'x' * 2**20, 1)"],
)
def test_memory_is_limited(body, namespaces):
    assert double(body, timeout=20, memory_bytes=2**27) == (False, "memory")


def test_the_default_limit_refuses_8_gib():
    assert double("return len(bytearray(8 * 2**30))") == (False, "memory")


def test_the_least_memory_is_enough_for_a_small_program():
    assert double("return 2 * x", memory_bytes=2**26).passed


@pytest.mark.parametrize("body", ["return 'x' * 2**24", "raise ValueError('x' * 2**24)", "return b'x' * 2**23"])
def test_answers_have_a_greatest_size(body):
    outcome = double(body, timeout=20)
    assert not outcome.passed and len(outcome.reason) < 300


def test_programs_have_a_greatest_size():
    padding = "#" * 2**24
    assert run_program(padding, "", DOUBLE_TEST, "double") == (False, "failed: a program of more than 16777216 bytes")
    with pytest.raises(ValueError, match="`prompt` and `test` have 16777216 and 0 characters. Allowed are 16777216"):
        run_program("", padding, "", "double")


def test_files_have_a_greatest_size(namespaces):
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
            assert 0 < written <= {kernel.MAX_FILE_BYTES}, written
            return []
    """
    assert attempts(program) == (True, "passed")


# ---- What the machine cannot do is said


@pytest.fixture
def trials():
    """Try the configurations anew."""
    run._has_namespaces.cache_clear()
    yield
    run._has_namespaces.cache_clear()


def test_a_machine_without_namespaces_has_landlock_and_seccomp(monkeypatch, caplog, trials):
    monkeypatch.setattr(run, "_refusal", lambda namespaces: "not allowed" if namespaces else None)
    with caplog.at_level("INFO"):
        check_isolation()
    assert "is without namespaces (not allowed)" in caplog.text
    with pytest.raises(ValueError, match="this machine refuses namespaces"):
        check_isolation(required=True)


@pytest.mark.parametrize("broken", ["PR_SET_SECCOMP = 9999", "SETUP_CALLS['landlock_add_rule'] = (9999, 9999)"])
def test_without_landlock_or_seccomp_nothing_is_run(broken, tmp_path, monkeypatch, trials):
    mark = tmp_path / "ran"
    child = run.CHILD.replace("from sandbox", f"import sandbox.kernel; sandbox.kernel.{broken}; from sandbox")
    monkeypatch.setattr(run, "CHILD", child)
    for refused in (
        lambda: run_program(f"open({str(mark)!r}, 'w')", "", "def check(f): pass", "f"),
        lambda: next(run_programs([("", "", "", "f")])),
        check_isolation,
    ):
        with pytest.raises(RuntimeError, match=r"cannot confine generated code \(with namespaces: OSError: .* 5\.13"):
            refused()
    assert not mark.exists()


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_refused(platform, monkeypatch, trials):
    monkeypatch.setattr(run.sys, "platform", platform)
    with pytest.raises(RuntimeError, match=f"with namespaces: not on {platform}; without: not on {platform}"):
        run_program("", "", "", "f")


def test_a_layer_that_fails_stops_the_run(tmp_path, monkeypatch):
    """Fail closed: what worked in the trial and is refused now must not be left out."""
    mark = tmp_path / "ran"
    monkeypatch.setattr(run, "_has_namespaces", lambda: False)
    broken = "import sandbox.kernel; sandbox.kernel.PR_SET_NO_NEW_PRIVS = 9999; from sandbox"
    monkeypatch.setattr(run, "CHILD", run.CHILD.replace("from sandbox", broken))
    with pytest.raises(RuntimeError, match=r"nothing was run: OSError: .*prctl\(9999\)"):
        run_program(f"open({str(mark)!r}, 'w')", "", "def check(f): pass", "f")
    assert not mark.exists()


@pytest.mark.parametrize("limits", [{"timeout": 0}, {"timeout": float("nan")}, {"memory_bytes": 1000}])
def test_limits_out_of_range_are_refused(limits):
    ((name, given),) = limits.items()
    with pytest.raises(ValueError, match=f"`{name}={given}`"):
        run_program("", "", "", "f", **limits)
