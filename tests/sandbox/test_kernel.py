"""No sample gets out of what the kernel holds it to."""

import os
import socket
import sys
from pathlib import Path

import pytest
from sandbox_samples import attempts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the samples attack Linux")


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
