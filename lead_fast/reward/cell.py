"""The inside of the guard: builds it around itself, gives up every privilege, then runs one program test by test.

Uses only the standard library, because this file's text is passed to a bare interpreter (by `programs.py`). The process
that is started enters new namespaces and waits; its child is process 1 of the new pid namespace, sees a root file
system of its own, and forks a process for each test. Whatever a test leaves behind is killed before the next test
begins, and everything ends with process 1, which ends when its input does.

Frames are JSON lines. In: the settings, the program, then one test's input at a time. Out: the protection in force,
then the outcome of each test. The other side trusts none of it: a program can spoil only its own outcome, because no
expected output ever enters here.
"""

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = ("user", "pid", "net", "mnt", "ipc", "uts")
INNER_ID = 1000  # user and group of programs, as they see it
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
# System call numbers: x86-64, AArch64.
PIVOT_ROOT, SOCKET, MOUNT_SETATTR = (155, 41), (41, 198), 442
REFUSED = {
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),  # keyrings outlive a process
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "pidfd_getfd": (438, 438),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),  # memory for
    "semget": (64, 190),  # which no process is charged
}  # fmt: skip
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and the kernel's identifier

# What LiveCodeBench puts in front of every program, in this order: `from NAME import *`, then `import NAME` for most.
STARS = ("string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys "
         "json builtins typing").split()  # fmt: skip
PLAIN = [name for name in STARS if name not in ("builtins", "typing")]
RECURSION = 50_000  # LiveCodeBench's recursion limit


def call(name: str, *args: Any) -> int:
    """Call a function of the C library. Raises OSError."""
    result = getattr(LIBC, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{args}: {os.strerror(number)}")
    return result


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [w.encode() if w is not None else None for w in (source, target, kind)]
    call("mount", *words, ctypes.c_ulong(flags), data.encode() if data else None)


def set_attributes(path: str, attributes: int, *, recursive: bool) -> None:
    attr = struct.pack("QQQQ", attributes, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, -100, path.encode(), 0x8000 if recursive else 0, attr, len(attr))


# ------------------------------------------------------------------------------------------------------------ the guard


def build_root(seen: list[str], box_bytes: int, machine: int) -> None:
    """Build a root that holds only `seen` read-only, a few devices, this namespace's /proc, and an empty /tmp."""
    mount(None, "/", None, RECURSIVE | PRIVATE)
    places = ("/mnt", "/media", "/srv", "/opt", "/tmp")
    root = next(p for p in places if os.path.isdir(p) and not any(f"{s}/".startswith(f"{p}/") for s in seen))
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.makedirs(f"{root}/tmp")
    mount("tmpfs", f"{root}/tmp", "tmpfs", NOSUID | NODEV, f"size={box_bytes},nr_inodes=4096,mode=1777")
    for path in seen:  # after /tmp, because an environment may be in there
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target) if os.path.isdir(path) else open(target, "x").close()
        mount(path, target, None, BIND | RECURSIVE)
        set_attributes(target, 1 | NOSUID | NODEV, recursive=True)  # 1: read-only
    os.makedirs(f"{root}/dev")
    for name in ("null", "zero", "full", "random", "urandom"):
        open(f"{root}/dev/{name}", "x").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, BIND)
    for name, to in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
                     ("stderr", "/proc/self/fd/2"), ("shm", "/tmp")):  # fmt: skip
        os.symlink(to, f"{root}/dev/{name}")
    os.makedirs(f"{root}/proc")
    mount("proc", f"{root}/proc", "proc", NOSUID | NODEV | NOEXEC)
    set_attributes(root, 1 | NOSUID | NODEV, recursive=False)
    os.chdir(root)
    call("syscall", PIVOT_ROOT[machine], b".", b".")
    call("umount2", b".", 2)  # detach the old root, so that it is out of reach
    os.chdir("/tmp")


