"""What the kernel enforces on a process, in one of two configurations.

- *All layers*: namespaces for processes, network and mounts, with a root of its own that holds Python's library,
  read-only, and 32 MiB in memory; a user namespace, and nobody's rights where the caller is root; and the next two.
- *Landlock and seccomp*, where an ordinary user or a container may make no namespaces: Landlock's first version keeps
  the process to its scratch folder and Python's library, and seccomp's list of system calls refuses all that Landlock
  does not see: sockets, processes, signals, tracing, memory outside the limit. Of the user's files, it leaves names,
  sizes and dates in sight.

There is no third one: seccomp alone leaves files open, Landlock alone leaves sockets and signals, and namespaces alone
leave every other system call of the kernel.

Numbers: linux/{sched,prctl,mount,landlock,seccomp}.h and the tables of system calls.
"""

import ctypes
import errno
import os
import signal
import struct
import sys
from collections.abc import Iterator
from functools import cache

MAX_OPEN_FILES = 32
MAX_FILE_BYTES = 4 * 2**20
SCRATCH_BYTES = 32 * 2**20
SCRATCH_FILES = 2000
NOBODY = 65534

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
KEYCTL_JOIN_SESSION_KEYRING = 1
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers of system calls, (x86_64, aarch64): first what sets the sandbox up.
SETUP_CALLS = {
    "pivot_root": (155, 41),
    "keyctl": (250, 219),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
# All that a program of the standard library in one thread needs; all else is refused.
SYSTEM_CALLS = """
read 0 63, write 1 64, open 2 -, openat 257 56, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79,
statx 332 291, statfs 137 43, fstatfs 138 44, lseek 8 62, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66,
access 21 -, faccessat 269 48, faccessat2 439 439, dup 32 23, dup2 33 -, dup3 292 24, fcntl 72 25, ioctl 16 29,
ftruncate 77 46, fsync 74 82, fadvise64 221 223, unlink 87 -, unlinkat 263 35, getdents64 217 61, getcwd 79 17,
chdir 80 49, pipe 22 -, pipe2 293 59, select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, mmap 9 222,
mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135,
rt_sigreturn 15 139, sigaltstack 131 132, restart_syscall 219 128, nanosleep 35 101, clock_nanosleep 230 115,
clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153, alarm 37 -,
setitimer 38 103, getitimer 36 102, pause 34 -, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, uname 63 160, sysinfo 99 179, getrusage 98 165, getrlimit 97 163,
prlimit64 302 261, futex 202 98, set_robust_list 273 99, rseq 334 293, membarrier 324 283, sched_yield 24 124,
sched_getaffinity 204 123, getrandom 318 278, wait4 61 260, exit 60 93, exit_group 231 94
"""
# Those of them that are allowed with some values of an argument: (its position, the bits that count, their values).
# O_TRUNC empties a file that is opened for reading alone too, or (access mode 3) for neither reading nor writing:
# Landlock's first version does not see it.
OPEN_FLAGS = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TRUNC)
OPEN_BITS = 3 | os.O_TRUNC
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC: none that makes signals.
FCNTL_COMMANDS = (*range(8), 1030)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: none to a device.
IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
CHECKED_ARGUMENTS = {
    "open": (1, OPEN_BITS, OPEN_FLAGS),
    "openat": (2, OPEN_BITS, OPEN_FLAGS),
    "fcntl": (1, 0xFFFFFFFF, FCNTL_COMMANDS),
    "ioctl": (1, 0xFFFFFFFF, IOCTL_COMMANDS),
    "prlimit64": (0, 0xFFFFFFFF, (0,)),  # getrlimit in glibc; no other process's limits
}


def confine(job: dict, has_scratch: bool) -> None:
    """Take from this process all that it does not need; raise OSError if the kernel refuses a part of it.

    The current folder is the scratch folder, before and, if `has_scratch`, after.
    """
    os.setsid()
    if job["namespaces"]:
        _isolate(has_scratch)
    elif not has_scratch:
        os.chdir("/")
    _limit_resources(int(job["timeout"]) + 2, job["memory_bytes"])
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check("capset", _libc().capset(header, nothing))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    _restrict_files(has_scratch)
    _restrict_system_calls()


def _isolate(has_scratch: bool) -> None:
    unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    _make_root(os.getcwd())
    if os.getuid() == 0:
        if has_scratch:
            os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _check("unshare", _libc().unshare(CLONE_NEWUSER))
    _system_call("keyctl", ctypes.c_int(KEYCTL_JOIN_SESSION_KEYRING), None)
    os.chroot("/jail")  # as the last: who is not in the real root can make no user namespace
    os.chdir("/scratch")


def _limit_resources(seconds: int, memory_bytes: int) -> None:
    import resource  # which Windows lacks

    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: 0,  # does not bind root
        resource.RLIMIT_AS: memory_bytes,
    }
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))


