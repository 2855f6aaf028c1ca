"""Prompts to responses over all ranks, and graded samples back on every one of them."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..records import Batch, Group, Problem, Response, Sample
from ..runtime.ranks import Ranks
from .engine import Engine, EngineFailure, Progress, Sampling, Work, silent


def sampling_seed(*parts: int) -> int:
    """One seed from several numbers (run seed, step, rank), the same on every machine."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


@dataclass(frozen=True)
class Rollout:
    """What one rank sampled: responses by the place of their prompt among those that were asked.

    seconds: that it took; failure: what its engine died of, if it did; leftover: responses that were cut off.
    """

    responses: dict[int, list[Response]]
    seconds: float
    failure: str | None = None
    leftover: dict[int, list[Response]] = field(default_factory=dict)


def rollout(
    engine: Engine,
    prompts: list[list[int]],
    n: int,
    s: Sampling,
    seed: int,
    ranks: Ranks,
    progress: Progress = silent,
    *,
    shared_by: int = 1,
    begun: dict[int, list[Response]] | None = None,
    want: int | None = None,
) -> Rollout:
    """Sample responses to the prompts that this rank takes, as its engine drains, so that no rank waits for another's.

    Args:
        prompts: of the step, the same on every rank.
        n: responses to each prompt.
        seed: of the step; every prompt has its own from it, so the result does not depend on who took the prompt.
        shared_by: neighbouring ranks that share an engine.
        begun: by prompt, responses to continue.
        want: stop when so many groups are complete; the rest comes back unfinished, as `leftover`.
    """
    began = time.perf_counter()
    work = Work(
        prompts,
        n,
        [sampling_seed(seed, i) for i in range(len(prompts))],
        ranks.store,
        f"rollout-{next(ranks.tickets)}",
        ranks.world // shared_by,
        begun or {},
        want,
        ranks.rank % shared_by,
        shared_by,
    )
    failure = None
    try:
        responses = engine.generate(work, s, progress)
    except EngineFailure as e:
        responses, failure = e.complete, str(e)
    if work.member:  # the first of those that share an engine speaks for them
        responses = {}
    left = {i: r for i, r in responses.items() if any(x.finish_reason == "unfinished" for x in r)}
    complete = {i: responses[i] for i in sorted(responses) if i not in left}
    return Rollout(complete, time.perf_counter() - began, failure, left)


def gather(
    rollout: Rollout,
    samples: dict[int, list[Sample]],
    problems: list[Problem],
    prompts: list[list[int]],
    ranks: Ranks,
) -> Batch:
    """Bring every rank's samples together as groups, in the order of the problems. A collective.

    Args:
        rollout: of this rank.
        samples: its graded responses, by the place of their problem.
        problems, prompts: that were asked, the same on every rank.
    Raises:
        EngineFailure: on every rank, if any rank's engine died.
    """
    parts = ranks.gather_objects((samples, rollout.leftover, rollout.seconds, rollout.failure))
    for rank, (_, _, _, failure) in enumerate(parts):
        if failure:
            raise EngineFailure(f"the engine of rank {rank} died ({failure})", {})
    by_place: dict[int, list[Sample]] = {}
    leftover: dict[int, list[Response]] = {}
    for part, left, _, _ in parts:
        assert not by_place.keys() & part.keys(), "a prompt was answered twice"
        by_place |= part
        leftover |= left
    order = sorted(by_place)
    seconds = [s for _, _, s, _ in parts]
    idle = 1 - sum(seconds) / len(seconds) / max(seconds)
    return Batch([Group(problems[i], prompts[i], by_place[i]) for i in order], order, leftover, idle)


class Backlog:
    """Which problems a step asks, where more may be asked than a step needs: each is asked once, none is dropped.

    A step asks `size + extra` problems, those waiting from earlier steps first, and trains on the `size` that are
    complete first; the others wait, with what was sampled of them. With extra = 0 nothing ever waits.

    Args:
        stream: position in the data to problem.
        size: groups to train on a step.
        extra: problems asked beyond that.
        position: where in the data to begin.
        waiting: problems to ask again, from the start.
    """

    def __init__(self, stream: Callable[[int], int], size: int, extra: int, position: int, waiting: Sequence[int] = ()):
        self.stream, self.size, self.extra, self.position = stream, size, extra, position
        self.entries: list[tuple[int, list[Response]]] = [(p, []) for p in waiting]  # problem, what there is of it

    @property
    def waiting(self) -> list[int]:
        """Problems that were asked and not trained on yet."""
        return [problem for problem, _ in self.entries]

    def ask(self) -> list[int]:
        """The step's problems."""
        while len(self.entries) < self.size + self.extra:
            self.entries.append((self.stream(self.position), []))
            self.position += 1
        return self.waiting

    @property
    def begun(self) -> dict[int, list[Response]]:
        """By place in the step: responses to continue."""
        return {i: responses for i, (_, responses) in enumerate(self.entries) if responses}

    def settle(self, batch: Batch) -> Batch:
        """The first `size` complete groups, those asked earliest first; what is left waits."""
        complete = dict(zip(batch.indices, batch.groups, strict=True))
        kept = batch.indices[: self.size]
        left = {**batch.leftover, **{i: [s.response for s in g.samples] for i, g in complete.items()}}
        self.entries = [(p, left.get(i, [])) for i, (p, _) in enumerate(self.entries) if i not in kept]
        return replace(batch, groups=[complete[i] for i in kept], indices=kept, leftover={})
