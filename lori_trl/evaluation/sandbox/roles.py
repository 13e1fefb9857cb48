"""The three processes: the supervisor, the candidate that executes the untrusted text, the judge that does not."""

import builtins
import json
import os
import select
import signal
import sys
import time
import types

from .kernel import (
    CLONE_NEWPID,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    SCRATCH_BYTES,
    SCRATCH_FILES,
    confine,
    prctl,
    unshare,
)
from .wire import NoAnswer, frame, pack, receive, send, unpack, write

SETUP_SECONDS = 30  # from the start of a process until the candidate's clock starts, on a machine that has much to do


# ---- The supervisor


def supervise() -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    job = receive(0)
    if job is None:
        return  # the caller is gone
    request_pipe, reply_pipe, verdict_pipe = os.pipe(), os.pipe(), os.pipe()
    # The judge comes first and reads the tests itself: no copy of them is in the memory that the candidate inherits.
    judge = os.fork()
    if judge == 0:
        _child(_judge, job, False, (0, request_pipe[1], reply_pipe[0], verdict_pipe[1]))
    os.close(0)
    if job["namespaces"]:
        unshare(CLONE_NEWPID)
    candidate = os.fork()
    if candidate == 0:
        _child(_serve, job, True, (request_pipe[0], reply_pipe[1]))
    for end in (*request_pipe, *reply_pipe, verdict_pipe[1]):
        os.close(end)
    verdict = _await_verdict(verdict_pipe[0], job)
    os.kill(judge, signal.SIGKILL)
    ended = verdict.get("reason") == "failed: the program ended"
    status = _end(candidate, wait=ended)
    if ended:
        code = os.waitstatus_to_exitcode(status)
        how = f"ended itself with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
        verdict["reason"] = f"failed: the program {how}"
    os.write(1, json.dumps(verdict).encode())


def _await_verdict(verdicts: int, job: dict) -> dict:
    deadline, started = time.monotonic() + SETUP_SECONDS, False
    # A file system in memory is bounded by itself; a folder has to be watched.
    watch_seconds = SETUP_SECONDS if job["namespaces"] else 0.01
    while (remaining := deadline - time.monotonic()) > 0:
        if select.select([verdicts], [], [], min(remaining, watch_seconds))[0]:
            message = receive(verdicts)
            if message is None:
                return {"passed": False, "reason": "failed: the tests' process ended without a verdict"}
            if "started" not in message:
                return message
            deadline, started = time.monotonic() + job["timeout"], True
        elif not job["namespaces"] and _is_over_budget():
            limit = f"{SCRATCH_FILES} files or {SCRATCH_BYTES} bytes"
            return {"passed": False, "reason": f"failed: more than {limit} in the scratch folder"}
    return {"passed": False, "reason": "timed out"} if started else {"error": f"not ready in {SETUP_SECONDS} seconds"}


def _is_over_budget() -> bool:
    """Add up the files in the scratch folder, which is the current one; it holds no folders."""
    num_files = num_bytes = 0
    with os.scandir() as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # removed meanwhile
                continue
            num_files += 1
            num_bytes += max(status.st_size, 512 * status.st_blocks)
            if num_files > SCRATCH_FILES or num_bytes > SCRATCH_BYTES:
                return True
    return False


def _end(candidate: int, wait: bool) -> int:
    """Kill the candidate, which can have started no other process; return its wait status.

    With `wait`, the candidate is ending by itself, and has a second to do so: its status says how.
    """
    deadline = time.monotonic() + 1
    while wait and time.monotonic() < deadline:
        pid, status = os.waitpid(candidate, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.001)
    os.kill(candidate, signal.SIGKILL)
    return os.waitpid(candidate, 0)[1]


def _child(role, job: dict, has_scratch: bool, fds: tuple[int, ...]) -> None:
    """Confine this forked process and play its role; never return."""
    # An error before the role starts says that the sandbox is not up. The role's first frame says that it is.
    fault = None
    try:
        _keep_only(fds)
        confine(job, has_scratch)
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


