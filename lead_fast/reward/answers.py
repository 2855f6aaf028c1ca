"""Rules of equality: the types of answers, how each is read, and how two are compared.

Both sides are read as typed values before anything is compared. `READERS` and `COMPARISONS` are all the rules, in the
order in which they are tried, each with its reason and with pairs (reference, answer, equal) that hold. A rule applies
to its own type only. Whatever no reader claims is passed to math-verify unchanged.

Nothing that may carry meaning is dropped from a reference: a bare letter there is an unknown, and the left side of an
equation is dropped only if it is a name. Exact values are compared exactly; only a decimal printed as such may be a
rounded value, and must then agree in every printed digit.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import mpmath

from . import algebra
from .algebra import Node
from .formulas import CLOSE, FUNCTIONS, OPEN, PLAIN, RELATIONS, Parser, Token, Unread, closes, spelled, split, tokens

Pair = tuple[str, str, bool]
Tokens = list[Token]
MINUS: Node = ("num", Fraction(-1))

# --------------------------------------------------------------------------------------------------------------- types


@dataclass(frozen=True)
class Quantity:
    """A number or formula, with what follows it."""

    node: Node
    unit: str = ""
    percent: bool = False
    printed: tuple[int, int] | None = None  # of a decimal: digits after the point, and significant digits
    ambiguous: bool = False
    product: Node | None = None  # with the unit read as letters: 5 m may also be 5 times m

    @property
    def constant(self) -> bool:
        return not algebra.names(self.node)


@dataclass(frozen=True)
class Infinity:
    sign: int


@dataclass(frozen=True)
class Named:
    """A name and its value: x = 3, f(x) = x + 1, (p, q) = (3, 2), x in [0, 1]."""

    name: str
    left: Node | None
    value: Any
    middle: tuple[Node, ...] = ()  # the middle of a chain that contains letters


@dataclass(frozen=True)
class Equation:
    members: tuple[Node, ...]


@dataclass(frozen=True)
class Inequality:
    members: tuple[Node, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Bound:
    """An end of an interval; `at` orders the ends, `node` is compared exactly (None: infinite)."""

    at: Any
    node: Node | None
    closed: bool


@dataclass(frozen=True)
class Reals:
    """A set of real numbers: intervals that neither overlap nor touch, in order."""

    pieces: tuple[tuple[Bound, Bound], ...]
    variable: str = ""


@dataclass(frozen=True)
class Tuple:
    opening: str
    closing: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Items:
    """Values without order; in braces a set, in which duplicates do not count."""

    items: tuple[Any, ...]
    braces: bool = False


@dataclass(frozen=True)
class Ratio:
    members: tuple[Node, ...]
    text: str


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Numeral:
    """Digits in a base other than ten."""

    digits: str
    base: int


@dataclass(frozen=True)
class Choice:
    letters: frozenset[str]
    value: Any = None


@dataclass(frozen=True)
class Text:
    words: str
    formula: Node | None = None  # three letters or fewer may be a product


class Reader(NamedTuple):
    type: str
    read: Callable[[Tokens, bool], Any]
    rule: str
    reason: str
    pairs: tuple[Pair, ...]


class Comparison(NamedTuple):
    answer: type
    reference: type
    same: Callable[[Any, Any], bool | None]
    both_ways: bool
    rule: str
    reason: str
    pairs: tuple[Pair, ...]


# ------------------------------------------------------------------------------------------------------------- reading


def value(ts: Tokens, answer: bool) -> Any:
    """The value of the first type that claims the tokens."""
    ts = trimmed(ts)
    if answer:
        ts = trimmed(_without_introduction(ts))
    if len(ts) == 1 and ts[0].kind == "text" and re.search(r"\d", ts[0].text):
        ts = trimmed(tokens(ts[0].text))
    if not ts:
        raise Unread
    for reader in READERS:
        try:
            v = reader.read(ts, answer)
        except (Unread, IndexError):
            continue
        if v is not None:
            return v
    raise Unread


_EDGE = {",", ";", ".", ":", r"\\", "\n", "&", "and"}


def trimmed(ts: Tokens) -> Tokens:
    start, end = 0, len(ts)
    while start < end and (ts[start].text in _EDGE or ts[start].text == "~"):
        start += 1
    while end > start and ts[end - 1].text in _EDGE:
        end -= 1
    while end - start > 2 and ts[start].text == "{" and closes(ts[start:end]) == end - start - 1:
        start, end = start + 1, end - 1
    return ts[start:end]


_INTRODUCTION = re.compile(r"(?i)(?:.*\b(?:is|are|equals?)|.*\b(?:answer|ans|result|value|solution)s?)\s*[:=]?|.*[:=]")


def _without_introduction(ts: Tokens) -> Tokens:
    """Drop words in front of a value, as in `The answer is 7` or `Answer: 7`, unless they negate it."""
    for k in range(min(len(ts), 12)):
        if ts[k].kind not in ("text", "run"):
            return ts
        words = " ".join(t.text for t in ts[: k + 1])
        if (
            (len(words) > 4 or ts[k].kind == "text")
            and " " in words.strip() + (" " if ts[k].kind == "text" else "")
            and _INTRODUCTION.fullmatch(words)
        ):
            follows = ts[k + 1].text if k + 1 < len(ts) else ""
            return ts if follows.lower() in ("", "not", "no") else ts[k + 1 :]
    return ts


def formula(ts: Tokens) -> tuple[Node, Parser]:
    if not ts:
        raise Unread
    parser = Parser(ts)
    return parser.formula(), parser


def _flat(ts: Tokens) -> str:
    return re.sub(r"\s+", " ", "".join((" " if t.spaced or t.kind == "text" else "") + t.text for t in ts)).strip()


# -- choice


_LABEL = re.compile(r"(?i:(?:option|choice|answer|ans)\s*[:.]?\s*)?(?:\(([A-E])\)|([A-E]))\s*[.:)]?")


def read_choice(ts: Tokens, answer: bool) -> Choice | None:
    if ts[0].kind not in ("text", "run") and ts[0].text != "(":
        return None
    text = _flat(ts)
    if m := _LABEL.fullmatch(text):
        return Choice(frozenset(m.group(1) or m.group(2)))
    if len(ts) == 1 and re.fullmatch("[A-E]{2,5}", text) and list(text) == sorted(set(text)):
        return Choice(frozenset(text), Quantity(formula(ts)[0]) if ts[0].kind == "run" else None)
    for k in range(1, min(5, len(ts))):
        label, rest = _flat(ts[:k]), ts[k:]
        marked = re.fullmatch(r"(?:\(([A-E])\)|([A-E])(?:[.:)]|\s*\n))", label) or (
            re.fullmatch("([A-E])", label) if rest[0].text == "\n" else None
        )
        if marked and rest[0].text not in _OPERATORS and rest[0].text.lower() not in SEPARATORS - {"\n"}:
            try:
                inside = value(rest, answer)
            except Unread:
                inside = None
            if isinstance(inside, Named | Equation | Inequality):
                return None  # `C \quad x = 1` is a list
            return Choice(frozenset(next(g for g in marked.groups() if g)), inside)
    return None


_OPERATORS = {"+", "-", "*", "/", r"\cdot", r"\times", "^", "_", "!", "=", "<", ">", r"\pm", r"\cup", "|", "'"} | {
    *RELATIONS
}


# -- matrix


def read_matrix(ts: Tokens, answer: bool) -> Matrix | None:
    """Rows of a matrix environment, with or without brackets around it; a determinant is not a matrix."""
    if ts[0].text in ("(", "[") and len(ts) > 2 and ts[1].text == r"\begin" and ts[-1].text in (")", "]"):
        ts = ts[1:-1]
    if ts[0].text != r"\begin" or len(ts) < 8:
        return None
    kind = ts[2].text
    if kind not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix") or [t.text for t in ts[-4:]] != [
        r"\end",
        "{",
        kind,
        "}",
    ]:
        return None
    body = ts[4:-4]
    if kind == "array" and body[0].text == "{":
        body = body[closes(body) + 1 :]
    rows = []
    for row in split(trimmed(body), {r"\\"})[0]:
        if row:
            rows.append(tuple(value(cell, answer) for cell in split(row, {"&"})[0]))
    if len({len(r) for r in rows}) != 1:
        return None
    return Matrix(tuple(rows))


# -- list

SEPARATORS = {",", ";", "\n", r"\\", "and", "or"}


def read_list(ts: Tokens, answer: bool) -> Any:
    parts, between = split(ts, SEPARATORS)
    if len(parts) < 2:
        return None
    if ";" in between and "," in between:
        parts, between = split(ts, {";"})
    items = [value(p, answer) for p in parts if trimmed(p)]
    if len(items) == 1:
        return items[0]
    if "or" in between and "," not in between and all(isinstance(x, Inequality | Reals) for x in items):
        sets = [reals(x) for x in items]
        if len({s.variable for s in sets}) == 1:
            return Reals(union([p for s in sets for p in s.pieces]), sets[0].variable)
    if "and" in between and len(items) == 2 and all(isinstance(x, Inequality | Reals) for x in items):
        one, two = map(reals, items)
        if one.variable == two.variable:
            return Reals(intersection(one.pieces, two.pieces), one.variable)
    return Items(
        tuple(
            y for x in items for y in (x.items if isinstance(x, Items) and not x.braces and ";" not in between else [x])
        )
    )


# -- sets


_NOTHING = re.compile(
    r"(?i)(?:there (?:is|are) )?no(?: real| integer| such)? (?:solutions?|values?)|none|empty set|no such \w+ exists?"
)
_EVERYTHING = re.compile(r"(?i)(?:all |the set of )?real numbers|all reals")


def read_set(ts: Tokens, answer: bool) -> Any:
    text = _flat(ts)
    if text in (r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}") or _NOTHING.fullmatch(text):
        return Items((), True)
    if text in (r"\mathbb{R}", r"\R", r"\mathbf{R}", r"\Reals") or _EVERYTHING.fullmatch(text):
        return Reals(EVERYTHING)
    for sign in (r"\cup", r"\setminus", r"\backslash", r"\cap"):
        parts, _ = split(ts, {sign})
        if len(parts) < 2:
            continue
        values = [value([Token("cmd", r"\R")] if _flat(p) == "R" else p, answer) for p in parts]
        if sign == r"\cup" and all(isinstance(v, Items) for v in values):
            return Items(tuple(x for v in values for x in v.items), True)
        first, *others = map(reals, values)
        pieces = first.pieces
        for s in others:
            if sign == r"\cup":
                pieces = union([*pieces, *s.pieces])
            else:
                pieces = intersection(pieces, s.pieces if sign == r"\cap" else complement(s.pieces))
        return Reals(pieces)
    if ts[0].text == r"\{" and closes(ts) == len(ts) - 1:
        inner = ts[1:-1]
        parts, _ = split(inner, {"|", r"\mid", ":"})
        if len(parts) == 2 and (parts[0][0].kind == "run" or parts[0][0].text == "("):
            element, _ = split(parts[0], {r"\in"})
            name = _flat(element[0])
            if len(element) == 2 and _flat(element[1]) not in (r"\mathbb{R}", r"\R", "R"):
                raise Unread
            condition = reals(value(parts[1], answer))
            if condition.variable != name:
                raise Unread
            return Reals(condition.pieces)
        items = [value(p, answer) for p in split(inner, {",", ";"})[0]]
        return Items(tuple(y for x in items for y in (x.items if isinstance(x, Items) and not x.braces else [x])), True)
    return None


INFINITE = (float("-inf"), float("inf"))
EVERYTHING = ((Bound(INFINITE[0], None, False), Bound(INFINITE[1], None, False)),)
Pieces = tuple[tuple[Bound, Bound], ...]


def bound(x: Any, closed: bool) -> Bound:
    if isinstance(x, Infinity):
        return Bound(INFINITE[x.sign > 0], None, False)
    if isinstance(x, Quantity) and x.constant and not x.unit and not x.percent:
        number = algebra.evaluate(x.node, 30)
        if number is not None and abs(number.imag) < 1e-20:
            return Bound(number.real, x.node, closed)
    raise Unread


def reals(x: Any) -> Reals:
    """Convert a value to a set of real numbers; raises Unread if it is not one."""
    if isinstance(x, Reals):
        return x
    if isinstance(x, Named):
        return Reals(reals(x.value).pieces, x.name)
    if isinstance(x, Tuple) and len(x.items) == 2:
        low, high = bound(x.items[0], x.opening == "["), bound(x.items[1], x.closing == "]")
        if not low.at < high.at:
            raise Unread
        return Reals(((low, high),))
    if isinstance(x, Items):
        if x.braces:
            points = [bound(y, True) for y in x.items]
            if any(p.node is None for p in points):
                raise Unread
            return Reals(union([(p, p) for p in points]))
        if x.items and all(isinstance(y, Tuple) for y in x.items):
            return Reals(union([p for y in x.items for p in reals(y).pieces]))
    if isinstance(x, Inequality):
        return solved(x)
    raise Unread


def solved(x: Inequality) -> Reals:
    """Solve inequalities that are linear in one unknown, or bounds on its absolute value."""
    unknowns = {n for m in x.members for n in _unknowns(m)}
    if len(unknowns) != 1:
        raise Unread
    (name,) = unknowns
    pieces: Pieces = EVERYTHING
    for left, sign, right in zip(x.members, x.signs, x.members[1:], strict=False):
        pieces = intersection(pieces, _half_line(left, sign, right, name))
    return Reals(pieces, name)


def _unknowns(node: Node) -> set[str]:
    if node[0] == "fn" and node[1].startswith("call "):
        return {f"{node[1][5:]}({node[2]})"}  # the bounds are on f(x), not on x
    if node[0] == "name":
        return {node[1]}
    found: set[str] = set()
    for part in node[1:]:
        for y in part if isinstance(part, list) else [part]:
            if isinstance(y, tuple):
                found |= _unknowns(y)
    return found


def _half_line(left: Node, sign: str, right: Node, name: str) -> Pieces:
    for a, b, flipped in ((left, right, False), (right, left, True)):
        if a[0] == "fn" and a[1] == "abs" and a[2][0] == ("name", name) and not algebra.names(b):
            end = bound(Quantity(b), True)
            op = FLIPPED[sign] if flipped else sign
            inner = (Bound(-end.at, ("*", [MINUS, b]), op == "<="), Bound(end.at, b, op == "<="))
            if end.at < 0 or op == "!=":
                raise Unread
            if op in ("<", "<="):
                return (inner,)
            return complement(((Bound(inner[0].at, inner[0].node, op == ">"), Bound(end.at, b, op == ">")),))
    calls = [n for n in (left, right) if n[0] == "fn" and n[1].startswith("call ")]
    if calls:
        if len(calls) == 2:
            raise Unread
        whole: Node = ("name", "whole")
        left, right, name = (whole if left in calls else left), (whole if right in calls else right), "whole"
    work = algebra.Algebra()
    try:
        d = work.add(work.of(left), work.of(right), -1)
    except algebra.Undecided as e:
        raise Unread from e
    slope_key = ((name, Fraction(1)),)
    if d.den != algebra.ONE or slope_key not in d.num or any(a == name for m in d.num if m != slope_key for a, _ in m):
        raise Unread
    slope = d.num[slope_key]
    if (
        any(name in a and a != name for m in d.num for a, _ in m)
        or work.hidden
        and any("(" in a and name in a for m in d.num for a, _ in m)
    ):
        raise Unread
    rest: Node = ("+", [left, ("*", [MINUS, right]), ("*", [("num", -slope), ("name", name)])])
    zero: Node = ("num", Fraction(0))
    point_node = _substituted(("/", ("*", [MINUS, rest]), ("num", slope)), name, zero)
    simple = {m: c for m, c in d.num.items() if m != slope_key}
    if not simple or set(simple) == {()}:
        point_node = ("num", -simple.get((), Fraction(0)) / slope)
    op = FLIPPED[sign] if slope < 0 else sign
    end = bound(Quantity(point_node), op in ("<=", ">=", "!="))
    if op == "!=":
        return complement(((end, end),))
    if op in ("<", "<="):
        return ((EVERYTHING[0][0], end),)
    return ((end, EVERYTHING[0][1]),)


def _substituted(node: Node, name: str, by: Node) -> Node:
    if node == ("name", name):
        return by
    return tuple(
        [_substituted(y, name, by) for y in part] if isinstance(part, list)
        else _substituted(part, name, by) if isinstance(part, tuple) else part
        for part in node
    )  # fmt: skip


FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def union(pieces: Sequence[tuple[Bound, Bound]]) -> Pieces:
    out: list[tuple[Bound, Bound]] = []
    for low, high in sorted(pieces, key=lambda p: (p[0].at, not p[0].closed)):
        if out and (low.at < out[-1][1].at or (low.at == out[-1][1].at and (low.closed or out[-1][1].closed))):
            last = out[-1]
            if (high.at, high.closed) > (last[1].at, last[1].closed):
                out[-1] = (last[0], high)
        else:
            out.append((low, high))
    return tuple(out)


def complement(pieces: Pieces) -> Pieces:
    out, low = [], EVERYTHING[0][0]
    for a, b in union(pieces):
        if a.node is not None:
            high = Bound(a.at, a.node, not a.closed)
            if low.at < high.at or (low.at == high.at and low.closed and high.closed):
                out.append((low, high))
        low = Bound(b.at, b.node, not b.closed)
        if b.node is None:
            return tuple(out)
    return (*out, (low, EVERYTHING[0][1]))


def intersection(a: Pieces, b: Pieces) -> Pieces:
    return complement(union([*complement(a), *complement(b)]))


# -- plus-minus


def read_plus_minus(ts: Tokens, answer: bool) -> Items | None:
    places = [i for i, t in enumerate(ts) if t.text in (r"\pm", r"\mp")]
    if not places or ts[0].text == r"\{":
        return None
    coupled = any(ts[i].text == r"\mp" for i in places)
    if len(places) > 3:
        raise Unread
    signs = [(0,) * len(places), (1,) * len(places)]
    if not coupled and len(places) > 1:
        signs = [tuple(n >> k & 1 for k in range(len(places))) for n in range(2 ** len(places))]
    items = []
    for choice in signs:
        chosen = list(ts)
        for i, minus in zip(places, choice, strict=True):
            chosen[i] = Token("sym", "-" if (ts[i].text == r"\mp") != bool(minus) else "+", ts[i].spaced)
        items.append(value(chosen, answer))
    return Items(tuple(items))


# -- equations and inequalities


def read_relation(ts: Tokens, answer: bool) -> Any:
    parts, between = split(ts, {*RELATIONS})
    if len(parts) < 2:
        return None
    signs = [RELATIONS[b] for b in between]
    if not trimmed(parts[0]):
        if signs[0] in ("=", "~") and len(parts) == 2:
            return value(parts[1], answer)
        raise Unread
    if "~" in signs:
        k = signs.index("~")
        if k == 0 and label(parts[0]) is not None and len(parts) == 2:
            return Named(label(parts[0]) or "", _maybe(parts[0]), value(parts[1], answer))
        return value(ts[: sum(len(p) + 1 for p in parts[: k + 1]) - 1], answer)
    if signs == ["in"]:
        inside = value(parts[1], answer)
        return Named(
            _flat(parts[0]), _maybe(parts[0]), Reals(reals(inside).pieces) if not isinstance(inside, Items) else inside
        )
    if set(signs) == {"="}:
        name = label(parts[0])
        if name is not None:
            middle = [formula(p)[0] for p in parts[1:-1]]
            return Named(
                name,
                _maybe(parts[0]),
                value(parts[-1], answer),
                tuple(middle) if any(map(algebra.names, middle)) else (),
            )
        return Equation(tuple(formula(p)[0] for p in parts))
    if set(signs) <= {"<", ">", "<=", ">=", "!="}:
        return Inequality(tuple(formula(p)[0] for p in parts), tuple(signs))
    raise Unread


def _maybe(ts: Tokens) -> Node | None:
    try:
        return formula(trimmed(ts))[0]
    except Unread:
        return None


_LETTER = r"(?:[a-zA-Z]|\\[a-zA-Z]+|\\(?:overline|vec|hat|bar|tilde|mathbf|mathcal|overrightarrow)\{[a-zA-Z]+\})"
_NAME = rf"{_LETTER}(?:_(?:\w|\\[a-zA-Z]+|\{{[^{{}}]*\}}))?'*"
_POINTS = r"(?:m?\\(?:angle|triangle)|\\(?:overline|overrightarrow|widehat))?\{?(?:[A-Z](?:_\{?\w\}?)?'?){1,4}\}?"
_ONE_NAME = rf"(?:{_NAME}|{_POINTS}|\|{_POINTS}\||\[{_POINTS}\]|{_NAME}\((?:[\w\\ ]|,)+\))"
_NAMES = re.compile(rf"{_ONE_NAME}|\({_ONE_NAME}(?:,{_ONE_NAME})+\)|{_ONE_NAME}[/:]{_ONE_NAME}"
                    rf"|\\frac\{{{_ONE_NAME}\}}\{{{_ONE_NAME}\}}|\\frac\{{d{_NAME}?\}}\{{d{_NAME}\}}")  # fmt: skip


def label(ts: Tokens) -> str | None:
    """The spelling of a left side that is only a name: x, x_1, f(x), AB, |AB|, (p, q), V_1 : V_2, words."""
    ts = trimmed(ts)
    if ts and all(t.kind == "text" for t in ts):
        return _flat(ts)
    if any(t.kind == "text" for t in ts) and ts[0].kind == "text":
        return None
    text = "".join(t.text for t in ts)
    if text in ("e", "i", r"\pi") or r"\infty" in text:
        return None
    if _NAMES.fullmatch(text):
        return re.sub(r"[{} ]", "", text)
    return None


# -- ratio, brackets, numeral


def read_ratio(ts: Tokens, answer: bool) -> Ratio | None:
    parts, between = split(ts, {":"})
    if len(parts) < 2:
        return None
    return Ratio(tuple(formula(p)[0] for p in parts), ":".join(_flat(p) for p in parts))


def read_brackets(ts: Tokens, answer: bool) -> Any:
    if ts[0].text == "]" and ts[-1].text == "[":
        ts = [Token("sym", "("), *ts[1:-1], Token("sym", ")")]
    elif ts[0].text == "]" or ts[-1].text == "[":
        return None
    if ts[0].text not in ("(", "[", "{", r"\langle") or closes(ts) != len(ts) - 1:
        return None
    inner = ts[1:-1]
    parts, _ = split(inner, {",", ";"})
    if len(parts) < 2:
        if any(t.text in RELATIONS or t.text in (r"\begin", r"\{", r"\pm") for t in inner) or (
            inner and inner[0].text in OPEN
        ):
            try:
                return Quantity(formula(ts)[0])
            except Unread:
                return value(inner, answer)
        return None
    items = tuple(value(p, answer) for p in parts)
    if ts[0].text == "{":
        return Items(items)
    opening, closing = ("(", ")") if ts[0].text == r"\langle" else (ts[0].text, ts[-1].text)
    return Tuple(opening, closing, items)


_BASES = {w: n for n, w in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)}


def read_numeral(ts: Tokens, answer: bool) -> Numeral | None:
    m = re.fullmatch(r"\(?(\d+)\)?_\{?\s*(\w+)\s*\}?", _flat(ts).replace("{ ", "{"))
    if not m:
        return None
    base = int(m.group(2)) if m.group(2).isdigit() else _BASES.get(m.group(2).lower())
    return Numeral(m.group(1).lstrip("0") or "0", base) if base else None


def read_infinity(ts: Tokens, answer: bool) -> Infinity | None:
    text = _flat(ts)
    return Infinity(-1 if text[0] == "-" else 1) if re.fullmatch(r"[+-]? ?(?:\\infty|(?i:infinity))", text) else None


# -- quantity

UNITS: dict[str, str] = {}
for _unit in """
m meter meters metre metres; cm centimeter centimeters centimetre centimetres; mm millimeter millimeters; dm;
km kilometer kilometers kilometre kilometres; ft foot feet; inch inches in; yd yard yards; mi mile miles;
g gram grams; kg kilogram kilograms; mg milligram milligrams; lb lbs pound pounds; oz ounce ounces; t ton tons tonnes;
s sec secs second seconds; ms millisecond milliseconds; min mins minute minutes; h hr hrs hour hours; d day days;
week weeks; month months; year years yr yrs; l L liter liters litre litres; ml mL milliliter milliliters;
J joule joules; kJ; N newton newtons; W watt watts; kW; MW; Hz hertz; kHz; MHz; GHz; eV; keV; MeV; GeV; K kelvin;
Pa pascal pascals; kPa; MPa; atm; bar; V volt volts; A amp amps ampere amperes; C coulomb coulombs; T tesla;
mol moles mole; arcmin; erg ergs; cal; kcal; rad radian radians; degree degrees deg; dollar dollars usd USD; cent cents;
euro euros EUR; yen yuan RMB; nm; um; mA; mV; kV; mph; rpm; lm; lx; F; H; Wb; dB; hm; ha hectare hectares; acre acres
""".split(";"):
    for _spelling in _unit.split():
        UNITS[_spelling] = _unit.split()[0]
SYMBOLS = {u for u in UNITS if len(u) <= 3} - {"deg", "day", "sec", "min", "bar", "in", "hrs", "yrs"}
CERTAIN = {
    "cm",
    "km",
    "mm",
    "kg",
    "eV",
    "Hz",
    "ft",
    "lb",
    "oz",
    "mol",
    "dm",
    "kHz",
    "MHz",
    "keV",
    "MeV",
    "GeV",
    "kJ",
    "kW",
}
CURRENCIES = {
    r"\$": "dollar",
    "€": "euro",
    "£": "sterling",
    "¥": "yen",
    r"\pounds": "sterling",
    r"\euro": "euro",
    "₹": "rupee",
}
PERCENTS = {"percent", "pct", "percentage", "per cent"}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NO_UNIT = re.compile(
    r"(?i)\b(?:or|and|not|no|to|than|if|when|for|mod|modulo|base|over|times|plus|minus|half|halves|thirds?|quarters?"
    r"|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|squared|cubed|factorial"
    r"|pi|point|root|roots|negative|positive|unless|wrong|except|more|less|least|most|about|between|score|pairs?"
    r"|is|are|but|remainder|where|with|while|then|so|wait|zero|one|two|three|four|five|six|seven|eight|nine|ten"
    r"|undefined|infinity|infinite|thousands|hundreds|millions|\w*illions?|\w*hundred|\w*thousand|dozens?)\b"
)


def unit_of(ts: Tokens) -> str | None:
    """What follows a number, in one spelling, if it can be a unit or the things counted; else None."""
    words: list[str] = []
    i = 0
    while i < len(ts):
        t = ts[i]
        if t.kind in ("text", "run"):
            words.append(t.text)
        elif (
            t.text in ("/", r"\cdot", r"\times", ".", "-", "(", ")", r"\mu", r"\Omega", "^", r"\circ", "{", "}")
            or t.kind == "num"
        ):
            words.append(t.text)
        else:
            return None
        i += 1
    text = " ".join(words)
    if NO_UNIT.search(text) or len(text.split()) > 14:
        return None
    text = re.sub(r"\s*\^\s*\{?\s*(-?\s*\d)\s*\}?", lambda m: "^" + m.group(1).replace(" ", ""), text)
    text = re.sub(
        r"\b(square|cubic|sq\.?|cu\.?)\s+(\w+)", lambda m: f"{m.group(2)}^{2 if m.group(1)[0] == 's' else 3}", text
    )
    text = re.sub(r"\bper\b", "/", text)
    if re.search(r"(?<!\^)(?<!\^-)\d", text) or re.search(r"[=<>,;+*]", text):
        return None
    out = re.sub(r"[a-zA-Z]+", lambda m: UNITS.get(m.group(), UNITS.get(m.group().lower(), m.group().lower())), text)
    out = re.sub(r"[.{}()\s]|\\cdot|\\times", "", out)
    return out or None


def read_quantity(ts: Tokens, answer: bool) -> Quantity:
    unit, percent, scale = "", False, 1
    if ts[0].text in CURRENCIES:
        unit, ts = CURRENCIES[ts[0].text], ts[1:]
    elif len(ts) > 2 and ts[0].text in "+-" and ts[1].text in CURRENCIES:
        unit, ts = CURRENCIES[ts[1].text], [ts[0], *ts[2:]]
    elif ts[-1].text in CURRENCIES:
        unit, ts = CURRENCIES[ts[-1].text], ts[:-1]
    if len(ts) > 1 and ts[-1].text == "'" and ts[-2].kind == "num":
        unit, ts = "arcmin", ts[:-1]
    if ts and (ts[-1].text in (r"\%", "%") or ts[-1].text.lower() in PERCENTS):
        percent, ts = True, trimmed(ts[:-1])
    if len(ts) == 1 and ts[0].kind == "text" and len(ts[0].text) == 1 and ts[0].text.isalpha():
        ts = [Token("run", ts[0].text)]
    product: Node | None = None
    depth = 0
    for k, t in enumerate(ts):
        depth += (t.text in OPEN) - (t.text in CLOSE)
        if k == 0 or depth or not (t.kind in ("text", "run") or t.text in (r"\mu", r"\Omega")):
            continue
        if t.kind == "text":
            word = t.text
        elif t.kind == "run":
            word = t.text
            bare_word = len(word) >= 4 and word not in FUNCTIONS and word not in PLAIN
            known = word in UNITS or word.lower() in SCALES
            if not (bare_word or (known and (answer or len(word) > 3 or (t.spaced and word in CERTAIN)))):
                continue
            if (
                len(word) == 1
                and not t.spaced
                and not (k + 1 < len(ts) and ts[k + 1].text in ("^", "/") and word == "m")
            ):
                continue
            if word in SYMBOLS and not answer and word not in CERTAIN:
                continue
        else:
            if not answer or k + 1 >= len(ts) and t.text == r"\mu":
                continue
            word = ""
        if ts[k - 1].text in ("_", "^") or (ts[k - 1].text == "{" and k > 1 and ts[k - 2].text == "_"):
            continue
        rest = ts[k:]
        if word.lower() in SCALES:
            scale, rest = SCALES[word.lower()], rest[1:]
        name = unit_of(rest) if rest else ""
        if name is None:
            continue
        try:
            node, parser = formula(_number(ts[:k]))
        except Unread:
            continue
        if t.kind == "run" and algebra.names(node) and word in UNITS:
            continue
        if scale > 1:
            node = ("*", [("num", Fraction(scale)), node])
        if parser.degrees:
            name = f"degree{name}"
        if t.kind != "text":
            try:
                product = formula(ts)[0]
            except Unread:
                product = None
        return Quantity(node, name or unit, percent, None if scale > 1 else printed(ts[:k]), parser.ambiguous, product)
    node, parser = formula(_number(ts))
    return Quantity(node, unit or ("degree" if parser.degrees else ""), percent, printed(ts), parser.ambiguous)


def _number(ts: Tokens) -> Tokens:
    """Rewrite a mixed number in plain text as a LaTeX one: 2 1/2."""
    kinds = [t.kind if t.kind == "num" else t.text for t in ts]
    start = 1 if kinds[:1] in (["-"], ["+"]) else 0
    if kinds[start:] == ["num", "num", "/", "num"] and ts[start + 1].spaced:
        braces = [Token("sym", "{"), Token("sym", "}")]
        top, bottom = ts[start + 1], ts[start + 3]
        return [*ts[: start + 1], Token("cmd", r"\frac"), braces[0], top, braces[1], braces[0], bottom, braces[1]]
    return ts


_DECIMAL = re.compile(
    r"[+-]?(\d*)\.(\d+)(?:(?:\\times|\\cdot|\*|x)10\^\{?([+-]?\d+)\}?)?|[+-]?\d+(?:\\times|\\cdot|\*)10\^\{?([+-]?\d+)\}?"
)


def printed(ts: Tokens) -> tuple[int, int] | None:
    """Digits after the point and significant digits of a decimal, as printed; None if it is not a decimal."""
    m = _DECIMAL.fullmatch("".join(t.text for t in ts))
    if not m or m.group(2) is None:
        return None
    significant = len((m.group(1) + m.group(2)).lstrip("0"))
    return len(m.group(2)) - int(m.group(3) or 0), significant


def read_text(ts: Tokens, answer: bool) -> Text:
    if not any(t.kind == "text" or (t.kind == "run" and len(t.text) > 1) for t in ts):
        raise Unread
    if any(t.text in (r"\int", r"\sum", r"\prod", r"\lim", r"\begin") for t in ts):
        raise Unread
    product = None
    if len(ts) == 1 and ts[0].kind == "run" and len(ts[0].text) <= 3:
        product = formula(ts)[0]
    words = re.sub(r"\s+", " ", re.sub(r"[.,!?\"'`*]+(?=\s|$)|\\[a-z]*quad", " ", _flat(ts))).strip().casefold()
    return Text(re.sub(r"(?<=\d) ?: ?(?=\d)", ":", words), product)


def read_word(ts: Tokens, answer: bool) -> Text | None:
    """Letters alone: a word, and possibly a product if there are few."""
    if all(t.kind == "run" for t in ts) and len("".join(t.text for t in ts)) > 2 and any(len(t.text) > 2 for t in ts):
        return read_text(ts, answer)
    return None


# ----------------------------------------------------------------------------------------------------------- comparing


def every(verdicts: Sequence[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def same(a: Any, b: Any) -> bool | None:
    """Whether an answer's value equals the reference's: True, False, or None for undecided."""
    compare = _BY_TYPES.get((type(a), type(b)))
    if compare is None:
        return False
    return compare(a, b)


def numbers(a: Node, b: Node, a_printed: tuple[int, int] | None, b_printed: tuple[int, int] | None) -> bool | None:
    """Exact equality; a printed decimal with six places and six digits may be the other side's rounded value."""
    equal = algebra.equal(a, b)
    if equal or not (a_printed or b_printed):
        return equal
    if a_printed and b_printed:
        decimal, digits, other = (a, a_printed, b) if a_printed[0] <= b_printed[0] else (b, b_printed, a)
    else:
        decimal, digits, other = (a, a_printed, b) if a_printed else (b, b_printed, a)
    assert digits is not None
    if min(digits) < 6 or algebra.names(other) or abs(digits[0]) > 60:
        return equal
    d, x = (algebra.evaluate(n, 60 + abs(digits[0])) for n in (decimal, other))
    if d is None or x is None or x.imag or (x.real < 0) != (d.real < 0):
        return equal
    with mpmath.workdps(60 + abs(digits[0])):
        steps = abs(x.real) * mpmath.mpf(10) ** digits[0]
        shown = mpmath.nint(abs(d.real) * mpmath.mpf(10) ** digits[0])
        return bool(shown in (mpmath.floor(steps), mpmath.floor(steps + mpmath.mpf(1) / 2)))


