"""Whether an answer equals a reference, checked in processes that may be killed.

Equal after normalisation is right; two plain integers that differ are wrong; all else goes to math-verify in a worker
process with a time limit, and what stalls, crashes or is absurdly long is wrong. What is decided here and not by
math-verify:

- Dropped: dollar signs, \\left, \\right, \\displaystyle, thousands separators of a whole number, degree signs (in
  trigonometric functions they become radians), a leading \\approx, a unit in \\text{} behind a number. Words that
  change the number (`or`, `million`, anything with a digit) are no unit, and 5 km is not 5 m.
- 50% is 50 as well as 0.5; x = 5 is 5; the last member of a chain of equalities counts; an interval may be written as
  an inequality; a set is no tuple; the case of words does not matter, that of single letters is left to math-verify.
- A decimal equals what it agrees with to six places (math-verify's rule): 0.333333 is 1/3 and 0.33 is not. Numbers
  with a power of ten, and tiny ones, must agree to one part in a million: 2e-18 is not 2e-17.
- A unit in plain text behind a number is dropped too (3 dollars, 9.6 m/s); a unit's symbol only where the other
  side is a plain number, for 5 m may be a product. Where the reference is a choice's letter, the first letter tells.

sympy evaluates text with Python's `eval` wherever it is handed a string, and latex2sympy hands it number tokens; the
worker lets numbers and sympy's own closed forms through and refuses all else, so nothing in an answer is run as code.
"""

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from types import TracebackType

from .extraction import MAX_ANSWER_CHARS

# --------------------------------------------------------------------------------------------------------- comparison


_SPELLING = str.maketrans({"−": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ",
    "√": "\\sqrt ", "²": "^2", "³": "^3", "½": "\\frac12", "¼": "\\frac14", "¾": "\\frac34", "≤": "\\le ", "≥": "\\ge ",
    "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "°": "^\\circ "})  # fmt: skip
_DROP = re.compile(
    r"\\(?:left|right)(?![a-z])\.?|(?<!\\)\\!|\\?\$|\\(?:displaystyle|limits)(?![a-z])|^\s*(?:\\approx|≈)"
)
_SPACE = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])")
_UNIT = re.compile(
    r"(?<=[\d}a-z])\s*\\(?:text|mathrm|mbox|textrm)\s*\{((?:[^{}\d,;=<>\\]|\^-?\d)*)\}((?:\^\{?-?\d\}?)?)$"
)
_WORDS = re.compile(r"\\(?:text|mathrm|mbox|textrm)\{[^{}]*\}$")
_NO_UNIT = re.compile(
    r"(?i)\b(?:or|and|not|to|than|if|when|for|mod|base|over|times|plus|minus|half|pi|dozen|\w*(?:hundred|thousand|illion))\b"
)
_UNITS = frozenset("mm cm dm m km in ft yd mi mg g kg lb oz ms s sec min h hr hours minutes seconds days ml l".split())
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)?\s*(?:\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])|\\degree(?![a-z]))")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_PLAIN_UNIT = re.compile(
    r"(?<=[\d}])(?:\s|\\,|~)*(dollars?|cents?|degrees?|units?|miles?|meters?|metres?|feet|foot|inch(?:es)?|hours?"
    r"|minutes?|seconds?|days?|weeks?|months?|years?|(?:square|cubic) [a-z]+"
    r"|(?:[kcmdnu]?m|[km]?g|s|h|[kM]?J|N|[kM]?W|[kMG]?Hz|[kMG]?eV"
    r"|K|Pa|V|A|C|mol|erg|ft|in)(?:/[a-z]+)?)(\^\{?-?\d\}?)?$"
)
_PERCENT = re.compile(r"(?<=\d)\s*(?:percent|\\(?:text|mathrm|mbox)\{\s*percent\s*\})$")
_NUMBER = re.compile(r"^([-+]?\d{1,30}(?:\.\d{1,30})?|[-+]?\.\d{1,30})(?:\\times10\^\{?(-?\d{1,3})\}?)?$", re.ASCII)
_CHOICE = re.compile(r"^\(?([A-E])\)?$")
_CHOSEN = re.compile(r"^(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*(?:\(([A-E])\)|([A-E])(?=[).:}]))")
_EULER = re.compile(r"(?<![a-zA-Z])e\^\{((?:[^{}]|\{[^{}]*\})*)\}")
_IMAGINARY = re.compile(r"(?<![a-zA-Z])i(?![a-zA-Z])")
_WHOLE_TEXT = re.compile(r"^\\(?:text|textit|textrm|mathrm|mbox|textbf|mathbf|boldsymbol)\s*\{([^{}]*)\}$")
_MIXED = re.compile(r"^(-?)(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|\s(\d+)/(\d+))$")
_RECURRING = re.compile(r"^(-?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{?(\d+)\}?$")
_THOUSANDS = re.compile(r"^[-+]?\d{1,3}(?:(?:,|\{,\}|\s)\d{3})+(?:\.\d+)?(?:\\?%)?$")
_INTEGER = re.compile(r"^[+-]?\d+$", re.ASCII)
_BASE = re.compile(r"^(\d+)_\{?(\d+)\}?$", re.ASCII)


