"""Compare this verifier with math-verify alone and with string comparison on labelled pairs of answer and reference.

    python bench/verifier.py [--suites FOLDER] [--show] [--speed] [--docs] [--out FILE.json]

It prints a table with a row per suite: pairs, wrong answers accepted and right answers refused by each of the three, in
numbers and percent, and pairs that only math-verify judges right. The suites of this repository take about half a
minute of CPU time. Each pair of a suite has a label:

    repository      tests/data/answer_pairs.jsonl: answer forms of AIME, MATH-500, AMC, Minerva and OlympiadBench
    faults          tests/data/fault_pairs.jsonl: forms that an earlier verifier judged wrongly, by kind
    rules           the examples given with each rule
    rewritings      generated reference forms, rewritten without changing their meaning
    near misses     the same forms with a sign, a digit, a factor, a bound or an element changed
    math-verify     its own tests, run as data: `pip download --no-deps --no-binary :all: math-verify` and unpack into
                    FOLDER; math-verify gets whole texts as in its tests, this verifier the answer in them

latex2sympy2_extended has no tests in its source distribution: it is listed as missing. `--speed` measures pairs per
second, each side through one worker process and one line of JSON per pair.
"""

import argparse
import ast
import json
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lead_fast.reward.answers import COMPARISONS, READERS
from lead_fast.reward.extraction import extract_boxed
from lead_fast.reward.verifier import Verifier, quick

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
FORMS = 120


class Pair(NamedTuple):
    suite: str
    kind: str
    reference: str
    answer: str
    equal: bool
    whole: tuple[str, str] = ("", "")  # reference and answer as in a test of another library
    options: tuple[tuple[str, object], ...] = ()  # options of math-verify's `verify`, as in its test


def from_file(name: str, suite: str, kind: str) -> list[Pair]:
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    return [Pair(suite, r[kind], r["reference"], r["answer"], r["equal"]) for r in rows]


def rules() -> list[Pair]:
    return [
        Pair("rules", getattr(rule, "type", rule.rule[:40]), *pair)
        for rule in (*READERS, *COMPARISONS)
        for pair in rule.pairs
    ]


# --------------------------------------------------------------------------------------------------- generated pairs


