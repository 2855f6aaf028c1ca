"""Show what a run would see in a file: `python -m lead_fast.data check FILE [--model DIR] [--data.key=value ...]`.

Reads, refuses and drops problems by the run's own code, under the same configuration keys.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from ..cli import load_config
from ..config import Config
from ..records import Problem
from .prompts import ask, read_problems, tokenize_prompts
from .read import columns_of
from .references import repeated, unverifiable, verifiable

SHOWN = 5


def check(a: argparse.Namespace) -> None:
    """Show what a run would see in a source: columns, rows, lengths, unverifiable references, duplicates.

    Exits with code 1 if a run would refuse the source. Accepts the run's keys (--data.reference_column=a.b,
    --recipe=NAME).
    """
    c: Config = load_config([*a.settings, *(["--model", a.model] if a.model else [])])
    print(f"{a.source}: columns {', '.join(columns_of(a.source, a.split))}", flush=True)
    problems = read_problems(c.data, a.source, a.split, min_difficulty=c.data.min_difficulty)
    print(f"problems: {len(problems):,}, of which the first {min(SHOWN, len(problems))}:")
    for p in problems[:SHOWN]:
        print(f"  row {p.id}")
        for role, text in p.messages or (("problem", p.problem),):
            print(f"    {role:10} {shortened(text)}")
        print(f"    {'reference':10} {shortened(p.reference) or '(none)'}")
    print_lengths("problem, characters", [len(p.problem) for p in problems])
    print_lengths("reference, characters", [len(p.reference) for p in problems])
    if solutions := [len(p.solution) for p in problems if p.solution]:
        print_lengths(f"solution, characters (of {len(solutions):,})", solutions)
    print_repeated(problems)
    bad = unverifiable(p.reference for p in problems)
    print(f"unverifiable references: {sum(p.reference in bad for p in problems):,}", flush=True)
    for p in [p for p in problems if p.reference in bad][:SHOWN]:
        print(f"  row {p.id}: {shortened(p.reference) or '(none)'} ({bad[p.reference]})")
    kept = verifiable(a.source, problems, drop=c.data.drop_unverifiable)
    if a.model:
        from ..learner.model import load_tokenizer

        d = c.data
        kept, prompts = tokenize_prompts(
            kept,
            load_tokenizer(c.model),
            instruction=d.instruction,
            max_prompt_tokens=d.max_prompt_tokens,
            drop_long=d.drop_long_prompts,
        )
        print_lengths("prompt, tokens", [len(ids) for ids in prompts])
    else:
        ask(kept, c.data.instruction)
    print(f"problems that a run would use: {len(kept):,}")


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:120]} ... {text[-35:]}"


def print_lengths(name: str, sizes: Sequence[int]) -> None:
    if sizes:
        quantiles = np.quantile(sizes, [0.5, 0.95, 0.99, 1], method="higher")
        median, most, nearly, longest = (f"{int(q):,}" for q in quantiles)
        print(f"{name:38} median {median}, 95 % {most}, 99 % {nearly}, longest {longest}")


def print_repeated(problems: Sequence[Problem]) -> None:
    """Print how many problems occur more than once, and where their references contradict each other."""
    groups, contradicting = repeated(problems)
    rows = sum(map(len, groups.values()))
    print(f"repeated problems: {len(groups):,} ({rows:,} rows); with contradicting references: {len(contradicting):,}")
    for group in list(contradicting.values())[:SHOWN]:
        first, other = group[0], next(p for p in group if p.reference != group[0].reference)
        print(f"  rows {first.id} and {other.id}: {shortened(first.reference)!r} and {shortened(other.reference)!r}")
