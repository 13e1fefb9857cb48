"""The whole list of attacks, in both configurations."""

import ctypes
import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
from sandbox_samples import attempts, system_calls

from lori_trl.evaluation.sandbox import run, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the samples attack Linux")

ATTACKS = {
    "opens for writing": "open(victim, 'a').close()",
    "empties": "call('truncate', victim.encode(), 0)",
    "empties while reading": "os.open(victim, os.O_RDONLY | os.O_TRUNC)",
    "empties with access mode 3": "os.open(victim, 3 | os.O_TRUNC)",
    "changes rights": "os.chmod(victim, 0o666)",
    "shuts the scratch folder": "os.chmod('.', 0)",
    "changes dates": "os.utime(victim)",
    "renames": "os.rename(victim, victim + '2')",
    "links": "os.link(victim, 'inside')",
    "links symbolically": "os.symlink(victim, 'inside')",
    "makes a folder": "os.mkdir('folder')",
    "makes a pipe": "os.mkfifo(victim + '3')",
    "removes a file of the library": "os.remove(library)",
    "reads": "open(victim).read()",
    "lists": "os.listdir(os.path.dirname(victim))",
    "reads a package": "open(package).read()",
    "reads an environment": "open(f'/proc/{process}/environ').read()",
    "sees a file": "os.stat(victim)",
    "reads a link": "os.readlink(os.path.dirname(victim) + '/link')",
    "holds a file": "os.fstat(os.open(victim, os.O_PATH))",
    "signals": "call('kill', process, 0)",
    "owns a pipe": "signal_by_pipe(8, process)",
    "owns a pipe by type": "signal_by_pipe(15, struct.pack('ii', 1, process))",
    "chooses a signal": "fcntl.fcntl(os.pipe()[0], 10, 15)",
    "leases": "fcntl.fcntl(os.open('leased', os.O_RDONLY | os.O_CREAT), 1024, 0)",
    "watches a folder": "fcntl.fcntl(os.open('.', os.O_RDONLY), 1026, 4)",
    "asks for signals": "fcntl.ioctl(os.pipe()[0], 0x5452, bytes((1, 0, 0, 0)))",
    "limits": "resource.prlimit(process, resource.RLIMIT_CPU)",
    "traces": "call('ptrace', 16, process, 0, 0)",
    "reads memory": "open(f'/proc/{process}/mem', 'rb').close()",
    "reaches the internet": "udp().connect(('192.0.2.1', 53))",
    "makes a local socket": "socket.socket(socket.AF_UNIX)",
    "reaches the machine's host": "socket.socket(socket.AF_VSOCK)",
    "finds the caller's key": "call('syscall', numbers['keyctl'], 10, -3, b'user', key, 0)",
    "keeps a key": "call('syscall', numbers['add_key'], b'user', b'lori-note', b'text', 4, -4)",
    "hides memory in a file": "os.memfd_create('hidden')",
    "hides memory in a segment": "call('shmctl', call('shmget', 0, 4096, 0o600), 0, None)",
    "forks": "os.fork() or os._exit(0)",
    "is root in a namespace": "call('unshare', 0x10000000)",
}
WITHOUT_NAMESPACES = ["sees a file", "holds a file"]  # what Landlock and seccomp leave: names, sizes and dates
PROGRAM = """
    import ctypes, fcntl, os, resource, socket, struct
    victim, package, library = {victim!r}, {package!r}, {library!r}
    process, key = {process}, {key!r}.encode()
    numbers = {numbers}

    def call(name, *args):
        library = ctypes.CDLL(None, use_errno=True)
        if (result := getattr(library, name)(*args)) < 0:
            raise OSError(ctypes.get_errno(), name)
        return result

    def signal_by_pipe(command, owner):
        reader, writer = os.pipe()
        fcntl.fcntl(reader, command, owner)
        fcntl.fcntl(reader, 4, os.O_ASYNC)
        os.write(writer, b"x")

    def udp():
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def attempts():
        done = []
        for name, attack in {attacks!r}.items():
            try:
                exec(attack)
                done.append(name)
            except OSError:
                pass
        return done
"""


