"""The whole list of attacks on every kind of kernel: what each can do is written beside it."""

import ctypes
import os
import socket
import subprocess
import sys
import textwrap

import pytest
from sandbox_samples import attempts, system_calls

from lori_trl.evaluation.sandbox import isolation, kernel, run, run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the samples attack Linux")

# What a kernel, a container or an ordinary user has: layers, and the newest version of Landlock.
NAMESPACES = ("pids", "mounts", "network", "nobody", "users")
MACHINES = {
    "all": (kernel.LAYERS, 6),
    "namespaces+seccomp": ((*NAMESPACES, "seccomp"), 0),
    "namespaces": (NAMESPACES, 0),
    "landlock6+seccomp": (("landlock", "seccomp"), 6),
    "landlock5+seccomp": (("landlock", "seccomp"), 5),
    "landlock3+seccomp": (("landlock", "seccomp"), 3),
    "landlock2+seccomp": (("landlock", "seccomp"), 2),
    "landlock1+seccomp": (("landlock", "seccomp"), 1),
    "landlock6": (("landlock",), 6),
    "landlock1": (("landlock",), 1),
    "seccomp": (("seccomp",), 0),
}


def can_make_vsock():
    try:
        socket.socket(socket.AF_VSOCK).close()
    except OSError:
        return False
    return True


NOWHERE = set()
NO_MOUNTS = {name for name in MACHINES if "namespaces" not in name and name != "all"}
NO_SECCOMP = {name for name in MACHINES if "seccomp" not in name and name != "all"}
SECCOMP_ALONE = {"seccomp"}
LANDLOCK_ALONE = {"landlock6", "landlock1"}
NO_NEW_LANDLOCK = {"landlock1"}
HAS_VSOCK = can_make_vsock()
FORKS = LANDLOCK_ALONE if sys.platform == "linux" and os.getuid() == 0 else NOWHERE  # the limit does not bind root