def normalize(answer: str) -> str:
    """One spelling for what mathematicians write in several; spaces stay only where they part two words or numbers."""
    return _normalize(answer)[0]


def _normalize(answer: str) -> tuple[str, str]:
    """The answer in one spelling, and the unit that was dropped from it."""
    s = "".join(c for c in answer.translate(_SPELLING) if c.isprintable() or c in "\n\t")
    s = _SPACE.sub(" ", _DROP.sub("", s)).strip().removesuffix(".").strip()
    s = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", s).replace("\\%", "%").replace("\\varnothing", "\\emptyset")
    s = re.sub(r"\\(?:text|mathrm|mbox)\{\s*(?:or|and)\s*\}", ",", s)
    s = re.sub(r"\\cdot(?![a-z])", r"\\times", s)
    if m := _WHOLE_TEXT.match(s):
        s = m.group(1).strip()
    s = _DEGREES.sub(r"(\\frac{\1\\pi}{180})" if _TRIGONOMETRIC.search(s) else r"\1", s).strip()
    s = _EULER.sub(_euler, s)
    unit = ""
    if (m := _UNIT.search(s)) and not _NO_UNIT.search(m.group(1)):
        s, unit = s[: m.start()].strip(), "".join(m.groups()).replace(" ", "").strip(".").lower()
    if m := re.match(r"^[a-zA-Z]\s*=\s*([^=]+)$", s):
        s = m.group(1)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", s)
    if m := _MIXED.match(s):
        sign, whole, a, b, c, d = m.groups()
        top, bottom = int(a or c), int(b or d)
        s = f"{sign}\\frac{{{int(whole) * bottom + top}}}{{{bottom}}}"
    if m := _RECURRING.match(s):  # 0.1(6) = (16 - 1) / 90
        sign, whole, start, cycle = m.groups()
        top = int(whole + start + cycle) - int(whole + start or "0")
        s = f"{sign}\\frac{{{top}}}{{{'9' * len(cycle) + '0' * len(start)}}}"
    if m := re.match(r"^([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)$", s):
        s = f"{m.group(1)}\\times10^{{{m.group(2)}}}"
    if _THOUSANDS.match(s):
        s = re.sub(r",|\{,\}|\s", "", s)
    s = re.sub(r"\s+", " ", s)
    return re.sub(r"(?<![\da-zA-Z]) | (?![\da-zA-Z])|(?<=\d) (?=[a-zA-Z])|(?<=[a-zA-Z]) (?=\d)", "", s), unit


def _euler(m: re.Match) -> str:
    """e^{i x} in cosine and sine where x is a closed form of numbers: math-verify takes i and e for letters."""
    exponent, found = _IMAGINARY.subn("", m.group(1))
    exponent = exponent.strip().replace("{}", "{1}")
    exponent += "1" * (exponent in ("", "-"))
    if found != 1 or not re.fullmatch(r"(?:[\d(){}/\s-]|\\pi|\\frac|\\times)*", exponent):
        return m.group()
    return f"(\\cos({exponent})+i\\sin({exponent}))"


