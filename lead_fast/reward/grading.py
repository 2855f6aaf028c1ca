"""Turn responses into scored samples."""

from collections.abc import Sequence
from dataclasses import replace

from ..config import RewardConfig
from ..records import Problem, Response, Sample, Score
from .extraction import extract_boxed, graded_text, is_degenerate
from .function import RewardFunction, call_of
from .verifier import Verifier


def score(
    responses: Sequence[Response],
    references: Sequence[str],
    verifier: Verifier,
    *,
    where: str = "all",
    degenerate: bool = False,
    longest_word: int | None = 120,
) -> list[Score]:
    """Grade responses against references, one each.

    Args:
        where: the part to grade (`graded_text`); if it is a side of `</think>`, a response without it is truncated.
        degenerate, longest_word: whether to check for repetition, and the limit for `is_degenerate`.
    """
    extracted = [extract_boxed(graded_text(r.text, where)) for r in responses]
    correct = verifier.grade(list(zip(extracted, references, strict=True)))
    return [
        Score(
            ok,
            answer,
            r.truncated or (where != "all" and "</think>" not in r.text),
            degenerate
            and (
                r.finish_reason == "repetition"
                or is_degenerate(r.text, longest_word=longest_word, from_start=longest_word is not None)
            ),
        )
        for r, ok, answer in zip(responses, correct, extracted, strict=True)
    ]


def grade(
    problems: Sequence[Problem],
    responses: dict[int, list[Response]],
    verifier: Verifier,
    c: RewardConfig,
    function: RewardFunction | None = None,
    *,
    trains: bool = True,
) -> dict[int, list[Sample]]:
    """Grade responses against their problems' references, and by the user's function.

    Args:
        problems: those that were asked.
        responses: by index of their problem.
        c: which side of `</think>` to grade, whether to check for repetition, and how to use the function's value.
        function: called with every response; None: there is none.
        trains: with reward.mode=replace the function decides what is correct; if False the verifier does, as in every
            evaluation.
    Returns:
        the samples, by the same indices.
    """
    flat = [(i, r) for i, rs in responses.items() for r in rs]
    watched = c.degenerate is not None or c.repetition is not None
    longest = 120 if c.degenerate is not None else None  # the released code's rule; stage 2's checks only n-grams
    scores = score(
        [r for _, r in flat],
        [problems[i].reference for i, _ in flat],
        verifier,
        where=c.grade,
        degenerate=watched,
        longest_word=longest,
    )
    if function:
        calls = [call_of(problems[i], r.text, s.correct) for (i, r), s in zip(flat, scores, strict=True)]
        values = function(calls)
        scores = [replace(s, terms=v.terms, failed=v.failed) for s, v in zip(scores, values, strict=True)]
        if trains and c.mode == "replace":
            scores = [replace(s, correct=s.terms["reward"] > c.correct_above) for s in scores]
    samples: dict[int, list[Sample]] = {i: [] for i in responses}
    for (i, r), s in zip(flat, scores, strict=True):
        samples[i].append(Sample(r, s))
    return samples