def quantities(a: Quantity, b: Quantity) -> bool | None:
    if a.unit and b.unit and not units_agree(a.unit, b.unit):
        return False
    if a.product is not None and not b.constant:
        found = algebra.equal(a.product, b.node)
        return found
    if b.product is not None and not a.constant:
        return algebra.equal(a.node, b.product)
    pairs = [(a.node, b.node, a.printed, b.printed)]
    if a.percent != b.percent:
        hundredth: Node = ("num", Fraction(1, 100))
        shift = lambda p: p and (p[0] + 2, p[1])  # noqa: E731
        if a.percent:
            pairs.append((("*", [a.node, hundredth]), b.node, shift(a.printed), b.printed))
        else:
            pairs.append((a.node, ("*", [b.node, hundredth]), a.printed, shift(b.printed)))
    results = [numbers(*p) for p in pairs]
    if True in results:
        return True
    return None if None in results or a.ambiguous or b.ambiguous else False


def units_agree(a: str, b: str) -> bool:
    """Known units must be the same; things that are merely counted (ways, apples) may be worded differently."""

    def known(unit: str) -> bool:
        return all(w in UNITS for w in re.findall("[a-z]+", unit, re.I))

    return a == b or not (known(a) and known(b))


def equations(a: Equation | Named, b: Equation | Named) -> bool | None:
    """Whether two equations are the same: their sides' differences are multiples of each other, sides in any order."""
    one, two = (_members(x) for x in (a, b))
    if one is None or two is None:
        return None
    if len(one) != 2 or len(two) != 2:
        return every([algebra.equal(x, y) for x, y in zip(one, two, strict=True)]) if len(one) == len(two) else None
    differences: list[Node] = [("+", [x, ("*", [MINUS, y])]) for x, y in (one, two)]
    c = algebra.ratio(*differences)
    if c is None:
        return None
    if c is not False:
        return True
    return False if all(map(_linear, differences)) else None


