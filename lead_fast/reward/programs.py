"""Run programs that a model wrote against tests, under guard, and grade them as LiveCodeBench does.

Every program gets a process tree of its own (cell.py runs inside it): namespaces for users, pids, network, mounts, IPC
and host name; an unprivileged user without capabilities; a root that holds only the interpreter and the system's
libraries, read-only; an empty /tmp in memory; a filter on system calls; limits on CPU and wall-clock time, memory,
processes, file size and output. The tree always ends as a whole. If any of this is unavailable, nothing is run.

A test is a text for standard input and the expected output, or a call's arguments and its expected value. Expected
outputs never enter the guard: what a test prints or returns is brought out and compared here, by the benchmark's rules.
"""

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config import RewardConfig
from ..records import Problem, Response, Sample, Score
from . import cell
from .extraction import graded_text

Tests = tuple[str | None, Sequence[tuple[str, str]]]  # the function to call, if any; (input, expected output)
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
FIRST_UID = 1_880_000_000  # above the ranges that systems and containers assign
START_S = 60.0  # maximum time for building a guard
GRACE_S = 10.0  # added to a test's wall-clock limit, so that the process inside can report it
STARTED = itertools.count()


@dataclass(frozen=True)
class Limits:
    """Limits on one test of a program. CPU seconds count per process; the benchmark allows 6 s of wall-clock time.

    memory_bytes: address space of each process, and resident memory of all of them. processes: threads count, and so
    does the supervising process. box_bytes: total of the files in /tmp, and each file. output_bytes: standard output.
    """

    cpu_s: int = 6
    wall_s: float = 15.0
    memory_bytes: int = 4 << 30
    processes: int = 32
    box_bytes: int = 64 << 20
    output_bytes: int = 16 << 20


@dataclass(frozen=True)
class Verdict:
    """The outcome of a program.

    reason: passed, wrong answer, runtime error, time limit, memory limit, output limit, no program, or guard ended
    (the process tree died before it reported). test: index of the first test that failed. detail: the end of the
    program's standard error, untrusted text.
    """

    passed: bool
    reason: str
    test: int | None = None
    detail: str = ""


# -------------------------------------------------------------------------------------------------------- comparison


def extract_program(text: str) -> str | None:
    """The last fenced block: the text between the last two lines that contain three backquotes. None without two."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def same_output(output: str, expected: str) -> bool:
    """Compare printed outputs as LiveCodeBench does: line by line without outer white space, numbers as decimals."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (output, expected))
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    try:
        return [Decimal(word) for word in ours.split()] == [Decimal(word) for word in theirs.split()]
    except (InvalidOperation, ValueError):  # not all of them are numbers
        return False


def value(sent: Any) -> Any:
    """Decode a returned value from JSON (`cell.plain`). Raises ValueError for anything that the cell never sends."""
    if isinstance(sent, list):
        return [value(v) for v in sent]
    if not isinstance(sent, dict):
        return sent
    try:
        match sent:
            case {"tuple": list(values)}:
                return tuple(value(v) for v in values)
            case {"dict": list(pairs)}:
                return {value(k): value(v) for k, v in pairs}
    except TypeError as e:
        raise ValueError(f"{sent!r:.100} is not a value.") from e
    return object()  # of a type whose values equal nothing


def same_value(sent: str, expected: str) -> bool:
    """Compare a returned value with the expected one by ==, with tuples as lists, as LiveCodeBench does."""
    try:
        ours = value(json.loads(sent, parse_int=_integer))
    except (ValueError, RecursionError):  # written by the program, not by the cell
        return False
    return bool(ours == json.loads(expected, parse_int=_integer))


def _integer(digits: str) -> int | tuple[str, str]:
    """Parse an integer; beyond the interpreter's limit on digits, keep its text, which compares equally well."""
    return int(digits) if len(digits) <= 4000 else ("integer", digits)


# ------------------------------------------------------------------------------------------------------------ the guard