def form(k: int, rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Make a reference form, rewritings with the same meaning, and near misses."""
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(11, 97)
    p, q = rng.choice([(3, 7), (5, 8), (2, 9), (7, 12), (11, 6), (4, 15)])
    r = rng.choice([2, 3, 5, 6, 7, 10, 11])
    x = rng.choice("xyznt")
    n = rng.randint(1200, 98765)
    shapes: list[tuple[str, list[str], list[str]]] = [
        (
            f"{n}",
            [
                f"{n:,}",
                f"{n}.0",
                f"{n}.",
                f"{n - 3}+3",
                f"{n * 2}/2",
                f"x={n}",
                f"{n}\\text{{ ways}}",
                f"{n} cm",
                f"\\mathbf{{{n}}}",
                f"{n:,}".replace(",", "{,}"),
                f"{n:,}".replace(",", "\\,"),
            ],
            [
                f"{n + 1}",
                f"-{n}",
                f"{n}0",
                f"{n}.5",
                f"{n / 10}",
                f"{n}x",
                f"{n}i",
                f"{n}, 1",
                f"{n:,}".replace(",", ", "),
                f"{n}^2",
            ],
        ),
        (
            f"\\frac{{{p}}}{{{q}}}",
            [
                f"{p}/{q}",
                f"\\dfrac{{{p}}}{{{q}}}",
                f"\\frac{{{3 * p}}}{{{3 * q}}}",
                f"{p}\\div {q}",
                f"\\frac{{-{p}}}{{-{q}}}",
                f"1-\\frac{{{q - p}}}{{{q}}}",
                f"{p}\\cdot\\frac{{1}}{{{q}}}",
                f"{p}⁄{q}",
                f"k=\\frac{{{p}}}{{{q}}}",
            ],
            [
                f"\\frac{{{q}}}{{{p}}}",
                f"-\\frac{{{p}}}{{{q}}}",
                f"\\frac{{{p + 1}}}{{{q}}}",
                f"\\frac{{{p}}}{{{q + 1}}}",
                f"{p / q:.2f}",
                f"{p}",
                f"{p}{q}",
                f"\\frac{{{p}}}{{{q}}}x",
            ],
        ),
        (
            f"{a}\\sqrt{{{r}}}",
            [
                f"\\sqrt{{{a * a * r}}}",
                f"{a}√{r}",
                f"\\sqrt{{{r}}}\\cdot {a}",
                f"{a}*sqrt({r})",
                f"\\frac{{{a * r}}}{{\\sqrt{{{r}}}}}",
                f"{a}\\sqrt{{{r}}}\\text{{ units}}",
                f"{a}\\cdot {r}^{{1/2}}",
                f"{a}({r})^{{\\frac12}}",
            ],
            [
                f"{a + 1}\\sqrt{{{r}}}",
                f"{a}\\sqrt{{{r + 2}}}",
                f"-{a}\\sqrt{{{r}}}",
                f"{a}",
                f"\\sqrt{{{a * r}}}",
                f"{a * r**0.5:.2f}",
                f"{a}{r}",
                f"{a}\\sqrt[3]{{{r}}}",
            ],
        ),
        (
            f"{a}\\pi",
            [
                f"\\pi\\cdot {a}",
                f"{a}π",
                f"{a}*pi",
                f"{a}\\pi\\text{{ cm}}^2",
                f"\\frac{{{2 * a}\\pi}}{{2}}",
                f"{a} \\pi",
                f"{a}\\times\\pi",
                f"S={a}\\pi",
            ],
            [
                f"{a}",
                f"{a + 1}\\pi",
                f"-{a}\\pi",
                f"{a * 3.14:.2f}",
                f"{a}\\pi^2",
                f"\\frac{{\\pi}}{{{a}}}",
                f"{a}+\\pi",
                f"{a}e",
            ],
        ),
        (
            f"{x}^2+{a}{x}-{c}",
            [
                f"{a}{x}+{x}^2-{c}",
                f"-{c}+{a}{x}+{x}^{{2}}",
                f"{x}({x}+{a})-{c}",
                f"{x}*{x}+{a}*{x}-{c}",
                f"{x}²+{a}{x}−{c}",
                f"({x}+{a}){x}-{c}",
                f"({x}+1)^2+{a - 2}{x}-{c + 1}" if a > 2 else f"{x}^2+{x}+{x}-{c}",
                f"-({c}-{a}{x}-{x}^2)",
            ],
            [
                f"{x}^2-{a}{x}-{c}",
                f"{x}^2+{a}{x}+{c}",
                f"{x}^2+{a + 1}{x}-{c}",
                f"{x}^3+{a}{x}-{c}",
                f"{x}^2+{a}{x}",
                f"w^2+{a}w-{c}",
                f"{x}^2+{a}{x}-{c + 1}",
                f"2{x}^2+{a}{x}-{c}",
            ],
        ),
        (
            f"({a}, -{c})",
            [
                f"\\left({a},-{c}\\right)",
                f"({a},−{c})",
                f"({a}.0, -{c})",
                f"(x,y)=({a},-{c})",
                f"{a}, -{c}",
                f"（{a}，-{c}）",
                f"\\left( {a} , -{c} \\right)",
                f"({2 * a}/2,-{c})",
            ],
            [
                f"(-{c}, {a})",
                f"({a}, {c})",
                f"({a + 1},-{c})",
                f"({a})",
                f"[{a},-{c}]",
                f"({a},-{c},0)",
                f"\\{{{a},-{c}\\}}",
                f"({a},-{c}]",
            ],
        ),
        (
            f"\\{{{a}, {c}, {n}\\}}",
            [
                f"\\{{{n},{a},{c}\\}}",
                f"{c}, {a}, {n}",
                f"\\left\\{{{a},{c},{n}\\right\\}}",
                f"{a}, {c} \\text{{ and }} {n}",
                f"{a}; {c}; {n}",
                f"{a}, {c}, and {n}",
                f"x={a}, x={c}, x={n}",
                f"\\lbrace {a},{c},{n}\\rbrace",
            ],
            [
                f"\\{{{a}, {c}\\}}",
                f"\\{{{a}, {c}, {n + 1}\\}}",
                f"({a}, {c}, {n})",
                f"{a}",
                f"\\{{{a},-{c},{n}\\}}",
                f"\\{{{a},{c},{n},0\\}}",
                f"{a}+{c}+{n}",
                f"[{a},{c},{n}]",
            ],
        ),
        (
            f"[{a}, {c})",
            [
                f"{a}\\le x<{c}",
                f"x\\in[{a},{c})",
                f"\\left[{a},{c}\\right)",
                f"{c}>x\\ge {a}",
                f"\\{{x\\mid {a}\\le x<{c}\\}}",
                f"[{a}.0,{c})",
                f"{a} ≤ x < {c}",
                f"x \\ge {a} \\text{{ and }} x<{c}",
            ],
            [
                f"({a}, {c})",
                f"[{a}, {c}]",
                f"[{a}, {c + 1})",
                f"[-{a}, {c})",
                f"{a}\\le x\\le {c}",
                f"x\\ge {a}",
                f"({a},{c}]",
                f"x<{c}",
            ],
        ),
        (
            f"(-\\infty, {a})\\cup({c},\\infty)",
            [
                f"x<{a} \\text{{ or }} x>{c}",
                f"({c},\\infty)\\cup(-\\infty,{a})",
                f"(-∞,{a})∪({c},∞)",
                f"\\{{x|x<{a}\\text{{ or }}x>{c}\\}}",
                f"(-\\infty,{a}),({c},\\infty)",
                f"x\\in(-\\infty,{a})\\cup({c},+\\infty)",
                f"x>{c} or x<{a}",
                f"\\mathbb{{R}}\\setminus[{a},{c}]",
            ],
            [
                f"(-\\infty, {a}]\\cup({c},\\infty)",
                f"(-\\infty, {a})\\cup[{c},\\infty)",
                f"({a},{c})",
                f"(-\\infty,{a})",
                f"x<{a} \\text{{ and }} x>{c}",
                f"(-\\infty,-{a})\\cup({c},\\infty)",
                f"[{a},{c}]",
                f"(-\\infty,{a})\\cup({c + 1},\\infty)",
            ],
        ),
        (
            f"{c}\\%",
            [
                f"{c}",
                f"{c / 100}",
                f"{c} percent",
                f"{c} \\%",
                f"\\frac{{{c}}}{{100}}",
                f"{c}\\text{{ percent}}",
                f"{c}.0\\%",
                f"{c} pct",
            ],
            [
                f"{c + 1}\\%",
                f"{c}0\\%",
                f"{c / 1000}",
                f"-{c}\\%",
                f"{c / 10}",
                f"{c * 10}",
                f"\\frac{{{c}}}{{10}}",
                f"{c},0",
            ],
        ),
        (
            f"y={a}x+{c}",
            [
                f"{a}x+{c}",
                f"y={c}+{a}x",
                f"{a}x-y+{c}=0",
                f"y-{c}={a}x",
                f"y = {a}x + {c}",
                f"2y={2 * a}x+{2 * c}",
                f"-{a}x+y={c}",
                f"x=\\frac{{y-{c}}}{{{a}}}",
            ],
            [
                f"y={a}x-{c}",
                f"y={a + 1}x+{c}",
                f"x={a}y+{c}",
                f"y={c}x+{a}" if a != c else "y=0",
                f"{a}x+y+{c}=0",
                f"y={a}x",
                f"{c}",
                f"y=-{a}x+{c}",
            ],
        ),
        (
            f"x={a}, y=-{c}",
            [
                f"x = {a},\\, y = -{c}",
                f"y=-{c}, x={a}",
                f"x={a} \\text{{ and }} y=-{c}",
                f"x={a};y=-{c}",
                f"x={a} \\quad y=-{c}",
                f"{a}, -{c}",
                f"x={a}.0, y=-{c}",
                f"(x,y)=({a},-{c})",
            ],
            [
                f"x=-{c}, y={a}",
                f"x={a}, y={c}",
                f"x={a}",
                f"x={a + 1}, y=-{c}",
                f"-{c}, {a}",
                f"y=-{c}",
                f"x={a}, z=-{c}",
                f"x={a}, y=-{c}, z=0",
            ],
        ),
        (
            f"\\begin{{pmatrix}} {a} & {b} \\\\ 0 & {c} \\end{{pmatrix}}",
            [
                f"\\begin{{bmatrix}}{a}&{b}\\\\0&{c}\\end{{bmatrix}}",
                f"\\left(\\begin{{array}}{{cc}}{a}&{b}\\\\0&{c}\\end{{array}}\\right)",
                f"\\begin{{pmatrix}}{a}.0&{b}\\\\0&{c}\\end{{pmatrix}}",
                f"A=\\begin{{pmatrix}}{a}&{b}\\\\0&{c}\\end{{pmatrix}}",
                f"\\begin{{pmatrix}}{2 * a}/2&{b}\\\\0&{c}\\end{{pmatrix}}",
                f"\\begin{{pmatrix}}{a}&{b}\\\\0&{c}\\\\\\end{{pmatrix}}",
            ],
            [
                f"\\begin{{pmatrix}}{a}&0\\\\{b}&{c}\\end{{pmatrix}}",
                f"\\begin{{pmatrix}}{a}&{b}\\\\0&-{c}\\end{{pmatrix}}",
                f"\\begin{{pmatrix}}{a}&{b}&0&{c}\\end{{pmatrix}}",
                f"\\begin{{pmatrix}}{a}&{b + 1}\\\\0&{c}\\end{{pmatrix}}",
                f"\\begin{{pmatrix}}{a}\\\\{c}\\end{{pmatrix}}",
                f"\\begin{{vmatrix}}{a}&{b}\\\\0&{c}\\end{{vmatrix}}",
            ],
        ),
        (
            f"\\frac{{-{a}\\pm\\sqrt{{{r}}}}}{{{b}}}",
            [
                f"\\frac{{-{a}+\\sqrt{{{r}}}}}{{{b}}}, \\frac{{-{a}-\\sqrt{{{r}}}}}{{{b}}}",
                f"x=\\frac{{-{a}\\pm\\sqrt{{{r}}}}}{{{b}}}",
                f"(-{a}±√{r})/{b}",
                f"-\\frac{{{a}}}{{{b}}}\\pm\\frac{{\\sqrt{{{r}}}}}{{{b}}}",
                f"\\left\\{{\\frac{{-{a}-\\sqrt{{{r}}}}}{{{b}}},\\frac{{\\sqrt{{{r}}}-{a}}}{{{b}}}\\right\\}}",
                f"\\frac{{-{a}+\\sqrt{{{r}}}}}{{{b}}} \\text{{ or }} \\frac{{-{a}-\\sqrt{{{r}}}}}{{{b}}}",
            ],
            [
                f"\\frac{{-{a}+\\sqrt{{{r}}}}}{{{b}}}",
                f"\\frac{{{a}\\pm\\sqrt{{{r}}}}}{{{b}}}",
                f"\\frac{{-{a}\\pm\\sqrt{{{r + 4}}}}}{{{b}}}",
                f"\\frac{{-{a}\\pm\\sqrt{{{r}}}}}{{{b + 1}}}",
                f"-{a}\\pm\\sqrt{{{r}}}",
                f"\\frac{{-{a}\\pm{r}}}{{{b}}}",
            ],
        ),
        (
            f"{a}-{c}i",
            [
                f"-{c}i+{a}",
                f"{a}-{c}\\mathrm{{i}}",
                f"{a} - {c} i",
                f"z={a}-{c}i",
                f"{a}-i\\cdot {c}",
                f"-({c}i-{a})",
                f"\\frac{{{2 * a}-{2 * c}i}}{{2}}",
                f"{a}−{c}i",
            ],
            [f"{a}+{c}i", f"{c}-{a}i", f"-{a}-{c}i", f"{a}-{c}", f"{a}", f"{a}-{c + 1}i", f"{a}-{c}j", f"-{c}i"],
        ),
        (
            f"e^{{{a}}}-{b}",
            [
                f"-{b}+e^{{{a}}}",
                f"exp({a})-{b}",
                f"\\mathrm{{e}}^{{{a}}}-{b}",
                f"e^{a}-{b}",
                f"e^{{{a - 1}}}\\cdot e-{b}",
                f"\\frac{{1}}{{e^{{-{a}}}}}-{b}",
                f"(e^{{{a}}})-{b}",
            ],
            [
                f"e^{{{a}}}+{b}",
                f"e^{{{a + 1}}}-{b}",
                f"e^{{-{a}}}-{b}",
                f"{2.718**a - b:.1f}",
                f"{a}e-{b}",
                f"e^{{{a}-{b}}}",
                f"{b}-e^{{{a}}}",
            ],
        ),
        (
            f"\\ln {r}+{a}",
            [
                f"{a}+\\ln({r})",
                f"ln({r})+{a}",
                f"\\text{{ln}} {r}+{a}",
                f"{a}+\\frac12\\ln {r * r}",
                f"{a}-\\ln\\frac{{1}}{{{r}}}",
                f"\\log_e {r} + {a}",
                f"\\ln({r}e^{{{a}}})",
            ],
            [
                f"\\ln {r + 1}+{a}",
                f"\\ln {r}-{a}",
                f"-\\ln {r}+{a}",
                f"\\ln({r}+{a})",
                f"{a}\\ln {r}",
                f"\\ln {r}",
                f"\\log_2 {r}+{a}",
            ],
        ),
        (
            f"{a}\\sin {x}",
            [
                f"{a}\\sin({x})",
                f"{a}sin({x})",
                f"\\sin({x})\\cdot {a}",
                f"-{a}\\sin(-{x})",
                f"{a} \\sin {{{x}}}",
                f"{a}\\cos {x}\\tan {x}",
                f"\\frac{{{a}}}{{\\csc {x}}}",
            ],
            [
                f"{a}\\cos {x}",
                f"{a + 1}\\sin {x}",
                f"-{a}\\sin {x}",
                f"\\sin {x}",
                f"{a}\\sin {a}{x}",
                f"{a}\\sin^2 {x}",
                f"{a}{x}",
            ],
        ),
        (
            f"\\frac{{{x}}}{{{x}+{a}}}",
            [
                f"{x}/({x}+{a})",
                f"1-\\frac{{{a}}}{{{x}+{a}}}",
                f"\\frac{{2{x}}}{{2{x}+{2 * a}}}",
                f"\\frac{{{x}}}{{{a}+{x}}}",
                f"\\frac{{1}}{{1+\\frac{{{a}}}{{{x}}}}}",
                f"{x}({x}+{a})^{{-1}}",
                f"\\dfrac{{-{x}}}{{-{x}-{a}}}",
            ],
            [
                f"\\frac{{{x}}}{{{x}-{a}}}",
                f"\\frac{{{x}+{a}}}{{{x}}}",
                f"\\frac{{1}}{{{x}+{a}}}",
                f"\\frac{{{x}}}{{{x}}}+{a}",
                f"-\\frac{{{x}}}{{{x}+{a}}}",
                f"\\frac{{{x}}}{{{x}+{a + 1}}}",
            ],
        ),
        (
            f"{a}^{{n}}-1",
            [
                f"-1+{a}^n",
                f"{a}\\cdot {a}^{{n-1}}-1",
                f"\\frac{{{a}^{{n+1}}}}{{{a}}}-1",
                f"{a}**n-1",
                f"{a}ⁿ-1",
                f"{a * a}^{{n/2}}-1",
                f"\\frac{{{a * a}^n}}{{{a}^n}}-1",
            ],
            [
                f"{a}^n+1",
                f"{a + 1}^n-1",
                f"{a}^{{n-1}}-1",
                f"{a}^{{n-1}}",
                f"{a}n-1",
                f"n^{{{a}}}-1",
                f"1-{a}^n",
                f"{a}^n",
            ],
        ),
        (
            f"\\text{{{rng.choice(['east', 'Monday', 'isosceles', 'increasing'])}}}",
            [],
            ["north", "7", "\\text{Tuesday}", "\\text{scalene}", "decreasing", "\\text{no}"],
        ),
        (
            f"\\text{{({'ABCDE'[k % 5]})}}",
            [
                x.replace("L", "ABCDE"[k % 5])
                for x in (
                    "L",
                    "(L)",
                    "\\text{L}",
                    "\\textbf{(L)}",
                    "L.",
                    "Option L",
                    "\\mathrm{(L)}",
                    "\\textbf{(L)}\\ 12",
                    "\\boxed{L}",
                )
            ],
            [
                x.replace("L", "ABCDE"[(k + 1) % 5])
                for x in ("L", "(L)", "\\text{L}", "\\textbf{(L)}", "L.", "Option L", "\\textbf{(L)}\\ 12")
            ]
            + ["12"],
        ),
        (
            f"{c}\\text{{ cm}}",
            [
                f"{c}",
                f"{c} cm",
                f"{c}\\,\\mathrm{{cm}}",
                f"{c}\\text{{ centimeters}}",
                f"{c} centimeters",
                f"{c}.0\\text{{cm}}",
                f"{c}~\\text{{cm}}",
                f"d={c}\\text{{ cm}}",
            ],
            [
                f"{c}\\text{{ m}}",
                f"{c + 1}\\text{{ cm}}",
                f"{c} km",
                f"{c}0",
                f"-{c}\\text{{ cm}}",
                f"{c}\\text{{ thousand}}",
                f"{c}\\text{{ squared}}",
                f"{c} or {c + 1}",
            ],
        ),
        (
            f"{a}m",
            [f"{a} m", f"m\\cdot {a}", f"{a}\\cdot m", f"{2 * a}m/2", f"m*{a}", f"\\frac{{{a}m}}{{1}}"],
            [f"{a}", f"{a + 1}m", f"{a}n", f"-{a}m", f"{a}m^2", f"{a}km", "m"],
        ),
        (
            f"{p}:{q}",
            [f"{p} : {q}", f"{3 * p}:{3 * q}", f"\\frac{{{p}}}{{{q}}}", f"A:B={p}:{q}", f"{p}/{q}", f"{p}\\!:\\!{q}"],
            [f"{q}:{p}", f"{p}:{q + 1}", f"{p}{q}", f"{p + 1}:{q}", f"{p}, {q}", f"{p}"],
        ),
        (
            f"{c}^\\circ",
            [
                f"{c}",
                f"{c}°",
                f"{c}^{{\\circ}}",
                f"{c} degrees",
                f"{c}\\text{{ degrees}}",
                f"{c}\\degree",
                f"\\angle ABC={c}^\\circ",
                f"{c}˚",
            ],
            [f"{c + 1}^\\circ", f"-{c}^\\circ", f"{c}^2", f"{c}0^\\circ", f"{c}'", f"{180 - c}"],
        ),
        (
            f"{a}.{c}",
            [
                f"{a}.{c}0",
                f"\\frac{{{a}{c}}}{{100}}",
                f"\\${a}.{c}",
                f"{a}.{c}\\text{{ dollars}}",
                f"{a}.{c} kg",
                f"{a}{c}\\times10^{{-2}}",
                f"{a}{c}e-2",
                f"{a}+0.{c}",
            ],
            [f"{a}.{c + 1}", f"{a}{c}", f"{a},{c}", f"-{a}.{c}", f"0.{a}{c}", f"{a}.0{c}", f"{a}"],
        ),
        (
            f"{a}\\frac{{1}}{{{b}}}",
            [
                f"{a} 1/{b}",
                f"\\frac{{{a * b + 1}}}{{{b}}}",
                f"{a}+\\frac1{b}",
                f"{a * b + 1}/{b}",
                f"{a} \\frac1{b}",
                f"{a}\\tfrac{{1}}{{{b}}}",
            ],
            [
                f"\\frac{{{a}}}{{{b}}}",
                f"{a}\\frac{{2}}{{{b}}}" if b > 2 else "1",
                f"{a + 1}\\frac{{1}}{{{b}}}",
                f"-{a}\\frac{{1}}{{{b}}}",
                f"{a}",
                f"{a}1/{b}",
            ],
        ),
        (
            f"({a},{c}),({c},{a})",
            [
                f"({c},{a}),({a},{c})",
                f"\\{{({a},{c}),({c},{a})\\}}",
                f"({a},{c}) \\text{{ and }} ({c},{a})",
                f"({a}, {c}); ({c}, {a})",
                f"(x,y)=({a},{c}),({c},{a})",
                f"({c}, {a}) or ({a}, {c})",
            ],
            [
                f"({a},{c})",
                f"({a},{c}),({c},{a + 1})",
                f"({a},{c}),({a},{c})",
                f"({a},{c},{c},{a})",
                f"({a},{c}),({c},-{a})",
                f"{a},{c},{c},{a}",
            ],
        ),
        (
            f"{a}\\cdot 10^{{{b}}}",
            [
                f"{a}\\times 10^{b}",
                f"{a * 10**b}",
                f"{a}e{b}",
                f"{a}.0\\times10^{{{b}}}",
                f"{a}·10^{b}",
                f"{a}0\\times10^{{{b - 1}}}",
                f"{a * 10**b:,}",
            ],
            [
                f"{a}\\times 10^{{{b + 1}}}",
                f"{a}\\times 10^{{-{b}}}",
                f"{a + 1}\\times10^{{{b}}}",
                f"{a}",
                f"{a}\\cdot 10",
                f"10^{{{a * b}}}",
            ],
        ),
        (
            f"n!-{a}",
            [f"-{a}+n!", f"n\\cdot(n-1)!-{a}", f"(n!)-{a}", f"\\frac{{(n+1)!}}{{n+1}}-{a}", f"n! - {a}"],
            [f"(n+1)!-{a}", f"n-{a}", f"n!+{a}", f"(n-{a})!", "n!", f"{a}-n!"],
        ),
        (
            f"\\frac{{1}}{{{a}^{{{c}}}}}",
            [
                f"{a}^{{-{c}}}",
                f"1/{a}^{{{c}}}",
                f"\\left(\\frac1{a}\\right)^{{{c}}}",
                f"\\frac{{{a}}}{{{a}^{{{c + 1}}}}}",
                f"({a}^{{{c}}})^{{-1}}",
            ],
            [
                f"\\frac{{1}}{{{a}^{{{c - 1}}}}}",
                f"{a}^{{-{c + 1}}}",
                "0",
                f"{a}^{{{c}}}",
                f"-\\frac{{1}}{{{a}^{{{c}}}}}",
                f"\\frac{{{b + a}}}{{{a}^{{{c}}}}}",
                "0.000001",
            ],
        ),
    ]
    return shapes[k % len(shapes)]  # every form is drawn in turn


WRAPPINGS: list[Callable[[str], str]] = [
    lambda s: f"${s}$",
    lambda s: f" {s} ",
    lambda s: f"{s}.",
    lambda s: f"{{{s}}}" if "," not in s else s,
    lambda s: s.replace(",", ",\\ ") if s.startswith(("(", "\\{")) else f"{s}\\,",
    lambda s: f"\\displaystyle {s}",
    lambda s: s.replace("-", "−"),
    lambda s: f"\\boxed{{{s}}}",
    lambda s: f"\\underline{{{s}}}",
    lambda s: f"\\[{s}\\]",
    lambda s: f"\\text{{The answer is }} {s}",
    lambda s: f"{s}\\\\",
]


def generated(forms: int = FORMS, each: int = 10, seed: int = 0) -> Iterator[Pair]:
    """`each` rewritings and `each` near misses of every reference form, spelled in various ways."""
    rng = random.Random(seed)
    references: set[str] = set()
    k = 0
    while len(references) < forms:
        reference, equal, unequal = form(k, rng)
        k += 1
        if reference in references:
            continue
        references.add(reference)
        equal = equal or [
            reference.upper().replace("\\TEXT", "\\text"),
            reference[6:-1],
            f"\\textbf{{{reference[6:-1]}}}",
        ]
        for suite, bases, truth in (("rewritings", equal, True), ("near misses", unequal, False)):
            texts = dict.fromkeys(bases[:each])
            for _ in range(200):
                if len(texts) >= each:
                    break
                texts[rng.choice(WRAPPINGS)(rng.choice([reference, *equal] if truth else unequal))] = None
            for text in [*texts][:each]:
                yield Pair(suite, f"form {k % 33}", reference, text, truth)


# ------------------------------------------------------------------------------------------------------ foreign tests

COMMA = "a comma separates thousands or values and is not a decimal point"
TWO_PLACES = "the test accepts two decimal places; here six are required"
OVERRULED = {
    # the ends of reference and answer as the test has them: why its label does not hold here
    ("1000.99", "1000,99"): COMMA,
    ("1,22", "1.22"): COMMA,
    ("2.74", "Soucis : 2,74 $ a.."): COMMA,
    ("0,111", "0.111"): COMMA,
    ("$9$", "Answer $ \n 9 \n $"): "the test is about finding formulas in a text; here only a boxed answer counts",
    ("$9$", "Answer \\( \n 9 \n \\)"): "the test is about finding formulas in a text; here only a boxed answer counts",
    ("ac{1}{5} \\end{pmatrix})$", "in{pmatrix}0.33\\\\0.2 \\end{pmatrix}$"): TWO_PLACES,
    ("$(\\frac{3}{5},\\frac{8}{3}]$", "$(0.6,2.6667]$"): TWO_PLACES,
    ("35 cm} ++++++ \\\\boxed{4}$", "${35 cm,4}$"): "boxes with plus signs between them are not a list",
    ("\\\\text{ and } W(n) = -1", "W(x)=1orW(x)=-1"): "the box is never closed",
    ("$10455$", "answer is $10,455$. I hope it is correct."): "the last box holds 255",
    ("$x \\in [-2,7]$", "$-2 \\\\le x \\\\le 7$"): "the test switches the comparison of sets with inequalities off",
    ("$f(x)$", "$f(y)$"): "the test renames variables; here a variable is what it is called",
    ("\\frac{1}{\\mathrm{e}}$", "\\frac{1}{\\mathrm{e}}$"): "1 - 1/e is not 1 + 1/e: the label is a mistake",
}
"""Labels of other libraries' tests that this verifier overrules, each with the reason."""
NOT_BOXED = "nothing is boxed, and only a boxed answer counts"


def foreign(folder: Path) -> tuple[list[Pair], list[str]]:
    """Read pairs from the libraries' own tests under `folder`, and a sentence for each library that is missing."""
    pairs, missing = [], []
    files = sorted(folder.glob("math_verify-*/tests/test_*.py")) if folder else []
    if not files:
        missing.append(f"math-verify: no tests under {folder}; download its source distribution, see --help")
    for path in files:
        pairs += [
            p
            for f in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(f, ast.FunctionDef)
            for p in _cases(path.name, f)
        ]
    if not list(folder.glob("latex2sympy2_extended-*/tests/*.py")):
        missing.append("latex2sympy2_extended: its source distribution holds no tests")
    return pairs, missing


def _cases(file: str, function: ast.FunctionDef) -> Iterator[Pair]:
    for mark in function.decorator_list:
        if not (
            isinstance(mark, ast.Call)
            and ast.unparse(mark.func) == "pytest.mark.parametrize"
            and isinstance(mark.args[1], ast.List)
        ):
            continue
        names = re.split(r"\s*,\s*", ast.literal_eval(mark.args[0]))
        for row in mark.args[1].elts:
            try:
                case = dict(zip(names, ast.literal_eval(row), strict=True))
            except ValueError:  # computed by code
                continue
            if "gold" not in case or "pred" not in case:
                continue
            label = case.get("expected", case.get("result"))
            options = tuple(
                (name, case[key])
                for key, name in (
                    ("precision", "float_rounding"),
                    ("strict", "strict"),
                    ("allow_set_relation_comp", "allow_set_relation_comp"),
                )
                if key in case
            )
            pair = answer_in(case["gold"]), answer_in(case["pred"]), bool(label)
            yield Pair("math-verify", f"{file}::{function.name}", *pair, (case["gold"], case["pred"]), options)


def answer_in(text: str) -> str:
    """Extract the answer from a library's test: what is boxed, the text if it is formulas, or the last formula."""
    if re.search(r"\\(?:boxed|fbox)", text):
        return extract_boxed(text.replace("\\\\boxed", "\\boxed")) or ""
    if len(text) < 60 and re.match(r"\s*\$[^$]*\$\W*(?:(?:and|or|\$[^$]*\$|%|percent|miles)\W*)*$", text):
        return text.replace("$", " ").strip()
    formulas = re.findall(r"(?<!\\)\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", text, re.S)
    return next((g for g in formulas[-1] if g), "") if formulas else text


# ------------------------------------------------------------------------------------------------------------ judging

ALONE = """
import json, logging, sys
from math_verify import LatexExtractionConfig, ExprExtractionConfig, parse, verify
logging.disable(logging.CRITICAL)
print("ready", flush=True)
for line in sys.stdin:
    answer, reference, whole, options = json.loads(line)
    config = [LatexExtractionConfig()]
    if whole:
        config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    else:
        answer, reference = (f"${x.strip('$')}$" for x in (answer, reference))
    try:
        ours, theirs = (parse(x, extraction_config=config, parsing_timeout=10) for x in (answer, reference))
        ok = bool(verify(theirs, ours, timeout_seconds=10, **options))
    except Exception:
        ok = False
    print(json.dumps(ok), flush=True)
"""


class MathVerify:
    """math-verify called as documented, in a separate process, with one line of JSON per pair."""

    def __enter__(self) -> "MathVerify":
        self.process = subprocess.Popen(
            [sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.process.stdout.readline()
        return self

    def __exit__(self, *args: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def judge(self, p: Pair) -> bool:
        assert self.process.stdin and self.process.stdout
        reference, answer = p.whole if p.whole[0] else (p.reference, p.answer)
        self.process.stdin.write(json.dumps([answer, reference, bool(p.whole[0]), dict(p.options)]) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() == "true"


def strings(p: Pair) -> bool:
    return p.answer.strip("$ ") == p.reference.strip("$ ")


class Judged(NamedTuple):
    pair: Pair
    ours: bool
    alone: bool

    @property
    def overruled(self) -> str:
        """Why the label of a library's test does not count; empty if it does."""
        if not self.pair.whole[0] or self.ours == self.pair.equal:
            return ""
        reference, answer = (x.strip() for x in self.pair.whole)
        for (one, two), reason in OVERRULED.items():
            if reference.endswith(one) and answer.endswith(two):
                return reason
        prose = "boxed" not in answer and re.search(r"[a-z']{2,} [a-z']{2,} ", answer)
        return NOT_BOXED if prose else ""


def suites(folder: Path) -> tuple[list[Pair], list[str]]:
    pairs, missing = foreign(folder)
    own = from_file("answer_pairs.jsonl", "repository", "source") + from_file("fault_pairs.jsonl", "faults", "kind")
    return [*own, *rules(), *generated(), *pairs], missing


def judge(pairs: list[Pair]) -> list[Judged]:
    with Verifier(timeout_s=30) as verifier, MathVerify() as alone:
        return [Judged(p, verifier.grade([(p.answer, p.reference)])[0], alone.judge(p)) for p in pairs]


def table(judged: list[Judged]) -> list[str]:
    """Format one row per suite: wrong pairs accepted, right pairs refused, pairs that only math-verify judges right."""
    rows = [
        "| suite | pairs | wrong accepted: ours, math-verify, strings | right refused: ours, math-verify, strings "
        "| math-verify right, ours wrong |",
        "|---|---|---|---|---|",
    ]
    for suite in dict.fromkeys(j.pair.suite for j in judged):
        of = [j for j in judged if j.pair.suite == suite and not j.overruled]
        wrong, right = [j for j in of if not j.pair.equal], [j for j in of if j.pair.equal]

        def share(n: int, of: int) -> str:
            return f"{n} ({100 * n / max(of, 1):.1f} %)"

        accepted = [sum(f(j) for j in wrong) for f in (lambda j: j.ours, lambda j: j.alone, lambda j: strings(j.pair))]
        refused = [
            sum(not f(j) for j in right) for f in (lambda j: j.ours, lambda j: j.alone, lambda j: strings(j.pair))
        ]
        better = sum(j.alone == j.pair.equal != j.ours for j in of)
        rows.append(
            f"| {suite} | {len(of)} | {', '.join(share(n, len(wrong)) for n in accepted)} | "
            f"{', '.join(share(n, len(right)) for n in refused)} | {better} |"
        )
    return rows


def speed(pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """Measure pairs per second by kind, each side through one worker; the fastest of three turns counts."""
    kinds: dict[str, list[Pair]] = defaultdict(list)
    for p in pairs:
        kinds[f"{p.suite} {p.kind}"].append(p)
        kinds[f"{p.suite}, all"].append(p)
    out: dict[str, dict[str, float]] = {}
    with MathVerify() as alone:
        alone.judge(pairs[0])
        for kind, of in kinds.items():
            times: dict[str, list[float]] = {"ours": [], "math-verify": []}
            for _ in range(3):
                with Verifier(timeout_s=30) as verifier:  # a new one each time, because a Verifier caches its verdicts
                    verifier.worker._start()
                    began = time.perf_counter()
                    for p in of:
                        verifier.grade([(p.answer, p.reference)])
                    times["ours"].append(time.perf_counter() - began)
                began = time.perf_counter()
                for p in of:
                    alone.judge(p)
                times["math-verify"].append(time.perf_counter() - began)
            out[kind] = {name: len(of) / min(t) for name, t in times.items()}
            out[kind]["ratio"] = out[kind]["ours"] / out[kind]["math-verify"]
    return out


def cell(text: str) -> str:
    return f"`{text}`".replace("|", "\\|").replace("\n", " ") if text else ""


def rule_tables() -> str:
    """Format the rules for the page: how answers are read, then how types are compared."""
    out = [
        "## How an answer is read",
        "",
        "The types are tried in this order; the first one that matches the text is used.",
        "",
    ]
    for r in READERS:
        out += [f"**{r.type.capitalize()}.** {r.rule} {r.reason}".strip(), "", *_examples(r.pairs)]
    out += ["## How two types are compared", "", "A pair of types that is not listed is not equal.", ""]
    rows: dict[tuple[str, str], list[str]] = {}
    pairs: dict[tuple[str, str], list[tuple[str, str, bool]]] = {}
    for c in COMPARISONS:
        types = f"{c.answer.__name__} with {c.reference.__name__}".lower() + (", either side" if c.both_ways else "")
        rows.setdefault((c.rule, c.reason), []).append(types)
        pairs.setdefault((c.rule, c.reason), []).extend(c.pairs)
    for (rule, reason), types in rows.items():
        out += [f"**{'; '.join(types).capitalize()}.** {rule} {reason}".strip(), "", *_examples(pairs[rule, reason])]
    return "\n".join(out)


def _examples(pairs: Iterable[tuple[str, str, bool]]) -> list[str]:
    rows = [
        f"| {cell(reference)} | {cell(answer)} | {'yes' if equal else 'no'} |" for reference, answer, equal in pairs
    ]
    return ["| reference | answer | equal |", "|---|---|---|", *rows, ""] if rows else []


INTRODUCTION = """# Which answers count as equal

The answer is the content of a response's last `\\boxed{}`. Boxes that the last sentence joins by a comma or `and` are
one list; an empty box does not count. Answer and reference are each read as a type, such as a number, a list or an
interval, and compared by the rule for the two types. This page is generated from the rules in
`lead_fast/reward/answers.py`, and a test tries every example. To try an answer yourself:

    python -c "from lead_fast.reward.answers import decide; print(decide('ANSWER', 'REFERENCE'))"

It prints True, False, or None. None means that no rule decides; in a run, math-verify then decides, in a process whose
CPU time is limited (`--reward.verifier_timeout_s`).
"""


def write_page(
    judged: list[Judged], missing: list[str], local: int, total: int, rates: dict[str, dict[str, float]]
) -> None:
    """Write docs/answers.md: the rules and the measurements."""
    overruled = dict.fromkeys(
        (cell(j.pair.whole[0][-60:]), cell(j.pair.whole[1][-60:]), j.overruled) for j in judged if j.overruled
    )
    out = [INTRODUCTION, rule_tables(), "## Measured", ""]
    out += [
        "`python bench/verifier.py --suites FOLDER --speed --docs`, "
        "where FOLDER holds the unpacked source distributions:",
        "",
    ]
    out += [*table(judged), "", *(f"Missing: {m}." for m in missing), ""]
    out += [f"{local} of {total} pairs are decided without a worker.", ""]
    if rates:
        out += [
            "Pairs per second, each verifier in one process (the fastest of three turns):",
            "",
            "| pairs | ours | math-verify | ratio |",
            "|---|---|---|---|",
        ]
        out += [
            f"| {kind} | {r['ours']:.0f} | {r['math-verify']:.0f} | {r['ratio']:.1f} |" for kind, r in rates.items()
        ]
        out.append("")
    out += [
        "Labels in math-verify's tests that this verifier overrules, with the end of each text:",
        "",
        "| reference | answer | reason |",
        "|---|---|---|",
    ]
    out += [f"| {one} | {two} | {reason} |" for one, two, reason in overruled]
    (ROOT / "docs" / "answers.md").write_text("\n".join(out) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suites", type=Path, default=ROOT / "build" / "suites", help="folder with the unpacked source distributions"
    )
    parser.add_argument(
        "--show", action="store_true", help="print every pair whose label this verifier does not follow"
    )
    parser.add_argument("--speed", action="store_true", help="measure pairs per second by kind")
    parser.add_argument("--docs", action="store_true", help="write docs/answers.md with these numbers")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    pairs, missing = suites(args.suites)
    judged = judge(pairs)
    print("\n".join([*table(judged), *(f"Missing: {m}." for m in missing)]))
    if args.show:
        for j in judged:
            p = j.pair
            if j.ours != p.equal:
                verdict = "refused" if p.equal else "ACCEPTED"
                texts = " | ".join(repr(t[-60:]) for t in (p.whole if p.whole[0] else (p.reference, p.answer)))
                print(f"{verdict}: {p.suite} {p.kind}: {texts}; {j.overruled or 'NOT overruled'}")
    local = sum(quick(p.answer, p.reference) is not None for p in pairs)
    print(f"Decided without a worker: {local} of {len(pairs)} ({100 * local / len(pairs):.1f} %).")
    rates = speed([p for p in pairs if p.suite in ("repository", "faults")]) if args.speed else {}
    for kind, r in rates.items():
        print(f"{kind:30} {r['ours']:9.0f} {r['math-verify']:9.0f} pairs per second, ratio {r['ratio']:.1f}")
    if args.docs:
        write_page(judged, missing, local, len(pairs), rates)
    if args.out:
        args.out.write_text(json.dumps({"table": table(judged), "speed": rates}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