@pytest.fixture
def process():
    """A process of the same user and with no more rights, in case it is root."""
    program = """
        import signal, time
        from sandbox.kernel import _libc, prctl
        prctl(38, 1)
        _libc().capset(b"\\x22\\5\\x08\\x20" + bytes(4), bytes(24))
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(flush=True)
        time.sleep(60)
    """
    child = f"import sys; sys.path.append({os.path.dirname(os.path.dirname(run.__file__))!r})\n"
    command = [sys.executable, "-I", "-S", "-c", child + textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.fixture
def key():
    """The name of a key in the session keyring of this process."""
    libc, numbers = ctypes.CDLL(None), system_calls(os.uname().machine)
    libc.syscall(numbers["keyctl"], 1, None)  # a new session keyring
    serial = libc.syscall(numbers["add_key"], b"user", b"lori-key", b"secret", 6, -3)
    yield "lori-key"
    libc.syscall(numbers["keyctl"], 3, serial)


def test_attacks(namespaces, process, key, tmp_path):
    victim, library = tmp_path / "victim", Path(os.__file__).with_name("lori_victim.py")
    victim.write_text("text")
    (tmp_path / "link").symlink_to(victim)
    succeeding = [] if namespaces else WITHOUT_NAMESPACES
    program = PROGRAM.format(
        victim=str(victim),
        package=pytest.__file__,
        library=str(library),
        process=process,
        key=key,
        numbers=system_calls(os.uname().machine),
        attacks=ATTACKS,
    )
    test = f"def check(candidate):\n    wrong = {{*candidate()}} ^ {{*{succeeding!r}}}\n    assert not wrong, wrong\n"
    with suppress(PermissionError):
        library.touch()
    try:
        assert run_program(textwrap.dedent(program), "", test, "attempts", timeout=20) == (True, "passed")
    finally:
        library.unlink(missing_ok=True)
    assert victim.read_text() == "text"


FLOODS = {
    "bytes": "for n in range(100):\n    with open(f'{n}', 'wb') as file: file.write(bytes(2**22))",
    "holes": "for n in range(100):\n    with open(f'{n}', 'wb') as file: file.truncate(2**22)",
    "files": "for n in range(100_000): open(f'{n}', 'x').close()",
}


@pytest.mark.parametrize("flood", FLOODS)
def test_the_disk_is_not_filled(flood, namespaces):
    program = f"import time\ndef attempts():\n{textwrap.indent(FLOODS[flood], '    ')}\n    time.sleep(60)"
    if namespaces and flood == "holes":  # a hole takes nothing of a file system in memory
        assert attempts(program, timeout=0.5) == (False, "timed out")
        return
    outcome = attempts(program, timeout=20)
    full = "failed: OSError: [Errno 28]"
    over = "failed: more than 2000 files or 33554432 bytes in the scratch folder"
    assert not outcome.passed and outcome.reason.startswith(full if namespaces else over)


def test_mounts_below_the_library_are_read_only():
    """In a mount namespace of its own, the caller has something writable below Python's library."""
    if not run._has_namespaces() or os.getuid() != 0:
        pytest.skip("only root can mount")
    folder = os.path.join(os.path.dirname(os.__file__), "json", "__pycache__")
    caller = f"""
        from lori_trl.evaluation.sandbox import kernel, run_program
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel._mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel._mount("none", {folder!r}, "tmpfs", 0, "mode=777")
        program = "def attempts():\\n    open({folder + "/written"!r}, 'x')"
        print(run_program(program, "", "def check(f): f()", "attempts").reason)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(caller)], capture_output=True, text=True)
    assert done.stdout.startswith("failed: OSError: [Errno 30] Read-only file system"), done
