"""Decide whether an answer equals a reference, in a process that may be killed if no rule decides.

`answers.py` holds the types, the rules and their reasons; most answers are decided there, in microseconds. Pairs that
no rule decides go to math-verify unchanged, in a worker process with limited CPU time: an answer that needs more time,
crashes the worker or is absurdly long counts as wrong. A busy machine does not shorten the limit.

math-verify rounds to six places, drops words, and compares fragments where it cannot parse. Therefore the worker
accepts its yes only if both sides were parsed, neither lacks a value, and exact sides agree to many digits.

sympy evaluates any string that it is given with Python's `eval`, and latex2sympy gives it number tokens; the worker
accepts only numbers and sympy's own closed forms, so that nothing in an answer is run as code.
"""

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from .answers import decide, readings
from .extraction import MAX_ANSWER_CHARS
from .formulas import Unread

WALL_FACTOR = 10
"""Wall-clock limit of a worker as a multiple of its CPU limit, for one that sleeps or waits, not for a busy machine."""

# ---------------------------------------------------------------------------------------------------------- undecided


def quick(answer: str, reference: str) -> bool | None:
    """Whether the answer is right, if the rules decide it, else None."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    verdict = decide(answer, reference)
    return False if verdict is None and (_tower(answer) or _unbalanced(answer)) else verdict


def _unbalanced(s: str) -> bool:
    return s.count("{") - s.count("\\{") != s.count("}") - s.count("\\}")


def _tower(s: str) -> bool:
    """Whether a computer algebra system would try to expand huge exponents, factorials or powers of powers.

    Only a short cut for obvious cases; the real protection is the worker's time limit.
    """
    if re.search(r"\^\{?\d{5,}|\d{5,}!|!!|\\uparrow|\d{60,}|\^\{[^{}]*\^\{[^{}]*\^", s):
        return True
    inner = re.findall(r"\^\{[^{}]*?(\d+)\^\{?(\d+)", s)
    return any(len(base) * int(exponent) > 20 for base, exponent in inner)


# ------------------------------------------------------------------------------------------------------------- workers


def worker() -> None:
    """Read [answer, reference, seconds] as JSON lines, write true or false; end when stdin does.

    Each comparison may use that many seconds of this process's CPU time: the kernel's profiling timer ends the process.
    """
    import ctypes
    import logging
    import resource
    import signal

    if sys.platform == "linux":  # no worker outlives the trainer, however that ends
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import sympy.physics.units  # noqa: F401  (passes strings to sympify during import)
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.parsing import sympy_parser

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    sys.setrecursionlimit(3000)
    logging.disable(logging.CRITICAL)
    sympy_parser.parse_expr = _only_numbers(sympy_parser.parse_expr)
    try:
        sympy.sympify("x")
    except ValueError:  # as it must
        pass
    else:
        raise RuntimeError("This version of sympy does not evaluate strings by sympy_parser.parse_expr.")
    config = [LatexExtractionConfig()]
    out = sys.stdout
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        answer, reference, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))  # SIGPROF is not handled: it ends the process
        try:
            ours, theirs = (
                parse(f"${x.strip().strip('$')}$", extraction_config=config, parsing_timeout=0)
                for x in (answer, reference)
            )
            ok = bool(ours and theirs) and not isinstance(ours[0], str) and not isinstance(theirs[0], str)
            ok = ok and verify(theirs[0], ours[0], timeout_seconds=None, allow_set_relation_comp=True)
            ok = ok and _endless(ours) == _endless(theirs) and not _undefined(ours) and not _undefined(theirs)
            ok = ok and not _apart(ours[0], theirs[0], "." in answer or "." in reference)
        except (Exception, RecursionError):  # anything that a parser raises: the answer is wrong
            ok = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(ok)), file=out, flush=True)


def _endless(parsed: list) -> bool:
    """Whether a parsed number is infinite: math-verify's tolerance equates it with any other number."""
    import sympy

    return any(isinstance(x, sympy.Expr) and x.has(sympy.oo, -sympy.oo) for x in parsed)


def _undefined(parsed: list) -> bool:
    """Whether a parsed number has no value, before or after evaluation: two of them are not equal."""
    import sympy

    without = (sympy.zoo, sympy.nan)
    return any(isinstance(x, sympy.Expr) and (x.has(*without) or x.doit().has(*without)) for x in parsed)


