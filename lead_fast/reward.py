"""From a response's text to right or wrong: the last \\boxed{}, checked in processes that may be killed.

What is compared: the last boxed answer of the graded text with the reference. Equal after normalisation is right
(dollar signs, spaces, \\left and \\right, \\dfrac, thousands commas, units in \\text{}, degree signs are dropped); two
plain integers that differ are wrong; all else goes to math-verify in a worker process with a time limit, and what
stalls, crashes or is absurdly long is wrong. Only LaTeX parsing is used: nothing in an answer is ever run as code.
"""

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from .schema import Response, Score

MAX_ANSWER_CHARS = 1000


# --------------------------------------------------------------------------------------------------------- extraction


def graded_text(text: str, where: str = "all") -> str:
    """The part of a response that is graded, seen from `</think>`: all, before_think, after_think.

    Without `</think>`, `after_think` leaves nothing and the others everything.
    """
    if where == "all":
        return text
    before, mark, after = text.partition("</think>")
    return before if where == "before_think" else after if mark else ""


def extract_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox{...} (or `\\boxed 7`), braces balanced; None if there is none."""
    at = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if at < 0:
        return None
    rest = text[at + (6 if text.startswith("\\boxed", at) else 5) :]
    body = rest.lstrip()
    if not body.startswith("{"):
        word = re.match(r"\s+([^\s$]+)", rest)
        return word.group(1) if word else None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", body, re.S):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0 and brace.group() == "}":
            return body[1 : brace.start()].strip()
    return None


# --------------------------------------------------------------------------------------------------------- repetition


def is_degenerate(text: str, *, max_ngram: int = 30, repeats: int = 10, longest_word: int = 120) -> bool:
    """Some n-gram of 1..max_ngram words stands `repeats` times in a row, or a word has `longest_word` characters.

    (The released code's test, lead.md section 2.) A run of r copies of an n-gram is a stretch of n (r - 1) words that
    equal the word n places before: linear in the text for each n.
    """
    words = text.split()
    if any(len(w) >= longest_word for w in words):
        return True
    ids = {w: i for i, w in enumerate(dict.fromkeys(words))}
    row = [ids[w] for w in words]
    for n in range(1, max_ngram + 1):
        need, run = n * (repeats - 1), 0
        if len(row) < n * repeats:
            break
        for a, b in zip(row, row[n:], strict=False):
            run = run + 1 if a == b else 0
            if run >= need:
                return True
    return False


def soft_overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """0 up to max_tokens - buffer tokens, then linearly down to -1 at max_tokens (DAPO, soft overlong punishment)."""
    return -min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))


# --------------------------------------------------------------------------------------------------------- comparison

_DROP = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\\?\$|~|\\displaystyle|\\limits")
_UNIT = re.compile(
    r"(?<=[\d}])\s*(?:\\text|\\mathrm|\\mbox|\\textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$|\^\{?\\circ\}?|°|\\degree"
)
_WHOLE_TEXT = re.compile(r"^(?:\\text|\\mathrm|\\mbox|\\textbf|\\mathbf)\s*\{([^{}]*)\}$")
_MIXED = re.compile(r"^(-?)(\d+)\s*(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|\s(\d+)/(\d+))$")
_INTEGER = re.compile(r"^[+-]?\d+$")


def normalize(answer: str) -> str:
    """One spelling for what mathematicians write in several."""
    s = "".join(c for c in answer if c.isprintable() or c in "\n\t").strip()
    s = _DROP.sub("", s).replace("−", "-").replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac")
    s = s.replace("\\%", "%").replace("\\cdot", "\\times") if "\\cdots" not in s else s.replace("\\%", "%")
    s = s.strip().rstrip(".").strip()
    if m := _WHOLE_TEXT.match(s):
        s = m.group(1).strip()
    s = _UNIT.sub("", s).strip()
    if m := re.match(r"^[a-zA-Z]\s*=\s*([^=]+)$", s):
        s = m.group(1)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", s)
    if m := _MIXED.match(s):
        sign, whole, a, b, c, d = m.groups()
        top, bottom = int(a or c), int(b or d)
        s = f"{sign}\\frac{{{int(whole) * bottom + top}}}{{{bottom}}}"
    s = (
        re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", s)
        if re.match(r"^[-+]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?%?$", s)
        else s
    )
    return re.sub(r"\s+", "", s)


def quick(answer: str, gold: str) -> bool | None:
    """Right or wrong where a glance tells, else None."""
    if len(answer) > MAX_ANSWER_CHARS:
        return False
    a, b = normalize(answer), normalize(gold)
    if not a:
        return False
    if a == b or a.lower() == b.lower() and a.isalpha():
        return True
    if _INTEGER.match(a) and _INTEGER.match(b):
        return int(a) == int(b)
    if _tower(a):
        return False
    return None


def _tower(s: str) -> bool:
    """Powers of powers and huge exponents or factorials, which a computer algebra system would try to write out."""
    return bool(re.search(r"\^\{?[^{}]*\^|\^\{?\d{4,}|\d{4,}!|!!|\\uparrow|\d{60,}", s))


# ------------------------------------------------------------------------------------------------------------- workers


def worker() -> None:
    """Reads [answer, gold] as JSON lines, writes true or false. Runs in a process of its own; ends when stdin does."""
    import ctypes
    import logging
    import resource
    import signal

    if sys.platform == "linux":  # however the trainer ends, no worker outlives it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    sys.setrecursionlimit(3000)
    logging.disable(logging.CRITICAL)
    config = [LatexExtractionConfig()]
    out = sys.stdout
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        answer, gold = json.loads(line)
        try:
            ours, theirs = (
                parse(f"${normalize(x)}$", extraction_config=config, parsing_timeout=0) for x in (answer, gold)
            )
            ok = bool(ours and theirs) and verify(theirs, ours, timeout_seconds=None)
        except (Exception, RecursionError):  # whatever a parser raises on an answer: the answer is wrong
            ok = False
        print(json.dumps(bool(ok)), file=out, flush=True)


class _Worker:
    """One process that checks answers; killed and started again when it stalls or dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, answer: str, gold: str, timeout_s: float) -> bool:
        if self.process is None:
            self.process = self._start()
        process = self.process
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
            [sys.executable, "-c", "from lead_fast.reward import worker; worker()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
        )
        if self._line(120.0) != "ready":
            self.kill()
            raise RuntimeError("The answer checker did not start: is the package math-verify installed?")
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
        self.kills = 0

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.worker.kill()

    def grade(self, pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
        """Whether each (extracted answer, reference) agrees; no answer is wrong."""
        return [answer is not None and self._equal(answer, gold) for answer, gold in pairs]

    def _equal(self, answer: str, gold: str) -> bool:
        told = quick(answer, gold)
        if told is not None:
            return told
        key = (answer, gold)
        if key not in self.seen:
            if len(self.seen) > 100_000:
                self.seen.clear()
            self.seen[key] = self.worker.ask(answer, gold, self.timeout_s)
            self.kills += self.worker.process is None
        return self.seen[key]


def score(
    responses: Sequence[Response],
    answers: Sequence[str],
    verifier: Verifier,
    *,
    where: str = "all",
    degenerate: bool = False,
) -> list[Score]:
    """Grades responses against reference answers, one each; looks for repetition only if `degenerate`."""
    extracted = [extract_boxed(graded_text(r.text, where)) for r in responses]
    correct = verifier.grade(list(zip(extracted, answers, strict=True)))
    return [
        Score(ok, found, r.truncated, degenerate and is_degenerate(r.text))
        for r, ok, found in zip(responses, correct, extracted, strict=True)
    ]
