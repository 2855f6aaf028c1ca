r"""Find references that no answer could equal before a model is loaded, since each would waste a group per epoch.

An answer is the content of a response's last \boxed{}. Nearly all references are decided from their characters alone;
the rest is parsed by the verifier's worker, divided over the ranks.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..records import Problem
from ..reward.extraction import MAX_ANSWER_CHARS
from ..reward.verifier import Verifier
from ..runtime.ranks import Ranks
from .columns import parsed
from .read import say

MANY_WORDS = 20
"""A text of this many words is a sentence or a solution, which nobody repeats in a box."""
NO_ANSWER = frozenset({"proof", "notfound", "not found", "see solution", "nan", "null", "n/a"})
"""What sets write if there is no answer (NuminaMath: proof, notfound), in lower case."""
_SIGNS = re.compile(r"\\(?:left|right|displaystyle|text|mathrm|mbox|q?quad|[,;:! ])(?![A-Za-z])|[\s$.~{}]")
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")
_COMMANDS = """frac dfrac tfrac sqrt pi cdot times div left right pm infty le leq ge geq ne cup cap in text mathrm
    mathbf mathbb circ degree sin cos tan log ln theta alpha beta gamma lambda mu angle triangle binom overline ldots
    begin end pmatrix textbf quad mid to emptyset""".split()
_PLAIN = re.compile(
    rf"(?:[\w\s.,:;+\-*/^=<>()\[\]{{}}|!'&%$°π√∞]|\\(?:{'|'.join(_COMMANDS)})(?![A-Za-z])|\\[{{}}%$,!;: \\])*"
)


def at_a_glance(reference: str) -> str | None:
    """Why no answer could equal a reference, "" if one can, None if only the verifier's parser can decide."""
    if not reference:
        return "it is empty"
    if len(reference) > MAX_ANSWER_CHARS:
        return f"longer than {MAX_ANSWER_CHARS} characters"
    if reference.strip(" .$").lower() in NO_ANSWER:
        return "it says that there is no answer"
    if re.match(r"\[?\s*[{\[]?\s*[\"']", reference) and isinstance(listed := parsed(reference), (list, dict)):
        return f"a list of {len(listed)} as text" if isinstance(listed, list) else "a dict as text"
    if len(words := _WORD.findall(reference)) >= MANY_WORDS:
        return f"a text of {len(words)} words"
    if reference.count("{") != reference.count("}"):
        return "its braces do not match"
    if not _SIGNS.sub("", reference):
        return "it consists of signs that the comparison ignores"
    return "" if len(reference) <= 200 and _PLAIN.fullmatch(reference) else None


def unverifiable(references: Iterable[str], ranks: Ranks | None = None) -> dict[str, str]:
    """References that no answer could equal, with the reason. A collective if `ranks` are given.

    Every rank gets the same result, because only one rank parses each reference: a time-out on a busy machine cannot
    make the ranks' problems differ.
    """
    reasons = {r: at_a_glance(r) for r in dict.fromkeys(references)}
    unsure = [r for r, reason in reasons.items() if reason is None]
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    here = unsure[rank::world]
    decided = dict(zip(here, _parse(here, int(os.environ.get("LOCAL_WORLD_SIZE", 1))), strict=True))
    for part in ranks.gather_objects(decided) if ranks else [decided]:
        reasons |= part
    return {r: reason for r, reason in reasons.items() if reason}


def _parse(references: Sequence[str], local_ranks: int) -> list[str]:
    """The verifier's reasons, with one worker per core that this rank may use; "" for a reference that parses."""
    workers = min(8, max(1, (os.cpu_count() or 1) // local_ranks), 1 + len(references) // 100)

    def part(first: int) -> list[str]:
        with Verifier() as verifier:
            return ["" if verifier.parses(r) else "it cannot be parsed" for r in references[first::workers]]

    out = [""] * len(references)
    with ThreadPoolExecutor(workers) as pool:
        for first, reasons in enumerate(pool.map(part, range(workers if references else 0))):
            out[first::workers] = reasons
    return out


def complaint(source: str, problems: Sequence[Problem], bad: dict[str, str]) -> str:
    """Count unverifiable references and quote two with different reasons; "" if all can be verified."""
    rows = [p for p in problems if p.reference in bad]
    examples = list({bad[p.reference]: p for p in reversed(rows)}.values())[::-1]
    examples = sorted((examples + [p for p in rows if p not in examples])[:2], key=lambda p: int(p.id))
    shown = "; ".join(f"row {p.id}: {_shortened(p.reference)} ({bad[p.reference]})" for p in examples)
    return f"{source}: no answer could equal the reference of {len(rows):,} of {len(problems):,} rows ({shown})"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def verifiable(
    source: str, problems: list[Problem], *, drop: bool, keep: bool = False, ranks: Ranks | None = None
) -> list[Problem]:
    """The problems that some answer could solve. A collective if `ranks` are given.

    Args:
        drop: leave the others out and say how many.
        keep: say how many others there are but keep them (a benchmark's score counts all of its problems).
    Raises:
        ValueError: there are others, and neither `drop` nor `keep` is set; or no problem is left.
    """
    bad = unverifiable((p.reference for p in problems), ranks)
    if not bad:
        return problems
    kept = [p for p in problems if p.reference not in bad]
    said = complaint(source, problems, bad)
    if keep and not drop:
        say(f"{said}: they count as unsolved.")
        return problems
    if not drop:
        raise ValueError(f"{said}: correct them, or leave such rows out with --data.drop_unverifiable.")
    if not kept:
        raise ValueError(f"{said}: none is left; correct them, or name another column with --data.reference_column.")
    say(f"{said}: left out.")
    return kept


def repeated(problems: Sequence[Problem]) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    """Problems with the same text, by that text; and those among them whose references differ."""
    times = Counter(p.problem for p in problems)
    groups: dict[str, list[Problem]] = {text: [] for text, n in times.items() if n > 1}
    for p in problems:
        if p.problem in groups:
            groups[p.problem].append(p)
    return groups, {t: ps for t, ps in groups.items() if len({p.reference for p in ps}) > 1}
