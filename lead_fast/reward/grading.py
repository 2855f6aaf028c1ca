"""Responses to scores."""

from collections.abc import Sequence

from ..config import Config
from ..records import Group, Response, Score
from .extraction import extract_boxed, graded_text, is_degenerate
from .verifier import Verifier


def score(
    responses: Sequence[Response],
    answers: Sequence[str],
    verifier: Verifier,
    *,
    where: str = "all",
    degenerate: bool = False,
    longest_word: int | None = 120,
) -> list[Score]:
    """Grades responses against reference answers, one each.

    Args:
        where: what is graded (`graded_text`); where that is a side of `</think>`, a response without it is truncated.
        degenerate, longest_word: whether to look for repetition, and `is_degenerate`'s limit.
    """
    extracted = [extract_boxed(graded_text(r.text, where)) for r in responses]
    correct = verifier.grade(list(zip(extracted, answers, strict=True)))
    return [
        Score(
            ok,
            found,
            r.truncated or (where != "all" and "</think>" not in r.text),
            degenerate and (r.finish_reason == "repetition" or is_degenerate(r.text, longest_word=longest_word)),
        )
        for r, ok, found in zip(responses, correct, extracted, strict=True)
    ]


def grade(groups: list[Group], verifier: Verifier, c: Config) -> list[Score]:
    """Scores of this rank's responses, flat, group by group."""
    responses = [r for g in groups for r in g.responses]
    answers = [g.problem.answer for g in groups for _ in g.responses]
    wants = c.reward.degenerate is not None or c.reward.repetition is not None
    longest = 120 if c.reward.degenerate is not None else None  # the released code's rule; stage 2's is n-grams alone
    return score(responses, answers, verifier, where=c.reward.grade, degenerate=wants, longest_word=longest)
