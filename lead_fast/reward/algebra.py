"""Compare formulas exactly: normal forms over the rationals, and numbers to many digits where no form decides.

A formula is a tree of tuples (`Node`). Its normal form is a quotient of polynomials with rational coefficients in
atoms: roots of primes, i, e, pi, letters, and functions of normal forms. Radicals of primes are linearly independent
over the rationals, so two forms in roots, letters, e and pi are equal exactly if their difference is zero. Functions of
several arguments may hide an identity: for them a difference of zero proves equality, two values that differ in many
digits refute it, and anything else is left undecided. Nothing is ever rounded to prove equality.

The work is bounded (terms, bits, exponents); whatever exceeds a bound is undecided.
"""

import zlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial, gcd, isqrt, lcm
from typing import Any

import mpmath

Node = tuple[Any, ...]
"""('num', Fraction) ('name', str) ('const', 'pi' | 'e' | 'i') ('+' | '*', [nodes]) ('/' | '^', node, node)
('root', degree node, node) ('fn', function, [nodes]): every formula that can be read."""

Monomial = tuple[tuple[str, Fraction], ...]
Polynomial = dict[Monomial, Fraction]

MAX_TERMS, MAX_BITS, MAX_PRODUCTS = 400, 40_000, 25_000
ONE: Polynomial = {(): Fraction(1)}
ZERO = Fraction(0)


class Undecided(Exception):
    """The formula is beyond what this module computes."""


@dataclass(frozen=True)
class Form:
    """num / den; a denominator of one term is always divided out."""

    num: Polynomial
    den: Polynomial

    @property
    def key(self) -> str:
        top = "+".join(f"{c}{m}" for m, c in sorted(self.num.items()))
        return top if self.den == ONE else f"({top})/({'+'.join(f'{c}{m}' for m, c in sorted(self.den.items()))})"

    def rational(self) -> Fraction | None:
        """The value, if it is a rational number."""
        if self.den != ONE or len(self.num) > 1:
            return None
        if not self.num:
            return ZERO
        ((m, c),) = self.num.items()
        return c if m == () else None


@lru_cache(4096)
def factors(n: int) -> tuple[tuple[int, int], ...]:
    """Prime factors and their exponents of a positive integer that is small or smooth; raises Undecided for others."""
    powers, p = [], 2
    while p * p <= n:
        if p > 40_000:
            if isqrt(n) ** 2 == n and n < 10**18:
                return (*powers, *((q, 2 * k) for q, k in factors(isqrt(n))))
            raise Undecided
        k = 0
        while n % p == 0:
            n, k = n // p, k + 1
        if k:
            powers.append((p, k))
        p += 1 if p == 2 else 2
    return (*powers, (n, 1)) if n > 1 else tuple(powers)


def is_prime_atom(atom: str) -> bool:
    return atom.isdigit()


