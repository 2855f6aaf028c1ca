"""Test extraction, repetition and the table of answers, and the checker's processes, which are killed and replaced."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_fast.cli import load_config
from lead_fast.records import Problem, Response
from lead_fast.reward.extraction import extract_boxed, graded_text, is_degenerate
from lead_fast.reward.grading import grade, score
from lead_fast.reward.terms import soft_overlong_penalty, wrong_reward
from lead_fast.reward.verifier import Verifier, _only_numbers, quick

pytestmark = pytest.mark.quick

SUM = (r"\sum_{k=1}^{3} k", "6")  # no rule decides a sum, so the worker is asked
STALL = (r"\sum_{k=1}^{2020}\frac{1}{\sqrt{k}}", "5")  # which computes for minutes

# response, reference, right or wrong
TABLE = [
    (r"\boxed{∞∞}", "98712.31", False),
    (r"\boxed{\infty}", "7", False),
    (r"\boxed{\infty}", r"\infty", True),
    (r"\boxed{(3, \infty)}", "x > 3", True),
    # none, several, nested, unclosed
    (r"The answer is 5", "5", False),
    (r"\boxed{5}", "5", True),
    (r"\boxed{4} no, \boxed{5}", "5", True),
    (r"\boxed{5} no, \boxed{4}", "5", False),
    (r"\boxed{\boxed{5}}", "5", True),
    (r"\fbox{5}", "5", True),
    (r"\boxed 5", "5", True),
    (r"\boxed{5", "5", False),
    (r"\boxed{}", "5", False),
    (r"\boxed{\text{}}", "5", False),
    (r"boxed{5}", "5", False),
    (r"\boxed{ 5 }", "5", True),
    (r"$\boxed{5}$.", "5", True),
    (r"\boxed{5.}", "5", True),
    # integers
    (r"\boxed{-5}", "5", False),
    (r"\boxed{-5}", "-5", True),
    (r"\boxed{−5}", "-5", True),
    (r"\boxed{05}", "5", True),
    (r"\boxed{+5}", "5", True),
    (r"\boxed{50}", "5", False),
    (r"\boxed{1,000}", "1000", True),
    (r"\boxed{1{,}000}", "1000", True),
    (r"\boxed{1\,000}", "1000", True),
    (r"\boxed{1,000,000}", "1000000", True),
    (r"\boxed{x=5}", "5", True),
    (r"\boxed{n = 5}", "5", True),
    # decimals and fractions
    (r"\boxed{0.5}", r"\frac{1}{2}", True),
    (r"\boxed{.5}", "0.5", True),
    (r"\boxed{0.50}", "0.5", True),
    (r"\boxed{0.5}", "0.51", False),
    (r"\boxed{\frac{1}{2}}", r"\frac12", True),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", True),
    (r"\boxed{\tfrac{1}{2}}", r"\frac{1}{2}", True),
    (r"\boxed{1/2}", r"\frac{1}{2}", True),
    (r"\boxed{2/4}", r"\frac{1}{2}", True),
    (r"\boxed{\frac{2}{1}}", "2", True),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}", True),
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", False),
    (r"\boxed{2\frac{1}{2}}", r"\frac{5}{2}", True),
    (r"\boxed{2 1/2}", "2.5", True),
    (r"\boxed{2\frac{1}{2}}", "1", False),
    # roots, powers, constants, expressions
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
    (r"\boxed{\sqrt{2}}", r"\sqrt{3}", False),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", True),
    (r"\boxed{2^{10}}", "1024", True),
    (r"\boxed{2\pi}", r"\pi \cdot 2", True),
    (r"\boxed{\pi}", "3.14", False),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", True),
    (r"\boxed{x+1}", "1+x", True),
    (r"\boxed{x+1}", "x-1", False),
    (r"\boxed{\frac{x}{2}}", "0.5x", True),
    (r"\boxed{10!}", "3628800", True),
    (r"\boxed{\binom{5}{2}}", "10", True),
    (r"\boxed{\log_2 8}", "3", True),
    # units, percent, degrees, money, text
    (r"\boxed{5 \text{ cm}}", "5", True),
    (r"\boxed{5\,\text{cm}^2}", "5", True),
    (r"\boxed{5\mathrm{ m}}", "5", True),
    (r"\boxed{90^\circ}", "90", True),
    (r"\boxed{90^{\circ}}", "90", True),
    (r"\boxed{50\%}", "50", True),
    (r"\boxed{50\%}", r"50\%", True),
    (r"\boxed{\$5}", "5", True),
    (r"\boxed{\text{A}}", "A", True),
    (r"\boxed{\textbf{B}}", "B", True),
    (r"\boxed{A}", "B", False),
    (r"\boxed{\text{Monday}}", "monday", True),
    # tuples, sets, intervals, relations
    (r"\boxed{(1,2)}", "(1, 2)", True),
    (r"\boxed{\left(1, 2\right)}", "(1,2)", True),
    (r"\boxed{(2,1)}", "(1,2)", False),
    (r"\boxed{\{1,2,3\}}", r"\{3,2,1\}", True),
    (r"\boxed{\{1,2\}}", r"\{1,2,3\}", False),
    (r"\boxed{1, 2, 3}", "1,2,3", True),
    (r"\boxed{[0,1]}", r"\left[0,1\right]", True),
    (r"\boxed{(0,1]}", "[0,1]", False),
    (r"\boxed{[0,\infty)}", r"[0, \infty)", True),
    (r"\boxed{(-\infty,0)\cup(1,\infty)}", r"(1,\infty)\cup(-\infty,0)", True),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    # adjacent powers are not a tower
    (r"\boxed{x^2+y^2}", "y^2+x^2", True),
    (r"\boxed{x^4+2x^2+1}", "(x^2+1)^2", True),
    (r"\boxed{2^3\cdot 3^2}", "72", True),
    (r"\boxed{2^{2023}-1}", "-1+2^{2023}", True),
    (r"\boxed{2^{2^3}}", "256", True),
    (r"\boxed{e^{-x^2}}", r"\frac{1}{e^{x^2}}", True),
    (r"\boxed{2024!}", r"2024\cdot 2023!", True),
    # spaces part numbers and words
    (r"\boxed{1 2}", "12", False),
    (r"\boxed{1 2 3}", "123", False),
    (r"\boxed{1 000}", "1000", True),
    (r"\boxed{12,34}", "1234", False),
    (r"\boxed{2 \pi r}", r"2r\pi", True),
    (r"\boxed{x \ln 2}", r"\ln(2)x", True),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    (r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),
    # words that are not units
    (r"\boxed{5\text{ or 6}}", "5", False),
    (r"\boxed{5\text{ or }6}", "5", False),
    (r"\boxed{5\text{ or }6}", "5,6", True),
    (r"\boxed{5 \text{ million}}", "5", False),
    (r"\boxed{3\text{ dozen}}", "3", False),
    (r"\boxed{7\text{ is wrong, 8}}", "7", False),
    (r"\boxed{5\text{ km}}", r"5\text{ m}", False),
    (r"\boxed{9.8\text{ m/s^2}}", "9.8", True),
    (r"\boxed{16\pi\text{ cm}^2}", r"16\pi", True),
    # degrees, recurring decimals, exponents, number bases, signs of print
    (r"\boxed{\sin 30^\circ}", r"\frac12", True),
    (r"\boxed{\sin(30)}", r"\sin(30^\circ)", False),
    (r"\boxed{0.\overline{3}}", r"\frac13", True),
    (r"\boxed{0.1\overline{6}}", r"\frac16", True),
    (r"\boxed{0.333333}", r"\frac13", True),
    (r"\boxed{0.33}", r"\frac13", False),
    (r"\boxed{1e3}", "1000", True),
    (r"\boxed{101_2}", "101_3", False),
    (r"\boxed{½}", "0.5", True),
    (r"\boxed{√2}", r"\sqrt{2}", True),
    (r"\boxed{\approx 3.14}", "3.14", True),
    # brackets and inequalities
    (r"\boxed{\{1,2\}}", "(1,2)", False),
    (r"\boxed{(1,2)}", r"\{1,2\}", False),
    (r"\boxed{x > 2}", r"(2,\infty)", True),
    (r"\boxed{x\ge 2}", r"(2,\infty)", False),
    (r"\boxed{\emptyset}", r"\varnothing", True),
    # an empty \boxed does not hide one that has content
    (r"\boxed{5}, as \boxed shows", "5", True),
    # must not be judged right
    (r"\boxed{5 or 6}", "5", False),
    (r"\boxed{?}", "5", False),
    (r"\boxed{\text{no answer}}", "5", False),
    (r"\boxed{__import__('os').system('true')}", "0", False),
    (r"\boxed{9^{9^{9^{9}}}}", "5", False),
    (r"\boxed{10^{1000000}}", "5", False),
    (r"\boxed{1\times10^{999}}", "5", False),
    (r"\boxed{1e400}", "2.5", False),
    (r"\boxed{1e-400}", "0.0001", False),
    (r"\boxed{3.0e400}", r"3 \times 10^{400}", True),
]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(timeout_s=20.0) as v:
        yield v


@pytest.mark.parametrize("response, gold, right", TABLE, ids=[f"{r} | {g}" for r, g, _ in TABLE])
def test_reward_table(verifier, response, gold, right):
    assert verifier.grade([(extract_boxed(response), gold)]) == [right]


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60 and sum(right for *_, right in TABLE) < len(TABLE)


def test_graded_text_around_think():
    text = r"\boxed{1}</think>\boxed{2}"
    assert [extract_boxed(graded_text(text, w)) for w in ("all", "before_think", "after_think")] == ["2", "1", "2"]
    assert graded_text("abc", "before_think") == "" and graded_text("abc", "after_think") == ""


@pytest.mark.parametrize("where", ["before_think", "after_think"])
def test_a_response_that_never_ends_its_thinking_is_wrong_and_truncated(verifier, where):
    """As in the code released with arXiv 2504.09696: no reward without `</think>`, whatever was boxed before."""
    guess = r"so \boxed{7} " + "wait " * 60
    responses = [Response([1], [0.0], end, guess, 0) for end in ("length", "stop")]
    responses.append(Response([1], [0.0], "stop", r"\boxed{7}</think>\boxed{7}", 0))
    scores = score(responses, ["7"] * 3, verifier, where=where, degenerate=True)
    assert [(s.correct, s.truncated, s.degenerate) for s in scores] == [(False, True, True)] * 2 + [
        (True, False, False)
    ]
    official = load_config(["--preset=official"])
    assert [wrong_reward(s, official) for s in scores[:2]] == [-2.0, -2.0]


def test_a_long_formula_is_no_repetition_to_stage_two():
    formula = "$f(x)=" + "+".join(rf"\frac{{x^{{{n}}}}}{{{n}!}}" for n in range(1, 9)) + "$ and so on"
    assert max(map(len, formula.split())) >= 120
    assert is_degenerate(formula) and not is_degenerate(formula, longest_word=None)
    problem, response = Problem("1", "P", "7"), Response([1], [0.0], "stop", formula, 0)
    for key, value, expected in (("repetition", -1.5, False), ("degenerate", -2.0, True)):
        with Verifier() as v:
            samples = grade([problem], {0: [response]}, v, load_config([f"--reward.{key}={value}"]).reward)
        assert [s.score.degenerate for s in samples[0]] == [expected] and samples[0][0].response is response


def test_votes_do_not_wait_again_for_an_answer_that_timed_out():
    slow = STALL[0]
    with Verifier(timeout_s=0.5) as v:
        assert v.grade([STALL]) == [False] and v.kills == 1
        others = [rf"\sqrt{{{n}}}" for n in (2, 3, 5)]
        assert not any(v.same(slow, other) or v.same(other, slow) for other in others) and v.kills == 1
        assert v.same(r"\sqrt{8}", r"2\sqrt{2}") and not v.same(r"\sqrt{2}", r"\sqrt{3}")


def test_score_reports_truncation_and_repetition(verifier):
    responses = [Response([1], [0.0], "stop", r"\boxed{7}", 0), Response([1], [0.0], "length", "again " * 50, 0)]
    one, two = score(responses, ["7", "7"], verifier, degenerate=True)
    assert one.correct and not one.truncated and not one.degenerate and one.extracted == "7"
    assert not two.correct and two.truncated and two.degenerate and two.extracted is None


RESPONSES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "response_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("r", RESPONSES, ids=lambda r: r["response"][:40])
def test_the_answer_is_found_in_a_response(verifier, r):
    (s,) = score([Response([1], [0.0], "stop", r["response"], 0)], [r["reference"]], verifier)
    assert s.correct is r["correct"], s.extracted


def test_the_released_rule_cuts_chunks_from_the_start(verifier):
    """`official` counts like the released code: 10 copies of 30 words that start at the second word are 9 chunks."""
    shifted = "start " + " ".join(f"w{i % 30}" for i in range(300))
    assert is_degenerate(shifted) and not is_degenerate(shifted, from_start=True)
    aligned = shifted.removeprefix("start ")
    assert is_degenerate(aligned, from_start=True) and not is_degenerate(aligned[:-4], from_start=True)
    response = [Response([1], [0.0], "length", shifted, 0)]
    (released,) = score(response, ["7"], verifier, degenerate=True)
    (ours,) = score(response, ["7"], verifier, degenerate=True, longest_word=None)
    assert not released.degenerate and ours.degenerate


@given(st.lists(st.sampled_from("ab"), max_size=80), st.integers(2, 5))
@settings(max_examples=200, deadline=None)
def test_repetition_by_its_definition(words, repeats):
    text = " ".join(words)

    def copies(start: int, n: int) -> bool:
        return (
            len(words) >= start + n * repeats
            and words[start : start + n] * repeats == words[start : start + n * repeats]
        )

    lengths = range(1, 31)
    anywhere = any(copies(i, n) for n in lengths for i in range(len(words)))
    from_start = any(copies(i, n) for n in lengths for i in range(0, len(words), n))
    assert is_degenerate(text, repeats=repeats) == anywhere
    assert is_degenerate(text, repeats=repeats, from_start=True) == from_start


@pytest.mark.parametrize(
    "text, degenerate",
    [
        ("a " * 9, False),
        ("a " * 10, True),
        ("x y z " * 10, True),
        ("x y z " * 9, False),
        ("w" * 119, False),
        ("w" * 120, True),
        (" ".join(str(i) for i in range(5000)), False),
        ("start " + " ".join(f"w{i % 30}" for i in range(300)), True),
        (" ".join(f"w{i % 31}" for i in range(310)), False),
        ("", False),
    ],
)
def test_degenerate(text, degenerate):
    assert is_degenerate(text) is degenerate


def test_soft_overlong_penalty():
    assert [soft_overlong_penalty(n, 100, 20) for n in (0, 80, 90, 100, 120)] == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_the_rules_decide_most_and_need_no_worker():
    with Verifier() as v:
        assert v.grade([(r"\frac{2}{4}", "0.5"), ("x+1", "1+x"), ("(x+y+z+w)^{300}", "(1+x)^{99}+z")]) == [
            True,
            True,
            False,
        ]
        assert v.worker.process is None
        assert v.grade([SUM]) == [True] and v.worker.process is not None
    assert quick(*SUM) is None and quick(*STALL) is None


def test_a_stalled_worker_is_killed_and_replaced():
    with Verifier(timeout_s=20.0) as v:
        assert v.grade([SUM]) == [True]
        first = v.worker.process
        assert first is not None
        v.timeout_s = 0.3
        assert v.grade([STALL]) == [False] and first.poll() == -signal.SIGPROF and v.kills == 1
        v.timeout_s = 20.0
        assert v.grade([(r"\sum_{k=1}^{4} k", "10")]) == [True]
        second = v.worker.process
        assert second is not None and second.pid != first.pid
    assert second.poll() is not None


def test_a_worker_that_waits_for_its_turn_does_not_use_up_its_limit():
    """The limit is CPU time, so a worker that is paused for longer, as on a busy machine, still answers correctly."""
    with Verifier(timeout_s=20.0) as v:
        assert v.grade([SUM]) == [True]
        assert v.worker.process is not None
        v.timeout_s, pid = 0.5, v.worker.process.pid
        os.kill(pid, signal.SIGSTOP)
        timers = [threading.Timer(1.0, os.kill, (pid, signal.SIGCONT))]
        timers[0].start()
        assert v.grade([(r"\sum_{k=1}^{5} k", "15")]) == [True] and v.kills == 0
        v.timeout_s, began = 1.0, time.monotonic()
        timers += [
            threading.Timer(0.3, os.kill, (pid, signal.SIGSTOP)),
            threading.Timer(2.3, os.kill, (pid, signal.SIGCONT)),
        ]
        for timer in timers[1:]:
            timer.start()
        assert v.grade([STALL]) == [False] and v.kills == 1
        assert time.monotonic() - began > 2.7, "what it used before it was stopped and after is its limit"
        for timer in timers:
            timer.join()


def test_a_worker_that_sleeps_for_ever_is_stopped_by_the_clock(monkeypatch):
    monkeypatch.setattr("lead_fast.reward.verifier.WALL_FACTOR", 2)
    with Verifier(timeout_s=20.0) as v:
        assert v.grade([SUM]) == [True]
        assert v.worker.process is not None
        v.timeout_s = 0.5
        os.kill(v.worker.process.pid, signal.SIGSTOP)
        assert v.grade([(r"\sum_{k=1}^{5} k", "15")]) == [False] and v.kills == 1


def test_a_dead_worker_is_replaced():
    with Verifier(timeout_s=20.0) as v:
        v.grade([SUM])
        assert v.worker.process is not None
        v.worker.process.kill()
        v.worker.process.wait()
        assert v.grade([(r"\sum_{k=1}^{4} k", "10"), (r"\sum_{k=1}^{5} k", "15")]) == [True, True]


ORPHAN = """
import sys, threading, os, signal
from lead_fast.reward.verifier import Verifier
v = Verifier(timeout_s=20.0)
v.grade([(r"\\sum_{k=1}^{3} k", "6")])
print(v.worker.process.pid, flush=True)
v.timeout_s = 60.0
threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
v.grade([(r"\\sum_{k=1}^{2020}\\frac{1}{\\sqrt{k}}", "5")])
"""


def test_a_worker_that_computes_ends_after_its_parent_was_killed():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    worker, until = int(done.stdout), time.monotonic() + 15
    assert alive(worker), "it ended before its parent: this tests nothing"
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_always_fails_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Verifier(timeout_s=20.0) as v, pytest.raises(RuntimeError, match="does not start"):
        v.grade([SUM])


def test_a_worker_runs_the_code_of_its_parent(tmp_path, monkeypatch):
    (tmp_path / "lead_fast").mkdir()
    (tmp_path / "lead_fast" / "__init__.py").write_text("raise RuntimeError('taken from the current folder')")
    monkeypatch.chdir(tmp_path)
    with Verifier(timeout_s=20.0) as v:
        assert v.grade([SUM]) == [True]


def test_the_parser_of_strings_takes_numbers_only():
    taken = []
    parse = _only_numbers(taken.append)
    for text in ("12", "0.5", "((2+sqrt(8))/2)", ".5"):
        parse(text)
    assert len(taken) == 4
    for text in ("__import__('os')", "x", "print(1)", "(1).real", "e.real", "1_0", "[1]", "exit()", "a.b"):
        with pytest.raises(ValueError, match="is not a number"):
            parse(text)


def test_nothing_in_an_answer_is_run(verifier, tmp_path):
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path('{mark}').touch()"
    for form in CODE:
        assert (
            verifier.grade([(form.replace("CODE", code), "5"), (form.replace("CODE", code), r"\{1,2\}")]) == [False] * 2
        )
    assert not mark.exists()


CODE = ["CODE", r"\text{CODE}", r"\{CODE\}", "(CODE,2)", r"\operatorname{CODE}(x)", "x_{CODE}", r"\sqrt[CODE]{2}",
        r"\frac{CODE}{2}", r"\sum_{i=CODE}^3 1", r"x=\text{CODE}", r"x\in\{CODE\}", r"\binom{CODE}{1}"]  # fmt: skip


HOSTILE = [
    r"\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    r"\boxed{" * 10_000 + "5" + "}" * 10_000,
    r"\boxed{" + "9" * 1_000_000 + "}",
    r"\boxed{" + "(" * 900 + ")" * 900 + "}",
    r"\boxed{\sqrt{" * 100 + "2" + "}}" * 100,
    "\\boxed{\x00\x1b[2J5\u202e}",
    "\\boxed{５}",
    "\\" * 100_000,
    "}" * 100_000 + r"\boxed{1}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_neither_stall_nor_pass(verifier, text):
    began = time.monotonic()
    assert verifier.grade([(extract_boxed(text), "1234567")]) == [False]
    assert time.monotonic() - began < 25


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_extraction_never_raises_and_finds_what_was_boxed(text):
    extract_boxed(text)
    quick(text, "5")
    quick("5", text)
    is_degenerate(text)
    is_degenerate(text, from_start=True)
    clean = text.replace("\\", "").replace("{", "").replace("}", "")
    assert extract_boxed(text + "\\boxed{" + clean + "}") == clean.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_worker_outlives_a_killed_parent():
    script = (
        "import os, signal\nfrom lead_fast.reward.verifier import Verifier\nv = Verifier(60.0)\n"
        "print(v.grade([(r'\\sum_{k=1}^{3} k', '6')]), v.worker.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120).stdout
    right, pid = out.rsplit(maxsplit=1)
    assert right == "[True]"
    deadline = time.monotonic() + 10
    while (alive := os.path.exists(f"/proc/{pid}")) and time.monotonic() < deadline:
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().split()[2] == "Z":  # a zombie
                alive = False
                break
        time.sleep(0.1)
    assert not alive
