"""Problems to groups of scored responses, shared out over the ranks and gathered on all of them."""

import zlib
from dataclasses import dataclass

from .config import Config
from .distributed import Ranks
from .engine import Engine, Progress, Sampling, silent
from .reward import Verifier, score
from .schema import Group, Problem, Score


@dataclass(frozen=True)
class Batch:
    """Whole groups, the same on every rank. Flat lists are [S], S = groups x group size, group by group."""

    groups: list[Group]
    scores: list[Score]

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


def rollout(
    engine: Engine,
    problems: list[Problem],
    prompts: list[list[int]],
    n: int,
    s: Sampling,
    seed: int,
    ranks: Ranks,
    progress: Progress = silent,
) -> list[Group]:
    """This rank's share of the groups: problems rank, rank + world, ..."""
    mine = list(range(ranks.rank, len(problems), ranks.world))
    seed = sampling_seed(seed, ranks.rank)
    answers = engine.generate([prompts[i] for i in mine], n, s, seed, progress) if mine else []
    return [Group(problems[i], prompts[i], r) for i, r in zip(mine, answers, strict=True)]


def grade(groups: list[Group], verifier: Verifier, c: Config) -> list[Score]:
    """Scores of this rank's responses, flat, group by group."""
    responses = [r for g in groups for r in g.responses]
    answers = [g.problem.answer for g in groups for _ in g.responses]
    wants = c.reward.degenerate is not None or c.reward.repetition is not None
    return score(responses, answers, verifier, where=c.reward.grade, degenerate=wants)


def gather(groups: list[Group], scores: list[Score], ranks: Ranks) -> Batch:
    """Every rank's groups, back in the order of the problems. A collective."""
    parts = ranks.gather_objects((groups, scores))
    order: list[tuple[Group, list[Score]]] = []
    for i in range(sum(len(g) for g, _ in parts)):
        share, flat = parts[i % ranks.world]
        group, at = share[i // ranks.world], sum(len(g.responses) for g in share[: i // ranks.world])
        order.append((group, flat[at : at + len(group.responses)]))
    return Batch([g for g, _ in order], [s for _, part in order for s in part])