class Algebra:
    """Normal forms for one comparison; counts products, so that no formula takes long."""

    def __init__(self) -> None:
        self.products = 0
        self.radicands: dict[str, Polynomial] = {}  # a root's atom -> its radicand
        self.shifts: dict[str, Form] = {}
        self.hidden = False  # whether an atom was made that may depend on others
        self.angles: set[str] = set()

    # ------------------------------------------------------------------------------------------------ polynomials

    def term(self, m: dict[str, Fraction], c: Fraction) -> Polynomial:
        """c times the product of atoms to their exponents, in normal form."""
        extra: Polynomial | None = None
        out = []
        for atom, e in m.items():
            if e == 0:
                continue
            if is_prime_atom(atom) and not 0 <= e < 1:
                k = e.numerator // e.denominator
                if abs(k) * int(atom).bit_length() > MAX_BITS:
                    raise Undecided
                c, e = c * Fraction(int(atom)) ** k, e - k
            elif atom == "i":
                k = int(e) % 4
                c, e = (-c if k >= 2 else c), Fraction(k % 2)
            elif atom in self.radicands and e >= 1:
                whole = e.numerator // e.denominator
                e -= whole
                power = self.power(self.radicands[atom], whole)
                extra = power if extra is None else self.times(extra, power)
            if e:
                out.append((atom, e))
        bits = c.numerator.bit_length() + c.denominator.bit_length()
        self.products += bits >> 9  # long numbers take long
        if bits > 2 * MAX_BITS:
            raise Undecided
        single: Polynomial = {tuple(sorted(out)): c} if c else {}
        return single if extra is None else self.times(single, extra)

    def times(self, a: Polynomial, b: Polynomial) -> Polynomial:
        self.products += len(a) * len(b)
        if self.products > MAX_PRODUCTS:
            raise Undecided
        out: Polynomial = {}
        for m, c in a.items():
            for n, d in b.items():
                if not m or not n:
                    out[m or n] = out.get(m or n, ZERO) + c * d
                    continue
                exponents = dict(m)
                for atom, e in n:
                    exponents[atom] = exponents.get(atom, ZERO) + e
                for key, value in self.term(exponents, c * d).items():
                    out[key] = out.get(key, ZERO) + value
        out = {m: c for m, c in out.items() if c}
        if len(out) > MAX_TERMS:
            raise Undecided
        return out

    def power(self, a: Polynomial, n: int) -> Polynomial:
        if len(a) == 1:
            ((m, c),) = a.items()
            bits = max(c.numerator.bit_length(), c.denominator.bit_length())
            if bits > 1 and bits * n > MAX_BITS:
                raise Undecided
            return self.term({atom: e * n for atom, e in m}, c**n)
        if n > 200:
            raise Undecided
        out = ONE
        while n:
            if n & 1:
                out = self.times(out, a)
            n >>= 1
            if n:
                a = self.times(a, a)
        return out

    @staticmethod
    def plus(a: Polynomial, b: Polynomial, sign: int = 1) -> Polynomial:
        out = dict(a)
        for m, c in b.items():
            out[m] = out.get(m, ZERO) + sign * c
        return {m: c for m, c in out.items() if c}

    # ------------------------------------------------------------------------------------------------------ forms

    def form(self, num: Polynomial, den: Polynomial = ONE) -> Form:
        if not den:
            raise Undecided  # a division by zero: an undefined value equals nothing
        if len(den) == 1 and den != ONE:
            ((m, c),) = den.items()
            num, den = self.times(num, self.term({atom: -e for atom, e in m}, 1 / c)), ONE
        return Form(num, den if num else ONE)

    def number(self, q: Fraction | int) -> Form:
        return Form({(): Fraction(q)} if q else {}, ONE)

    def atom(self, name: str, exponent: Fraction | int = 1) -> Form:
        return Form(self.term({name: Fraction(exponent)}, Fraction(1)), ONE)

    def add(self, a: Form, b: Form, sign: int = 1) -> Form:
        if a.den == b.den:
            return self.form(self.plus(a.num, b.num, sign), a.den)
        return self.form(self.plus(self.times(a.num, b.den), self.times(b.num, a.den), sign), self.times(a.den, b.den))

    def multiply(self, a: Form, b: Form) -> Form:
        return self.form(self.times(a.num, b.num), self.times(a.den, b.den))

    def divide(self, a: Form, b: Form) -> Form:
        return self.form(self.times(a.num, b.den), self.times(a.den, b.num))

    def negative(self, a: Form) -> Form:
        return Form({m: -c for m, c in a.num.items()}, a.den)

    def raised(self, a: Form, b: Form, *, real: bool = False) -> Form:
        """a to the power b; real: an odd root of a negative number is negative."""
        q = b.rational()
        if q is None:
            return self._exponential(a, b)
        if q.denominator == 1:
            n = abs(int(q))
            if n > 10**6:
                raise Undecided
            if q < 0:
                a = self.divide(self.number(1), a)
            return self.form(self.power(a.num, n), self.power(a.den, n))
        return self._root(a, q, real)

    def _root(self, a: Form, q: Fraction, real: bool) -> Form:
        if not a.num:
            if q < 0:
                raise Undecided
            return a
        if a.den != ONE:
            raise Undecided
        content = self._content(a.num)
        if len(a.num) == 1:
            ((m, c),) = a.num.items()
            content = abs(c)
            sign = -1 if c < 0 else 1
            atoms = dict(m)
            constant = all(is_prime_atom(x) or x in ("e", "pi") for x in atoms)
            if sign < 0 and not (constant and (q.denominator == 2 or (real and q.denominator % 2))):
                return self._opaque_root(a.num, q)
            if not constant:
                ((name, e), *others) = atoms.items()
                if others or name in self.radicands or name == "i" or (e.numerator % 2 == 0 and q.denominator % 2 == 0):
                    return self._opaque_root(a.num, q)
            out = self._rational_root(content, q)
            out = self.multiply(out, self.form(self.term({x: e * q for x, e in atoms.items()}, Fraction(1))))
            if sign < 0:
                out = self.multiply(
                    out,
                    self.atom("i", q.numerator) if q.denominator == 2 else self.number(-1 if q.numerator % 2 else 1),
                )
            return out
        primitive = {m: c / content for m, c in a.num.items()}
        return self.multiply(self._rational_root(content, q), self._opaque_root(primitive, q))

    def _opaque_root(self, radicand: Polynomial, q: Fraction) -> Form:
        self.hidden = True
        atom = f"root({Form(radicand, ONE).key})"
        self.radicands[atom] = radicand
        return self.form(self.term({atom: q}, Fraction(1)))

    def _rational_root(self, c: Fraction, q: Fraction) -> Form:
        exponents: dict[str, Fraction] = {}
        for n, sign in ((c.numerator, 1), (c.denominator, -1)):
            for p, k in factors(n):
                exponents[str(p)] = exponents.get(str(p), ZERO) + sign * k * q
        return self.form(self.term(exponents, Fraction(1)))

    @staticmethod
    def _content(p: Polynomial) -> Fraction:
        """The largest rational number that divides every coefficient."""
        return Fraction(gcd(*(c.numerator for c in p.values())), lcm(*(c.denominator for c in p.values())))

    def _exponential(self, a: Form, b: Form) -> Form:
        """A power whose exponent contains letters, split into one factor per term of the exponent."""
        out = self.number(1)
        bases: list[tuple[str, Fraction]] = []
        q = a.rational()
        if q is not None and q > 0:
            for n, sign in ((q.numerator, 1), (q.denominator, -1)):
                bases += [(str(p), Fraction(sign * k)) for p, k in factors(n)]
        elif a.den == ONE and len(a.num) == 1 and [*a.num.values()] == [1]:
            ((m, _),) = a.num.items()
            bases = [*m]
            if len(bases) > 1 or (bases[0][0] == "i"):
                raise Undecided
        else:
            if a.den != ONE:
                raise Undecided
            bases = [(f"({a.key})", Fraction(1))]
            self.hidden = True
        if b.den != ONE:
            for base, k in bases:
                self.hidden = True
                out = self.multiply(out, self.atom(f"{base}^({b.key})", k))
            return out
        for m, c in b.num.items():
            if m == ():
                out = self.multiply(out, self.raised(a, self.number(c)))
                continue
            for base, k in bases:
                exponent = c * k
                if base == "e" and ("i", Fraction(1)) in m:  # Euler's formula
                    turn = self.form({tuple(x for x in m if x[0] != "i"): exponent})
                    wave = self.add(self.cosine(turn), self.multiply(self.atom("i"), self.sine(turn)))
                    out = self.multiply(out, wave)
                elif (
                    base == "e"
                    and len(m) == 1
                    and m[0][1] == 1
                    and m[0][0].startswith("ln(")
                    and m[0][0][3:-1].isdigit()
                ):
                    out = self.multiply(out, self._rational_root(Fraction(int(m[0][0][3:-1])), exponent))
                else:
                    if any(x == "i" or not (x.isalpha() or is_prime_atom(x)) for x, _ in m):
                        self.hidden = True
                    out = self.multiply(out, self.atom(f"{base}^({m})", exponent))
        return out

    # -------------------------------------------------------------------------------------------------- functions

    def _half_turns(self, a: Form) -> Fraction | None:
        """a / pi, if it is rational."""
        if not a.num:
            return ZERO
        if a.den == ONE and len(a.num) == 1:
            ((m, c),) = a.num.items()
            if m == (("pi", Fraction(1)),):
                return c
        return None

    def cosine(self, a: Form) -> Form:
        t = self._half_turns(a)
        if t is None:
            return self._wave("cos", a)[0]
        t %= 2
        t = 2 - t if t > 1 else t
        sign = -1 if t > Fraction(1, 2) else 1
        t = 1 - t if sign < 0 else t
        known = {0: {(): 1}, Fraction(1, 2): {}, Fraction(1, 3): {(): Fraction(1, 2)}}
        root2, root3, root5 = ((str(p), Fraction(1, 2)) for p in (2, 3, 5))
        known |= {
            Fraction(1, 4): {(root2,): Fraction(1, 2)},
            Fraction(1, 6): {(root3,): Fraction(1, 2)},
            Fraction(1, 5): {(): Fraction(1, 4), (root5,): Fraction(1, 4)},
            Fraction(2, 5): {(): Fraction(-1, 4), (root5,): Fraction(1, 4)},
            Fraction(1, 12): {(root2,): Fraction(1, 4), (root2, root3): Fraction(1, 4)},
            Fraction(5, 12): {(root2,): Fraction(-1, 4), (root2, root3): Fraction(1, 4)},
        }
        if t in known:
            return Form({m: Fraction(c) * sign for m, c in known[t].items()}, ONE)
        self.hidden = True
        return self.multiply(self.number(sign), self.atom(f"cos({t}pi)"))

    def sine(self, a: Form) -> Form:
        t = self._half_turns(a)
        if t is not None:
            return self.cosine(self.form({(("pi", Fraction(1)),): Fraction(1, 2) - t} if t != Fraction(1, 2) else {}))
        out, flipped = self._wave("sin", a)
        return self.negative(out) if flipped else out

    def _wave(self, name: str, a: Form) -> tuple[Form, bool]:
        flipped = self._leads_negative(a)
        a = self.negative(a) if flipped else a
        self.angles.add(a.key)
        if len(self.angles) > 1:
            self.hidden = True
        return self.atom(f"{name}({a.key})"), flipped

    @staticmethod
    def _leads_negative(a: Form) -> bool:
        return bool(a.num) and a.num[min(a.num)] < 0

    def logarithm(self, a: Form) -> Form:
        q = a.rational()
        if q is not None:
            if q <= 0:
                raise Undecided
            out = self.number(0)
            for n, sign in ((q.numerator, 1), (q.denominator, -1)):
                for p, k in factors(n):
                    out = self.add(out, self.multiply(self.number(sign * k), self.atom(f"ln({p})")))
            return out
        if a.den == ONE and len(a.num) == 1:
            ((m, c),) = a.num.items()
            if c > 0 and all(is_prime_atom(x) or x in ("e", "pi") for x, _ in m):
                out = self.logarithm(self.number(c))
                for x, e in m:
                    log = self.number(1) if x == "e" else self.atom(f"ln({x})")
                    out = self.add(out, self.multiply(self.number(e), log))
                return out
        self.hidden = True
        return self.atom(f"ln({a.key})")

    def opaque(self, name: str, *arguments: Form) -> Form:
        self.hidden = True
        return self.atom(f"{name}({';'.join(a.key for a in arguments)})")

    def function(self, name: str, args: list[Form], nodes: list[Node]) -> Form:
        a = args[0]
        if name == "sin":
            return self.sine(a)
        if name == "cos":
            return self.cosine(a)
        if name in ("tan", "cot", "sec", "csc"):
            one, s, c = self.number(1), self.sine(a), self.cosine(a)
            top, bottom = {"tan": (s, c), "cot": (c, s), "sec": (one, c), "csc": (one, s)}[name]
            return self.divide(top, bottom)
        if name == "ln":
            return self.logarithm(a)
        if name == "log":  # base, argument
            return self.divide(self.logarithm(args[1]), self.logarithm(a))
        if name in ("arcsin", "arccos", "arctan"):
            return self._arc(name, a)
        if name == "abs":
            value = evaluate(nodes[0]) if not names(nodes[0]) else None
            if value is not None and abs(value.imag) < 1e-25 and abs(value.real) > 1e-20:
                return a if value.real > 0 else self.negative(a)
            if a.den == ONE and a.num:
                content = self._content(a.num) * (-1 if self._leads_negative(a) else 1)
                inner = Form({m: c / content for m, c in a.num.items()}, ONE)
                return self.multiply(self.number(abs(content)), self.opaque("abs", inner))
            return self.opaque("abs", a)
        if name == "factorial":
            return self._factorial(a)
        if name == "binomial":
            n, k = args[0].rational(), args[1].rational()
            if n is not None and k is not None and n.denominator == k.denominator == 1 and 0 <= k and 0 <= n <= 3000:
                return self.number(comb(int(n), int(k)))
            top = self._factorial(args[0])
            return self.divide(
                top, self.multiply(self._factorial(args[1]), self._factorial(self.add(args[0], args[1], -1)))
            )
        if name in ("floor", "ceil"):
            q = a.rational()
            if q is not None:
                return self.number(q.__floor__() if name == "floor" else q.__ceil__())
        return self.opaque(name, *args)

    def _arc(self, name: str, a: Form) -> Form:
        flipped = self._leads_negative(a)
        positive = self.negative(a) if flipped else a
        for degrees in (0, 15, 18, 30, 36, 45, 54, 60, 72, 75, 90):
            turn = self.form({(("pi", Fraction(1)),): Fraction(degrees, 180)} if degrees else {})
            s, c = self.sine(turn), self.cosine(turn)
            try:
                image = {"arcsin": s, "arccos": c}.get(name) or self.divide(s, c)
            except Undecided:
                continue
            if image.key == positive.key:
                if not flipped:
                    return turn
                return self.negative(turn) if name != "arccos" else self.add(self.atom("pi"), turn, -1)
        if flipped and name != "arccos":
            return self.negative(self.opaque(name, positive))
        return self.opaque(name, a)

    def _factorial(self, a: Form) -> Form:
        q = a.rational()
        if q is not None:
            if q.denominator != 1 or q < 0 or q > 3000:
                raise Undecided
            return self.number(factorial(int(q)))
        if a.den != ONE:
            return self.opaque("factorial", a)
        shift = a.num.get((), ZERO)
        k = shift.numerator // shift.denominator
        if abs(k) > 30:
            raise Undecided
        base = self.add(a, self.number(k), -1)  # (m + k)! = m! (m + 1) ... (m + k)
        out = self.atom(f"factorial({base.key})")
        for j in range(1, k + 1):
            out = self.multiply(out, self.add(base, self.number(j)))
        for j in range(0, k, -1):
            out = self.divide(out, self.add(base, self.number(j)))
        return out

    # ------------------------------------------------------------------------------------------------------ trees

    def of(self, node: Node) -> Form:
        """The normal form of a tree."""
        kind = node[0]
        if kind == "num":
            return self.number(node[1])
        if kind == "name":
            return self.atom(node[1])
        if kind == "const":
            return self.atom(node[1])
        if kind == "+":
            out = self.of(node[1][0])
            for x in node[1][1:]:
                out = self.add(out, self.of(x))
            return out
        if kind == "*":
            out = self.of(node[1][0])
            for x in node[1][1:]:
                out = self.multiply(out, self.of(x))
            return out
        if kind == "/":
            return self.divide(self.of(node[1]), self.of(node[2]))
        if kind == "^":
            return self.raised(self.of(node[1]), self.of(node[2]))
        if kind == "root":
            degree = self.of(node[1]).rational()
            if degree is None or degree.denominator != 1 or not 2 <= degree <= 1000:
                raise Undecided
            return self.raised(self.of(node[2]), self.number(1 / degree), real=True)
        if kind == "fn":
            return self.function(node[1], [self.of(x) for x in node[2]], node[2])
        raise Undecided

    def vanishes(self, p: Polynomial) -> bool:
        """Whether a polynomial is zero, after multiplying out roots and writing sin^2 as 1 - cos^2."""
        low: dict[str, Fraction] = {}
        for m in p:
            for atom, e in m:
                if e < 0:
                    low[atom] = min(low.get(atom, ZERO), e)
        if low:
            p = self.times(p, {tuple(sorted((a, -e) for a, e in low.items())): Fraction(1)})
        while True:
            out: Polynomial = {}
            changed = False
            for m, c in p.items():
                squared = next((a for a, e in m if a.startswith("sin(") and e >= 2), None)
                if squared is None:
                    out = self.plus(out, {m: c})
                    continue
                changed = True
                if dict(m)[squared] > 20:
                    raise Undecided
                rest = {a: (e - 2 if a == squared else e) for a, e in m}
                cos2 = {(("cos" + squared[3:], Fraction(2)),): Fraction(-1), (): Fraction(1)}
                out = self.plus(out, self.times(self.term(rest, c), cos2))
            p = out
            if not changed:
                return not p


