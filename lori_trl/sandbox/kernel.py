"""What the kernel enforces on a process, layer by layer.

Numbers: linux/{sched,prctl,mount,landlock,seccomp}.h and the tables of system calls.
"""

import ctypes
import errno
import os
import signal
import struct
import sys
from functools import cache

LAYERS = ("pids", "mounts", "network", "nobody", "landlock", "seccomp")
PROMISES = {
    "no network": ("network", "seccomp"),
    "no writes outside the scratch folder": ("mounts", "landlock"),
    "no reading of the user's files": ("mounts", "landlock"),
    "no signals to other processes, no tracing of them": ("pids", "seccomp"),
    "no process left behind, not even by a fork that hides": ("pids", "seccomp"),
}
MAX_FILE_BYTES = 16 * 2**20
SCRATCH_BYTES = 32 * 2**20
NOBODY = 65534
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


def confine(job: dict, has_scratch: bool) -> None:
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
        unshare(namespaces)
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
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
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
    # getrlimit is prlimit64(0, ...) in glibc; another process's limits are not the candidate's to set.
    prlimit = (302, 261)[column]
    program += [(equal, 0, 3, prlimit), (load, 0, 0, 16), (equal, 0, 1, 0), (give, 0, 0, allow)]
    program.append((give, 0, 0, refuse))
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(filter_program))
