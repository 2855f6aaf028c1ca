r"""Convert the LaTeX mathematics that models write to MathML: fractions, roots, scripts, fences, matrices, text.

The output consists of tags written here and of escaped text. Unknown commands are never guessed: the caller gets None
and shows the source.
"""

import html
import re
from collections.abc import Callable

MOST = 3000  # characters of a formula; longer ones are shown as source
DEEPEST = 40  # nested braces

LEXER = re.compile(r"\\(?:[a-zA-Z]+|.)|\d+(?:[.,]\d+)*|\s+|.", re.S)

GREEK = dict(
    zip(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho"
        " varrho sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi"
        " Psi Omega ell hbar imath jmath aleph Re Im".split(),
        "αβγδϵεζηθϑικλμνξπϖρϱσςτυϕφχψωΓΔΘΛΞΠΣΥΦΨΩℓℏıȷℵℜℑ",
        strict=True,
    )
)
SYMBOLS = {
    "infty": "∞", "partial": "∂", "nabla": "∇", "emptyset": "∅", "varnothing": "∅", "angle": "∠", "triangle": "△",
    "square": "□", "ldots": "…", "cdots": "⋯", "dots": "…", "vdots": "⋮", "ddots": "⋱", "prime": "′", "degree": "°",
    "checkmark": "✓", "top": "⊤", "bot": "⊥", "star": "⋆", "dag": "†", "blacksquare": "■", "Box": "□",
}  # fmt: skip
OPERATORS = {
    "times": "×", "cdot": "⋅", "div": "÷", "pm": "±", "mp": "∓", "ast": "∗", "circ": "∘", "bullet": "∙", "oplus": "⊕",
    "otimes": "⊗", "cap": "∩", "cup": "∪", "setminus": "∖", "wedge": "∧", "vee": "∨", "land": "∧", "lor": "∨",
    "neg": "¬", "lnot": "¬", "leq": "≤", "le": "≤", "leqslant": "≤", "geq": "≥", "ge": "≥", "geqslant": "≥",
    "neq": "≠", "ne": "≠", "approx": "≈", "equiv": "≡", "sim": "∼", "simeq": "≃", "cong": "≅", "propto": "∝",
    "ll": "≪", "gg": "≫", "in": "∈", "notin": "∉", "ni": "∋", "subset": "⊂", "subseteq": "⊆", "supset": "⊃",
    "supseteq": "⊇", "to": "→", "rightarrow": "→", "leftarrow": "←", "gets": "←", "mapsto": "↦", "Rightarrow": "⇒",
    "implies": "⟹", "Leftarrow": "⇐", "iff": "⟺", "Leftrightarrow": "⇔", "leftrightarrow": "↔", "longrightarrow": "⟶",
    "uparrow": "↑", "downarrow": "↓", "forall": "∀", "exists": "∃", "mid": "∣", "nmid": "∤", "parallel": "∥",
    "perp": "⊥", "therefore": "∴", "because": "∵", "colon": ":", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈",
    "rceil": "⌉", "langle": "⟨", "rangle": "⟩", "lvert": "|", "rvert": "|", "vert": "|", "Vert": "‖", "lVert": "‖",
    "rVert": "‖", "lt": "<", "gt": ">",
    "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "backslash": "\\",
}  # fmt: skip
LARGE = {"sum": "∑", "prod": "∏", "coprod": "∐", "bigcup": "⋃", "bigcap": "⋂", "bigoplus": "⨁"}
INTEGRALS = {"int": "∫", "iint": "∬", "iiint": "∭", "oint": "∮"}
FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log ln lg exp det dim ker deg gcd arg hom Pr"
    .split()
)  # fmt: skip
LIMITS = {"lim": "lim", "max": "max", "min": "min", "sup": "sup", "inf": "inf", "limsup": "lim sup",
          "liminf": "lim inf"}  # fmt: skip
SPACES = {",": ".17em", ":": ".22em", ">": ".22em", ";": ".28em", " ": ".25em", "quad": "1em", "qquad": "2em",
          "!": "-.17em", "thinspace": ".17em", "enspace": ".5em"}  # fmt: skip
