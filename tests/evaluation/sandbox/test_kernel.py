"""No sample gets out of what the kernel holds it to."""

import os
import re
import socket
import struct
import sys
from pathlib import Path

import pytest
from sandbox_samples import attempts, system_calls

from lori_trl.evaluation.sandbox import kernel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the samples attack Linux")


def test_only_the_scratch_folder_can_be_written(tmp_path, namespaces):
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


def test_no_network(namespaces):
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


def test_other_processes_are_out_of_reach(namespaces, monkeypatch):
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


def test_system_calls_that_no_program_needs_are_refused(namespaces):
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


# ---- The tables, on the machines that there are


@pytest.mark.parametrize("machine", kernel.AUDIT_ARCHITECTURE)
def test_the_numbers_of_system_calls_are_the_kernels(machine):
    numbers, column = system_calls(machine), [*kernel.AUDIT_ARCHITECTURE].index(machine)
    entries = [entry.split() for entry in kernel.SYSTEM_CALLS.split(",")]
    ours = {name: given[column] for name, *given in entries} | {
        name: str(given[column]) for name, given in kernel.SETUP_CALLS.items()
    }
    assert ours == {name: str(numbers.get(name, "-")) for name in ours}
    assert len(entries) == len({name for name, *_ in entries}) and {*kernel.CHECKED_ARGUMENTS} <= {*ours}


def test_the_table_is_that_of_the_installed_headers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.is_file():
        pytest.skip("no kernel headers are installed")
    installed = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    table = system_calls("x86_64")
    assert {name: int(installed[name]) for name in table} == table


def decide(program, architecture, number, *arguments):
    """Run a seccomp program as the kernel does, on little-endian words."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    word, at = 0, 0
    while True:
        code, if_equal, if_not, value = program[at]
        at += 1
        if code == 0x20:
            (word,) = struct.unpack_from("<I", data, value)
        elif code == 0x54:
            word &= value
        elif code == 0x15:
            at += if_equal if word == value else if_not
        else:
            assert code == 0x06
            return {0x7FFF0000: "allowed", 0x00050001: "refused", 0x80000000: "killed"}[value]


@pytest.mark.parametrize("machine", kernel.AUDIT_ARCHITECTURE)
def test_the_filter_allows_what_is_listed_and_nothing_else(machine):
    numbers, program = system_calls(machine), kernel.system_call_filter(machine)
    architecture = kernel.AUDIT_ARCHITECTURE[machine]
    listed = {entry.split()[0] for entry in kernel.SYSTEM_CALLS.split(",")} - {*kernel.CHECKED_ARGUMENTS}
    for name, number in numbers.items():
        if name not in kernel.CHECKED_ARGUMENTS:
            assert decide(program, architecture, number) == ("allowed" if name in listed else "refused"), name
            assert decide(program, architecture, number | 0x40000000) == "refused"  # x32
            assert decide(program, 0x40000003, number) == "killed"  # i386
    assert not listed & {"truncate", "keyctl", "add_key", "request_key", "socket", "fork", "clone", "readlinkat"}


REFUSED_ARGUMENTS = {
    "fcntl": ((3, 8), (3, 10), (3, 15), (3, 1024), (3, 1026), (3, 1031), (3, 8 | 1 << 32)),
    "ioctl": ((3, 0x5452), (3, 0x8901), (3, 0x5412)),
    "prlimit64": ((1,), (4711,)),
    "openat": ((3, 0, os.O_TRUNC), (3, 0, 3), (3, 0, 3 | os.O_TRUNC)),
}
ALLOWED_ARGUMENTS = {
    "fcntl": ((3, 1), (3, 2), (3, 1030)),
    "ioctl": ((3, 0x5401), (3, 0x5451)),
    "prlimit64": ((0, 9),),
    "openat": ((3, 0, os.O_RDONLY | os.O_CLOEXEC), (3, 0, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)),
}


@pytest.mark.parametrize("machine", kernel.AUDIT_ARCHITECTURE)
@pytest.mark.parametrize(
    ("decision", "table"), [("refused", REFUSED_ARGUMENTS), ("allowed", ALLOWED_ARGUMENTS)], ids=["refused", "allowed"]
)
def test_the_filter_looks_at_arguments(decision, table, machine):
    numbers, program = system_calls(machine), kernel.system_call_filter(machine)
    for name, cases in table.items():
        for arguments in cases:
            assert decide(program, kernel.AUDIT_ARCHITECTURE[machine], numbers[name], *arguments) == decision, name
            if name == "openat" and machine == "x86_64":
                assert decide(program, kernel.AUDIT_ARCHITECTURE[machine], numbers["open"], *arguments[1:]) == decision