def map_ids(uid: int, gid: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INNER_ID} {uid} 1"), ("gid_map", f"{INNER_ID} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def become(uid: int) -> None:
    """Change from root to a user that owns nothing, in a new user namespace."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    call("prctl", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, or /proc/self would belong to root
    call("unshare", NEW_USER)
    map_ids(uid, uid)


def drop_privileges(machine: int, architecture: int) -> None:
    """Forbid further user namespaces, capabilities, gaining privileges by exec, and the system calls of REFUSED."""
    with open("/proc/sys/user/max_user_namespaces", "w") as f:
        f.write("0")
    call("prctl", 47, 4, 0, 0, 0)  # PR_CAP_AMBIENT: clear all
    for capability in range(64):
        if LIBC.prctl(24, capability, 0, 0, 0) < 0:  # PR_CAPBSET_DROP, up to this kernel's last capability
            break
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    refuse_system_calls(machine, architecture)
    call("prctl", 4, 0, 0, 0, 0)  # not dumpable: a program cannot read this process's memory


def refuse_system_calls(machine: int, architecture: int) -> None:
    """Install a seccomp filter: REFUSED, sockets that escape a network namespace, and other machines' system calls."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    no, kill, yes = 0x50000 | 1, 0x80000000, 0x7FFF0000  # EPERM, kill the process, allow
    refused = [numbers[machine] for numbers in REFUSED.values()]
    families = [1, 2, 10]  # AF_UNIX, AF_INET, AF_INET6; others escape: AF_VSOCK reaches a virtual machine's host
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, no)]  # x32
    program += [(equal, 0, 1, 435), (give, 0, 0, 0x50000 | 38)]  # clone3: ENOSYS, so that clone is used
    for number in refused:
        program += [(equal, 0, 1, number), (give, 0, 0, no)]
    program += [(equal, 1, 0, SOCKET[machine]), (give, 0, 0, yes), (load, 0, 0, 16)]
    for family in families:
        program += [(equal, 0, 1, family), (give, 0, 0, yes)]
    program.append((give, 0, 0, no))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    call("prctl", 22, 2, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0)


def enter(settings: dict) -> None:
    """Build the guard; returns in its process 1. The process that called this ends together with process 1."""
    machine, architecture = MACHINES[os.uname().machine]
    root, uid, gid = os.geteuid() == 0, os.getuid(), os.getgid()
    others = NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    if root:
        call("unshare", others)
    else:
        call("unshare", NEW_USER | others)
        map_ids(uid, gid)
    if child := os.fork():
        os.close(0)
        os.close(1)
        os.waitpid(child, 0)
        os._exit(0)
    call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    build_root(settings["seen"], settings["box_bytes"], machine)
    if root:
        become(settings["uid"])
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # again, because changing the user resets it
    drop_privileges(machine, architecture)