def _members(x: Equation | Named) -> tuple[Node, ...] | None:
    if isinstance(x, Equation):
        return x.members
    if x.left is None or not isinstance(x.value, Quantity) or x.value.unit:
        return None
    return (x.left, *x.middle, x.value.node)


def _linear(node: Node) -> bool:
    work = algebra.Algebra()
    try:
        f = work.of(node)
    except algebra.Undecided:
        return False
    return (
        f.den == algebra.ONE
        and not work.hidden
        and all(sum((e for a, e in m if not a.isdigit()), Fraction(0)) in (0, 1) for m in f.num)
    )


def named(a: Named, b: Named) -> bool | None:
    if a.name == b.name:
        if a.middle and b.middle:
            return (
                every([same(a.value, b.value), *(algebra.equal(x, y) for x, y in zip(a.middle, b.middle, strict=True))])
                if len(a.middle) == len(b.middle)
                else None
            )
        found = same(a.value, b.value)
        if found is False and isinstance(a.value, Quantity) and a.left and _unknowns(a.left) & _unknowns(a.value.node):
            return equations(a, b)
        return found
    if not (isinstance(a.value, Quantity) and isinstance(b.value, Quantity) and a.left and b.left):
        return False
    if not (_unknowns(a.left) <= _unknowns(b.value.node) and _unknowns(b.left) <= _unknowns(a.value.node)):
        return False
    return equations(a, b)


