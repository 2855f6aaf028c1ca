"""Malicious and nonsensical answers and problems for test_hostile.py and soak.py, generated from a seed.

A case is (answer text, reference). The text never states the reference, so it must never be judged right.
"""

import random
from collections.abc import Iterator

GOLDS = [
    "987123",
    r"\frac{98712}{31}",
    "x^2+98712",
    "(98712,31)",
    r"\{98712,31\}",
    "98712.31",
    r"\sqrt{98712}",
    "[98712,\\infty)",
]

CODE = [
    "__import__('os').system('touch MARK')",
    "open('MARK','w')",
    "exec(\"open('MARK','w')\")",
    "().__class__.__bases__[0].__subclasses__()",
    "eval('1')",
    "os.system('touch MARK')",
    "`touch MARK`",
    "$(touch MARK)",
    "{{7*7}}",
    "%s%s%n",
    "'; DROP TABLE answers; --",
    "<script>fetch('http://x')</script>",
    "\\input{/etc/passwd}",
    "\\write18{touch MARK}",
    "\\immediate\\openout1=MARK",
    "lambda: open('MARK','w')",
    "[open('MARK','w') for _ in [0]]",
    "@open('MARK','w')",
    "exit()",
    "quit()",
    "raise SystemExit",
]
FORMS = [
    "X",
    r"\text{X}",
    r"\{X\}",
    "(X,2)",
    r"\operatorname{X}(x)",
    "x_{X}",
    r"\sqrt[X]{2}",
    r"\frac{X}{2}",
    r"x=\text{X}",
    r"\sum_{i=X}^3 1",
    r"\mathrm{X}",
    r"\begin{pmatrix}X\end{pmatrix}",
    r"\int_X^1 x dx",
    r"\lim_{x\to X} x",
]
UNICODE = [
    "９８７",
    "४५६",
    "Ⅻ",
    "①",
    "½½",
    "𝟗𝟖𝟕",
    "9\u200b8\u200b7",
    "\u202e321",
    "9\u0301",
    "\ufeff9",
    "\ud800",
    "🤖" * 50,
    "é" * 300,
    "\u2028",
    "٩",
    "x\u20d7",
    "−−1",
    "∞∞",
    "√√2",
    "⁹⁸⁷",
    "₉₈₇",
    "＋1",
    "1⁄2",
    "\u00ad9",
    "e\u0301" * 99,
]
TOWERS = [
    "9^{9^{9^{9}}}",
    "9^9^9^9",
    "10^{10^{100}}",
    "99999999999!",
    "((((3!)!)!)!)!",
    "2^{100000000}",
    r"2\uparrow\uparrow\uparrow 9",
    r"\binom{10^{9}}{5\cdot10^{8}}",
    r"\sum_{k=1}^{10^{12}} \frac{1}{k}",
    r"\prod_{k=1}^{10^9} k",
    "7^{7^{7^{7}}} \\bmod 10",
]
STALLS = [
    "(x+y+z+w)^{300}",
    r"\int_0^1 e^{e^{e^{x}}} dx",
    r"\sum_{k=1}^{99999} \sin(k^k)",
    "(a+b+c)^{200}-(c+b+a)^{199}",
]
MARKERS = [
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "<|im_start|>system",
    "<|im_end|>",
    "<｜User｜>",
    "<｜end▁of▁sentence｜>",
    "</think>",
    "<think>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "{{ messages }}",
    "{% for m in messages %}",
    "<<SYS>>",
]


def handmade() -> Iterator[str]:
    for box in (
        "\\boxed{X}",
        "\\boxed X",
        "\\fbox{X}",
        "\\boxed {X}",
        "\\boxed{\\boxed{X}}",
        "<think>\\boxed{1}</think>\\boxed{X}",
    ):
        for x in [
            *CODE[:6],
            *UNICODE[:6],
            *TOWERS[:6],
            *MARKERS[:6],
            "",
            " ",
            "\\",
            "{",
            "}",
            "\\}",
            "%",
            "#",
            "&",
            "~",
            "$",
            "$$",
            "\n",
        ]:
            yield box.replace("X", x)
    for code in CODE:
        for form in FORMS:
            yield "\\boxed{" + form.replace("X", code) + "}"
    for x in (*UNICODE, *TOWERS, *MARKERS):
        yield "\\boxed{" + x + "}"
        yield x
    for n in (10, 900, 10_000):
        yield "\\boxed{" * n + "5" + "}" * n
        yield "\\boxed{" + "{" * n + "5" + "}" * n + "}"
        yield "\\boxed{" + "(" * n + ")" * n + "}"
        yield "\\boxed{" + "\\sqrt{" * n + "2" + "}" * n + "}"
        yield "\\boxed{" + "\\frac{1}{" * n + "2" + "}" * n + "}"
        yield "\\boxed{" + "-" * n + "5}"
        yield "\\boxed{" + "\\left(" * n + "}"
        yield "\\boxed{" + "9" * n + "}"
        yield "\\boxed{" + "1+" * n + "1}"
        yield "\\boxed{" + "\\text{" * n + "}" * n + "}"
        yield "\\boxed " * n
        yield "<think>" * n + "</think>" * n
    for x in ("\x00", "\x1b[2J\x1b[31m", "\r", "\b" * 50, "\x7f", "\x85", "\x0b\x0c", "\x00" * 900):
        yield "\\boxed{5" + x + "}"
    yield "\\" * 1_000_000
    yield "}" * 1_000_000 + "\\boxed{1}"
    yield "{" * 1_000_000
    yield "\\boxed{" + "9" * 1_000_000 + "}"
    yield "word " * 300_000
    yield "$" * 500_000 + "\\boxed{" + "$" * 900 + "}"


def generated(n: int, seed: int = 0) -> Iterator[str]:
    """Generate answers from random pieces, inside and outside boxes."""
    rng = random.Random(seed)
    pieces = [
        *CODE,
        *UNICODE,
        *MARKERS,
        *TOWERS[:5],
        *FORMS,
        "\\boxed{",
        "\\boxed",
        "\\fbox{",
        "}",
        "{",
        "}}",
        "\\frac",
        "\\frac{",
        "^{",
        "_{",
        "^",
        "_",
        "!",
        "!!",
        "\\left(",
        "\\right)",
        "\\sqrt",
        "\\text{",
        ",",
        ";",
        "=",
        "\\le",
        "\\in",
        "\\cup",
        "[",
        ")",
        "\\%",
        "\\\\",
        "&",
        "1",
        "2",
        "3.5",
        "0",
        "-",
        "+",
        "*",
        "/",
        "\\pi",
        "x",
        "e",
        "i",
        "\\infty",
        "\\begin{cases}",
        "\\end{cases}",
        "\n",
        "\t",
        "\x00",
        " " * 40,
        "\\overline{",
        "'",
        '"',
    ]
    for _ in range(n):
        inside = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        yield rng.choice(
            ["\\boxed{X}", "\\boxed{X", "X", "so \\boxed{X} and", "\\boxed{X}\\boxed{X}", "\\fbox{X}"]
        ).replace("X", inside)


def cases(n_generated: int, mark: str, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Return cases (answer text, reference); `mark` is the file that code in an answer would create."""
    rng = random.Random(seed)
    for text in (*handmade(), *generated(n_generated, seed)):
        yield text.replace("MARK", mark), rng.choice(GOLDS)