def in_force() -> dict:
    """The protection of this process as the kernel reports it, for the other side to verify."""
    with open("/proc/self/status") as f:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
    with open("/proc/self/uid_map") as f:
        outer = int(f.read().split()[1])
    return {
        "pid": os.getpid(), "uid": os.getuid(), "outer_uid": outer,
        "capabilities": [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
        "no_new_privileges": int(status["NoNewPrivs"]), "seccomp": int(status["Seccomp"]),
        "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ one test


def limit(settings: dict) -> None:
    """Set limits on a test's own processes."""
    for what, most in (("RLIMIT_CPU", settings["cpu_s"]), ("RLIMIT_AS", settings["memory_bytes"]),
                       ("RLIMIT_FSIZE", settings["box_bytes"]), ("RLIMIT_NPROC", settings["processes"]),
                       ("RLIMIT_NOFILE", 64), ("RLIMIT_STACK", 64 << 20), ("RLIMIT_MSGQUEUE", 0),
                       ("RLIMIT_MEMLOCK", 0), ("RLIMIT_SIGPENDING", 64),
                       ("RLIMIT_CORE", 1)):  # fmt: skip  # 1 and not 0: a core handler treats 0 as no limit
        kind = getattr(resource, what)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        grace = most + 1 if what == "RLIMIT_CPU" and hard == resource.RLIM_INFINITY else most
        resource.setrlimit(kind, (most, grace))


def plain(value: Any) -> Any:
    """Convert a returned value to JSON so that the other side can compare it by == as Python would (programs.value)."""
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a numpy scalar
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [plain(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[plain(k), plain(v)] for k, v in value.items()]}
    return {"other": type(value).__name__}


def play(job: dict, text: str, result: int) -> None:
    """Run the program on one input: as a script, or as a function whose value goes to `result`."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for star in STARS:
        exec(f"from {star} import *", names)
    for name in PLAIN:
        exec(f"import {name}", names)
    sys.setrecursionlimit(RECURSION)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(RECURSION)
    exec(compile(job["program"], "program.py", "exec"), names)
    if job["function"] is not None:
        owner = names["Solution"]() if "class Solution" in job["program"] else None
        function = getattr(owner, job["function"]) if owner is not None else names[job["function"]]
        value = function(*[json.loads(line) for line in text.split("\n")])
        sent = json.dumps(plain(list(value) if isinstance(value, tuple) else value)).encode()
        while sent:
            sent = sent[os.write(result, sent) :]


def child(settings: dict, job: dict, text: str, fds: tuple[int, int, int]) -> None:
    """Run a test's process, from fork to its end."""
    code = 1
    try:
        os.setsid()
        call("prctl", 4, 1, 0, 0, 0)  # so that its /proc/self belongs to it again
        given, out, err = fds
        result = os.dup(out) if job["function"] is not None else -1
        os.dup2(given, 0)
        os.dup2(os.open("/dev/null", os.O_WRONLY) if job["function"] is not None else out, 1)
        os.dup2(err, 2)
        if result < 0:
            os.closerange(3, 4096)
        else:
            os.closerange(3, result)
            os.closerange(result + 1, 4096)
        sys.stdin, sys.stdout = open(0), open(1, "w")
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")
        limit(settings)
        try:
            play(job, text, result)
            import threading

            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
        except SystemExit:
            pass
        sys.stdout.flush()
        code = 0
    except BaseException as e:  # raised by the program; it ends in this process
        try:
            os.write(2, f"\n{type(e).__name__}: {e}"[:500].encode(errors="replace"))
        except BaseException:
            pass
    finally:
        os._exit(code)


def over(most: int) -> bool:
    """Whether all processes here except this one hold more than `most` bytes; shared pages count once."""
    pids = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    resident = {pid: resident_bytes(pid) for pid in pids}
    return sum(resident.values()) > most and sum(min(resident[pid], proportional_bytes(pid)) for pid in pids) > most


def resident_bytes(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):  # ended in the meantime
        return 0


def proportional_bytes(pid: str) -> int:
    """A process's memory with shared pages divided. Slow, because the kernel visits every page."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith(b"Pss:"))
    except (OSError, StopIteration):  # ended, or not readable: then all resident memory counts
        return sys.maxsize


def end_all() -> None:
    """Kill and reap every process here except this one; none can escape by forking: the kernel signals all at once."""
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
        except ChildProcessError:
            return


def outcome(settings: dict, job: dict, given: int) -> dict:
    """Run one test to its end; `given` is the file with its input."""
    text: str = job["input"]
    os.ftruncate(given, 0)
    os.lseek(given, 0, 0)
    data = memoryview(text.encode("utf-8", "surrogatepass"))
    while data:
        data = data[os.write(given, data) :]
    os.lseek(given, 0, 0)
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(settings, job, text, (given, out_end, err_end))
    os.close(out_end)
    os.close(err_end)
    ended = os.pidfd_open(pid)
    taken = {out: bytearray(), err: bytearray()}
    most = {out: settings["output_bytes"], err: 1 << 16}
    status = ""
    watched = [0, out, err, ended]
    while not status:
        ready = select.select(watched, [], [], 0.05)[0]
        if 0 in ready:  # no frame is due, so the other side has closed the pipe
            os._exit(0)
        if time.monotonic() - began > settings["wall_s"]:
            status = "time limit"
        elif over(settings["memory_bytes"]):
            status = "memory limit"
        for fd in (out, err):
            if fd in ready:
                piece = os.read(fd, 1 << 16)
                taken[fd] += piece
                if not piece:
                    watched.remove(fd)
                elif fd == err:
                    del taken[fd][: -most[fd]]
                elif len(taken[fd]) > most[fd]:
                    status = "output limit"
        if ended in ready and not status:
            status = "ended"
    code = -signal.SIGKILL
    if status == "ended":
        _, raw = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(raw)
    end_all()
    for fd in (out, err):
        while fd in watched and len(taken[fd]) <= most[fd] and (piece := os.read(fd, 1 << 16)):
            taken[fd] += piece
        os.close(fd)
    os.close(ended)
    if status == "ended":
        status = {0: "ended", -signal.SIGXCPU: "time limit"}.get(code, "runtime error")
        if len(taken[out]) > most[out]:
            status = "output limit"
    last = taken[err].decode("utf-8", "replace").strip().rpartition("\n")[2][:300]
    seconds = round(time.monotonic() - began, 4)
    output = bytes(taken[out][: most[out]]).decode("utf-8", "replace") if status == "ended" else ""
    return {"status": status, "code": code, "output": output, "error": last, "seconds": seconds}


# --------------------------------------------------------------------------------------------------------------- frames


def send(frame: dict) -> None:
    data = memoryview(json.dumps(frame).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]


class Frames:
    """JSON lines from standard input; never reads ahead, so that a test cannot see later frames."""

    def __init__(self) -> None:
        self.rest = bytearray()

    def next(self) -> Any:
        """The next frame; ends this process at the end of the input."""
        while b"\n" not in self.rest:
            piece = os.read(0, 1 << 20)
            if not piece:
                os._exit(0)
            self.rest += piece
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)


def main() -> None:
    frames = Frames()
    settings = frames.next()
    try:
        given = os.memfd_create("input")  # before the filter, which forbids it
        enter(settings)
        sys.path += settings["packages"]
        for name in STARS:
            __import__(name)
        send({"in_force": in_force()})
    except (OSError, KeyError, StopIteration) as e:
        send({"failed": f"{type(e).__name__}: {e}"})
        os._exit(1)
    job: dict = {}
    while True:
        job |= frames.next()  # the first frame also holds the program
        send(outcome(settings, job, given))


if __name__ == "__main__":
    main()