def named_value(a: Named, b: Any) -> bool | None:
    return same(a.value, b)


def value_named(a: Any, b: Named) -> bool | None:
    return same(a, b.value)


def named_items(a: Any, b: Any) -> bool | None:
    """(x, y) = (1, 2) as x = 1, y = 2; a name before a list names each value of it."""
    pair, items = (a, b) if isinstance(a, Named) else (b, a)
    names = pair.name.strip("()").split(",")
    if isinstance(pair.value, Tuple) and 1 < len(names) == len(pair.value.items):
        spread = Items(tuple(Named(n, None, v) for n, v in zip(names, pair.value.items, strict=True)))
        if any(isinstance(x, Named) for x in items.items):
            return lists(spread, items) if pair is a else lists(items, spread)
        return False if len(items.items) != 1 else one_item(a, b)
    return same(pair.value, items) if pair is a else same(items, pair.value)


def last_member(a: Equation, b: Quantity) -> bool | None:
    return same(Quantity(a.members[-1]), b)


def inequalities(a: Inequality, b: Inequality) -> bool | None:
    if a == b:
        return True
    try:
        one, two = solved(a), solved(b)
        return every([one.variable == two.variable, sets(one, two)])
    except Unread:
        pass
    for members, signs in ((b.members, b.signs), (b.members[::-1], tuple(FLIPPED[s] for s in b.signs[::-1]))):
        if signs == a.signs and every([algebra.equal(x, y) for x, y in zip(a.members, members, strict=True)]):
            return True
    if len(a.signs) == len(b.signs) == 1 and {a.signs[0], FLIPPED[a.signs[0]]} >= {b.signs[0]}:
        c = algebra.ratio(*(("+", [x.members[0], ("*", [MINUS, x.members[1]])]) for x in (a, b)))
        if isinstance(c, Fraction) and (a.signs == b.signs) == (c > 0):
            return True
    return None


