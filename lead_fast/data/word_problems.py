"""Arithmetic word problems with worked solutions, generated from a seed, on which `make pipeline` trains a model.

A problem's difficulty is its number of steps, 2 to 4. Numbers are small, so that a model of 135 million parameters
learns most of the arithmetic from some hundred solutions. A solution is correct, ends in \\boxed{} and is terse (one
equation per step), wordy (the same equations in sentences) or hasty (the answer alone, which a small model gets wrong
most of the time). A model trained on this mix can therefore improve: it can learn to show its steps, and to be brief.
Train and test never share a problem.

    python -m lead_fast.data word_problems --out DIR [--train 3000] [--test 256] [--seed 1]    # train.jsonl, test.jsonl
"""

import random
from collections.abc import Callable

from .arithmetic import is_test

FORMS = {"terse": 0.42, "wordy": 0.35, "hasty": 0.23}  # forms of solutions, and their fractions
OPENING = "Let's think"  # of a wordy solution
NAMES = "Mia Tom Ana Leo Sam Eva Ben Zoe Max Ida Noor Kofi".split()
THINGS = "apples stickers books cards shells stamps pencils marbles cookies beads".split()


Line = tuple[str, str, int]  # what is computed, the expression, its value


def make_problems(n: int, *, seed: int, split: str = "train") -> list[dict]:
    """Make `n` distinct problems of one split ("train" or "test").

    Returns:
        rows with problem, answer (the reference), difficulty and solution; the same for a seed on every machine.
    """
    rng = random.Random(f"words {seed} {split}")
    seen: set[str] = set()
    rows: list[dict] = []
    while len(rows) < n:
        text, lines = rng.choice(KINDS)(rng)
        (form,) = rng.choices(list(FORMS), list(FORMS.values()))
        if text in seen or is_test(text) != (split == "test"):
            continue
        seen.add(text)
        reference = lines[-1][2]
        work = "" if form == "hasty" else (_terse if form == "terse" else _wordy)(lines)
        rows.append(
            {
                "problem": text,
                "answer": str(reference),
                "difficulty": float(len(lines)),
                "solution": f"{work}\\boxed{{{reference}}}",
            }
        )
    return rows


def form_of(text: str) -> str:
    """Form of a response, by how it begins; "other" if it begins like no solution."""
    begins = text.strip()
    if begins.startswith(OPENING):
        return "wordy"
    return "hasty" if begins.startswith("\\boxed") else "terse" if begins[:1].isdigit() else "other"


def _terse(lines: list[Line]) -> str:
    return "".join(f"{expression} = {value}\n" for _, expression, value in lines)


def _wordy(lines: list[Line]) -> str:
    text = f"{OPENING} about the problem one step at a time."
    for i, (what, expression, value) in enumerate(lines):
        opening = "First we need to find" if i == 0 else "Next we need to find"
        text += f"\n{opening} {what}. We calculate {expression} = {value}, so this is {value}."
    return text + "\nNow we have everything, and we can give the final answer:\n"


def _bags(rng: random.Random) -> tuple[str, list[Line]]:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    bags, each, lost = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 3)
    bagged = bags * each
    lines = [(f"how many {thing} there are in all bags", f"{bags} * {each}", bagged)]
    lines.append((f"how many {thing} are left", f"{bagged} - {lost}", bagged - lost))
    text = f"{name} has {bags} bags with {each} {thing} in each bag and gives {lost} {thing} away."
    if rng.random() < 0.5:
        more = rng.randint(2, 5)
        lines.append((f"how many {thing} there are in the end", f"{bagged - lost} + {more}", bagged - lost + more))
        text += f" Then {name} finds {more} more."
    return f"{text} How many {thing} does {name} have now?", lines


def _shop(rng: random.Random) -> tuple[str, list[Line]]:
    name, (thing, other) = rng.choice(NAMES), rng.sample(THINGS, 2)
    n, price, m, cost = rng.randint(2, 4), rng.randint(2, 4), rng.randint(2, 3), rng.randint(2, 3)
    first, second = n * price, m * cost
    total = first + second
    lines = [(f"what the {thing} cost", f"{n} * {price}", first), (f"what the {other} cost", f"{m} * {cost}", second)]
    lines.append(("what everything costs together", f"{first} + {second}", total))
    text = f"{name} buys {n} {thing} for {price} dollars each and {m} {other} for {cost} dollars each."
    if rng.random() < 0.5:
        less = rng.randint(2, 5)
        lines.append(("how much is left to pay", f"{total} - {less}", total - less))
        return f"{text} The shop takes {less} dollars off. How many dollars does {name} pay?", lines
    return f"{text} How many dollars does {name} pay?", lines


def _sharing(rng: random.Random) -> tuple[str, list[Line]]:
    (name, friend), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    children, each = rng.randint(2, 4), rng.randint(2, 4)
    together = children * each
    first = rng.randint(max(2, together - 9), min(9, together - 2))
    more = rng.randint(2, 5)
    text = (
        f"{name} has {first} {thing} and {friend} has {together - first}. They share all of them equally among "
        f"{children} children. How many {thing} does a child have who had {more} before?"
    )
    return text, [
        (f"how many {thing} there are together", f"{first} + {together - first}", together),
        ("how many each child gets", f"{together} / {children}", each),
        ("how many that child has then", f"{each} + {more}", each + more),
    ]


def _days(rng: random.Random) -> tuple[str, list[Line]]:
    name = rng.choice(NAMES)
    pages, days, rest = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 5)
    read = pages * days
    text = f"{name} reads {pages} pages a day for {days} days, and {rest} pages are left."
    lines = [("how many pages have been read", f"{pages} * {days}", read)]
    lines.append(("how many pages the book has", f"{read} + {rest}", read + rest))
    if rng.random() < 0.4:
        twice = 2 * (read + rest)
        lines.append(("how many pages the second book has", f"2 * {read + rest}", twice))
        return f"{text} A second book has twice as many pages as this one. How many pages has the second book?", lines
    return f"{text} How many pages has the book?", lines


KINDS: tuple[Callable[[random.Random], tuple[str, list[Line]]], ...] = (_bags, _shop, _sharing, _days)