def interpreter() -> str:
    """The interpreter that this environment was made from, which starts without the environment's packages."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _seen() -> tuple[list[str], list[str]]:
    """The parts of the file system that a program sees, and the folders of its packages (numpy, say)."""
    packages = os.path.realpath(sysconfig.get_path("purelib"))
    paths = [p for p in SYSTEM if os.path.lexists(p)]
    for path in (os.path.realpath(sys.base_prefix), packages):
        if not any(f"{path}/".startswith(f"{p}/") for p in paths if not os.path.islink(p)):
            paths.append(path)
    return paths, [packages]


class PidsGroup:
    """A pids cgroup below this process's own, or none if that is not writable; version 1 or 2."""

    def __init__(self, name: str, most: int):
        self.folder: Path | None = None
        parent = self._parent()
        if parent is not None:
            for old in parent.glob("lead-fast-*-*"):  # left by a process that was killed
                if not os.path.exists(f"/proc/{old.name.split('-')[2]}"):
                    with contextlib.suppress(OSError):
                        old.rmdir()
            try:
                (parent / name).mkdir()
                (parent / name / "pids.max").write_text(str(most))
                self.folder = parent / name
            except OSError:
                with contextlib.suppress(OSError):
                    (parent / name).rmdir()

    @staticmethod
    def _parent() -> Path | None:
        try:
            rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        except OSError:
            return None
        for _, controllers, path in rows:
            if "pids" in controllers.split(","):
                return Path("/sys/fs/cgroup/pids", path.lstrip("/"))
        for _, controllers, path in rows:
            folder = Path("/sys/fs/cgroup", path.lstrip("/"))
            with contextlib.suppress(OSError):
                if not controllers and "pids" in (folder / "cgroup.subtree_control").read_text().split():
                    return folder
        return None

    def add(self, pid: int) -> None:
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        until = time.monotonic() + 5
        while self.folder is not None:
            try:
                self.folder.rmdir()
                self.folder = None
            except FileNotFoundError:
                self.folder = None
            except OSError:  # the kernel is still tearing down processes
                if time.monotonic() > until:
                    raise
                time.sleep(0.005)


class GuardFailure(ValueError):
    """A guard cannot be built on this machine."""