def sets(a: Any, b: Any) -> bool | None:
    try:
        one, two = reals(a), reals(b)
    except Unread:
        return None if isinstance(a, Inequality) or isinstance(b, Inequality) else False
    if one.variable and two.variable and one.variable != two.variable:
        return False
    if len(one.pieces) != len(two.pieces):
        return False
    found: list[bool | None] = []
    for x, y in zip(one.pieces, two.pieces, strict=True):
        for p, q in zip(x, y, strict=True):
            if p.closed != q.closed or (p.node is None) != (q.node is None) or (p.node is None and p.at != q.at):
                return False
            found.append(True if p.node is None else algebra.equal(p.node, q.node or MINUS))
    return every(found)


def tuples(a: Tuple, b: Tuple) -> bool | None:
    if len(a.items) != len(b.items) or (a.opening, a.closing) != (b.opening, b.closing):
        return False
    return every([same(x, y) for x, y in zip(a.items, b.items, strict=True)])


def lists(a: Items, b: Items) -> bool | None:
    ones, twos = list(a.items), list(b.items)
    if a.braces and b.braces:
        ones, twos = distinct(ones), distinct(twos)
    elif len(ones) > len(twos):
        ones = distinct(ones)
    if len(ones) != len(twos):
        return False
    in_order = [len({x.name for x in xs if isinstance(x, Named)}) == len(xs) > 1 for xs in (ones, twos)]
    if in_order[0] != in_order[1]:  # names on one side only: the order decides which is which
        return every([same(x, y) for x, y in zip(ones, twos, strict=True)])
    undecided = False
    for y in twos:
        unsure = False
        for i, x in enumerate(ones):
            found = same(x, y)
            if found:
                ones.pop(i)
                break
            unsure = unsure or found is None
        else:
            if not unsure:
                return False
            undecided = True
    return None if undecided else True


