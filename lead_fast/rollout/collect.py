"""Sample responses to prompts over all ranks, and gather the graded samples on every rank."""

import time
import zlib
from dataclasses import dataclass, field

from ..records import Batch, Group, Problem, Response, Sample
from ..runtime.ranks import Ranks
from .engine import Engine, EngineFailure, Progress, Sampling, Speculation, Work, silent


def sampling_seed(*parts: int) -> int:
    """Combine several numbers (run seed, step, rank) into one seed, the same on every machine."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


@dataclass(frozen=True)
class Rollout:
    """The samples of one rank: responses by the position of their prompt among those that were asked.

    seconds: time taken; failure: what its engine died of, if it died; leftover: responses that were cut off;
    speculation: what its drafter achieved.
    """

    responses: dict[int, list[Response]]
    seconds: float
    failure: str | None = None
    leftover: dict[int, list[Response]] = field(default_factory=dict)
    speculation: Speculation = Speculation()


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
    due: int = 0,
) -> Rollout:
    """Sample responses to the prompts that this rank takes as its engine drains, so that no rank waits for another's.

    Args:
        prompts: of the step, the same on every rank.
        n: responses per prompt.
        seed: of the step; each prompt's seed derives from it, so the result does not depend on who took the prompt.
        shared_by: neighbouring ranks that share an engine.
        begun: responses to resume, by prompt.
        want: stop when this many groups are complete; the rest is returned unfinished, as `leftover`.
        due: the first `due` prompts must be complete by then.
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
        due,
    )
    failure = None
    try:
        responses = engine.generate(work, s, progress)
    except EngineFailure as e:
        responses, failure = e.complete, str(e)
    if work.member:  # the first of the ranks that share an engine reports for all of them
        responses = {}
    left = {i: r for i, r in responses.items() if any(x.finish_reason == "unfinished" for x in r)}
    complete = {i: responses[i] for i in sorted(responses) if i not in left}
    speculation = Speculation() if work.member else getattr(engine, "speculation", Speculation())
    return Rollout(complete, time.perf_counter() - began, failure, left, speculation)


def gather(
    rollout: Rollout,
    samples: dict[int, list[Sample]],
    problems: list[Problem],
    prompts: list[list[int]],
    ranks: Ranks,
) -> Batch:
    """Gather every rank's samples into groups, in the order of the problems. A collective.

    Args:
        rollout: of this rank.
        samples: its graded responses, by position of their problem.
        problems, prompts: those that were asked, the same on every rank.
    Raises:
        EngineFailure: on every rank, if any rank's engine died.
    """
    parts = ranks.gather_objects((samples, rollout.leftover, rollout.seconds, rollout.failure, rollout.speculation))
    for rank, (*_, failure, _) in enumerate(parts):
        if failure:
            raise EngineFailure(f"the engine of rank {rank} died ({failure})", {})
    by_place: dict[int, list[Sample]] = {}
    leftover: dict[int, list[Response]] = {}
    for part, left, *_ in parts:
        assert not by_place.keys() & part.keys(), "a prompt was answered twice"
        by_place |= part
        leftover |= left
    order = sorted(by_place)
    seconds = [s for _, _, s, *_ in parts]
    idle = 1 - sum(seconds) / len(seconds) / max(seconds)
    groups = [Group(problems[i], prompts[i], by_place[i]) for i in order]
    counts = sum((part[-1] for part in parts), Speculation()).metrics()
    return Batch(groups, order, leftover, idle, counts=counts)
