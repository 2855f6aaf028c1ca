"""Twenty problems in LiveCodeBench's schema, made by this project, with reference programs and broken ones.

    python tests/made_programs.py    # writes data/livecodebench.jsonl and data/livecodebench_programs.jsonl

Expected outputs come from the oracles below, which use different algorithms from the reference programs. Each broken
program is listed with the reason for which it must fail under SHORT limits.
"""

import base64
import itertools
import json
import pickle
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
WRONG, ERROR, TIME, MEMORY, OUTPUT = "wrong answer", "runtime error", "time limit", "memory limit", "output limit"


@dataclass
class Made:
    """A problem; `oracle` takes an input's text (stdin) or the arguments, and returns the output's text or value."""

    title: str
    difficulty: str
    statement: str
    inputs: list[Any]
    oracle: Callable[..., Any]
    reference: str
    broken: dict[str, str]  # program: reason
    function: str | None = None
    starter: str = ""
    day: str = "2024-09-01"
    extra: list[str] = field(default_factory=list)  # further correct programs

    @property
    def name(self) -> str:
        return self.title.lower().replace(" ", "-")


def numbers(seed: int, n: int, low: int, high: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(low, high) for _ in range(n)]


def listed(values: list[int]) -> str:
    return f"{len(values)}\n{' '.join(map(str, values))}\n"


def ints(text: str) -> list[int]:
    return [int(w) for w in text.split()[1:]]


def lis(text: str) -> str:
    a = ints(text)
    best = [1] * len(a)
    for i in range(len(a)):
        for j in range(i):
            if a[j] < a[i]:
                best[i] = max(best[i], best[j] + 1)
    return str(max(best))


def inversions(text: str) -> str:
    a = ints(text)
    order = sorted(range(len(a)), key=lambda i: (a[i], i))
    tree, total = [0] * (len(a) + 1), 0
    for seen, i in enumerate(order):
        at, before = i + 1, 0
        while at:
            before += tree[at]
            at &= at - 1
        total += seen - before
        at = i + 1
        while at <= len(a):
            tree[at] += 1
            at += at & -at
    return str(total)


def steps(text: str) -> str:
    rows = text.split("\n")[1:-1]
    far = {(0, 0): 0}
    changed = True
    while changed:  # relaxation, without a queue
        changed = False
        for (r, c), d in list(far.items()):
            for a, b in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if 0 <= a < len(rows) and 0 <= b < len(rows[0]) and rows[a][b] == ".":
                    if far.get((a, b), 10**9) > d + 1:
                        far[a, b], changed = d + 1, True
    return str(far.get((len(rows) - 1, len(rows[0]) - 1), -1))