class Cell:
    """One program's process tree under guard; a context manager that leaves no part of it behind.

    Raises:
        GuardFailure: a part of the protection is unavailable; no program has run.
    """

    def __init__(self, limits: Limits = Limits()):
        if sys.platform != "linux" or os.uname().machine not in cell.MACHINES:
            raise GuardFailure(f"Programs run under guard on Linux on {' and '.join(cell.MACHINES)} only.")
        number = next(STARTED)
        seen, packages = _seen()
        self.rest = b""
        self.limits, self.words = limits, tempfile.TemporaryFile()
        self.pids = PidsGroup(f"lead-fast-{os.getpid()}-{number}", limits.processes + 1)
        self.process = subprocess.Popen(
            [interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", Path(cell.__file__).read_text(encoding="utf-8")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "TMPDIR": "/tmp",
                 "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
        try:
            uid = FIRST_UID + (os.getpid() % (1 << 21)) * 64 + number % 64
            started = self.ask(asdict(limits) | {"seen": seen, "packages": packages, "uid": uid}, START_S)
            self.in_force = self._insist(started)
            for pid in self._children():
                self.pids.add(pid)
        except BaseException:
            self.close()
            raise

    def _children(self) -> list[int]:
        """Process 1 of the new namespace, by its number outside."""
        try:
            return list(
                map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())
            )
        except OSError:
            return []

    def _insist(self, started: dict | None) -> dict:
        """Return the protection in force; raise GuardFailure if any part of it is missing."""
        force = (started or {}).get("in_force")
        if force is None:
            self.words.seek(0)
            said = self.words.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise GuardFailure(f"No guard for programs can be built here ({(started or {}).get('failed') or said}): "
                               "they need Linux 5.14 or later, and user namespaces (sysctl user.max_user_namespaces, "
                               "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns; in a "
                               "container, its privileges).")  # fmt: skip
        shared = [kind for kind in cell.NAMESPACES if force["namespaces"][kind] == os.readlink(f"/proc/self/ns/{kind}")]
        wanted = {"pid": 1, "uid": cell.INNER_ID, "capabilities": [0] * 5, "no_new_privileges": 1, "seccomp": 2}
        wrong = [f"{k} is {force[k]}" for k, v in wanted.items() if force[k] != v]
        if shared or wrong or force["outer_uid"] == 0:
            raise GuardFailure(f"The guard for programs is incomplete here: {', '.join([*wrong, *shared]) or 'root'}.")
        return force

    def ask(self, frame: dict, seconds: float) -> dict | None:
        """Send a frame and wait for the answer; None if none arrives in time or the process tree has ended."""
        assert self.process.stdin and self.process.stdout
        given, taken = self.process.stdin.fileno(), self.process.stdout.fileno()
        data, until = memoryview(json.dumps(frame).encode() + b"\n"), time.monotonic() + seconds
        most = 6 * self.limits.output_bytes + (1 << 16)  # 6: the length of a JSON escape
        got = bytearray(self.rest)
        while b"\n" not in got[-(1 << 16) - 1 :]:
            left = until - time.monotonic()
            if left <= 0 or len(got) > most:
                return None
            poller = select.poll()  # select cannot handle descriptors above 1023
            poller.register(taken, select.POLLIN)
            if data:
                poller.register(given, select.POLLOUT)
            ready = dict(poller.poll(1000 * left))
            try:
                if given in ready:
                    data = data[os.write(given, data) :]
                if taken in ready:
                    piece = os.read(taken, 1 << 16)
                    got += piece
                    if not piece:
                        return None
            except BrokenPipeError:
                return None
            except BlockingIOError:
                continue
        line, _, rest = bytes(got).partition(b"\n")
        self.rest = rest
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return answer if isinstance(answer, dict) else None

    def run(self, program: str, tests: Tests) -> Verdict:
        """Run a program against tests, up to the first that fails. Call once per cell."""
        function, cases = tests
        job = {"program": program, "function": function}
        for i, (text, expected) in enumerate(cases):
            answer = self.ask({"input": text} | (job if i == 0 else {}), self.limits.wall_s + GRACE_S)
            if answer is None:
                return Verdict(False, "guard ended", i)
            status, output, detail = (answer.get(k) for k in ("status", "output", "error"))
            if status != "ended":
                return Verdict(False, str(status), i, str(detail)[:300])
            if not (same_value if function is not None else same_output)(str(output), expected):
                return Verdict(False, "wrong answer", i, str(detail)[:300])
        return Verdict(True, "passed")

    def kill(self) -> None:
        """Kill the entire tree: process 1 of its namespace takes every other process with it."""
        for pid in self._children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()

    def close(self) -> None:
        """Kill the entire tree and leave nothing behind."""
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(OSError):
                pipe.close()
        self.words.close()
        self.pids.remove()

    def __enter__(self) -> "Cell":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def protection(limits: Limits = Limits()) -> str:
    """Build a guard, run a program in it, and describe the protection. Raises GuardFailure if it is incomplete."""
    with Cell(limits) as tried:
        verdict = tried.run("print(6 * 7)", (None, [("", "42")]))
        if not verdict.passed:
            raise GuardFailure(f"A guard for programs was built, but print(6 * 7) in it ended with: {verdict.reason}.")
        pids = "a pids cgroup" if tried.pids.folder else "no pids cgroup (none is writable)"
        user = tried.in_force["outer_uid"]
    return (
        f"Programs run under guard, each in separate namespaces ({', '.join(cell.NAMESPACES)}), as user {user} "
        f"without capabilities, with a filter on system calls, {pids}, a read-only root and an empty /tmp; at most "
        f"{limits.cpu_s} s of CPU, {limits.wall_s:g} s, {limits.memory_bytes >> 20} MiB, {limits.processes} processes."
    )


# -------------------------------------------------------------------------------------------------------------- grading


def run(program: str, tests: Tests, limits: Limits = Limits()) -> Verdict:
    """Run one program in a new guard."""
    with Cell(limits) as one:
        return one.run(program, tests)


class Programs:
    """Grade responses that are programs, several at a time.

    Args:
        tests: returns a problem's tests.
        limits: on each test.
        workers: programs at once; None: as many as this process's share of the cores and the memory allow.
    """

    def __init__(self, tests: Callable[[Problem], Tests], limits: Limits = Limits(), workers: int | None = None):
        self.tests, self.limits = tests, limits
        self.workers = workers or _workers(limits)
        self.reasons: Counter[str] = Counter()
        self.running: set[Cell] = set()
        self.interrupted = False

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Do nothing: each program's process tree ends when it has been graded."""

    def grade(
        self, problems: Sequence[Problem], responses: dict[int, list[Response]], c: RewardConfig
    ) -> dict[int, list[Sample]]:
        """Grade responses, by index of their problem; a Score's `extracted` is the program."""
        programs = {i: [extract_program(graded_text(r.text, c.grade)) for r in rs] for i, rs in responses.items()}
        jobs = [(i, p) for i, ps in programs.items() for p in dict.fromkeys(ps) if p is not None]  # without repeats
        pool = ThreadPoolExecutor(self.workers)
        try:
            done = pool.map(lambda job: self._run(problems[job[0]], job[1]), jobs)
            verdicts = dict(zip(jobs, done, strict=True))
        except BaseException:  # including Ctrl-C: do not wait for running programs
            self.interrupted = True  # before the loop, so that programs about to start see it
            for one in list(self.running):
                one.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return {
            i: [self._sample(r, p, verdicts.get((i, p or "")), c) for r, p in zip(rs, programs[i], strict=True)]
            for i, rs in responses.items()
        }

    def _run(self, problem: Problem, program: str) -> Verdict:
        tests = self.tests(problem)
        with Cell(self.limits) as one:
            self.running.add(one)
            try:
                if self.interrupted:
                    return Verdict(False, "guard ended")
                return one.run(program, tests)
            finally:
                self.running.discard(one)

    def _sample(self, response: Response, program: str | None, verdict: Verdict | None, c: RewardConfig) -> Sample:
        verdict = Verdict(False, "no program") if program is None or verdict is None else verdict
        self.reasons[verdict.reason] += 1
        truncated = response.truncated or (c.grade != "all" and "</think>" not in response.text)
        return Sample(response, Score(verdict.passed, program, truncated, False))


def _workers(limits: Limits) -> int:
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(1, min(cores, free // limits.memory_bytes))


def counted(reasons: Iterable[Counter[str]]) -> str:
    """Count the outcomes of all programs, in one sentence."""
    total = sum(reasons, Counter())
    if not total:
        return "Programs: all were graded earlier."
    return f"Programs: {', '.join(f'{n} {reason}' for reason, n in total.most_common())}."
