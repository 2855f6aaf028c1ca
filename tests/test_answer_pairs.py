"""The verifier on pairs of answers written after the answer forms of the public sets, before it was looked at.

Printed with `pytest -s`: the share of pairs judged wrongly by this verifier, by comparing strings, and by math-verify.
"""

import json
from pathlib import Path

import pytest

from lead_fast.reward.verifier import Verifier, normalize

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "data" / "answer_pairs.jsonl").read_text().splitlines()]


def errors(judged: list[bool]) -> dict[str, float]:
    """Shares: of all pairs judged wrongly, of equal ones missed, of unequal ones taken."""
    truth = [p["equal"] for p in PAIRS]
    missed = sum(t and not j for t, j in zip(truth, judged, strict=True))
    taken = sum(j and not t for t, j in zip(truth, judged, strict=True))
    return {"all": (missed + taken) / len(truth), "missed": missed / sum(truth), "taken": taken / truth.count(False)}


def math_verify_alone() -> list[bool]:
    """math-verify as its documentation has it: both texts in dollars, its own LaTeX extraction."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> list:
        return parse(f"${text.strip('$')}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=10)

    return [bool(verify(parsed(p["gold"]), parsed(p["answer"]), timeout_seconds=10)) for p in PAIRS]


def test_the_pairs_are_many_and_of_every_set():
    assert len(PAIRS) >= 300 and len({(p["gold"], p["answer"]) for p in PAIRS}) == len(PAIRS)
    sources = {p["source"] for p in PAIRS}
    assert sources == {"AIME24", "AIME25", "MATH500", "Minerva", "OlympiadBench", "AMC23", "AMC"}
    assert 0.4 < sum(p["equal"] for p in PAIRS) / len(PAIRS) < 0.6


def test_error_rate_beside_string_comparison_and_math_verify():
    with Verifier(timeout_s=30) as verifier:
        judged = verifier.grade([(p["answer"], p["gold"]) for p in PAIRS])
    ours, strings = errors(judged), errors([p["answer"].strip("$ ") == p["gold"].strip("$ ") for p in PAIRS])
    theirs = errors(math_verify_alone())
    for name, rate in (("lead_fast", ours), ("strings", strings), ("math-verify", theirs)):
        print(f"{name:12} " + "  ".join(f"{k} {100 * v:.1f} %" for k, v in rate.items()))
    for p, ok in zip(PAIRS, judged, strict=True):
        if ok != p["equal"]:
            print(f"{'missed' if p['equal'] else 'TAKEN'}: {p['gold']}  |  {p['answer']}")
    assert ours["all"] <= 0.01 and ours["taken"] <= 0.005
    assert ours["all"] < theirs["all"] < strings["all"]


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("5 m", "5m", True),  # a product, spelled with a space
        ("5 m", "5", True),
        ("5 m^2", r"5\text{ m}^2", True),
        ("5 km", r"5\text{ m}", False),
        ("3 dollars", "3", True),
        ("30 dollars", "3", False),
        ("2e-17", "2e-18", False),
        ("0.0002", "0.0003", False),
        (r"e^{i\pi/3}", r"\frac12+\frac{\sqrt3}{2}i", True),
        (r"e^{\pi i}", "-1", True),
        (r"e^{-i}", r"\cos 1-i\sin 1", True),
        (r"e^{2\pi i/3}", r"e^{i\pi/3}", False),
        (r"\textbf{(C)} 5", "C", True),
        (r"\textbf{(B)} 5", "C", False),
        (r"\textbf{(C)} 5", "5", False),
        ("12.5 percent", r"12.5\%", True),
        ("125 percent", r"12.5\%", False),
    ],
)
def test_faults_that_were_found(answer, gold, right):
    with Verifier(timeout_s=30) as verifier:
        assert verifier.grade([(answer, gold)]) == [right], normalize(answer)
