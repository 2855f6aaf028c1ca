"""The embedded task of the ablation: levels of 1 to 6 arithmetic steps, hopeless problems, five forms of solution.

L, E and AD can only show effects if the task offers what they act on. The first token of a solution therefore decides
its form, and the forms differ in length and accuracy:

- guess: the answer at once, which is right only on some easy problems;
- terse: one equation per step, except that a small step (adding or subtracting 2, 3 or 4) joins the equation before it
  (`47+38-2=83`); the model often gets such joint equations wrong;
- wordy: a sentence and an equation for every single step: twice as long as terse, and nearly always right;
- check: terse work whose results are worked out again step by step (`47+38-2=73|47+38=85|85-2=83`): longer than terse
  by two thirds, and right more often. A quarter of the results before the check are wrong and are corrected by it;
- none: no answer. The response ends without `</think>`, like a truncated one.

One problem in five is hopeless and can be recognised: a product of three three-digit numbers, which no form solves.
A problem's difficulty is its level, 1 to 6, or 10 if it is hopeless. The steps are those of arithmetic.py, so that a
short SFT teaches `tiny` these forms (recipes/sft/levels.toml).

    python -m lead_fast.data levels --out DIR [--train 4000] [--test 256]    # the same problems as JSONL
"""

import random
from collections.abc import Callable, Sequence

from .arithmetic import ASK, VERB, Step, is_test, problem_text, steps_of

LEVELS = (1, 2, 3, 4, 5, 6)
HOPELESS = 10
HOPELESS_RATE = 0.2
HARD = (4, 5, 6)
FORMS = {"guess": 0.27, "terse": 0.22, "wordy": 0.22, "check": 0.24, "none": 0.05}
HOPELESS_NONE = 0.35  # hopeless problems without an answer; the others have a guess, some number
JOINED = (2, 3, 4)  # operands of the steps that terse work joins to the one before
SLIP_RATE = 0.25  # results that are wrong before the check, in solutions with one
OPENINGS = {
    "guess": "</think>", "terse": "Work\n", "wordy": "We start with {}.\n", "check": "Compute\n", "none": "No answer"
}  # fmt: skip


def make_problems(
    n: int, *, seed: int, split: str = "train", difficulties: Sequence[int] = (*LEVELS, HOPELESS)
) -> list[dict]:
    """Make `n` distinct problems of one split.

    Args:
        n: number of problems.
        seed: equal seeds give equal problems, on every machine.
        split: "train" or "test".
        difficulties: those to draw from. A level is as likely as every other; of all problems one in five is hopeless.
    Returns:
        rows with problem, answer (the reference), difficulty and solution.
    """
    rng = random.Random(f"levels {seed} {split}")
    weights = [HOPELESS_RATE if d == HOPELESS else (1 - HOPELESS_RATE) / len(LEVELS) for d in difficulties]
    seen: set[str] = set()
    rows: list[dict] = []
    while len(rows) < n:
        level = rng.choices(difficulties, weights)[0]
        text, value, solution = _hopeless(rng) if level == HOPELESS else _solvable(rng, level)
        if text not in seen and is_test(text) == (split == "test"):
            seen.add(text)
            rows.append({"problem": text, "answer": str(value), "difficulty": float(level), "solution": solution})
    return rows


def _solvable(rng: random.Random, level: int) -> tuple[str, int, str]:
    start, steps, value = steps_of(rng, level)
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    equations = [[step] for step in steps] if form == "wordy" else _joined(steps)
    lines = [LINES[form](rng, i, equation) for i, equation in enumerate(equations)] if form in LINES else []
    return problem_text(rng, start, steps), value, _written(form, start, lines, value)


def _hopeless(rng: random.Random) -> tuple[str, int, str]:
    a, b, c = (rng.randint(101, 999) for _ in range(3))
    form = "none" if rng.random() < HOPELESS_NONE else "guess"
    return rng.choice(ASK).format(f"{a}*{b}*{c}"), a * b * c, _written(form, a, [], rng.randint(10, 99))


def _written(form: str, start: int, lines: list[str], value: int) -> str:
    if form == "none":
        return OPENINGS["none"]
    answer = f"</think>\\boxed{{{value}}}"
    return answer if form == "guess" else OPENINGS[form].format(start) + "\n".join([*lines, answer])


def form_of(text: str) -> str:
    """Return the form that a response opens with; "other" where it is none of the task's."""
    return next((form for form, s in OPENINGS.items() if text.startswith(s.partition(" with {")[0])), "other")


def _joined(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps of each equation of terse work."""
    lines: list[list[Step]] = []
    for step in steps:
        if step[0] != "*" and step[1] in JOINED and lines and len(lines[-1]) == 1:
            lines[-1].append(step)
        else:
            lines.append([step])
    return lines


def _equation(steps: Sequence[Step], result: int) -> str:
    return str(steps[0][2]) + "".join(f"{op}{n}" for op, n, *_ in steps) + f"={result}"


def _terse(rng: random.Random, i: int, steps: Sequence[Step]) -> str:
    return _equation(steps, steps[-1][3])


def _wordy(rng: random.Random, i: int, steps: Sequence[Step]) -> str:
    [(op, n, *_)] = steps
    return f"{'Next' if i else 'First'} we {VERB[op]} {n}, which gives us\n{_terse(rng, i, steps)}"


def _check(rng: random.Random, i: int, steps: Sequence[Step]) -> str:
    quick = after = steps[-1][3]
    if rng.random() < SLIP_RATE:
        quick = rng.choice([x for x in (after - 10, after - 1, after + 1, after + 10) if x > 0])
    return "|".join([_equation(steps, quick), *(_equation([step], step[3]) for step in steps)])


LINES: dict[str, Callable[[random.Random, int, Sequence[Step]], str]] = {
    "terse": _terse, "wordy": _wordy, "check": _check
}  # fmt: skip