def plain_units(answer: str, other: str) -> str:
    """The answer with a unit in plain text behind its number set as \\text{...}, which comparison knows."""
    s = _PERCENT.sub("%", answer.strip().strip("$").removesuffix(".").strip())
    if not (m := _PLAIN_UNIT.search(s)):
        return s if s.endswith("%") else answer
    if len(m.group(1)) < 4 and not _NUMBER.match(normalize(other)):
        return answer
    return f"{s[: m.start()]}\\text{{ {m.group(1)}}}{m.group(2) or ''}"


def _numbers(a: str, b: str) -> bool | None:
    """Two decimals, where their size or a percent sign is beyond math-verify's six places; else None."""
    x, y = (_NUMBER.match(s.removesuffix("%")) for s in (a, b))
    if not x or not y:
        return None
    one, two = (Decimal(m.group(1)).scaleb(int(m.group(2) or 0)) for m in (x, y))
    near = abs(one - two) <= Decimal("1e-6") * max(abs(one), abs(two))
    if a.endswith("%") or b.endswith("%"):
        return True if near else None
    tiny = 0 < max(abs(one), abs(two)) < Decimal("1e-3")
    return near if tiny or x.group(2) or y.group(2) else None


def quick(answer: str, gold: str) -> bool | None:
    """Right or wrong where a glance tells, else None."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    if m := _CHOICE.match(normalize(gold)):
        if chosen := _CHOSEN.match(answer.strip().strip("$")):
            return (chosen.group(1) or chosen.group(2)) == m.group(1)
    answer, gold = plain_units(answer, gold), plain_units(gold, answer)
    (a, unit_a), (b, unit_b) = _normalize(answer), _normalize(gold)
    if not a or (unit_a != unit_b and {unit_a, unit_b} <= _UNITS):
        return False
    if a == b or (a.lower() == b.lower() and len(a) > 1 and a.replace(" ", "").isalpha()):
        return True
    if _INTEGER.match(a) and _INTEGER.match(b):
        return int(a) == int(b)
    if (near := _numbers(a, b)) is not None:
        return near
    if (m := _BASE.match(a)) and (n := _BASE.match(b)) and m.group(2) != n.group(2):
        return False
    if {_bracket(a), _bracket(b)} == {"set", "tuple"}:
        return False
    if any(map(str.isdigit, a)) and bool(_WORDS.search(a)) != bool(_WORDS.search(b)):
        return False  # words that are no unit: math-verify would drop them and take `5 million` for 5
    return False if _tower(a) else None


def _bracket(s: str) -> str:
    """`set` for \\{1,2\\}, `tuple` for (1,2) or [1,2], where the brackets hold numbers only."""
    listed = re.match(r"^(\\\{|[(\[])[-\d.,/\s]*,[-\d.,/\s]*(?:\\\}|[)\]])$", s)
    return "" if not listed else "set" if listed.group(1) == "\\{" else "tuple"


def _tower(s: str) -> bool:
    """What a computer algebra system would try to write out: huge exponents and factorials, powers of powers.

    Only a short cut for the obvious; the time limit of the worker is the guard.
    """
    if re.search(r"\^\{?\d{5,}|\d{5,}!|!!|\\uparrow|\d{60,}|\^\{[^{}]*\^\{[^{}]*\^", s):
        return True
    inner = re.findall(r"\^\{[^{}]*?(\d+)\^\{?(\d+)", s)
    return any(len(base) * int(exponent) > 20 for base, exponent in inner)


# ------------------------------------------------------------------------------------------------------------- workers


def worker() -> None:
    """Reads [answer, gold] as JSON lines, writes true or false. Runs in a process of its own; ends when stdin does."""
    import ctypes
    import logging
    import resource
    import signal

    if sys.platform == "linux":  # however the trainer ends, no worker outlives it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    import sympy.physics.units  # noqa: F401  (hands strings to sympify while it is imported)
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
        raise RuntimeError("This sympy evaluates strings by another way than sympy_parser.parse_expr.")
    config = [LatexExtractionConfig()]
    out = sys.stdout
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        try:
            ours, theirs = (
                parse(f"${normalize(x)}$", extraction_config=config, parsing_timeout=0) for x in (answer, gold)
            )
            ok = bool(ours and theirs) and not (_endless(ours) and not _endless(theirs))
            ok = ok and verify(theirs, ours, timeout_seconds=None, allow_set_relation_comp=True)
        except (Exception, RecursionError):  # whatever a parser raises on an answer: the answer is wrong
            ok = False
        print(json.dumps(bool(ok)), file=out, flush=True)


def _endless(parsed: list) -> bool:
    """A number without bound or value among what was parsed: math-verify's tolerance takes it for any other number."""
    import sympy

    without = (sympy.oo, -sympy.oo, sympy.zoo, sympy.nan)
    return any(isinstance(x, sympy.Expr) and x.has(*without) for x in parsed)