def distinct(xs: list[Any]) -> list[Any]:
    out: list[Any] = []
    for x in xs:
        if not any(same(x, y) for y in out):
            out.append(x)
    return out


def in_order(a: Any, b: Any) -> bool | None:
    if any(isinstance(x, Items) and x.braces for x in (a, b)):
        return one_item(a, b)
    if len(a.items) != len(b.items):
        return False if not all(isinstance(y, Tuple) for x in (a, b) for y in x.items) else sets(a, b)
    if any(isinstance(x, Tuple) and (x.opening, x.closing) != ("(", ")") for x in (a, b)):
        return False
    return every([same(x, y) for x, y in zip(a.items, b.items, strict=True)])


def one_item(a: Any, b: Any) -> bool | None:
    items, other, swapped = (a, b, False) if isinstance(a, Items) else (b, a, True)
    if len(items.items) != 1:
        return False
    return same(other, items.items[0]) if swapped else same(items.items[0], other)


def ratios(a: Ratio, b: Ratio) -> bool | None:
    if a.text == b.text:
        return True
    if len(a.members) != len(b.members):
        return False
    if re.search(r"(?:^|:)0", a.text + ":" + b.text):  # a time of day, or a zero
        return every([algebra.equal(x, y) for x, y in zip(a.members, b.members, strict=True)])
    return every([
        algebra.equal(("*", [x, b.members[0]]), ("*", [a.members[0], y]))
        for x, y in zip(a.members[1:], b.members[1:], strict=True)
    ])  # fmt: skip


def quotient(a: Any, b: Any) -> bool | None:
    r, q = (a, b) if isinstance(a, Ratio) else (b, a)
    if len(r.members) != 2 or q.unit or q.percent:
        return False
    return algebra.equal(("/", r.members[0], r.members[1]), q.node)


def matrices(a: Matrix, b: Matrix) -> bool | None:
    if (len(a.rows), len(a.rows[0])) != (len(b.rows), len(b.rows[0])):
        return False
    return every([same(x, y) for r, s in zip(a.rows, b.rows, strict=True) for x, y in zip(r, s, strict=True)])


def undecided(a: Any, b: Any) -> None:
    return None


def choices(a: Choice, b: Choice) -> bool | None:
    return a.letters == b.letters


def several_choices(a: Items, b: Choice) -> bool | None:
    letters = [x.letters for x in a.items if isinstance(x, Choice) and x.value is None]
    return len(letters) == len(a.items) and frozenset().union(*letters) == b.letters


def choice_value(a: Any, b: Choice) -> bool | None:
    return same(a, b.value) if b.value is not None else False


def lettered(a: Choice, b: Any) -> bool | None:
    return same(a.value, b) if len(a.letters) > 1 and a.value is not None else False


def texts(a: Text, b: Text) -> bool | None:
    if a.words == b.words:
        return True
    return bool(a.formula and b.formula and algebra.equal(a.formula, b.formula))


def word_product(a: Any, b: Any) -> bool | None:
    t, q = (a, b) if isinstance(a, Text) else (b, a)
    return False if t.formula is None else algebra.equal(t.formula, q.node)


# ----------------------------------------------------------------------------------------------------------- the rules

