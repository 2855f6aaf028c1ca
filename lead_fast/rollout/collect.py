"""Prompts to responses over all ranks, and graded samples back on every one of them."""

import time
import zlib
from dataclasses import dataclass, field

from ..records import Batch, Group, Problem, Response, Sample
from ..runtime.ranks import Ranks
from .engine import Engine, EngineFailure, Progress, Sampling, Speculation, Work, silent


def sampling_seed(*parts: int) -> int:
    """One seed from several numbers (run seed, step, rank), the same on every machine."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


@dataclass(frozen=True)
class Rollout:
    """What one rank sampled: responses by the place of their prompt among those that were asked.

    seconds: that it took; failure: what its engine died of, if it did; leftover: responses that were cut off;
    speculation: what its drafter came to.
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
    """Sample responses to the prompts that this rank takes, as its engine drains, so that no rank waits for another's.

    Args:
        prompts: of the step, the same on every rank.
        n: responses to each prompt.
        seed: of the step; every prompt has its own from it, so the result does not depend on who took the prompt.
        shared_by: neighbouring ranks that share an engine.
        begun: by prompt, responses to continue.
        want: stop when so many groups are complete; the rest comes back unfinished, as `leftover`.
        due: the first so many prompts must be complete by then.
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
    if work.member:  # the first of those that share an engine speaks for them
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
    """Bring every rank's samples together as groups, in the order of the problems. A collective.

    Args:
        rollout: of this rank.
        samples: its graded responses, by the place of their problem.
        problems, prompts: that were asked, the same on every rank.
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
