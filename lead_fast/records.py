"""The records that flow through a step: Problem -> Group of Responses -> Scores."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its reference answer; `solution` is a worked one, for SFT."""

    id: str
    problem: str
    answer: str
    difficulty: float | None = None
    solution: str | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer.

    logprobs: log-prob of each of token_ids at the sampling temperature, by the engine that sampled it.
    finish_reason: `stop` (end of sequence or stop string), `length`, `repetition`, or `unfinished` (goes on in the next
    step).
    policy_version: number of optimiser batches that the weights had seen when the first token was sampled.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    text: str
    policy_version: int

    @property
    def length(self) -> int:
        """Tokens, the end of sequence included."""
        return len(self.token_ids)

    @property
    def truncated(self) -> bool:
        return self.finish_reason != "stop"


@dataclass(frozen=True, slots=True)
class Group:
    """The responses to one problem."""

    problem: Problem
    prompt_ids: list[int]
    responses: list[Response]


@dataclass(frozen=True, slots=True)
class Score:
    """What grading says of a response.

    truncated: it ran into the limit, or has no `</think>` where a side of it is graded.
    degenerate: False where nobody asked for it.
    """

    correct: bool
    extracted: str | None
    truncated: bool
    degenerate: bool