def names(node: Node) -> set[str]:
    """The unknowns in a tree."""
    if node[0] == "name":
        return {node[1]}
    unknowns: set[str] = set()
    for part in node[1:]:
        for x in part if isinstance(part, list) else [part]:
            if isinstance(x, tuple):
                unknowns |= names(x)
    return unknowns


# ------------------------------------------------------------------------------------------------------------- numbers


def evaluate(node: Node, digits: int = 40, point: int = 0) -> Any:
    """The value as a complex number to about `digits` digits, with fixed positive numbers for letters; or None."""
    with mpmath.workdps(digits):
        try:
            value = mpmath.mpc(_value(node, point))
        except (Undecided, ZeroDivisionError, ValueError, OverflowError, TypeError, NotImplementedError):
            return None
        return value if mpmath.isfinite(value) else None


def _value(node: Node, point: int) -> Any:
    kind = node[0]
    if kind == "num":
        return mpmath.mpf(node[1].numerator) / node[1].denominator
    if kind == "name":
        return mpmath.mpf(zlib.crc32(f"{node[1]} {point}".encode()) % 999_983 + 1000) / 300_007
    if kind == "const":
        return {"pi": +mpmath.pi, "e": +mpmath.e, "i": mpmath.mpc(0, 1)}[node[1]]
    if kind in ("+", "*"):
        parts = [_value(x, point) for x in node[1]]
        return mpmath.fsum(parts) if kind == "+" else mpmath.fprod(parts)
    if kind == "/":
        return _value(node[1], point) / _value(node[2], point)
    if kind == "^":
        return _power(_value(node[1], point), _value(node[2], point))
    if kind == "root":
        degree, x = _value(node[1], point), _value(node[2], point)
        if x.imag == 0 and x.real < 0 and degree % 2 == 1:
            return -_power(-x, 1 / degree)
        return _power(x, 1 / degree)
    name, args = node[1], [_value(x, point) for x in node[2]]
    if name == "log":
        return mpmath.log(args[1]) / mpmath.log(args[0])
    if name in ("factorial", "binomial") and any(abs(x) > 10**6 for x in args):
        raise Undecided
    if name in FUNCTIONS:
        return FUNCTIONS[name](*args)
    raise Undecided