FILES, READS, SIGHT = "no writes outside the scratch folder", "no reading of the user's files", "no sight of the names"
NETWORK, SOCKETS, KEYS = "no network", "no local sockets", "no kernel keys"
SIGNALS, TRACING, MEMORY, ORPHANS = "no signals", "no tracing", "no memory", "no process left behind"
# name: (the promise that it would break, what it does, where it succeeds)
ATTACKS = {
    "opens for writing": (FILES, "open(victim, 'a').close()", SECCOMP_ALONE),
    "empties": (FILES, "call('truncate', victim.encode(), 0)", NO_NEW_LANDLOCK),
    "empties while reading": (FILES, "os.open(victim, os.O_RDONLY | os.O_TRUNC)", NOWHERE),
    "empties with access mode 3": (FILES, "os.open(victim, 3 | os.O_TRUNC)", NO_NEW_LANDLOCK),
    "changes rights": (FILES, "os.chmod(victim, 0o666)", LANDLOCK_ALONE),
    "changes dates": (FILES, "os.utime(victim)", LANDLOCK_ALONE),
    "renames": (FILES, "os.rename(victim, victim + '2')", NOWHERE),
    "links": (FILES, "os.link(victim, 'inside')", NOWHERE),
    "links symbolically": (None, "os.symlink(victim, 'inside')", {"namespaces"}),
    "makes a folder": (None, "os.mkdir('folder')", {"namespaces"}),
    "makes a pipe": (FILES, "os.mkfifo(victim + '3')", NOWHERE),
    "reads": (READS, "open(victim).read()", SECCOMP_ALONE),
    "lists": (READS, "os.listdir(os.path.dirname(victim))", SECCOMP_ALONE),
    "reads a package": (READS, "open(package).read()", SECCOMP_ALONE),
    "reads an environment": (READS, "open(f'/proc/{process}/environ').read()", SECCOMP_ALONE),
    "sees a file": (SIGHT, "os.stat(victim)", NO_MOUNTS),
    "reads a link": (SIGHT, "os.readlink(os.path.dirname(victim) + '/link')", LANDLOCK_ALONE),
    "holds a file": (SIGHT, "os.fstat(os.open(victim, os.O_PATH))", NO_MOUNTS),
    "signals": (SIGNALS, "call('kill', process, 0)", NO_NEW_LANDLOCK),
    "owns a pipe": (SIGNALS, "signal_by_pipe(8, process)", LANDLOCK_ALONE),
    "owns a pipe by type": (SIGNALS, "signal_by_pipe(15, struct.pack('ii', 1, process))", LANDLOCK_ALONE),
    "chooses a signal": (None, "fcntl.fcntl(os.pipe()[0], 10, 15)", NO_SECCOMP),
    "leases": (None, "fcntl.fcntl(os.open('leased', os.O_RDONLY | os.O_CREAT), 1024, 0)", NO_SECCOMP),
    "watches a folder": (None, "fcntl.fcntl(os.open('.', os.O_RDONLY), 1026, 4)", NO_SECCOMP),
    "asks for signals": (None, "fcntl.ioctl(os.pipe()[0], 0x5452, bytes((1, 0, 0, 0)))", NO_SECCOMP),
    "limits": (SIGNALS, "resource.prlimit(process, resource.RLIMIT_CPU)", LANDLOCK_ALONE),
    "traces": (TRACING, "call('ptrace', 16, process, 0, 0)", NOWHERE),
    "reads memory": (TRACING, "open(f'/proc/{process}/mem', 'rb').close()", SECCOMP_ALONE),
    "reaches the internet": (NETWORK, "udp().connect(('192.0.2.1', 53))", LANDLOCK_ALONE),
    "makes a local socket": (SOCKETS, "socket.socket(socket.AF_UNIX)", NO_SECCOMP),
    "reaches the machine's host": (SOCKETS, "socket.socket(socket.AF_VSOCK)", NO_SECCOMP if HAS_VSOCK else NOWHERE),
    "finds the caller's key": (KEYS, "call('syscall', numbers['keyctl'], 10, -3, b'user', key, 0)", LANDLOCK_ALONE),
    "hides memory in a file": (MEMORY, "os.memfd_create('hidden')", NO_SECCOMP),
    "hides memory in a segment": (MEMORY, "call('shmctl', call('shmget', 0, 4096, 0o600), 0, None)", NO_SECCOMP),
    "forks": (ORPHANS, "os.fork() or os._exit(0)", FORKS),
    "is root in a namespace": (None, "call('unshare', 0x10000000)", LANDLOCK_ALONE),
}
PROGRAM = """
    import ctypes, fcntl, os, resource, socket, struct
    victim, package, process, key = {victim!r}, {package!r}, {process}, {key!r}.encode()
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


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    layers, abi = MACHINES[request.param]
    layers = tuple(layer for layer in layers if layer != "nobody" or os.getuid() == 0)
    if not {*layers} <= {*run._layers()} or (abi and kernel.landlock_abi() < abi):
        pytest.skip("this machine has less")
    monkeypatch.setattr(run, "_layers", lambda: layers)
    monkeypatch.setattr(run, "landlock_abi", lambda: abi)
    return request.param


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


def test_attacks(machine, process, key, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("text")
    (tmp_path / "link").symlink_to(victim)
    attacks = {name: attack for name, (_, attack, _) in ATTACKS.items()}
    succeeding = [name for name, (_, _, machines) in ATTACKS.items() if machine in machines]
    program = PROGRAM.format(
        victim=str(victim),
        package=pytest.__file__,
        process=process,
        key=key,
        numbers=system_calls(os.uname().machine),
        attacks=attacks,
    )
    test = f"def check(candidate):\n    wrong = {{*candidate()}} ^ {{*{succeeding!r}}}\n    assert not wrong, wrong\n"
    assert run_program(textwrap.dedent(program), "", test, "attempts", timeout=20) == (True, "passed")
    assert victim.read_text() == ("" if "empties" in succeeding else "text")
    broken = {promise for name in succeeding if (promise := ATTACKS[name][0])}
    promised = [promise for promise, layers in isolation().items() if layers]
    assert [promise for promise in promised if promise.startswith(tuple(broken))] == []


def test_keys_end_with_their_program(monkeypatch):
    layers = tuple(layer for layer in MACHINES["namespaces"][0] if layer in run._layers())
    if "users" not in layers:
        pytest.skip("this machine has less")
    monkeypatch.setattr(run, "_layers", lambda: layers)
    numbers = system_calls(os.uname().machine)
    program = f"""
        import ctypes
        def attempts():
            call = ctypes.CDLL(None).syscall
            keyrings = -3, -4, -5  # of the session, of the user, of the user's session
            kept = [ring for ring in keyrings if call({numbers["keyctl"]}, 10, ring, b"user", b"lori-note", 0) >= 0]
            assert all([call({numbers["add_key"]}, b"user", b"lori-note", b"text", 4, ring) >= 0 for ring in keyrings])
            return kept
    """
    assert [attempts(program), attempts(program)] == [(True, "passed")] * 2


FLOODS = {
    "bytes": "for n in range(100):\n    with open(f'{n}', 'wb') as file: file.write(bytes(2**22))",
    "holes": "for n in range(100):\n    with open(f'{n}', 'wb') as file: file.truncate(2**22)",
    "files": "for n in range(100_000): open(f'{n}', 'x').close()",
}


@pytest.mark.parametrize("name", ["landlock6+seccomp", "all"])
@pytest.mark.parametrize("flood", FLOODS)
def test_the_disk_is_not_filled(flood, name, monkeypatch):
    layers = tuple(layer for layer in run._layers() if layer in MACHINES[name][0])
    if not {"landlock", "seccomp"} <= {*layers}:
        pytest.skip("this machine has less")
    monkeypatch.setattr(run, "_layers", lambda: layers)
    program = f"import time\ndef attempts():\n{textwrap.indent(FLOODS[flood], '    ')}\n    time.sleep(60)"
    if name == "all" and flood == "holes":  # a hole takes nothing of a file system in memory
        assert attempts(program, timeout=0.5) == (False, "timed out")
        return
    outcome = attempts(program, timeout=20)
    full = "failed: OSError: [Errno 28]"
    over = "failed: more than 2000 files or 33554432 bytes in the scratch folder"
    assert not outcome.passed and outcome.reason.startswith(full if name == "all" else over)


def test_a_shut_scratch_folder_is_a_verdict(monkeypatch):
    """Without seccomp a program may take the supervisor's right to look into the folder."""
    monkeypatch.setattr(run, "_layers", lambda: ())
    program = "import os, time\ndef attempts():\n    os.chmod('.', 0)\n    time.sleep(60)"
    outcome = attempts(program, timeout=1)
    assert not outcome.passed and outcome.reason.startswith("timed out" if os.getuid() == 0 else "failed: more than")


def test_mounts_below_the_library_are_read_only():
    """In a mount namespace of its own, the caller has something writable below Python's library."""
    if not {"pids", "mounts"} <= {*run._layers()} or os.getuid() != 0:
        pytest.skip("only root can mount")
    folder = os.path.join(os.path.dirname(os.__file__), "json", "__pycache__")
    caller = f"""
        from lori_trl.evaluation.sandbox import kernel, run, run_program
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel._mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel._mount("none", {folder!r}, "tmpfs", 0, "mode=777")
        run._layers = lambda: ("pids", "mounts", "nobody")
        program = "def attempts():\\n    open({folder + "/written"!r}, 'x')"
        print(run_program(program, "", "def check(f): f()", "attempts").reason)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(caller)], capture_output=True, text=True)
    assert done.stdout.startswith("failed: OSError: [Errno 30] Read-only file system"), done
