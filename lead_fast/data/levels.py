"""The embedded task of the ablation: levels of 1 to 6 arithmetic steps, hopeless problems, five forms of solution.

What L, E and AD act on has to be in the task, or their effects cannot show. So the first token of a solution says which
form it has, and each form has a price of its own:

- guess: the answer at once, right on easy problems only;
- terse: one equation per step;
- wordy: the same equations in sentences, twice as long and just as right;
- check: each equation worked out twice (`47+38=75|47+38=85`), the second time as if the first were not there: twice as
  long as terse work, and right more often, for the slip of the first time is mended;
- none: no answer. The response ends without `</think>`, as one does that was cut at its limit.

One problem in five is hopeless and can be recognised: a product of three three-digit numbers, which no form solves.
A problem's difficulty is its level, 1 to 6, and 10 where it is hopeless. The steps are those of arithmetic.py, so that
its model learns these forms by a short SFT (recipes/sft/levels.toml).

    python -m lead_fast.data levels --out DIR [--train 4000] [--test 256]    # the same problems as JSONL
"""

import random
from collections.abc import Callable, Sequence
from itertools import accumulate

from .arithmetic import ASK, VERB, Step, is_test, problem_text, steps_of

LEVELS = (1, 2, 3, 4, 5, 6)
HOPELESS = 10
HOPELESS_RATE = 0.2
HARD = (4, 5, 6)
FORMS = {"guess": 0.27, "terse": 0.22, "wordy": 0.22, "check": 0.24, "none": 0.05}
HOPELESS_NONE = 0.35  # hopeless problems without an answer; the others have a guess, some number
SLIP_RATE = 0.08  # of the results, in every form
OPENINGS = {"terse": "Work", "wordy": "We start with {}.", "check": "Compute"}


def make_problems(
    n: int, *, seed: int, split: str = "train", difficulties: Sequence[int] = (*LEVELS, HOPELESS)
) -> list[dict]:
    """Make `n` distinct problems of one split.

    Args:
        n: how many.
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
    text = problem_text(rng, start, steps)
    lines, last = [], value
    if form in LINES:
        lines, last = _worked(rng, form, start, steps)
    return text, value, _written(form, start, lines, last)


def _worked(rng: random.Random, form: str, start: int, steps: Sequence[Step]) -> tuple[list[str], int]:
    """Lines of the work and the value it ends at: slips are made in every form, carried on but for checked work."""
    lines, before = [], start
    for i, (op, n, *_) in enumerate(steps):
        after = apply(before, op, n)
        quick = _slip(rng, after, steps[i + 1 :]) if rng.random() < SLIP_RATE else after
        lines.append(LINES[form](i, (op, n, before, after), quick))
        before = after if form == "check" else quick
    return lines, before


def apply(value: int, op: str, n: int) -> int:
    return {"+": value + n, "-": value - n, "*": value * n}[op]


def _slip(rng: random.Random, after: int, rest: Sequence[Step]) -> int:
    """A result that is wrong by 1 or by 10, from which the remaining steps stay above zero."""

    def lowest(value: int) -> int:
        values = list(accumulate(rest, lambda v, step: apply(v, step[0], step[1]), initial=value))
        return min(values)

    return rng.choice([x for x in (after - 10, after - 1, after + 1, after + 10) if lowest(x) > 0])


def _hopeless(rng: random.Random) -> tuple[str, int, str]:
    a, b, c = (rng.randint(101, 999) for _ in range(3))
    form = "none" if rng.random() < HOPELESS_NONE else "guess"
    return rng.choice(ASK).format(f"{a}*{b}*{c}"), a * b * c, _written(form, a, [], rng.randint(10, 99))


def _written(form: str, start: int, lines: list[str], value: int) -> str:
    if form == "none":
        return "No answer"
    answer = f"</think>\\boxed{{{value}}}"
    return answer if form == "guess" else "\n".join([OPENINGS[form].format(start), *lines, answer])


def _terse(i: int, step: Step, quick: int) -> str:
    op, n, before, _ = step
    return f"{before}{op}{n}={quick}"


def _wordy(i: int, step: Step, quick: int) -> str:
    return f"{'Next' if i else 'First'} we {VERB[step[0]]} {step[1]}, which gives us\n{_terse(i, step, quick)}"


def _check(i: int, step: Step, quick: int) -> str:
    return f"{_terse(i, step, quick)}|{_terse(i, step, step[3])}"


LINES: dict[str, Callable[[int, Step, int], str]] = {"terse": _terse, "wordy": _wordy, "check": _check}
