"""Records that flow through a step: Problem -> Response -> Sample (a response with its score) -> Group -> Batch."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and the reference that answers are compared with; `solution` is a worked solution, for SFT.

    messages: (role, text) of each message of a prompt with a system message or several turns, the last one the user's;
    None if `problem` is the entire prompt.
    columns: the row as loaded, if it was requested.
    """

    id: str
    problem: str
    reference: str
    difficulty: float | None = None
    solution: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    columns: dict[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response.

    logprobs: log-prob of each of token_ids at the sampling temperature, as computed by the engine that sampled it.
    finish_reason: `stop` (end of sequence or stop string), `length`, `repetition`, or `unfinished` (resumed in the next
    step).
    policy_version: number of batches that the weights had been trained on when the first token was sampled.
    continued: for every later part of a resumed response, (policy version, index of the part's first token).
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    policy_version: int
    continued: tuple[tuple[int, int], ...] = ()

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Policy version and number of tokens of every part, in order; parts without tokens are left out."""
        starts = [(self.policy_version, 0), *self.continued]
        ends = [start for _, start in starts[1:]] + [self.length]
        return [(version, end - start) for (version, start), end in zip(starts, ends, strict=True) if end > start]

    @property
    def length(self) -> int:
        """Number of tokens, end of sequence included."""
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.finish_reason != "stop"


@dataclass(frozen=True, slots=True)
class Score:
    """The result of grading a response.

    extracted: the answer found in it; None if there is none.
    truncated: whether it reached the limit, or lacks `</think>` where one side of it is graded.
    degenerate: always False if repetition is not checked.
    terms: what the user's reward function returned, with `reward` as the total; empty without a function.
    failed: whether the function failed, so that `reward` is reward.function_failed.
    """

    correct: bool
    extracted: str | None
    truncated: bool
    degenerate: bool
    terms: dict[str, float] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """A response with its score."""

    response: Response
    score: Score


@dataclass(frozen=True, slots=True)
class Group:
    """The samples of one problem."""

    problem: Problem
    prompt_ids: list[int]
    samples: list[Sample]

    @property
    def correct(self) -> int:
        """How many samples are correct."""
        return sum(s.score.correct for s in self.samples)


@dataclass(frozen=True)
class Batch:
    """Complete groups, the same on every rank. Flat lists have shape [S], S = groups x group size, group by group."""

    groups: list[Group]
    indices: list[int] = field(default_factory=list)
    """Index of each group among the problems that were asked."""
    leftover: dict[int, list[Response]] = field(default_factory=dict)
    """Index among the problems that were asked -> responses that were cut off, to be resumed."""
    idle_share: float = 0.0
    """Share of the ranks' time spent between their own last token and that of the slowest rank."""
    refilled: int = 0
    """Number of groups that replaced dropped ones."""
    counts: dict[str, float] = field(default_factory=dict)
    """Numbers on the rollout for metrics.jsonl: groups that wait, tokens that a drafter proposed."""
    solve_rates: list[dict] = field(default_factory=list)
    """(problem, correct, sampled) of every problem graded, dropped ones included."""

    @property
    def samples(self) -> list[Sample]:
        return [s for g in self.groups for s in g.samples]

    @property
    def scores(self) -> list[Score]:
        return [s.score for s in self.samples]

    @property
    def prompts(self) -> list[list[int]]:
        return [g.prompt_ids for g in self.groups for _ in g.samples]

    @property
    def responses(self) -> list[list[int]]:
        return [s.response.token_ids for s in self.samples]

    @property
    def logprobs(self) -> list[list[float]]:
        return [s.response.logprobs for s in self.samples]

    @property
    def lengths(self) -> list[int]:
        return [s.response.length for s in self.samples]

    def ages(self, version: int) -> list[list[int]]:
        """Per response, the age of each token: policy updates from the version that sampled it to `version`."""
        parts = [s.response.parts for s in self.samples]
        return [[version - v for v, tokens in part for _ in range(tokens)] for part in parts]

    def counted(self) -> list[dict]:
        """How many samples of each problem are correct: the data for `lead_fast.data select`."""
        return [{"problem": g.problem.problem, "correct": g.correct, "sampled": len(g.samples)} for g in self.groups]

    def with_dropped_replaced(self, kept: list[bool], more: "Batch", more_kept: list[bool]) -> "Batch":
        """The batch with as many of its dropped groups as possible replaced by the kept ones of `more`."""
        good = iter([g for g, ok in zip(more.groups, more_kept, strict=True) if ok])
        groups = [g if ok else next(good, g) for g, ok in zip(self.groups, kept, strict=True)]
        new = sum(a is not b for a, b in zip(groups, self.groups, strict=True))
        return replace(self, groups=groups, refilled=self.refilled + new)