# ---- The candidate: executes the untrusted text, decides nothing


def _serve(job: dict, fault: str | None, requests: int, replies: int) -> None:
    send(replies, {"fault": fault})
    if fault is not None:
        return
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    candidate = None
    while (request := receive(requests)) is not None:
        nonce = request["nonce"]
        try:
            objects: list = []
            if candidate is None:
                exec(compile(job["program"], "<candidate>", "exec", dont_inherit=True), module.__dict__)
                if job["entry_point"] not in module.__dict__:
                    raise NameError(f"the program defines no {job['entry_point']!r}")
                candidate = module.__dict__[job["entry_point"]]
                reply = frame({"nonce": nonce})
            else:
                args, kwargs = unpack(request["data"], objects)
                reply = frame({"nonce": nonce, "data": pack([candidate(*args, **kwargs)], objects)})
        except BaseException as error:
            try:
                message = str(error)[:200]
            except Exception:
                message = ""
            names = [cls.__name__ for cls in type(error).__mro__]
            reply = frame({"nonce": nonce, "raised": names, "message": message})
        write(replies, reply)


# ---- The judge: executes the trusted tests, asks the candidate


class CandidateError(Exception):
    """Stand for an exception of the candidate's own making."""


def _judge(job: dict, fault: str | None, tests: int, requests: int, replies: int, verdicts: int) -> None:
    if fault is None:
        hello = receive(replies)
        fault = "the candidate's process ended" if hello is None else hello["fault"]
    if fault is not None:
        send(verdicts, {"error": fault})
        return
    problem = receive(tests)
    if problem is None:
        return  # the caller is gone
    send(verdicts, {"started": True})
    passed, reason = _run_tests(problem, requests, replies)
    send(verdicts, {"passed": passed, "reason": reason})


def _run_tests(problem: dict, requests: int, replies: int) -> tuple[bool, str]:
    misconduct: list[NoAnswer] = []

    def candidate(*args, **kwargs):
        try:
            return _call(args, kwargs, requests, replies)
        except NoAnswer as error:
            misconduct.append(error)
            raise

    try:
        _ask({}, requests, replies)
        namespace: dict = {"__name__": "tests"}
        exec(_compile(problem["prompt"]), namespace)
        namespace[problem["entry_point"]] = candidate
        exec(compile(problem["test"], "<test>", "exec", dont_inherit=True), namespace)
        namespace["check"](candidate)
    except NoAnswer as error:
        return False, f"failed: {error}"
    except MemoryError:
        return False, "memory"
    except BaseException as error:
        return False, f"failed: {type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
    return (False, f"failed: {misconduct[0]}") if misconduct else (True, "passed")


def _compile(prompt: str) -> types.CodeType:
    """Compile a prompt, which ends behind a function's head or its docstring."""
    try:
        return compile(prompt, "<prompt>", "exec", dont_inherit=True)
    except SyntaxError:
        return compile(prompt + "\n    pass\n", "<prompt>", "exec", dont_inherit=True)


def _call(args: tuple, kwargs: dict, requests: int, replies: int) -> object:
    """Call the candidate's function; return its result, or raise the like of what it raised."""
    objects: list = []
    reply = _ask({"data": pack([args, kwargs], objects)}, requests, replies)
    try:
        (result,) = unpack(reply["data"], objects)
    except Exception as error:
        raise NoAnswer(f"an answer that is none ({type(error).__name__})") from None
    return result


def _ask(question: dict, requests: int, replies: int) -> dict:
    """Put one question to the candidate, and make sure that the reply belongs to it."""
    nonce = os.urandom(8).hex()
    try:
        send(requests, {"nonce": nonce, **question})
        reply = receive(replies)
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
    """Make the nearest built-in exception of what the candidate says that it raised."""
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