def coins(text: str) -> str:
    (target, *_), values = (list(map(int, line.split())) for line in text.strip().split("\n"))
    return str(sum(
        1 for counts in itertools.product(*[range(target // v + 1) for v in values])
        if sum(n * v for n, v in zip(counts, values, strict=True)) == target
    ))  # fmt: skip


def tree_cost(text: str) -> str:
    rows = [list(map(int, line.split())) for line in text.strip().split("\n")]
    n, edges = rows[0][0], rows[1:]
    inside, cost = {1}, 0
    while len(inside) < n:  # Prim, where the reference is Kruskal
        w, v = min((w, b if a in inside else a) for a, b, w in edges if (a in inside) != (b in inside))
        inside.add(v)
        cost += w
    return str(cost)


def fibonacci(text: str) -> str:
    import sys

    sys.set_int_max_str_digits(0)

    def pair(n: int) -> tuple[int, int]:  # doubling
        if n == 0:
            return 0, 1
        a, b = pair(n // 2)
        c, d = a * (2 * b - a), a * a + b * b
        return (d, c + d) if n % 2 else (c, d)

    return str(pair(int(text))[0])


def roman(text: str) -> str:
    signs = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    values = [signs[c] for c in text.strip()]
    return str(sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True)))


def balanced(text: str) -> str:
    out = []
    for line in text.split("\n")[1:-1]:
        while (shorter := line.replace("()", "").replace("[]", "")) != line:
            line = shorter
        out.append("NO" if line else "YES")
    return "\n".join(out)


def window(s: str, t: str) -> str:
    pieces = [s[i:j] for i in range(len(s)) for j in range(i + 1, len(s) + 1)]
    return min((p for p in pieces if all(p.count(c) >= t.count(c) for c in t)), key=len, default="")


def distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(new[-1] + 1, row[j] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def solution(name: str, arguments: str, result: str) -> str:
    return f"class Solution:\n    def {name}(self, {arguments}) -> {result}:\n        "


RNG = random.Random(5)
GRIDS = ["".join(RNG.choice("...#") for _ in range(8 * 6)) for _ in range(4)]
EDGES = [[(a, b, RNG.randint(1, 99)) for a, b in itertools.combinations(range(1, n + 1), 2)] for n in (2, 5, 9)]

MADE = [
    Made("Sum of a list", "easy", "Read n, then n integers on one line. Print their sum.",
         [listed(numbers(i, n, -99, 99)) for i, n in enumerate((3, 1, 8, 50))], lambda t: str(sum(ints(t))),
         "n = int(input())\nprint(sum(map(int, input().split())))",
         {"n = int(input())\nprint(max(map(int, input().split())))": WRONG, "print(int(input('')) + ' ')": ERROR},
         extra=["import sys\ndata = sys.stdin.buffer.read().split()\nif __name__ == '__main__':\n    print(sum(map("
                "int, data[1:])))\n    sys.exit(0)",
                "def main():\n    print(reduce(add, map(int, open(0).read().split()[1:])))\nmain()"]),
    Made("Reversed words", "easy", "Print the words of each line in reverse order, line by line, up to the end of the "
         "input.", ["a b c\nd e\n", "one\n", "x y\n\nz w\n"],
         lambda t: "\n".join(" ".join(line.split()[::-1]) for line in t.rstrip("\n").split("\n")),
         "import sys\nfor line in sys.stdin:\n    words = line.split()\n    words.reverse()\n    print(*words)",
         {"import sys\nfor line in sys.stdin:\n    print(line[::-1].strip())": WRONG,
          "while True:\n    print(input())": ERROR}),
    Made("Mean of a list", "easy", "Read n, then n integers. Print their mean with two decimals.",
         [listed(v) for v in ([1, 2, 3, 4], [7], [1, 2], [10, 0, 0, 0])],
         lambda t: str(sum(ints(t)) / len(ints(t))),
         "n = int(input())\nprint('%.2f' % (sum(map(int, input().split())) / n))  # 2.50 equals 2.5",
         {"n = int(input())\nprint(sum(map(int, input().split())) // n)": WRONG}),
    Made("Vowels", "easy", "Print how many of the letters a, e, i, o, u the line has, in either case.",
         ["Programming\n", "xyz\n", "AEIOU aeiou\n"], lambda t: str(len([c for c in t.lower() if c in "aeiou"])),
         "s = input().lower()\nprint(sum(s.count(c) for c in 'aeiou'))",
         {"print(sum(map(input().count, 'aeiou')))": WRONG, "print(len(input())": ERROR}),
    Made("Balanced brackets", "medium", "Read q, then q lines of the brackets ()[]. For each print YES if it is "
         "balanced, else NO.", ["3\n()[]\n([)]\n((\n", "2\n[]\n)(\n", "2\n\n([()[]])\n"], balanced,
         "for _ in range(int(input())):\n    stack = []\n    ok = True\n    for c in input():\n        if c in '([':\n"
         "            stack.append(c)\n        elif not stack or stack.pop() + c not in ('()', '[]'):\n"
         "            ok = False\n    print('YES' if ok and not stack else 'NO')",
         {"for _ in range(int(input())):\n    s = input()\n    print('YES' if s.count('(') == s.count(')') else 'NO')":
          WRONG, "for _ in range(int(input())):\n    print('YES')\n    print('NO')": WRONG}),
    Made("Longest rise", "medium", "Read n, then n integers. Print the length of the longest strictly increasing "
         "subsequence.", [listed(numbers(i, n, 0, 999)) for i, n in enumerate((5, 9, 1, 600))], lis,
         "from bisect import bisect_left\nn = int(input())\ntails = []\nfor x in map(int, input().split()):\n"
         "    at = bisect_left(tails, x)\n    tails[at:at + 1] = [x]\nprint(len(tails))",
         {"n = int(input())\na = list(map(int, input().split()))\ndef go(i, last):\n    if i == n:\n        return 0\n"
          "    skip = go(i + 1, last)\n    return max(skip, 1 + go(i + 1, a[i])) if a[i] > last else skip\n"
          "print(go(0, -1))": TIME}),
    Made("Steps through a grid", "medium", "Read the size, then a grid of . and #. Print the fewest steps from the "
         "first cell to the last one through dots, or -1.",
         [f"6 8\n{chr(10).join('.' * (r in (0, 5)) + g[8 * r + (r in (0, 5)):8 * r + 7] + '.' for r in range(6))}\n"
          for g in GRIDS], steps,
         "from collections import deque\nh, w = map(int, input().split())\ng = [input() for _ in range(h)]\n"
         "q, d = deque([(0, 0)]), {(0, 0): 0}\nwhile q:\n    r, c = q.popleft()\n"
         "    for a, b in ((r+1,c),(r-1,c),(r,c+1),(r,c-1)):\n"
         "        if 0 <= a < h and 0 <= b < w and g[a][b] == '.' and (a, b) not in d:\n"
         "            d[a, b] = d[r, c] + 1\n            q.append((a, b))\nprint(d.get((h-1, w-1), -1))",
         {"h, w = map(int, input().split())\nprint(h + w - 3)": WRONG,
          "h, w = map(int, input().split())\ng = [[0] * 10 ** 9 for _ in range(h)]\nprint(g)": ERROR}),
    Made("Ways to pay", "medium", "Read an amount, then the values of coins. Print in how many ways the coins pay it.",
         ["10\n1 2 5\n", "7\n2 4\n", "30\n1 5 10\n", "0\n3\n"], coins,
         "n = int(input())\nways = [1] + [0] * n\nfor c in map(int, input().split()):\n    for i in range(c, n + 1):\n"
         "        ways[i] += ways[i - c]\nprint(ways[n])",
         {"n = int(input())\nways = [1] + [0] * n\ncoins = list(map(int, input().split()))\nfor i in range(1, n + 1):\n"
          "    ways[i] = sum(ways[i - c] for c in coins if c <= i)\nprint(ways[n])": WRONG}),
    Made("Inversions", "hard", "Read n, then n integers. Print how many pairs stand in the wrong order.",
         [listed(numbers(i, n, 0, 10**6)) for i, n in enumerate((4, 10, 30_000))], inversions,
         "def sort(a):\n    if len(a) < 2:\n        return a, 0\n    m = len(a) // 2\n    (l, x), (r, y) = "
         "sort(a[:m]), sort(a[m:])\n    out, i, n = [], 0, x + y\n    for v in r:\n        while i < len(l) and "
         "l[i] <= v:\n            out.append(l[i]); i += 1\n        n += len(l) - i\n        out.append(v)\n"
         "    return out + l[i:], n\ninput()\nprint(sort(list(map(int, input().split())))[1])",
         {"input()\na = list(map(int, input().split()))\nprint(sum(a[i] > a[j] for j in range(len(a)) for i in "
          "range(j)))": TIME, "def f(a):\n    return f(a[1:] + a)\nprint(f([1]))": ERROR}),
    Made("Cheapest tree", "hard", "Read n, then edges a b w of a connected graph, one a line, to the end. Print the "
         "cost of its cheapest spanning tree.",
         [f"{max(b for _, b, _ in e)}\n" + "".join(f"{a} {b} {w}\n" for a, b, w in e) for e in EDGES], tree_cost,
         "import sys\nn = int(input())\nedges = sorted((w, a, b) for a, b, w in (map(int, l.split()) for l in "
         "sys.stdin))\nroot = list(range(n + 1))\ndef find(x):\n    while root[x] != x:\n        root[x] = "
         "root[root[x]]\n        x = root[x]\n    return x\ncost = 0\nfor w, a, b in edges:\n"
         "    if find(a) != find(b):\n        root[find(a)] = find(b)\n        cost += w\nprint(cost)",
         {"import sys\nn = int(input())\nprint(sum(sorted(int(l.split()[2]) for l in sys.stdin)[:n]))": WRONG}),
    Made("Long Fibonacci", "hard", "Print the n-th Fibonacci number; the first two are 0 and 1.",
         ["0\n", "10\n", "30000\n"], fibonacci,
         "a, b = 0, 1\nfor _ in range(int(input())):\n    a, b = b, a + b\nprint(a)",
         {"def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(int(input())))": TIME,
          "import math\nn = int(input())\nprint(round(((1 + 5 ** .5) / 2) ** n / 5 ** .5))": ERROR}),
    Made("Roman numerals", "medium", "Print the value of a Roman numeral.", ["XIV\n", "MCMXCIV\n", "III\n"], roman,
         "v = dict(I=1, V=5, X=10, L=50, C=100, D=500, M=1000)\ns = input().strip()\nt = 0\nfor i, c in enumerate(s):\n"
         "    t += -v[c] if i + 1 < len(s) and v[s[i + 1]] > v[c] else v[c]\nprint(t)",
         {"v = dict(I=1, V=5, X=10, L=50, C=100, D=500, M=1000)\nprint(sum(v[c] for c in input().strip()))": WRONG}),
    Made("Pair with a sum", "easy", "Return the indices of the two numbers that add up to the target.",
         [([2, 7, 11, 15], 9), ([3, 2, 4], 6), ([3, 3], 6)],
         lambda a, t: next([i, j] for i, j in itertools.combinations(range(len(a)), 2) if a[i] + a[j] == t),
         solution("pair", "nums: List[int], target: int", "List[int]") + "seen = {}\n        for i, x in "
         "enumerate(nums):\n            if target - x in seen:\n                return seen[target - x], i\n"
         "            seen[x] = i",
         {solution("pair", "nums, target", "List[int]") + "return [0, 1]": WRONG,
          solution("other", "nums, target", "List[int]") + "return [0, 1]": ERROR}, "pair",
         solution("pair", "nums: List[int], target: int", "List[int]"),
         extra=[solution("pair", "nums, target", "list") + "print('looking')\n        return [(i, j) for j in "
                "range(len(nums)) for i in range(j) if nums[i] + nums[j] == target][0]"]),
    Made("Palindrome", "easy", "Return whether the text reads the same both ways, letters alone, in either case.",
         [("A man, a plan",), ("Anna",), ("ab",), ("",)],
         lambda s: [c for c in s.lower() if c.isalpha()] == [c for c in s.lower() if c.isalpha()][::-1],
         solution("isPalindrome", "s: str", "bool") + "t = ''.join(filter(str.isalpha, s)).lower()\n"
         "        return all(t[i] == t[-1 - i] for i in range(len(t) // 2))",
         {solution("isPalindrome", "s: str", "bool") + "return s == s[::-1]": WRONG}, "isPalindrome",
         solution("isPalindrome", "s: str", "bool")),
    Made("Merge sorted lists", "easy", "Return both sorted lists as one sorted list.",
         [([1, 3], [2, 4]), ([], [1]), ([1, 1], [1])], lambda a, b: sorted(a + b),
         solution("merge", "a: List[int], b: List[int]", "List[int]") + "return list(heapq.merge(a, b))",
         {solution("merge", "a, b", "List[int]") + "return a + b": WRONG,
          solution("merge", "a, b", "List[int]") + "return heapq.merge(a, b)": WRONG}, "merge",
         solution("merge", "a: List[int], b: List[int]", "List[int]")),
    Made("Letter counts", "medium", "Return how often each letter stands in the text.", [("abca",), ("",), ("zz",)],
         lambda s: {c: s.count(c) for c in s},
         solution("count", "s: str", "Dict[str, int]") + "return Counter(s)",
         {solution("count", "s: str", "Dict[str, int]") + "return {c: 1 for c in s}": WRONG,
          solution("count", "s: str", "Dict[str, int]") + "return set(s)": WRONG}, "count",
         solution("count", "s: str", "Dict[str, int]")),
    Made("Turn a matrix", "medium", "Return the matrix turned by a quarter, clockwise.",
         [([[1, 2], [3, 4]],), ([[1, 2, 3], [4, 5, 6]],), ([[7]],)],
         lambda m: [[row[c] for row in m[::-1]] for c in range(len(m[0]))],
         solution("turn", "m: List[List[int]]", "List[List[int]]") + "return [list(r) for r in zip(*m[::-1])]",
         {solution("turn", "m", "List[List[int]]") + "return [r for r in zip(*m[::-1])]": WRONG,  # tuples inside
          solution("turn", "m", "List[List[int]]") + "return [r[::-1] for r in m]": WRONG}, "turn",
         solution("turn", "m: List[List[int]]", "List[List[int]]"), "2025-01-05"),
    Made("Median", "medium", "Return the median of the list.", [([1, 2],), ([3, 1, 2],), ([5],)],
         lambda a: (sorted(a)[(len(a) - 1) // 2] + sorted(a)[len(a) // 2]) / 2,
         solution("median", "a: List[int]", "float") + "import statistics\n        return statistics.median(a)",
         {solution("median", "a: List[int]", "float") + "return sorted(a)[len(a) // 2]": WRONG}, "median",
         solution("median", "a: List[int]", "float"), "2025-01-05"),
    Made("Edit distance", "hard", "Return the fewest insertions, deletions and replacements that turn a into b.",
         [("horse", "ros"), ("", "abc"), ("intention", "execution")], distance,
         solution("distance", "a: str, b: str", "int") + "@lru_cache(None)\n        def go(i, j):\n            if not "
         "i or not j:\n                return i + j\n            return min(go(i - 1, j) + 1, go(i, j - 1) + 1, "
         "go(i - 1, j - 1) + (a[i - 1] != b[j - 1]))\n        return go(len(a), len(b))",
         {solution("distance", "a, b", "int") + "return abs(len(a) - len(b))": WRONG,
          solution("distance", "a, b", "int") + "while True:\n            pass": TIME}, "distance",
         solution("distance", "a: str, b: str", "int"), "2025-02-01"),
    Made("Smallest window", "hard", "Return the shortest piece of s that has all letters of t as often as t; one that "
         "comes first; empty if there is none.",
         [("ADOBECODEBANC", "ABC"), ("a", "aa"), ("aab", "ab")], window,
         "def smallest(s, t):\n    need, missing, start, best = Counter(t), len(t), 0, ''\n    for end, c in "
         "enumerate(s):\n        missing -= need[c] > 0\n        need[c] -= 1\n        while not missing:\n"
         "            if not best or end + 1 - start < len(best):\n                best = s[start:end + 1]\n"
         "            need[s[start]] += 1\n            missing += need[s[start]] > 0\n            start += 1\n"
         "    return best",
         {"def smallest(s, t):\n    return s if set(t) <= set(s) else ''": WRONG}, "smallest",
         "def smallest(s: str, t: str) -> str:\n    ", "2025-02-01"),
]  # fmt: skip


def rows() -> list[dict]:
    """The problems in the benchmark's schema: the first two tests are public, all others private and packed."""
    out = []
    for number, made in enumerate(MADE):
        tests = []
        for given in made.inputs:
            if made.function is None:
                tests.append({"input": given, "output": made.oracle(given), "testtype": "stdin"})
            else:
                given_text = "\n".join(map(json.dumps, given))
                tests.append({"input": given_text, "output": json.dumps(made.oracle(*given)), "testtype": "functional"})
        packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[2:]), protocol=4))).decode()
        out.append({
            "question_title": made.title, "question_content": made.statement,
            "platform": "leetcode" if made.function else "atcoder", "question_id": made.name,
            "contest_id": f"made-{number // 4}", "contest_date": f"{made.day}T00:00:00", "starter_code": made.starter,
            "difficulty": made.difficulty, "public_test_cases": json.dumps(tests[:2]), "private_test_cases": packed,
            "metadata": json.dumps({"func_name": made.function} if made.function else {}),
        })  # fmt: skip
    return out


def main() -> None:
    programs = [{"question_id": m.name, "right": [m.reference, *m.extra], "broken": m.broken} for m in MADE]
    for name, lines in (("livecodebench.jsonl", rows()), ("livecodebench_programs.jsonl", programs)):
        (DATA / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{DATA / name}: {len(lines)} lines")


if __name__ == "__main__":
    main()