READERS = (
    Reader(
        "choice",
        read_choice,
        "One letter from A to E, in brackets or not, with or without `Option`, or several letters; the text after a "
        "marked letter is that choice's value.",
        "A letter that is part of a formula or a list is not a choice.",
        (
            ("B", r"\text{Option B}", True), (r"\textbf{(A)}\ 12", "A", True), ("C", r"C \quad \frac{1}{2}", True),
            ("AB", "A, B", True), ("C", r"\textbf{(B)} 5", False), ("E", r"\mathrm{E}*2", False),
            ("A", r"\text{A} \text{ and } \text{B}", False), ("A", "(A), (B)", False),
        ),
    ),
    Reader(
        "matrix",
        read_matrix,
        "Rows of `pmatrix`, `bmatrix`, `matrix` or `array`, with any brackets around them.",
        "The brackets are a matter of style; a determinant's bars are not.",
        (
            (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", True),
            (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
        ),
    ),
    Reader(
        "list",
        read_list,
        "Values between commas, semicolons, wide spaces, line breaks, `and` or `or`. Inequalities joined by `or` are a "
        "union, joined by `and` an intersection.",
        "A comma followed by three digits without a space may separate thousands: then both readings are tried. With a "
        "space it never does.",
        (
            ("19, 46, \\text{ and } 82", "19,46,82", True), ("112, 336", "336, 112", True), ("32349", "32, 349", False),
            ("5, 120", "5120", False), ("32349", "32,349", True), (r"a=1 \quad b=2", r"a=3 \quad b=2", False),
            (r"(-\infty,1)\cup(2,\infty)", "x<1 or x>2", True), ("1, -2", r"x=1 \text{ or } x=-2", True),
        ),
    ),
    Reader(
        "set",
        read_set,
        "Braces, set-builder form, unions, differences, intersections, the real numbers, and the empty set in words.",
        "Sets of real numbers are compared as sets, however they are written.",
        (
            (r"\{1,2,3\}", r"\{3,2,1\}", True), (r"\{x|1\le x\le2\}", "[1,2]", True),
            (r"\{x \mid x>1\}", r"(1,\infty)", True), ("0", r"\emptyset", False),
            (r"\text{no solution}", r"\emptyset", True),
            (r"(-\infty,0)\cup(0,\infty)", r"\mathbb{R}\setminus\{0\}", True), (r"\{1,2\}", r"\{1,2,3\}", False),
        ),
    ),
    Reader(
        "list",
        read_plus_minus,
        "Plus-minus is read as two values, wherever it occurs; two of them as four, unless minus-plus ties them.",
        "It abbreviates a list.",
        (
            (r"\frac{-1+\sqrt{17}}{2}, \frac{-1-\sqrt{17}}{2}", r"\frac{-1\pm\sqrt{17}}{2}", True),
            (r"\frac{\pm 1}{2}", r"\frac12,-\frac12", True), (r"\pm 2021", "2021", False),
        ),
    ),
    Reader(
        "equation or inequality",
        read_relation,
        "A name and its value, an equation, or a chain of inequalities; of a chain of equalities with numbers only, "
        "the last member is the value; anything after an approximation sign is dropped.",
        "A left side is dropped only if it is a name (x, f(x), AB, (p, q), a ratio of names): otherwise it is half of "
        "the statement.",
        (
            ("5", "x = 5", True), ("y=3", "x=3", False), ("y = 2x+3", "2x+3", True), ("2x+4y-3=0", "0", False),
            ("f(x)=1", "1", True), ("11", r"x \approx 11", True), ("x<3", r"x \lt 3", True),
            (r"x\ne 3", "x != 3", True),
            (r"b_0=2a_2-2a_0 b_n=(n+2)a_n", r"b_0=2a_2-3a_0 b_n=(n+2)a_n", False),
        ),
    ),
    Reader(
        "ratio",
        read_ratio,
        "Formulas between colons.",
        "Ratios are compared by proportion, times of day member by member.",
        (("2:3", "4:6", True), ("2:3", "3:2", False), ("12:00", "1:00", False)),
    ),
    Reader(
        "tuple or interval",
        read_brackets,
        "Values in brackets with a comma: a tuple, and with two real ends in order an interval too.",
        "Order and brackets count.",
        (("(1,2)", "(2,1)", False), ("[0,1]", "(0,1]", False), ("(1,2)", r"\left(1, 2\right)", True)),
    ),
    Reader(
        "numeral",
        read_numeral,
        "Digits with a base as their index, in digits or words.",
        "The same digits in another base are a different number, and the question may be about the base.",
        (("4210_5", r"4210_{\text{five}}", True), ("101_3", "101_2", False), ("4210_5", "4210", False)),
    ),
    Reader(
        "infinity",
        read_infinity,
        "Infinity and its negative, alone.",
        "It is not a number: it equals only itself.",
        ((r"-\infty", "-oo", True), ("7", r"\infty", False)),
    ),
    Reader(
        "text",
        read_word,
        "Letters alone, three or more: a word, which may be a product if there are three.",
        "Words are compared as words: neither as products nor in parts.",
        ((r"\text{even}", "Even", True), ("east", "seat", False), ("abc", "cab", True)),
    ),
    Reader(
        "number, percent, unit, expression",
        read_quantity,
        "A formula with a currency before it, or a unit, words or a percent sign after it; degrees are a unit, and "
        "become radians inside trigonometric functions.",
        "In a reference only words and units of several letters are units: a bare letter is an unknown. Words that "
        "change a number (or, than, squared, thirds) are not units.",
        (
            ("6m", "6", False), (r"5\text{ m}", "5", True), ("5", "5 m", True), (r"5\text{ m}", r"5\text{ km}", False),
            ("18", "€18", True), ("18", "18 apples per day", True), ("5", r"5 \text{ million}", False),
            ("3 \\frac{1}{2}\\%", r"3.5\%", True), ("90", r"90^\circ", True), (r"\frac12", r"\sin 30^\circ", True),
            (r"\frac13", "0.333...", True), (r"\frac{2}{3}", "⅔", True), ("10^{12}", "10¹²", True),
            ("2.5", "2 1/2", True), ("1 000", "1000", True),
            (r"1-\frac{1}{\mathrm{e}}", r"1-\frac1e", True), ("5", r"\textcolor{blue}{5}", True),
        ),
    ),
    Reader(
        "text",
        read_text,
        "Anything else that contains words; case, punctuation and LaTeX are ignored.",
        "No part of a text is dropped, and no part stands for all of it.",
        (
            (r"\text{Evelyn}", "Evelyn", True), (r"4:30 \text{ p.m.}", r"4\!:\!30 \text{ p.m.}", True),
            (r"\text{east}", r"\text{northeast}", False), ("5", r"7 \text{ is wrong, } 5", False),
        ),
    ),
)  # fmt: skip

COMPARISONS = (
    Comparison(
        Quantity, Quantity, quantities, False,
        "Exactly equal as formulas. A printed decimal of at least six places and six digits may be the rounded or cut "
        "value of the other side. 50% is 50 and 0.5. If both sides have a known unit, it must be the same.",
        "A decimal's digits show how exact it is; nothing else is approximate.",
        (
            (r"\frac13", "0.333333", True), (r"\frac13", "0.33", False), (r"\frac{1}{9999}", "0.0001", False),
            (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", False), (r"33\frac13\%", "33.333333\\%", True),
            ("50\\%", "0.5", True), ("10\\%", "0.01", False), (r"\sqrt{8}", r"2\sqrt2", True), ("x+1", "1+x", True),
            (r"(\gamma-1)m", r"(\gamma-2)m", False), (r"A_{\text{total}}", r"A_{\text{side}}", False),
        ),
    ),
    Comparison(
        Infinity, Infinity, lambda a, b: a == b, False, "The same sign.", "Infinities are not numbers.",
        ((r"\infty", r"\infty", True), (r"\infty", r"-\infty", False)),
    ),
    Comparison(
        Named, Named, named, False,
        "The same name and the same value; or the same equation, if a value contains letters.",
        "x = 3 is not y = 3.",
        (("x=3", "x=3.0", True), ("y=3", "x=3", False), ("x=y", "y=x", True)),
    ),
    *(
        Comparison(
            Named, other, named_value, False, "The value of the named side.", "The name says what is asked for.",
            pairs,
        )
        for other, pairs in (
            (Quantity, (("5", "x=5", True),)), (Tuple, (("(3,2)", "(p,q)=(3,2)", True),)), (Ratio, ()), (Matrix, ()),
            (Text, ()), (Numeral, ()), (Infinity, ()), (Choice, ()),
        )
    ),
    *(
        Comparison(
            other, Named, value_named, False, "The value of the named side.", "The name says what was asked for.", pairs
        )
        for other, pairs in (
            (Quantity, (("x=5", "5", True), ("x+z=1", "1", False))), (Tuple, (("(p,q)=(3,2)", "(3,2)", True),)),
            (Ratio, ()), (Matrix, ()), (Text, ()), (Numeral, ()), (Infinity, ()), (Choice, ()),
        )
    ),
    Comparison(
        Equation, Quantity, last_member, False,
        "The last member of an answer's equation, if the reference is a value.",
        "m + n = 33 says how much m + n is. An equation in the reference is never shortened in this way.",
        (("33", "m+n=33", True), ("x+2y=33", "33", False)),
    ),
    Comparison(
        Equation, Equation, equations, False,
        "The differences of the sides are multiples of one another; longer chains agree member by member.",
        "An equation may be multiplied and rearranged.",
        (("2x+4y-3=0", "4x+8y=6", True), ("5x-7y+4=0", "5x+7y+4=0", False)),
    ),
    Comparison(
        Equation, Named, equations, True,
        "As two equations.", "y = ... is an equation whose left side is a name.",
        ((r"2x+4y-3=0", r"y=-\frac12x+\frac34", True), ("y=2x+3", "2x-y+3=0", True), ("x-y=2", "x=y+2", True)),
    ),
    Comparison(
        Inequality, Inequality, inequalities, False,
        "The same solutions for the same unknown, or the same members in the same or the reverse order.",
        "An inequality may be multiplied and rearranged too.",
        ((r"x\le5", r"5\ge x", True), ("x<1", "-x>-1", True), ("x<1", "x>-1", False), ("x>2", "y>2", False)),
    ),
    *(
        Comparison(a, b, sets, a is not b, "The same set of real numbers.", "Intervals, inequalities, unions and "
                   "set-builder form express the same.", pairs)
        for a, b, pairs in (
            (Reals, Reals, ((r"x\in[-2,7)", r"-2\le x<7", True),)), (Reals, Tuple, (("(2,3)", "2<x<3", True),)),
            (Reals, Inequality, ((r"(-\infty,2)\cup(2,\infty)", r"x\ne2", True),)),
            (Tuple, Inequality, ((r"(2,\infty)", r"x\ge2", False), (r"(2,\infty)", "x>2", True))),
            (Reals, Items, ((r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1),(2,\infty)", True),)), (Reals, Named, ()),
            (Inequality, Named, ((r"x\in[-2,7]", r"-2\le x\le7", True),)),
        )
    ),
    Comparison(
        Tuple, Tuple, tuples, False, "Item by item, brackets included.", "(1, 2] is not [1, 2].",
        (("(3,\\frac{\\pi}{2})", r"(3,\pi/2)", True), ("(1,2)", "[1,2]", False)),
    ),
    Comparison(
        Items, Items, lists, False,
        "The same values in any order; an answer may repeat a value, but a repetition in the reference counts. If only "
        "one side names its values (x = 3, y = 4), the order counts.",
        "A list of solutions has no order.",
        (("17,31", "31,17", True), ("2,-1", r"\{2,-1\}", True), ("17,31", "17", False), ("17,31", "17,31,17", True),
         ("2,2,5", "2,5", False), ("x=3,y=4", "x=4,y=3", False),
         ("x=3,y=4", "4,3", False), ("x=3,y=4", "3,4", True)),
    ),
    Comparison(
        Items, Tuple, in_order, True,
        "The same values in the same order, in round brackets, not as a set.", "Coordinates may lack brackets.",
        (("(1,2)", "1,2", True), ("(1,2)", "2,1", False), ("(1,2)", r"\{1,2\}", False), ("(1,2)", r"\{(1,2)\}", True)),
    ),
    *(
        Comparison(Items, b, one_item, True, "A list of one value is that value.", "One solution.", pairs)
        for b, pairs in ((Quantity, (("5", r"\{5\}", True), ("5", "5,6", False))), (Equation, ()), (Text, ()))
    ),
    Comparison(
        Named, Items, named_items, True,
        "A tuple of names as one equation each, in any order; otherwise the value of the named side.",
        "(x, y) = (1, 2) means x = 1 and y = 2.",
        (("x=1, y=2", "(x,y)=(1,2)", True), ("x=1, y=2", "(x,y)=(2,1)", False), (r"\{1,2\}", r"S=\{2,1\}", True)),
    ),
    Comparison(
        Ratio, Ratio, ratios, False, "Proportional; if a zero occurs, member by member.", "2:3 is 4:6.",
        (("7:32", "S_1:S=7:32", True), ("2:3", "2:5", False)),
    ),
    Comparison(
        Ratio, Quantity, quotient, True, "The quotient of its two members.", "A ratio may be given as a fraction.",
        (("2:3", r"\frac23", True), ("2:3", r"\frac32", False)),
    ),
    Comparison(
        Matrix, Matrix, matrices, False, "The same shape, entry by entry.", "",
        ((r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", False),),
    ),
    *(
        Comparison(Matrix, b, undecided, True, "Left to math-verify.", "A matrix may be the value of a formula.", ())
        for b in (Tuple, Quantity, Items)
    ),
    Comparison(
        Numeral, Numeral, lambda a, b: a == b, False, "The same digits in the same base.", "",
        (("4210_5", "4201_5", False),),
    ),
    Comparison(Choice, Choice, choices, False, "The same letters.", "", (("C", "(C)", True), ("C", "D", False))),
    Comparison(
        Items, Choice, several_choices, False, "All letters of the list.", "Several choices are right only together.",
        (("AB", "A,B", True), ("A", "A,B", False)),
    ),
    Comparison(
        Choice, Items, lambda a, b: several_choices(b, a), False, "All letters of the list.", "", (("A,B", "AB", True),)
    ),
    *(
        Comparison(b, Choice, choice_value, False, "The value after the reference's letter.",
                   "The value was asked for; an answer with a letter is judged by its letter.", pairs)
        for b, pairs in (
            (Quantity, ((r"\textbf{(A)}\ 12", "12", True), ("12", r"\textbf{(A)}\ 12", False))), (Text, ()),
            (Tuple, ()),
        )
    ),
    Comparison(
        Choice, Quantity, lettered, False, "Adjacent letters may be a product.", "AB may be a product of A and B.", ()
    ),
    Comparison(Text, Text, texts, False, "The same words.", "", ((r"\text{even}", r"\text{odd}", False),)),
    Comparison(
        Text, Quantity, word_product, True, "Three letters as a product; otherwise never.",
        "mgh is a product, even is not.",
        (("mgh", "ghm", True), ("mgh", r"m\cdot g h", True), ("2", "even", False)),
    ),
)  # fmt: skip


def _pairs_of_types() -> dict[tuple[type, type], Callable[[Any, Any], bool | None]]:
    out: dict[tuple[type, type], Callable[[Any, Any], bool | None]] = {}
    for rule in COMPARISONS:
        out[rule.answer, rule.reference] = rule.same
        if rule.both_ways:
            out[rule.reference, rule.answer] = rule.same
    return out


_BY_TYPES = _pairs_of_types()

# ------------------------------------------------------------------------------------------------------------ decisions

_REPEATING = re.compile(
    r"(?<![\w.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?|\((\d+)\))(?!\d)"
)
_ONWARD = re.compile(r"(?<![\w.])(\d*)\.(\d+)\s*(?:\.\.\.|\\[lc]?dots)(?![\w.])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d]|,\d)")
_SPACED = re.compile(r"(?<![\d.,] )(?<![\d.,])\d{1,3}(?: \d{3})+(?! ?\d)")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![\w.])")


def _repeating(m: re.Match) -> str:
    """Convert 0.1(6) to (16 - 1) / 90; a dot over two digits encloses the repeating part."""
    whole, start, first, between, last, bracketed = m.groups()
    return _fraction(whole, start, (first or bracketed) + (between or "") + (last or ""))


def _onward(m: re.Match) -> str:
    """Convert 0.1666... to 1/6: the shortest run of digits that occurs at least twice at the end."""
    whole, digits = m.groups()
    for n in range(1, len(digits) // 2 + 1):
        if digits[-n:] == digits[-2 * n : -n]:
            start = digits
            while start.endswith(digits[-n:]):
                start = start[:-n]
            return _fraction(whole, start, digits[-n:])
    return m.group()


def _fraction(whole: str, start: str, cycle: str) -> str:
    top = int(f"{whole}{start}{cycle}") - int(f"{whole}{start}" or "0")
    return rf"\frac{{{top}}}{{{'9' * len(cycle)}{'0' * len(start)}}}"


def readings(text: str, answer: bool) -> list[Any]:
    """The values that a text may have; empty if it is of no known type."""
    s = spelled(text)
    if not answer and "####" in s:  # a GSM8K solution, whose answer follows
        s = s.rpartition("####")[2].strip()
    s = _SPACED.sub(lambda m: m.group().replace(" ", ""), s)
    if "." in s:
        s = _ONWARD.sub(_onward, _REPEATING.sub(_repeating, s))
    variants = [s]
    if _THOUSANDS.search(s):
        variants.insert(0, _THOUSANDS.sub(lambda m: m.group().replace(",", ""), s))
    if m := _SCIENTIFIC.search(s):
        written = _SCIENTIFIC.sub(r"\1\\times10^{\2}", s)
        variants = [written, s] if m.group(2)[0] in "+-" else [written]  # 2e-1 may be 2 e - 1
    out: list[Any] = []
    for variant in variants:
        try:
            out.append(value(tokens(variant), answer))
        except (Unread, RecursionError):
            pass
    return out


@lru_cache(512)
def _of_reference(text: str) -> tuple[Any, ...]:
    """Cached, because the responses of a group share their reference."""
    return tuple(readings(text, False))


_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)


def decide(answer: str, reference: str) -> bool | None:
    """Whether an answer equals the reference: True, False, or None if no rule decides."""
    if not any(map(str.isalnum, answer)) or not any(map(str.isalnum, reference)):
        return False
    if answer.strip() == reference.strip():
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference):
        return int(answer) == int(reference)
    try:
        ours, theirs = readings(answer, True), _of_reference(reference)
    except (Unread, RecursionError):
        return False  # unbalanced or reversed text is not what it looks like
    if not ours or not theirs:
        return None
    found = [same(a, b) for a in ours for b in theirs]
    if True in found:
        return True
    several = any(
        isinstance(x, Items) and any(isinstance(y, Named | Equation) for y in x.items) for x in (*ours, *theirs)
    )
    return None if None in found and not several else False  # math-verify uses the last of several equations
