"""Read formulas: from the text of an answer to tokens, and from tokens to trees; LaTeX, plain text and Unicode alike.

`spelled` gives one spelling to everything that looks the same and drops nothing that carries meaning; `tokens` splits
it; `Parser` reads a formula by the usual precedence. A parser raises `Unread`, and nothing else, for what it cannot
read. If a spelling has two readings (a/bc, ln 2 x), the formula is marked ambiguous: it may be found equal, but not
unequal.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from .algebra import Node


class Unread(Exception):
    """The text is not a formula of a kind that this module reads."""


class Token(NamedTuple):
    kind: str  # num, run (letters), cmd (\\name), text (the words of \\text{...}), sym
    text: str
    spaced: bool = False  # preceded by a space


# ------------------------------------------------------------------------------------------------------------ spelling

SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "✕": r"\times ", "✖": r"\times ",
    "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "Ø": r"\emptyset ",
    "ø": r"\emptyset ", "⌀": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ", "˚": r"^\circ ",
    "º": r"^\circ ", "∘": r"\circ ", "ℝ": r"\mathbb{R} ", "∣": "|", "′": "'", "’": "'",
    "…": r"\ldots ", "⋯": r"\ldots ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "µ": r"\mu ", "‰": r"\permil ",
    "𝑖": "i", "𝜋": r"\pi ", "∖": r"\setminus ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "，": ", ", "、": ", ", "；": "; ", "。": ".",
}  # fmt: skip
SIGNS |= {chr(code): rf"\{name} " for name, code in {
    "alpha": 945, "beta": 946, "gamma": 947, "delta": 948, "epsilon": 949, "zeta": 950, "eta": 951, "theta": 952,
    "iota": 953, "kappa": 954, "lambda": 955, "mu": 956, "nu": 957, "xi": 958, "rho": 961, "sigma": 963, "tau": 964,
    "phi": 966, "chi": 967, "psi": 968, "omega": 969, "Gamma": 915, "Delta": 916, "Theta": 920, "Lambda": 923,
    "Sigma": 931, "Phi": 934, "Psi": 936, "Omega": 937}.items()}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₘₖᵢⱼ", "0123456789+-=()nmkij", strict=True))
_BIDI = re.compile("[\u202a-\u202e\u2066-\u2069\u061c]")
_DECORATION = re.compile(
    r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr|middle)(?![a-zA-Z])\.?"
    r"|\\(?:displaystyle|textstyle|limits|nolimits|strut|hfill|qed|square|blacksquare|Box|checkmark)(?![a-zA-Z])"
    r"|(?<!\\)\\(?:begin|end)\s*\{(?:aligned|align\*?|equation\*?|gathered|split|center)\}"
)
_DOUBLED = re.compile(  # escaped once too often: a line break is not followed by the name of a command
    r"(?<!\\)\\\\(?=(?:left|right|d?frac|sqrt|pi|leq?|geq?|cdot|times|text|infty|cup|boxed|mathbb|pm|begin|end)(?![a-z]))"
)
_WRAPPED = re.compile(
    r"\\(?:boxed|fbox|framebox|underline|mathsf|mathtt|mathnormal|boldsymbol|bm|pmb|textnormal|ensuremath|mathord|mathop"
    r"|(?:text|math)?color\s*\{[^{}]*\}|textcolor\s*\{[^{}]*\}|displaylines|phantom)\s*\{"
)


def spelled(text: str) -> str:
    """Give one spelling to what is read alike; characters that change the writing direction make it unreadable."""
    if _BIDI.search(text):
        raise Unread
    text = re.sub(r"(?<!\\)\\\s*$", "", text)  # what is left of a trailing "\ "
    if not text.isascii():
        text = _plain(text)
    s = "".join(c for c in text if c.isprintable() or c in "\n\t")
    s = re.sub(r"(?<!\\)\\(?:\[|\]|\(|\))", " ", s) if "\\" in s else s
    s = re.sub(r"^\s*\*\*(.*)\*\*\s*$", r"\1", s).replace("**", "^") if "**" in s else s
    s = re.sub(r"(?<!\\)\$", "", s)
    s = _DOUBLED.sub(r"\\", s) if r"\\" in s else s
    s = re.sub(r",\s*\\!\s*(?=\d)", "{,}", s)
    s = re.sub(r"(?<!\\)\\!", "", s)
    s = _DECORATION.sub(" ", s) if "\\" in s else s
    while m := _WRAPPED.search(s):
        inside, rest = group(s, m.end())
        s = f"{s[: m.start()]} {inside} {rest}"
    s = re.sub(r"\\[dtc]frac(?![a-zA-Z])|\\nicefrac(?![a-zA-Z])|\\sfrac(?![a-zA-Z])", r"\\frac", s)
    s = re.sub(r"\\[dt]binom(?![a-zA-Z])", r"\\binom", s)
    s = re.sub(r"(?<=\d)\{,\}(?=\d{3})", "", s)
    s = re.sub(r"(?<!\\)\\[,;: ]|~|\\(?:thin|med|thick)space(?![a-zA-Z])|\\[hm]space\*?\s*\{[^{}]*\}", " ", s)
    return s.strip()


def _plain(text: str) -> str:
    """Convert Unicode letters, digits, signs, roots, fractions, powers and indices to ASCII."""
    out: list[str] = []
    for c in text:
        if c in SIGNS:
            out.append(SIGNS[c])
        elif c in _RAISED or c in _LOWERED:
            out.append(c)
        elif c in "√∛∜":
            out.append(c)
        elif c.isascii():
            out.append(c)
        elif unicodedata.category(c) == "Cf":
            continue
        elif unicodedata.category(c) == "Nd":
            out.append(str(unicodedata.digit(c)))
        elif unicodedata.category(c) == "No" and "⁄" in unicodedata.normalize("NFKC", c):
            top, bottom = unicodedata.normalize("NFKC", c).split("⁄")
            out.append(rf"\frac{{{top}}}{{{bottom}}}" if bottom else c)
        elif "\uff01" <= c <= "\uff5e" or "\U0001d400" <= c <= "\U0001d7ff" or c == "\u3000":
            plain = unicodedata.normalize("NFKC", c)
            out.append(SIGNS.get(plain, plain))
        else:
            out.append(c)
    s = "".join(out)
    for signs, mark in ((_RAISED, "^"), (_LOWERED, "_")):
        s = re.sub(f"[{''.join(signs)}]+", lambda m: f"{mark}{{{''.join(signs[c] for c in m.group())}}}", s)  # noqa: B023
    for sign, command in (("√", r"\sqrt"), ("∛", r"\sqrt[3]"), ("∜", r"\sqrt[4]")):
        s = re.sub(rf"{sign}\s*(\d+(?:\.\d+)?|[a-zA-Z])", lambda m: f"{command}{{{m.group(1)}}}", s)  # noqa: B023
        while (k := s.find(sign)) >= 0:
            rest = s[k + 1 :].lstrip()
            if not rest.startswith("("):
                s = f"{s[:k]}{command} {rest}"
                continue
            inside, after = group(rest, 1, "()")
            s = f"{s[:k]}{command}{{{inside}}}{after}"
    return s


def group(s: str, start: int, brackets: str = "{}") -> tuple[str, str]:
    """The text before the bracket that closes the one before `start`, and the text after it."""
    depth = 1
    for i in range(start, len(s)):
        if s[i] == brackets[0]:
            depth += 1
        elif s[i] == brackets[1]:
            depth -= 1
            if depth == 0:
                return s[start:i], s[i + 1 :]
    raise Unread


# -------------------------------------------------------------------------------------------------------------- tokens

_TOKEN = re.compile(
    r"(?P<text>\\(?:text(?:rm|bf|it|sf|tt|up|normal)?|mathrm|mathbf|mathit|mbox|operatorname\*?|hbox|emph)"
    r"\s*\{(?P<words>(?:[^{}\\]|\\[ ,;:!~%$]|\{[^{}]*\}|\\text\w*\{[^{}]*\})*)\})"
    r"|(?P<cmd>\\[a-zA-Z]+|\\.)|(?P<num>\d+(?:\.\d+)?|\.\d+)|(?P<run>[a-zA-Z]+)|(?P<space>\s+)|(?P<sym>.)",
    re.S,
)
FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "tg": "tan", "cot": "cot", "ctg": "cot", "sec": "sec", "csc": "csc",
    "ln": "ln", "log": "log", "lg": "lg", "exp": "exp", "arcsin": "arcsin", "arccos": "arccos", "arctan": "arctan",
    "arctg": "arctan", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "sinh": "sinh", "cosh": "cosh",
    "tanh": "tanh", "gcd": "gcd", "lcm": "lcm", "max": "max", "min": "min", "sqrt": "sqrt", "det": "det",
}  # fmt: skip
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
PLAIN = {"pi": r"\pi", "infinity": r"\infty", "infty": r"\infty", "inf": r"\infty", "oo": r"\infty",
         "theta": r"\theta", "alpha": r"\alpha", "beta": r"\beta", "gamma": r"\gamma", "lambda": r"\lambda",
         "omega": r"\omega", "cup": r"\cup", "union": r"\cup", "U": r"\cup"}  # fmt: skip
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\lt": "<", r"\gt": ">", r"\le": "<=", r"\leq": "<=", r"\leqslant": "<=",
             r"\ge": ">=", r"\geq": ">=", r"\geqslant": ">=", r"\ne": "!=", r"\neq": "!=", r"\in": "in",
             r"\approx": "~", r"\sim": "~", r"\simeq": "~", r"\doteq": "~", r"\equiv": "=="}  # fmt: skip
GREEK = set("alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho "
            "sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar"
            .split())  # fmt: skip
ACCENTS = {r"\overline", r"\bar", r"\vec", r"\hat", r"\widehat", r"\tilde", r"\dot", r"\ddot", r"\mathbf", r"\mathcal",
           r"\overrightarrow", r"\mathit", r"\mathscr", r"\mathfrak"}  # fmt: skip
BRACKETS = {r"\{": r"\{", r"\}": r"\}", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lvert": "|", r"\rvert": "|",
            r"\vert": "|", r"\|": r"\|", r"\mid": r"\mid", r"\lbrack": "[", r"\rbrack": "]"}  # fmt: skip
CALLED = set("fghuFGHPQRSTW")  # letters that are functions before a bracket


def tokens(s: str) -> list[Token]:
    out: list[Token] = []
    spaced = False
    for m in _TOKEN.finditer(s):
        kind = m.lastgroup if m.lastgroup != "words" else "text"
        if m.group("text") is not None:
            kind = "text"
        if kind == "space":
            if "\n\n" in m.group():
                out.append(Token("sym", "\n", spaced))
            elif "\n" in m.group():
                out.append(Token("sym", "\n", spaced))
            spaced = True
            continue
        text = m.group()
        if kind == "text":
            words = re.sub(r"\\[ ,;:!]|~|[{}]|\\text\w*", " ", m.group("words")).strip()
            name = words.replace(" ", "")
            if name in FUNCTIONS and name not in ("min", "max"):
                out.append(Token("cmd", "\\" + name, spaced))
            elif name in ("e", "i", "d") and "text" not in text[:6]:
                out.append(Token("run", name, spaced))
            else:
                out.append(Token("text", words, spaced))
        elif kind == "run" and text in FUNCTIONS and text not in ("tg", "lg", "det", "min", "max"):
            out.append(Token("cmd", "\\" + text, spaced))
        elif kind == "run" and text in PLAIN and (len(text) > 1 or spaced):
            out.append(Token("cmd", PLAIN[text], spaced))
        elif kind == "cmd" and text in BRACKETS:
            out.append(Token("sym", BRACKETS[text], spaced))
        elif kind == "cmd" and text in (r"\\", r"\quad", r"\qquad", r"\newline"):
            out.append(Token("sym", "\n" if text != r"\\" else r"\\", spaced))
        else:
            out.append(Token(kind or "sym", text, spaced))
        spaced = False
    merged: list[Token] = []
    for t in out:  # <=, >=, and != with a space before it (n!=6 is a factorial)
        if (
            t.text == "="
            and merged
            and not t.spaced
            and merged[-1].text in ("<", ">", "!")
            and (merged[-1].text != "!" or merged[-1].spaced)
        ):
            merged[-1] = Token("cmd", {"<": r"\le", ">": r"\ge", "!": r"\ne"}[merged[-1].text], merged[-1].spaced)
        else:
            merged.append(t)
    return merged


OPEN = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
    r"\langle": r"\rangle",
}
CLOSE = set(OPEN.values())


def split(ts: list[Token], at: set[str]) -> tuple[list[list[Token]], list[str]]:
    """Split at separators outside brackets and environments; returns pieces and separators, cutting no interval."""
    if at.isdisjoint([t.text.lower() for t in ts]):
        return [list(ts)], []
    parts: list[list[Token]] = [[]]
    between: list[str] = []
    depth = 0
    for t in ts:
        if t.text in OPEN or t.text == r"\begin":
            depth += 1
        elif t.text in CLOSE or t.text == r"\end":
            depth -= 1
        sep = t.text.lower() if t.kind in ("text", "run") else t.text
        if depth == 0 and sep in at and not (t.kind == "run" and len(sep) < 2):
            parts.append([])
            between.append(sep)
        else:
            parts[-1].append(t)
    return parts, between


def closes(ts: list[Token]) -> int:
    """Index of the bracket that closes the first token, counting interval brackets alike; -1 if there is none."""
    depth = 0
    for i, t in enumerate(ts):
        if t.text in OPEN:
            depth += 1
        elif t.text in CLOSE:
            depth -= 1
            if depth == 0:
                return i
    return -1


# ------------------------------------------------------------------------------------------------------------- parsing

TERM_END = {")", "]", "}", r"\}", "+", "-", ",", ";", "|", r"\rfloor", r"\rceil", r"\rangle", r"\pm", r"\mp", "=", ":"}


class Parser:
    """Read one formula; all tokens must be used."""

    def __init__(self, ts: list[Token]):
        self.ts, self.at, self.depth = list(ts), 0, 0
        self.ambiguous = self.degrees = False
        self.angle = self.bars = 0

    def formula(self) -> Node:
        try:
            node = self.sum()
        except (IndexError, ZeroDivisionError) as e:
            raise Unread from e
        if self.at < len(self.ts):
            raise Unread
        return node

    @property
    def next(self) -> Token | None:
        return self.ts[self.at] if self.at < len(self.ts) else None

    def take(self, text: str | None = None) -> Token:
        t = self.ts[self.at]
        if text is not None and t.text != text:
            raise Unread
        self.at += 1
        return t

    def seen(self, *texts: str) -> bool:
        t = self.next
        return t is not None and t.text in texts and t.kind != "text"

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > 40:
            raise Unread
        terms = [self.signed()]
        while self.seen("+", "-"):
            minus = self.take().text == "-"
            term = self.signed()
            terms.append(("*", [("num", Fraction(-1)), term]) if minus else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("+", terms)

    def signed(self) -> Node:
        if self.seen("-"):
            self.take()
            return ("*", [("num", Fraction(-1)), self.product()])
        if self.seen("+"):
            self.take()
        return self.product()

    def product(self) -> Node:
        node = self.factor(first=True)
        while t := self.next:
            if self.seen("*", r"\cdot", r"\times", r"\ast"):
                self.take()
                node = ("*", [node, self.minus_factor()])
            elif self.seen("/", r"\div"):
                self.take()
                node = ("/", node, self.minus_factor())
                if self.starts():
                    self.ambiguous = True
            elif self.starts():
                if t.kind == "num":
                    before = self.ts[self.at - 1]
                    if before.kind == "num":
                        raise Unread
                    self.ambiguous = True
                node = ("*", [node, self.factor()])
            else:
                break
        return node

    def minus_factor(self) -> Node:
        if self.seen("-"):
            self.take()
            return ("*", [("num", Fraction(-1)), self.factor()])
        return self.factor()

    def starts(self) -> bool:
        t = self.next
        if t is None or t.kind == "text":
            return t is not None and t.text in FUNCTIONS
        if t.kind in ("num", "run"):
            return True
        if t.kind == "cmd":
            name = t.text[1:]
            return (
                name in GREEK or name in FUNCTIONS or t.text in ACCENTS
                or name in ("pi", "frac", "sqrt", "binom", "lfloor", "lceil", "imath", "det")
            )  # fmt: skip
        return t.text in ("(", "[", "{") or (t.text == "|" and not self.bars)

    def factor(self, first: bool = False) -> Node:
        start = self.at
        node = self.base()
        if first and self.ts[start].kind == "num" and self.at == start + 1 and "." not in self.ts[start].text:
            node = self.mixed(node)
        while True:
            if self.seen("^"):
                self.take()
                if self.seen(r"\circ"):
                    self.take()
                    node = self.degree(node)
                    continue
                if self.seen("{") and self.at + 2 < len(self.ts) and self.ts[self.at + 1].text == r"\circ":
                    self.at += 2
                    self.take("}")
                    node = self.degree(node)
                    continue
                node = ("^", node, self.script())
            elif self.seen("!"):
                self.take()
                if self.seen("!"):
                    raise Unread
                node = ("fn", "factorial", [node])
            elif self.seen(r"\degree"):
                self.take()
                node = self.degree(node)
            elif self.seen(r"\%", "%") and self.depth > 1:
                raise Unread
            else:
                return node

    def degree(self, node: Node) -> Node:
        if self.angle:
            return ("*", [node, ("/", ("const", "pi"), ("num", Fraction(180)))])
        self.degrees = True
        return node

    def mixed(self, whole: Node) -> Node:
        """Read 3 1/2 in LaTeX: a whole number before a proper fraction of whole numbers."""
        if not self.seen(r"\frac"):
            return whole
        mark = self.at
        _, top, bottom = self.base()
        number = top[0] == bottom[0] == "num" and top[1].denominator == bottom[1].denominator == 1
        if number and 0 < top[1] < bottom[1]:
            return ("num", whole[1] + top[1] / bottom[1])
        self.at = mark
        return whole

    def script(self) -> Node:
        """Read an exponent: a group, or one factor without its own power."""
        if self.seen("{"):
            return self.braced()
        if self.seen("-", "+"):
            minus = self.take().text == "-"
            node = self.base()
            return ("*", [("num", Fraction(-1)), node]) if minus else node
        t = self.next
        if t and t.kind == "num" and len(t.text) > 1:
            self.ambiguous = True  # LaTeX raises the first digit, plain text the number
        return self.base()

    def braced(self) -> Node:
        self.take("{")
        node = self.sum()
        self.take("}")
        return node

    def argument(self) -> Node:
        """Read a macro's argument: a group, a command, or one character."""
        if self.seen("{"):
            return self.braced()
        t = self.take()
        if t.kind in ("num", "run") and len(t.text) > 1:
            if "." in t.text:
                raise Unread
            self.at -= 1
            self.ts[self.at : self.at + 1] = [Token(t.kind, t.text[0], t.spaced), Token(t.kind, t.text[1:])]
            return self.base()
        self.at -= 1
        return self.base()

    def base(self) -> Node:
        t = self.take()
        if t.kind == "num":
            return ("num", Fraction(t.text))
        if t.kind == "run":
            return self.letters(t)
        if t.kind == "cmd":
            return self.command(t)
        if t.text in ("(", "[", "{"):
            outer, self.bars = self.bars, 0
            node = self.sum()
            self.take({"(": ")", "[": "]", "{": "}"}[t.text])
            self.bars = outer
            return node
        if t.text == "|":
            return self.between("|", "abs")
        raise Unread

    def between(self, end: str, function: str) -> Node:
        self.bars += end == "|"
        node = self.sum()
        self.take(end)
        self.bars -= end == "|"
        return ("fn", function, [node])

    def letters(self, t: Token) -> Node:
        """Read the first letter of a run and leave the others."""
        if len(t.text) > 1:
            self.at -= 1
            self.ts[self.at : self.at + 1] = [Token("run", t.text[0], t.spaced), Token("run", t.text[1:])]
            self.take()
        return self.name(t.text[0])

    def name(self, letter: str) -> Node:
        index = ""
        if self.seen("_"):
            self.take()
            index = self.index()
        while self.seen("'"):
            self.take()
            index += "'"
        if not index and letter in ("e", "i"):
            return ("const", letter)
        full = f"{letter}_{index}" if index else letter
        called = (
            letter in CALLED or letter in (r"\phi", r"\varphi", r"\Gamma", r"\zeta", r"\psi") or index.endswith("'")
        )
        if called and self.seen("(") and not (self.next and self.next.spaced and letter not in CALLED):
            self.take()
            arguments = [self.sum()]
            while self.seen(","):
                self.take()
                arguments.append(self.sum())
            self.take(")")
            return ("fn", f"call {full}", arguments)
        return ("name", full)

    def index(self) -> str:
        """A subscript as spelled, without braces and spaces."""
        if not self.seen("{"):
            t = self.take()
            if t.kind in ("num", "run") and len(t.text) > 1:
                if "." in t.text:
                    raise Unread
                self.at -= 1
                self.ts[self.at : self.at + 1] = [Token(t.kind, t.text[0], t.spaced), Token(t.kind, t.text[1:])]
                self.take()
                return t.text[0]
            if t.kind not in ("num", "run", "text", "cmd"):
                raise Unread
            return t.text
        depth, out = 0, []
        while True:
            t = self.take()
            depth += (t.text == "{") - (t.text == "}")
            if depth == 0:
                return "".join(out).strip()
            out.append("" if t.text in ("{", "}") else t.text)

    def command(self, t: Token) -> Node:
        name = t.text[1:]
        if name == "frac":
            return ("/", self.argument(), self.argument())
        if name == "sqrt":
            if self.seen("("):
                return ("root", ("num", Fraction(2)), self.base())
            degree: Node = ("num", Fraction(2))
            if self.seen("["):
                self.take()
                degree = self.sum()
                self.take("]")
            if (n := self.next) and n.kind == "num" and len(n.text) > 1:
                self.ambiguous = True
                return ("root", degree, self.base())
            return ("root", degree, self.argument())
        if name == "binom":
            return ("fn", "binomial", [self.argument(), self.argument()])
        if name == "pi":
            return ("const", "pi")
        if name == "imath":
            return ("const", "i")
        if name in GREEK:
            return self.name(t.text)
        if t.text in ACCENTS:
            if self.seen("{"):
                inside = self.index_group()
            else:
                inside = self.take().text
            return self.name(f"{t.text[1:]}({inside})")
        if name in ("lfloor", "lceil"):
            return self.between(r"\rfloor" if name == "lfloor" else r"\rceil", "floor" if name == "lfloor" else "ceil")
        if name in FUNCTIONS:
            return self.call(FUNCTIONS[name])
        raise Unread

    def index_group(self) -> str:
        out, depth = [], 0
        while True:
            u = self.take()
            depth += (u.text == "{") - (u.text == "}")
            if depth == 0:
                return "".join(out)
            out.append("" if u.text in ("{", "}") else u.text)

    def call(self, name: str) -> Node:
        """Read a function: its base or power, and its argument."""
        power: Node | None = None
        base: Node | None = ("num", Fraction(10)) if name == "lg" else None
        for _ in range(2):
            if self.seen("_") and name == "log":
                self.take()
                base = self.braced() if self.seen("{") else self.argument()
            elif self.seen("^"):
                self.take()
                power = self.script()
        self.angle += name in TRIGONOMETRIC
        if self.seen("(", "{", "["):
            close = {"(": ")", "{": "}", "[": "]"}[self.take().text]
            outer, self.bars = self.bars, 0
            arguments = [self.sum()]
            while self.seen(",") and name in ("gcd", "lcm", "max", "min"):
                self.take()
                arguments.append(self.sum())
            self.take(close)
            self.bars = outer
            if self.seen("^", "!"):
                if self.ts[self.at + 1 :][:1] and self.ts[self.at + 1].text == r"\circ":
                    raise Unread
                self.ambiguous = True
        else:
            factors = [self.minus_factor()]
            while self.starts() and not self.seen("(", "[", "{", "|"):
                u = self.next
                assert u is not None
                if (u.kind == "cmd" and u.text[1:] in FUNCTIONS) or (u.kind == "num"):
                    break
                if name in ("ln", "log", "lg", "exp"):
                    self.ambiguous = True
                factors.append(self.factor())
            if self.seen("(", "[", "{", "|", "/", r"\cdot", r"\times", "*"):
                self.ambiguous = True
            arguments = [factors[0] if len(factors) == 1 else ("*", factors)]
        self.angle -= name in TRIGONOMETRIC
        return self.applied(name, arguments, base, power)

    def applied(self, name: str, arguments: list[Node], base: Node | None, power: Node | None) -> Node:
        x = arguments[0]
        if power == ("*", [("num", Fraction(-1)), ("num", Fraction(1))]) and name in ("sin", "cos", "tan"):
            return ("fn", f"arc{name}", [x])
        if name == "exp":
            node: Node = ("^", ("const", "e"), x)
        elif name in ("log", "lg"):
            node = ("fn", "log", [base, x]) if base else ("fn", "call log", [x])
        elif name in ("det", "min", "max", "gcd", "lcm"):
            node = ("fn", f"call {name}", arguments)
        else:
            node = ("fn", name, arguments)
        return ("^", node, power) if power else node
