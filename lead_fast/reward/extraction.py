"""Extract the answer from a response's text, and detect text that repeats itself."""

import re

MAX_ANSWER_CHARS = 1000


# --------------------------------------------------------------------------------------------------------- extraction


def graded_text(text: str, where: str = "all") -> str:
    """The part of a response to grade, relative to `</think>`: all, before_think, after_think.

    Without `</think>` a response never ended its reasoning, and both sides are empty, as in the released code of arXiv
    2504.09696, which gives such a response no credit.
    """
    if where == "all":
        return text
    before, mark, after = text.partition("</think>")
    return "" if not mark else before if where == "before_think" else after


_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*+\{")
_JOINED = re.compile(
    r"(?i)\\(?:quad|qquad|text|mathrm|left|right|[a-z]+_)?|[$(){}\[\],;&=_^'\\\s]|[a-z]\b|[a-z]_?\d\b|\d"
)
_TURNED = re.compile(  # words between two boxes which show that the second replaces the first
    r"(?i)\b(?:no|not|wait|but|so|then|instead|rather|hence|thus|therefore|wrong|actually|should|correct|later|next"
    r"|finally|total|in all|answer)\b"
)


def extract_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, \fbox{...} or \framebox{...}, braces balanced; else that of `\boxed 7`.

    An empty box does not hide one with content. Boxes that the last sentence joins by a comma or `and` are one list. If
    the last box is never closed, the answer was not finished and the result is None, as for a text without a box.
    """
    starts = [m.span() for m in _BOX.finditer(text)]
    if not starts:
        words = re.findall(r"\\(?:boxed|fbox|framebox)\s++([^\s${}]++)", text)
        return words[-1] if words else None
    boxes: list[tuple[int, int, str]] = []  # start, end, content, last first; only innermost boxes
    for start, inside in reversed(starts[-12:]):
        end = _closing(text, inside)
        if end is None:
            if boxes:
                break
            return None
        if boxes and end >= boxes[-1][0]:
            continue
        if content := text[inside:end].strip():
            boxes.append((start, end + 1, content))
    if not boxes:
        return ""
    answers = [boxes[0][2]]
    for later, earlier in zip(boxes, boxes[1:], strict=False):
        if not _joins(text[earlier[1] : later[0]]):
            break
        answers.insert(0, earlier[2])
    return ", ".join(dict.fromkeys(answers))


def _closing(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`."""
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return brace.start()
    return None


def _joins(between: str) -> bool:
    """Whether the text between two boxes joins them into a list: a comma or `and`, few words, no change of mind."""
    if len(between) > 80 or "\n\n" in between or _TURNED.search(between):
        return False
    if re.search(r"[.!?](?:\s|$)", between):
        return False
    return bool(re.search(r"(?i)[,;]|\b(?:and|or)\b|\\q?quad", between)) or not _JOINED.sub("", between)


# --------------------------------------------------------------------------------------------------------- repetition


def is_degenerate(
    text: str, *, max_ngram: int = 30, repeats: int = 10, longest_word: int | None = 120, from_start: bool = False
) -> bool:
    """Whether an n-gram of 1..max_ngram words occurs `repeats` times in a row, or a word has `longest_word` characters.

    Args:
        longest_word: None checks n-grams alone, because a long formula is one word.
        from_start: follow the code released with arXiv 2504.09696: cut the text into chunks of n words from its first
            word on, and count equal chunks. Otherwise n-grams are found wherever they start, which finds more.
    A run of r copies of an n-gram is a stretch of n (r - 1) words that each equal the word n positions earlier, so the
    search takes linear time for each n.
    """
    words = text.split()
    if longest_word is not None and any(len(w) >= longest_word for w in words):
        return True
    ids = {w: i for i, w in enumerate(dict.fromkeys(words))}
    row = [ids[w] for w in words]
    for n in range(1, max_ngram + 1):
        if len(row) < n * repeats:
            break
        if from_start:
            chunks = [tuple(row[i : i + n]) for i in range(0, len(row), n)]
            need, same = repeats - 1, map(tuple.__eq__, chunks, chunks[1:])
        else:
            need, same = n * (repeats - 1), map(int.__eq__, row, row[n:])
        run = 0
        for equal in same:
            run = run + 1 if equal else 0
            if run >= need:
                return True
    return False
