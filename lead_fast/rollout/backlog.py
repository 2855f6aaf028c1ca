"""Backlog of problems that wait from step to step with unfinished responses: partial rollouts that drop nothing."""

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..records import Batch, Group, Response


class Backlog:
    """Decide which problems a step asks if more may be asked than it needs: each is asked once, none is dropped.

    A step asks `size + extra` problems, those waiting from earlier steps first, and trains on the first `size` that are
    complete, those asked earliest before the others; the rest waits, with the responses sampled so far. With extra = 0
    nothing ever waits.

    A group is trained on at most `max_age` steps after the step that asked it. `due` is the number of oldest groups
    that must be complete in a step: if the entry at position p (1 is the oldest) may wait s more steps, p - size s of
    them must be, so that every later step can still train on all groups that fall due in it. With extra <= size max_age
    that is never more than `size`: a step asks up to position size + extra, and each step trains on `size`.

    Short responses are complete first, so those of the first steps are shorter than all that were asked; from step
    max_age on they are not, because by then as many long groups come from earlier steps as wait for later ones.
    `length_bias` measures this: mean length of step `length_bias_step` over that of all groups it asked, less 1,
    reported once the last of those has been trained on.

    Args:
        stream: maps a position in the data to a problem.
        size: groups to train on per step.
        extra: problems asked beyond that.
        max_age: steps that a group may wait.
        state: the result of `state`, or empty.
        position: position in the data at which to begin without a state.
    """

    def __init__(
        self,
        stream: Callable[[int], int],
        size: int,
        extra: int,
        max_age: int = 1,
        state: dict[str, Any] | None = None,
        position: int = 0,
    ):
        assert extra <= size * max_age, f"{extra} extra problems cannot be trained on within {max_age} steps"
        state = state or {}
        self.stream, self.size, self.extra, self.max_age = stream, size, extra, max_age
        self.position = int(state.get("asked", position))
        self.steps = int(state.get("steps", 0))  # number of settled steps
        self.entries = [_Waiting(p, at, decoded(r)) for p, at, r in state.get("waiting", ())]
        self.trained = {int(step): mean for step, mean in state.get("trained", {}).items()}
        self.lengths = {int(step): list(x) for step, x in state.get("lengths", {}).items()}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, in JSON, with the unfinished responses: if resampled, they would be shorter."""
        if not self.extra and not self.entries:
            return {"asked": self.position}
        return {
            "asked": self.position,
            "steps": self.steps,
            "waiting": [(e.problem, e.asked, encoded(e.responses)) for e in self.entries],
            "trained": self.trained,
            "lengths": self.lengths,
        }

    @property
    def waiting(self) -> list[int]:
        """Problems that were asked but not yet trained on."""
        return [e.problem for e in self.entries]

    def ask(self) -> list[int]:
        """The step's problems."""
        while len(self.entries) < self.size + self.extra:
            self.entries.append(_Waiting(self.stream(self.position), self.steps, []))
            self.position += 1
        return self.waiting

    @property
    def begun(self) -> dict[int, list[Response]]:
        """Position in the step -> responses to resume."""
        return {i: e.responses for i, e in enumerate(self.entries) if e.responses}

    @property
    def due(self) -> int:
        """How many of the step's problems, from the first on, must be complete before it ends.

        A run resumed with a lower max_age cannot satisfy it at once; until it can, every step trains on the oldest.
        """
        left = [e.asked + self.max_age - self.steps for e in self.entries]
        return min(self.size, max([0, *(place - self.size * s for place, s in enumerate(left, 1))]))

    def settle(self, batch: Batch) -> Batch:
        """Return the first `size` complete groups, those asked earliest first; the others wait."""
        complete = dict(zip(batch.indices, batch.groups, strict=True))
        kept = batch.indices[: self.size]
        assert kept[: self.due] == list(range(self.due)), "a group waits longer than max_age allows"
        left = {**batch.leftover, **{i: [s.response for s in g.samples] for i, g in complete.items()}}
        books = self._count({i: complete[i] for i in kept}) if self.extra else {}
        self.entries = [
            replace(e, responses=left.get(i, e.responses)) for i, e in enumerate(self.entries) if i not in kept
        ]
        self.steps += 1
        if self.extra:
            tokens = [r.length for e in self.entries for r in e.responses]
            books["groups_waiting"] = len(self.entries)
            books["tokens_waiting_mean"] = sum(tokens) / len(tokens) if tokens else 0.0
        return replace(
            batch, groups=[complete[i] for i in kept], indices=kept, leftover={}, counts=batch.counts | books
        )

    def _count(self, kept: dict[int, Group]) -> dict[str, float]:
        """Ages of the groups trained on, and the length bias of the last step whose groups have all been trained on."""
        now, size = self.steps, len(kept)
        assert size, "a step without groups"
        ages = [now - self.entries[i].asked for i in kept]
        means = {i: sum(s.response.length for s in g.samples) / len(g.samples) for i, g in kept.items()}
        self.trained[now] = sum(means.values()) / size
        for i, mean in means.items():
            self.lengths.setdefault(self.entries[i].asked, []).append(mean)
        out: dict[str, float] = {"group_age_mean": sum(ages) / size, "group_age_max": max(ages)}
        oldest = min([now + 1, *(e.asked for i, e in enumerate(self.entries) if i not in kept)])
        if (step := min(self.trained)) < oldest:
            mean, asked = self.trained.pop(step), self.lengths.pop(step, [])
            if not asked:  # a run resumed with fewer extra problems asks none until it has caught up
                return out
            out |= {"length_bias": mean / (sum(asked) / len(asked)) - 1, "length_bias_step": step + 1}
        return out


@dataclass(frozen=True)
class _Waiting:
    """A problem that was asked at the start of step `asked`, with its responses so far."""

    problem: int
    asked: int
    responses: list[Response]


def encoded(responses: list[Response]) -> list[dict[str, Any]]:
    """Responses as JSON, token ids as int32 and log-probs as float32, both in base 64."""
    out = []
    for r in responses:
        row = {"finish_reason": r.finish_reason, "text": r.text, "policy_version": r.policy_version}
        row |= {
            "continued": r.continued,
            "token_ids": _base64(r.token_ids, "i4"),
            "logprobs": _base64(r.logprobs, "f4"),
        }
        out.append(row)
    return out


def decoded(rows: list[dict[str, Any]]) -> list[Response]:
    """Decode responses that `encoded` wrote."""
    return [
        Response(
            np.frombuffer(base64.b64decode(row["token_ids"]), "<i4").tolist(),
            np.frombuffer(base64.b64decode(row["logprobs"]), "<f4").tolist(),
            row["finish_reason"],
            row["text"],
            row["policy_version"],
            tuple((version, start) for version, start in row["continued"]),
        )
        for row in rows
    ]


def _base64(numbers: list[int] | list[float], kind: str) -> str:
    return base64.b64encode(np.asarray(numbers, f"<{kind}").tobytes()).decode()