ACCENTS = {"bar": "‾", "hat": "^", "widehat": "^", "tilde": "~", "widetilde": "~", "vec": "→",
           "overrightarrow": "→", "dot": "˙", "ddot": "¨", "overbrace": "⏞"}  # fmt: skip
BELOW = {"underline": "_", "underbrace": "⏟"}
IGNORED = {"displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "nonumber", "notag", "big", "Big", "bigg",
           "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "Biggl", "Biggr", "left.", "allowbreak",
           "hline"}  # fmt: skip
TEXTS = {"text", "textbf", "textit", "textrm", "texttt", "mbox", "hbox", "textnormal", "operatorname"}
FONTS = {"mathrm": 0, "mathbf": 0x1D400, "boldsymbol": 0x1D400, "bm": 0x1D400, "mathit": 0, "mathcal": 0x1D49C,
         "mathscr": 0x1D49C, "mathfrak": 0x1D504, "mathbb": 0x1D538, "mathsf": 0x1D5A0, "mathtt": 0x1D670}  # fmt: skip
# Letters that Unicode had before it got these alphabets.
ODD = {0x1D49C: dict(zip("BEFHILMRego", "ℬℰℱℋℐℒℳℛℯℊℴ", strict=True)), 0x1D504: dict(zip("CHIRZ", "ℭℌℑℜℨ", strict=True)),
       0x1D538: dict(zip("CHNPQRZ", "ℂℍℕℙℚℝℤ", strict=True))}  # fmt: skip
FENCES = {"pmatrix": "()", "bmatrix": "[]", "vmatrix": "||", "Vmatrix": "‖‖", "Bmatrix": "{}", "cases": "{ "}
PAIRS = {"aligned", "align", "align*", "split", "eqnarray", "eqnarray*"}  # left and right sides of relations
TABLES = {*FENCES, *PAIRS, "matrix", "array", "gathered", "smallmatrix",
          "gather*", "gather", "equation*", "equation"}  # fmt: skip


class Unknown(Exception):
    """Raised for anything that this converter cannot express in MathML."""


def mathml(source: str, *, block: bool = False) -> str | None:
    """Convert a formula without its delimiters to MathML; None if any part of it is unknown."""
    if len(source) > MOST:
        return None
    try:
        parser = _Parser(LEXER.findall(source), block)
        body = parser.row(lambda token: False)
        if parser.at < len(parser.tokens):
            raise Unknown("unbalanced")
    except Unknown:
        return None
    return _tag("math", body, ' display="block"' if block else "")


def _tag(name: str, body: str, attributes: str = "") -> str:
    return f"<{name}{attributes}>{body}</{name}>"


def _leaf(name: str, text: str, attributes: str = "") -> str:
    return _tag(name, html.escape(text), attributes)


