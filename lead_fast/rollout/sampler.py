"""Collect a step's graded groups: choose problems, sample, grade and gather responses, replace dropped groups."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import Config
from ..data.order import ProblemStream, SolveRateStream
from ..learner.advantage import advantages
from ..records import Batch, Problem, Response
from ..reward.function import RewardFunction
from ..reward.grading import grade
from ..reward.verifier import Verifier
from ..runtime.journal import Journal
from ..runtime.jsonl import read_jsonl
from ..runtime.ranks import Ranks
from .backlog import Backlog
from .collect import gather, rollout, sampling_seed
from .engine import Engine, Sampling


class Sampler:
    """Owner of the order of problems, of those that wait, of the verifier and of the seeds.

    Args:
        engine: samples responses; it is awake while a step collects and sleeps afterwards.
        verifier: grades them.
        problems, prompts: the training set, the same on every rank.
        c: the configuration.
        ranks: of this job.
        journal: receives phases and progress.
        step: number of finished steps.
        state: the result of `state` at that step; empty at the start.
        function: the user's reward function, if there is one.
    """

    def __init__(
        self,
        engine: Engine,
        verifier: Verifier,
        problems: list[Problem],
        prompts: list[list[int]],
        c: Config,
        ranks: Ranks,
        journal: Journal,
        step: int,
        state: dict[str, Any],
        function: RewardFunction | None = None,
    ):
        r = c.rollout
        self.engine, self.verifier, self.problems, self.prompts = engine, verifier, problems, prompts
        self.c, self.ranks, self.journal, self.function = c, ranks, journal, function
        watched = c.reward.degenerate is not None or c.reward.repetition is not None
        self.sampling = Sampling(r.max_tokens, r.temperature, r.top_p, r.min_p, r.stop, r.top_k, end_repetition=watched)
        kind = SolveRateStream if c.data.sampling == "solve_rate" else ProblemStream
        self.stream: ProblemStream | SolveRateStream = kind(len(problems), r.problems, c.seed)
        self.spare = ProblemStream(len(problems), r.problems, c.seed + 1)
        self.place = {p.problem: i for i, p in enumerate(problems)}
        position = step * r.problems
        self.backlog = Backlog(self._problem_at, r.problems, r.extra_problems, r.max_age, state, position)
        if step and isinstance(self.stream, SolveRateStream):  # the first rank's file counts for all ranks
            self._tell(ranks.gather_objects(read_jsonl(Path(journal.folder) / "solved.jsonl") if ranks.main else [])[0])

    def state(self) -> dict[str, Any]:
        """The order of problems as saved in a checkpoint."""
        return self.backlog.state()

    def collect(self, step: int) -> Batch:
        """Sample and grade the groups of a step, 0 being the first. A collective.

        Raises:
            EngineFailure: on every rank, if any rank's engine died.
        """
        asked = self.backlog.ask()
        want = self.c.rollout.problems if self.c.rollout.extra_problems else None
        sampled = self._sample(asked, step, begun=self.backlog.begun, want=want, due=self.backlog.due)
        batch = self.backlog.settle(sampled)
        batch = self._replace_dropped(replace(batch, solve_rates=batch.counted()), set(asked), step)
        self.engine.sleep()  # not earlier: an engine cannot wake without new weights
        self._tell(batch.solve_rates)
        return batch

    def _sample(
        self,
        asked: list[int],
        step: int,
        again: int = 0,
        begun: dict[int, list[Response]] | None = None,
        want: int | None = None,
        due: int = 0,
    ) -> Batch:
        """Sample and grade these problems; `again` counts the rounds that replace dropped groups."""
        c = self.c
        problems, prompts = [self.problems[i] for i in asked], [self.prompts[i] for i in asked]
        with self.journal.phase("rollout"):
            self.engine.wake()
            sampled = rollout(
                self.engine,
                prompts,
                c.rollout.group_size,
                self.sampling,
                sampling_seed(c.seed, step, again) if again else sampling_seed(c.seed, step),
                self.ranks,
                partial(self.journal.progress, "rollout", step + 1),
                shared_by=c.rollout.tensor_parallel,
                begun=begun,
                want=want,
                due=due,
            )
        with self.journal.phase("reward"):
            samples = grade(problems, sampled.responses, self.verifier, c.reward, self.function)
            return gather(sampled, samples, problems, prompts, self.ranks)

    def _replace_dropped(self, batch: Batch, asked: set[int], step: int) -> Batch:
        """Replace groups that advantage.group_filter drops by groups of other problems (DAPO's dynamic sampling)."""
        most = self.c.rollout.refill
        for again in range(1, most + 1):
            kept = self._kept(batch)
            spare = self.spare.batch(step * most + again - 1)
            others = [i for i in spare if i not in asked][: kept.count(False)]
            if not others:
                break
            more = self._sample(others, step, again)
            asked |= set(others)
            batch = batch.with_dropped_replaced(kept, more, self._kept(more))
            batch = replace(batch, solve_rates=[*batch.solve_rates, *more.counted()])
        return batch

    def _kept(self, batch: Batch) -> list[bool]:
        with self.journal.phase("advantage"):
            return advantages(batch.scores, batch.lengths, self.c, self.ranks.device).kept.tolist()

    def _problem_at(self, position: int) -> int:
        n = self.c.rollout.problems
        return self.stream.batch(position // n)[position % n]

    def _tell(self, solve_rates: list[dict]) -> None:
        """Tell the stream how often each problem was solved; problems no longer in the data are ignored."""
        if isinstance(self.stream, SolveRateStream):
            for row in solve_rates:
                if row["problem"] in self.place:
                    self.stream.tell(self.place[row["problem"]], row["correct"] / row["sampled"])
