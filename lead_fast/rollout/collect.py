"""Problems to groups of scored responses, shared out over the ranks and gathered on all of them."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..records import Group, Problem, Response, Score
from ..runtime.ranks import Ranks
from .engine import Engine, EngineFailure, Progress, Sampling, Work, silent


@dataclass(frozen=True)
class Batch:
    """Whole groups, the same on every rank. Flat lists are [S], S = groups x group size, group by group."""

    groups: list[Group]
    scores: list[Score]
    idle_share: float = 0.0
    """Share of the ranks' time between their own last token and the slowest rank's."""
    indices: list[int] = field(default_factory=list)
    """Place of each group in the step's problems."""
    leftover: dict[int, list[Response]] = field(default_factory=dict)
    """By place in the step's problems: responses that were cut off, to go on with."""

    @property
    def prompts(self) -> list[list[int]]:
        return [g.prompt_ids for g in self.groups for _ in g.responses]

    @property
    def responses(self) -> list[list[int]]:
        return [r.token_ids for g in self.groups for r in g.responses]

    @property
    def logprobs(self) -> list[list[float]]:
        return [r.logprobs for g in self.groups for r in g.responses]

    @property
    def lengths(self) -> list[int]:
        return [len(t) for t in self.responses]


def sampling_seed(*parts: int) -> int:
    """One seed from several numbers (run seed, step, rank), the same on every machine."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


@dataclass(frozen=True)
class Share:
    """What one rank brought home: which prompts, their groups, its seconds, and what its engine died of, if it did."""

    indices: list[int]
    groups: list[Group]
    seconds: float
    failure: str | None = None
    leftover: dict[int, list[Response]] = field(default_factory=dict)


def rollout(
    engine: Engine,
    problems: list[Problem],
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
) -> Share:
    """This rank's share of the groups. Engines take prompts as they drain, so that no rank waits for another's.

    Args:
        problems, prompts: of the step, the same on every rank.
        n: responses to each prompt.
        seed: of the step; every prompt has its own from it, so the result does not depend on who took the prompt.
        shared_by: neighbouring ranks that share an engine.
        begun: by prompt, responses to go on with.
        want: stop when so many groups are whole; the rest comes back unfinished, as `leftover`.
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
        answers = engine.generate(work, s, progress)
    except EngineFailure as e:
        answers, failure = e.whole, str(e)
    if work.member:  # the first of those that share an engine speaks for them
        answers = {}
    left = {i: r for i, r in answers.items() if any(x.finish_reason == "unfinished" for x in r)}
    whole = [i for i in sorted(answers) if i not in left]
    groups = [Group(problems[i], prompts[i], answers[i]) for i in whole]
    return Share(whole, groups, time.perf_counter() - began, failure, left)


def gather(share: Share, scores: list[Score], ranks: Ranks) -> Batch:
    """Every rank's groups, back in the order of the problems. A collective.

    Raises:
        EngineFailure: on every rank, if any rank's engine died.
    """
    parts = ranks.gather_objects((share, scores))
    for rank, (part, _) in enumerate(parts):
        if part.failure:
            raise EngineFailure(f"the engine of rank {rank} died ({part.failure})", {})
    found: dict[int, tuple[Group, list[Score]]] = {}
    leftover: dict[int, list[Response]] = {}
    for part, flat in parts:
        at = 0
        for i, group in zip(part.indices, part.groups, strict=True):
            assert i not in found, f"prompt {i} was answered twice"
            found[i] = group, flat[at : at + len(group.responses)]
            at += len(group.responses)
        leftover |= part.leftover
    order = [found[i] for i in sorted(found)]
    seconds = [part.seconds for part, _ in parts]
    idle = 1 - sum(seconds) / len(seconds) / max(seconds)
    return Batch([g for g, _ in order], [s for _, part in order for s in part], idle, sorted(found), leftover)


class Backlog:
    """Which problems a step asks, where more may be asked than a step needs: each is asked once, none is dropped.

    A step asks `size + extra` problems, those waiting from earlier steps first, and trains on the `size` that are whole
    first; the others wait, with what was sampled of them. With extra = 0 nothing ever waits.

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
        """By place in the step: responses to go on with."""
        return {i: responses for i, (_, responses) in enumerate(self.entries) if responses}

    def settle(self, batch: Batch) -> Batch:
        """The first `size` whole groups, those asked earliest first; what is left waits."""
        whole = dict(zip(batch.indices, batch.groups, strict=True))
        kept = batch.indices[: self.size]
        left = {**batch.leftover, **{i: g.responses for i, g in whole.items()}}
        self.entries = [(p, left.get(i, [])) for i, (p, _) in enumerate(self.entries) if i not in kept]
        groups = [whole[i] for i in kept]
        scores = batch.scores[: sum(len(g.responses) for g in groups)]
        return replace(batch, groups=groups, scores=scores, indices=kept, leftover={})