def _only_numbers(parse_expr: Callable) -> Callable:
    """sympy's string parser, which is `eval`, for numbers and closed forms of numbers; all else is refused."""
    safe = re.compile(r"(?:[\d\s.+\-*/()]|sqrt|exp|log|pi|[eE])*", re.ASCII)

    def parse(text: str, *args, **kwargs):
        if not safe.fullmatch(text):
            raise ValueError(f"{text[:50]!r} is no number.")
        return parse_expr(text, *args, **kwargs)

    return parse


class _Worker:
    """One process that checks answers; killed and started again when it stalls or dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, answer: str, gold: str, timeout_s: float) -> bool:
        if self.process is not None and self.process.poll() is not None:
            self.kill()  # died between two answers: not this one's fault
        process = self.process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write((json.dumps([answer, gold]) + "\n").encode())
            process.stdin.flush()
            line = self._line(timeout_s)
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
            start_new_session=True,  # Ctrl-C in the terminal is the trainer's to answer
        )
        ready = self._line(120.0) == "ready"
        if ready:
            assert self.process.stdin
            self.process.stdin.write(b'["x+1", "1+x"]\n')
            self.process.stdin.flush()
            ready = self._line(60.0) == "true"
        if not ready:  # or every answer would be wrong, and nobody would know why
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
                    except OSError:  # what was not yet written to a dead process
                        pass
            self.process = None


class Verifier:
    """Checks answers; a context manager, so that no process is left behind.

    Args:
        timeout_s: wall-clock limit for one answer, seconds; past it the answer is wrong and the worker is replaced.
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
        """Whether each (extracted answer, reference) agrees; no answer is wrong."""
        return [answer is not None and self._equal(answer, gold) for answer, gold in pairs]

    def same(self, answer: str, other: str) -> bool:
        """Whether two answers, both wrong, are one: for votes. One that timed out before is like no other."""
        return not {answer, other} & self.timed_out and self._equal(answer, other)

    def parses(self, answer: str) -> bool:
        """Whether a reference can be graded against: a whole number, or math-verify finds it equal to itself."""
        if _INTEGER.match(normalize(answer)):
            return True
        balanced = answer.count("{") == answer.count("}")  # math-verify would compare what is not as plain text
        return balanced and len(answer) <= MAX_ANSWER_CHARS and self.worker.ask(answer, answer, self.timeout_s)

    def _equal(self, answer: str, gold: str) -> bool:
        told = quick(answer, gold)
        if told is not None:
            return told
        key = plain_units(answer, gold), plain_units(gold, answer)
        if key not in self.seen:
            if len(self.seen) > 100_000:
                self.seen.clear()
            self.seen[key] = self.worker.ask(*key, self.timeout_s)
            if self.worker.process is None:
                self.kills += 1
                self.timed_out.add(answer)
        return self.seen[key]