class _Parser:
    """Recursive descent over the lexer's tokens; `at` is the index of the next one."""

    def __init__(self, tokens: list[str], block: bool):
        self.tokens, self.block = tokens, block
        self.at = self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def skip_space(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def take(self) -> str:
        self.skip_space()
        token = self.peek()
        if not token:
            raise Unknown("ends early")
        self.at += 1
        return token

    def row(self, ends: Callable[[str], bool]) -> str:
        """Parse everything up to a token that ends it, which is not consumed."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unknown("too deep")
        out = []
        while True:
            self.skip_space()
            token = self.peek()
            if not token or ends(token) or token == "}":
                break
            out.append(self.scripted())
        self.depth -= 1
        return _tag("mrow", "".join(out))

    def argument(self) -> str:
        self.skip_space()
        if self.peek() == "{":
            self.at += 1
            body = self.row(lambda token: False)
            self.expect("}")
            return body
        return self.atom()[0]

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unknown(f"no {token}")

    def raw(self) -> str:
        """The source of a braced argument, as text."""
        self.expect("{")
        depth, out = 1, []
        while depth:
            token = self.peek()
            if not token:
                raise Unknown("ends early")
            self.at += 1
            depth += (token == "{") - (token == "}")
            if depth:
                out.append(token)
        return "".join(out)

    def scripted(self) -> str:
        """Parse an atom with its sub- and superscript."""
        base, stacked = self.atom() if self.peek() not in ("^", "_", "'") else (_tag("mrow", ""), False)
        below = above = ""
        while True:
            self.skip_space()
            token = self.peek()
            if token in ("\\limits", "\\nolimits"):
                self.at += 1
            elif token == "'":
                primes = 0
                while self.peek() == "'":
                    primes, self.at = primes + 1, self.at + 1
                above += _leaf("mo", "′" * primes)
            elif token in ("^", "_"):
                if above if token == "^" else below:
                    raise Unknown("two scripts")
                self.at += 1
                if token == "^":
                    above = self.argument()
                else:
                    below = self.argument()
            else:
                break
        if not below and not above:
            return base
        above = _tag("mrow", above) if above else ""
        names = ("munder", "mover", "munderover") if stacked else ("msub", "msup", "msubsup")
        return _tag(names[2 if below and above else 0 if below else 1], base + below + above)

    def atom(self) -> tuple[str, bool]:
        """Parse a single item; returns it, and whether its scripts are placed below and above it."""
        token = self.take()
        if token[0] == "\\" and len(token) > 1:
            return self.command(token[1:])
        if token == "{":
            body = self.row(lambda t: False)
            self.expect("}")
            return body, False
        if token in ("}", "&", "#", "$", "%", "^", "_", "\\"):
            raise Unknown(token)
        if token[0].isdigit():
            return _leaf("mn", token), False
        if token.isalpha():
            return _leaf("mi", token), False
        if token == "~":
            return '<mspace width=".25em"/>', False
        if token == "/":
            return _leaf("mo", token, ' lspace="0" rspace="0"'), False
        fixed = ' stretchy="false"' if token in "()[]|" else ""
        return _leaf("mo", "−" if token == "-" else token, fixed), False

    def command(self, name: str) -> tuple[str, bool]:
        stacked = self.block
        if name in GREEK:
            return _leaf("mi", GREEK[name], ' mathvariant="normal"' if name[0].isupper() else ""), False
        if name in SYMBOLS:
            return _leaf("mi", SYMBOLS[name], ' mathvariant="normal"'), False
        if name in OPERATORS:
            return _leaf("mo", OPERATORS[name], ' stretchy="false"'), False
        if name in LARGE:
            return _leaf("mo", LARGE[name]), stacked
        if name in INTEGRALS:
            return _leaf("mo", INTEGRALS[name]), False
        if name in FUNCTIONS:
            return _leaf("mo", name, ' form="prefix" lspace=".1em" rspace=".17em"'), False
        if name in LIMITS:
            return _leaf("mo", LIMITS[name], ' form="prefix"'), stacked
        if name in SPACES:
            return f'<mspace width="{SPACES[name]}"/>', False
        if name in IGNORED:
            return "", False
        if name in "{}%$#&_":
            return _leaf("mo", name, ' stretchy="false"'), False
        if name == "|":
            return _leaf("mo", "‖", ' stretchy="false"'), False
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return _tag("mfrac", self.argument() + self.argument()), False
        if name in ("binom", "dbinom", "tbinom"):
            inner = _tag("mfrac", self.argument() + self.argument(), ' linethickness="0"')
            return _tag("mrow", _leaf("mo", "(") + inner + _leaf("mo", ")")), False
        if name == "sqrt":
            self.skip_space()
            if self.peek() != "[":
                return _tag("msqrt", self.argument()), False
            self.at += 1
            index = self.row(lambda t: t == "]")
            self.expect("]")
            return _tag("mroot", self.argument() + index), False
        if name in ("boxed", "fbox"):
            return _tag("mrow", self.argument(), ' class="boxed"'), False
        if name == "overline":
            return _tag("mrow", self.argument(), ' class="over"'), False
        if name in TEXTS:
            text = re.sub(r"\\([{}%$#&_ ])", r"\1", self.raw())
            if "\\" in text:
                raise Unknown("a command in text")
            return _leaf("mtext", text.replace(" ", "\u00a0")), False
        if name in FONTS:
            return self.letters(name), False
        if name in ACCENTS:
            return _tag("mover", self.argument() + _leaf("mo", ACCENTS[name]), ' accent="true"'), name == "overbrace"
        if name in BELOW:
            return _tag("munder", self.argument() + _leaf("mo", BELOW[name])), name == "underbrace"
        if name in ("stackrel", "overset"):
            above = self.argument()
            return _tag("mover", self.argument() + above), False
        if name == "underset":
            below = self.argument()
            return _tag("munder", self.argument() + below), False
        if name == "pmod":
            return _tag("mrow", _leaf("mtext", "\u00a0(mod\u00a0") + self.argument() + _leaf("mtext", ")")), False
        if name in ("bmod", "mod"):
            return _leaf("mo", "mod", ' lspace=".22em" rspace=".22em"'), False
        if name == "left":
            return self.fenced(), False
        if name == "begin":
            return self.table(), False
        if name == "not":
            following = self.atom()[0]
            if following.endswith("=</mo>"):
                return _leaf("mo", "≠"), False
            if match := re.fullmatch(r"(<mo[^>]*>)([^<&])</mo>", following):
                return f"{match[1]}{match[2]}\u0338</mo>", False  # struck through
        if name == "tag":
            return _leaf("mtext", f"\u2003({self.raw()})"), False
        raise Unknown(name)

    def letters(self, font: str) -> str:
        start = self.at
        self.skip_space()
        text = self.raw() if self.peek() == "{" else self.take()
        if not re.fullmatch(r"[a-zA-Z0-9 ]+", text):
            self.at = start
            return self.argument()  # \mathbf{\alpha}: the alphabet lacks this letter, so the plain one is shown
        code = FONTS[font]
        if code:
            odd = ODD.get(code, {})
            text = "".join(
                odd.get(ch) or (chr(code + ord(ch) - ord("A") - (6 if ch.islower() else 0)) if ch.isalpha() else ch)
                for ch in text
            )
        return _leaf("mi", text, ' mathvariant="normal"')

    def delimiter(self) -> str:
        token = self.take()
        if token == ".":
            return ""
        text = token[1:] if token[0] == "\\" else token
        text = "‖" if token == "\\|" else OPERATORS.get(text, text)
        if len(text) != 1:
            raise Unknown(token)
        return _leaf("mo", text, ' fence="true" stretchy="true"')

    def fenced(self) -> str:
        opening = self.delimiter()
        body = self.row(lambda t: t == "\\right")
        while self.peek() == "\\middle":
            self.at += 1
            body += self.delimiter() + self.row(lambda t: t == "\\right")
        self.expect("\\right")
        return _tag("mrow", opening + body + self.delimiter())

    def table(self) -> str:
        name = self.raw()
        if name not in TABLES:
            raise Unknown(name)
        if name == "array":
            self.raw()
        rows: list[list[str]] = [[]]
        while True:
            rows[-1].append(_tag("mtd", self.row(lambda t: t in ("&", "\\\\", "\\end"))))
            token = self.take()
            if token == "\\\\":
                rows.append([])
            elif token == "\\end":
                break
            elif token != "&":
                raise Unknown(token)
        if self.raw() != name:
            raise Unknown("another \\end")
        if len(rows[-1]) == 1 and rows[-1][0] == "<mtd><mrow></mrow></mtd>":
            rows.pop()
        sides = "left" if name == "cases" else "pairs" if name in PAIRS else ""
        attributes = f' class="{sides}"' if sides else ""
        table = _tag("mtable", "".join(_tag("mtr", "".join(cells)) for cells in rows), attributes)
        fences = [_leaf("mo", f, ' fence="true" stretchy="true"') if f.strip() else "" for f in FENCES.get(name, "  ")]
        return _tag("mrow", fences[0] + table + fences[1])