def _apart(a: object, b: object, rounded: bool) -> bool:
    """Whether numbers that math-verify's rounding equates differ: in the 6th digit, exact ones in the 30th."""
    import sympy

    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or a.free_symbols or b.free_symbols:
        return False
    x, y = (sympy.N(v, 60) for v in (a, b))
    if not (x.is_number and y.is_number) or not (x.is_finite and y.is_finite):
        return False
    return bool(abs(x - y) > max(abs(x), abs(y)) * sympy.Float(10, 60) ** (-6 if rounded else -30))


def _only_numbers(parse_expr: Callable) -> Callable:
    """Restrict sympy's string parser, which is `eval`, to numbers and closed forms of numbers."""
    safe = re.compile(r"(?:[\d\s.+\-*/()]|sqrt|exp|log|pi|[eE])*", re.ASCII)

    def parse(text: str, *args, **kwargs):
        if not safe.fullmatch(text):
            raise ValueError(f"{text[:50]!r} is not a number.")
        return parse_expr(text, *args, **kwargs)

    return parse


class _Worker:
    """One process that checks answers; killed and restarted if it stalls or dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, answer: str, reference: str, timeout_s: float) -> bool:
        if self.process is not None and self.process.poll() is not None:
            self.kill()  # died between two answers, not because of this one
        process = self.process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write((json.dumps([answer, reference, timeout_s]) + "\n").encode())
            process.stdin.flush()
            line = self._line(WALL_FACTOR * timeout_s)
        except (BrokenPipeError, OSError):
            line = ""
        if not line:
            self.kill()
        return line == "true"

    def _start(self) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from lead_fast.reward.verifier import worker; worker()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,  # only the trainer handles Ctrl-C in the terminal
        )
        ready = self._line(600.0) == "ready"
        if ready:
            assert self.process.stdin
            self.process.stdin.write(b'["x+1", "1+x", 60]\n')
            self.process.stdin.flush()
            ready = self._line(600.0) == "true"
        if not ready:  # otherwise every answer would count as wrong, and nobody would know why
            self.kill()
            raise RuntimeError("The answer checker does not start: are math-verify and sympy installed as pinned?")
        return self.process

    def _line(self, timeout_s: float) -> str:
        assert self.process and self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        return self.process.stdout.readline().decode().strip() if ready else ""

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe:
                    try:
                        pipe.close()
                    except OSError:  # unwritten data for a dead process
                        pass
            self.process = None


class Verifier:
    """Check answers; a context manager, so that no process is left behind.

    Args:
        timeout_s: limit on the worker's CPU time for one answer, in seconds; beyond it the answer is wrong and the
            worker is replaced. Ten times as long by the clock also ends it.
    """

    def __init__(self, timeout_s: float = 5.0):
        self.timeout_s = timeout_s
        self.worker = _Worker()
        self.seen: dict[tuple[str, str], bool] = {}
        self.timed_out: set[str] = set()
        self.kills = 0

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.worker.kill()

    def grade(self, pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
        """Whether each extracted answer equals its reference; a missing answer is wrong."""
        return [answer is not None and self._equal(answer, reference) for answer, reference in pairs]

    def same(self, answer: str, other: str) -> bool:
        """Whether two wrong answers are the same, for votes. One that timed out before equals no other."""
        return not {answer, other} & self.timed_out and self._equal(answer, other)

    def parses(self, answer: str) -> bool:
        """Whether a reference can be graded against: a rule reads it, or math-verify finds it equal to itself."""
        if len(answer) > MAX_ANSWER_CHARS or _unbalanced(answer):
            return False  # math-verify would compare unbalanced text as plain text
        try:
            if readings(answer, False):
                return True
        except (Unread, RecursionError):
            return False
        return self.worker.ask(answer, answer, self.timeout_s)

    def _equal(self, answer: str, reference: str) -> bool:
        verdict = quick(answer, reference)
        if verdict is not None:
            return verdict
        key = answer, reference
        if key not in self.seen:
            if len(self.seen) > 100_000:
                self.seen.clear()
            self.seen[key] = self.worker.ask(*key, self.timeout_s)
            if self.worker.process is None:
                self.kills += 1
                self.timed_out.add(answer)
        return self.seen[key]