def _power(x: Any, y: Any) -> Any:
    if x == 0:
        if y.real <= 0:
            raise Undecided
        return mpmath.mpf(0)
    if abs(y) * (1 + abs(mpmath.log(abs(x)))) > 1e12:
        raise Undecided
    return x**y


FUNCTIONS = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc,
    "ln": mpmath.log, "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "abs": mpmath.fabs,
    "factorial": mpmath.factorial, "binomial": mpmath.binomial, "sinh": mpmath.sinh, "cosh": mpmath.cosh,
    "tanh": mpmath.tanh,
}  # fmt: skip


def differ(a: Node, b: Node) -> bool:
    """Whether the values certainly differ: consistently at two precisions, at a point with positive letters."""
    for point in range(2):
        seen = []
        for digits in (40, 90):
            x, y = evaluate(a, digits, point), evaluate(b, digits, point)
            if x is None or y is None:
                return False
            size = max(abs(x), abs(y))
            seen.append(size > 0 and abs(x - y) > size * mpmath.mpf(10) ** -12)
        if all(seen):
            return True
        if any(seen):
            return False
    return False


def equal(a: Node, b: Node) -> bool | None:
    """Whether two formulas are equal for every value of their letters: proved, refuted, or None for undecided."""
    if a == b:
        return True
    algebra = Algebra()
    try:
        x, y = algebra.of(a), algebra.of(b)
        difference = algebra.plus(algebra.times(x.num, y.den), algebra.times(y.num, x.den), -1)
        if algebra.vanishes(difference):
            return True
        if not algebra.hidden:
            return False
    except (Undecided, RecursionError):
        pass
    try:
        return False if differ(a, b) else None
    except RecursionError:
        return None


def ratio(a: Node, b: Node) -> Fraction | None | bool:
    """The rational constant c with a = c b; False if the quotient is certainly not constant, None if undecided."""
    algebra = Algebra()
    try:
        x, y = algebra.of(a), algebra.of(b)
        top, bottom = algebra.times(x.num, y.den), algebra.times(y.num, x.den)
        if not top or not bottom:
            return False if bool(top) != bool(bottom) and not algebra.hidden else None
        for m in top:
            if m in bottom:
                c = top[m] / bottom[m]
                if algebra.vanishes(
                    algebra.plus(top, bottom, -1)
                    if c == 1
                    else algebra.plus(top, {k: c * v for k, v in bottom.items()}, -1)
                ):
                    return c
        return None if algebra.hidden else False
    except (Undecided, RecursionError):
        return None
