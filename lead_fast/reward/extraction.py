"""From a response's text to its answer, and whether the text repeats itself."""

import re

MAX_ANSWER_CHARS = 1000


# --------------------------------------------------------------------------------------------------------- extraction


def graded_text(text: str, where: str = "all") -> str:
    """The part of a response that is graded, seen from `</think>`: all, before_think, after_think.

    Without `</think>` a response never ended its thinking: both sides are empty, as in the
    released code of arXiv 2504.09696, which gives such a response no credit.
    """
    if where == "all":
        return text
    before, mark, after = text.partition("</think>")
    return "" if not mark else before if where == "before_think" else after


def extract_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox{...}, braces balanced; without any, of `\\boxed 7`; else None.

    A last box that is never closed gives None: the answer was not finished.
    """
    starts = [box.end() for box in re.finditer(r"\\(?:boxed|fbox)\s*+\{", text)]
    if not starts:
        words = re.findall(r"\\(?:boxed|fbox)\s++([^\s${}]++)", text)
        return words[-1] if words else None
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, starts[-1]):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[starts[-1] : brace.start()].strip()
    return None


# --------------------------------------------------------------------------------------------------------- repetition


def is_degenerate(text: str, *, max_ngram: int = 30, repeats: int = 10, longest_word: int | None = 120) -> bool:
    """Some n-gram of 1..max_ngram words stands `repeats` times in a row, or a word has `longest_word` characters.

    The test of the code released with arXiv 2504.09696; longest_word None: n-grams alone, for a long formula is one
    word. A run of r copies of an n-gram is a stretch of n (r - 1) words that equal the word n places before: linear in
    the text for each n.
    """
    words = text.split()
    if longest_word is not None and any(len(w) >= longest_word for w in words):
        return True
    ids = {w: i for i, w in enumerate(dict.fromkeys(words))}
    row = [ids[w] for w in words]
    for n in range(1, max_ngram + 1):
        need, run = n * (repeats - 1), 0
        if len(row) < n * repeats:
            break
        for a, b in zip(row, row[n:], strict=False):
            run = run + 1 if a == b else 0
            if run >= need:
                return True
    return False