@cache
def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _check(call: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result


def _system_call(name: str, *args) -> int:
    number = SETUP_CALLS[name][_column(os.uname().machine)]
    return _check(name, _libc().syscall(ctypes.c_long(number), *args))


def _column(machine: str) -> int:
    if machine not in AUDIT_ARCHITECTURE:
        raise NotImplementedError(f"no table of system calls for {machine}")
    return [*AUDIT_ARCHITECTURE].index(machine)


def prctl(option: int, *args) -> None:
    long = ctypes.c_ulong
    _check(f"prctl({option})", _libc().prctl(option, *[long(value) for value in (*args, 0, 0, 0, 0)[:4]]))


def unshare(namespaces: int) -> None:
    """Leave the given namespaces for new ones, as an owner of a new user namespace where that is what it takes."""
    uid, gid = os.getuid(), os.getgid()
    if _libc().unshare(namespaces) == 0:
        return
    if ctypes.get_errno() != errno.EPERM:
        _check("unshare", -1)
    prctl(PR_SET_DUMPABLE, 1)  # else the maps belong to root
    _check("unshare", _libc().unshare(namespaces | CLONE_NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    prctl(PR_SET_DUMPABLE, 0)


def _readable() -> list[str]:
    """List the folders that Python itself reads: its library and the shared libraries."""
    own = [os.path.dirname(os.path.realpath(os.__file__)), os.path.join(sys.base_prefix, "lib")]
    paths = {*own, "/usr/lib", "/usr/lib64", "/lib", "/lib64"}
    return sorted(filter(os.path.isdir, paths), key=len)  # what lies in another comes after it


def _installed(path: str) -> list[str]:
    """List the folders of installed packages in a folder of `_readable`; they may hold the tests' own text."""
    names = ("site-packages", "dist-packages", "python3/dist-packages")
    return [f"{path}/{name}" for name in names if os.path.isdir(f"{path}/{name}")]


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    text = [part if part is None else os.fsencode(part) for part in (source, target, kind, data)]
    result = _libc().mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3])
    _check(f"mount on {target}", result)


def _make_root(root: str) -> None:
    """Make a file system of Python's library, read-only, and a scratch folder in memory, and know no other."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    paths = _readable()
    in_memory, read_only = MS_NOSUID | MS_NODEV, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
    _mount("none", root, "tmpfs", in_memory, "mode=755")
    jail = root + "/jail"
    for path in paths:
        if not os.path.isdir(jail + path):  # not within another
            os.makedirs(jail + path)
            _mount(path, jail + path, None, MS_BIND | MS_REC)
    for path, kept in _mounts_below(jail):
        _mount("none", path, None, read_only | kept)
    for path in paths:
        for folder in _installed(jail + path):
            _mount("none", folder, "tmpfs", in_memory | MS_RDONLY)
    os.mkdir(jail + "/scratch")
    _mount("none", jail + "/scratch", "tmpfs", in_memory, f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=755")
    _mount("none", root, None, read_only)
    os.chdir(root)
    _system_call("pivot_root", b".", b".")
    _check("umount", _libc().umount2(b".", MNT_DETACH))
    os.chdir("/jail/scratch")


def _mounts_below(folder: str) -> list[tuple[str, int]]:
    """List every mount below a folder, and the flags that a remount has to keep."""
    mounts = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            path, options = line.split(" ")[4:6]
            for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                path = path.replace(code, character)
            if path.startswith(folder + "/"):
                mounts.append((path, MS_NOEXEC if "noexec" in options.split(",") else 0))
    return mounts


def _restrict_files(has_scratch: bool) -> None:
    """Landlock: read below Python's library, read and write files in the current folder, touch nothing else.

    Its first version is enough: links and renames between folders are refused in it, and what later ones add
    (truncation, devices, TCP, signals, sockets) seccomp refuses.
    """
    integer, nothing = ctypes.c_int, ctypes.c_uint(0)
    read_file, read_folder = 1 << 2, 1 << 3
    write = 1 << 1 | 1 << 5 | 1 << 8  # WRITE_FILE, REMOVE_FILE, MAKE_REG
    handled = struct.pack("Q", (1 << 13) - 1)
    ruleset = _system_call("landlock_create_ruleset", handled, ctypes.c_size_t(len(handled)), nothing)

    def allow(path: str, access: int) -> None:
        place = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", access, place)
        _system_call("landlock_add_rule", integer(ruleset), integer(1), rule, nothing)
        os.close(place)

    paths = {os.path.realpath(path) for path in _readable()}
    hidden = {folder for path in paths for folder in _installed(path)}
    for path in paths:
        allow(path, read_folder)
        for entry in _entries(path, hidden):
            allow(entry.path, read_file | read_folder if entry.is_dir() else read_file)
    if has_scratch:
        allow(".", read_file | read_folder | write)
    _system_call("landlock_restrict_self", integer(ruleset), nothing)
    os.close(ruleset)


def _entries(folder: str, hidden: set[str]) -> Iterator[os.DirEntry]:
    """Yield what lies in a folder, less `hidden` and links; a folder that holds some of `hidden` part by part."""
    for entry in os.scandir(folder):
        if any(path.startswith(entry.path + "/") for path in hidden):
            yield from _entries(entry.path, hidden)
        elif entry.path not in hidden and not entry.is_symlink():
            yield entry


def system_call_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Write the program that allows the calls of `SYSTEM_CALLS` and no others: no socket, fork, thread, exec, kill."""
    column = _column(machine)
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    load, mask, equal, give = 0x20, 0x54, 0x15, 0x06  # a word of seccomp_data; a bitwise and; a jump; a return
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCHITECTURE[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    for entry in SYSTEM_CALLS.split(","):
        name, *numbers = entry.split()
        if numbers[column] == "-":
            continue
        body = [(give, 0, 0, allow)]
        if name in CHECKED_ARGUMENTS:
            position, bits, values = CHECKED_ARGUMENTS[name]
            body = [(load, 0, 0, 16 + 8 * position), (mask, 0, 0, bits)]  # the lower half, as the kernel reads it
            body += [(equal, len(values) - n, 0, value) for n, value in enumerate(values)]
            body += [(give, 0, 0, refuse), (give, 0, 0, allow)]
        program += [(equal, 0, len(body), int(numbers[column])), *body]
    return [*program, (give, 0, 0, refuse)]


def _restrict_system_calls() -> None:
    program = system_call_filter(os.uname().machine)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(filter_program))
