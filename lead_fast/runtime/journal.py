"""Journal of a run: every step's numbers and alerts, sample responses, solve rates, batches of skipped updates.

Metrics holds the sinks (console, files, TensorBoard, Weights & Biases), Health looks for what is unusual, the watchdog
ends a run that makes no progress. The journal decides which of them receives what.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from lead_kernels import LeadAdvantages

from ..config import Config
from ..records import Batch
from .health import Health, skipped_update
from .metrics import Metrics, PhaseTimer
from .ranks import Ranks
from .rollouts import Rollouts, TokenValues
from .watchdog import Watchdog

ASIDE = ("evaluate", "save")  # phases that are not part of a step


class Journal:
    """Keep a run's records; on ranks other than the first, only time phases and beat the watchdog.

    Args:
        folder: of the run.
        c: uses steps, wandb, watchdog_s, optim.max_skipped, advantage.eps and metrics.
        ranks: of this job.
        tokenizer: saved with the rollouts, so that their tokens can be shown one by one.
    """

    def __init__(self, folder: Path, c: Config, ranks: Ranks, tokenizer: Any = None):
        self.folder, self.c, self.ranks = folder, c, ranks
        self.metrics = Metrics(folder, total_steps=c.steps, wandb_project=c.wandb or None, enabled=ranks.main)
        self.phase = PhaseTimer(self._beat)
        self.health = Health(folder, c.optim.max_skipped)
        self.watchdog: Watchdog | None = None
        self.rollouts = Rollouts(folder, c.metrics.keep_rollouts * 2**20)
        self.tokenizer = tokenizer
        self._values: list[tuple[torch.Tensor, ...]] = []  # of this rank's packs in the current step
        self._began = time.monotonic()

    def begin(self, step: int, elapsed_s: float = 0.0, updates_skipped: int = 0) -> None:
        """Start watching after `step` steps; records of later steps, left by a run that was killed, are dropped."""
        self.metrics.truncate_after(step)
        if self.ranks.main:
            self.rollouts.truncate_after(step)
            self.rollouts.keep_tokenizer(self.tokenizer)
        self._began = time.monotonic() - elapsed_s
        self.health = Health(self.folder, self.c.optim.max_skipped, updates_skipped)
        self.watchdog = Watchdog(self.c.watchdog_s, self.ranks)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began, earlier processes included."""
        return time.monotonic() - self._began

    def state(self) -> dict[str, Any]:
        """The journal's state for a checkpoint."""
        return {"elapsed_s": self.elapsed_s, "updates_skipped": self.health.skipped}

    def _beat(self, phase: str | None = None, step: int | None = None) -> None:
        if self.watchdog:
            self.watchdog.beat(phase, step)

    def progress(self, phase: str, step: int, done: int, total: int) -> None:
        """Report to console and watchdog that `phase` of `step` is at `done` of `total`."""
        self._beat(phase, step)
        self.metrics.progress(phase, step, done, total)

    def token_values(
        self, sequences_R: torch.Tensor, positions_R: torch.Tensor, gap_R: torch.Tensor, entropy_R: torch.Tensor
    ) -> None:
        """Record a pack's values for this step's kept rollouts, if any; copies nothing from the device.

        Args:
            sequences_R: int32 [R], which response of the batch each row belongs to.
            positions_R: int64 [R], the rows' positions in their sequences.
            gap_R: float32 [R], log-prob by the trainer minus log-prob by the engine.
            entropy_R: float32 [R].
        """
        if self.rollouts.limit_bytes:
            self._values.append((sequences_R, positions_R.int(), gap_R.half(), entropy_R.half()))

    def _keep_rollouts(self, done: int, batch: Batch, credit: LeadAdvantages) -> None:
        """Gather the token values of all ranks on the first rank, and write the step's groups. A collective."""
        if not self.rollouts.limit_bytes:
            return
        empty = (torch.empty(0, dtype=d) for d in (torch.int32, torch.int32, torch.half, torch.half))
        columns = zip(*self._values, strict=True) if self._values else ([x] for x in empty)
        self._values = []
        parts = self.ranks.gather_objects(TokenValues(*(torch.cat([*x]).cpu().numpy() for x in columns)))
        if self.ranks.main:
            reward, advantage = credit.reward.tolist(), credit.advantage.tolist()
            failed = self.rollouts.add(done, batch, reward, advantage, self.c.advantage.eps, TokenValues.joined(parts))
            if failed:
                self.metrics.warn(failed)

    def step(self, done: int, batch: Batch, credit: LeadAdvantages, update: dict[str, Any], synced: dict) -> None:
        """Record step `done`, the first being 1.

        Raises:
            ValueError: the loss or gradient was not finite in too many consecutive steps.
        """
        with self.phase("keep"):
            self._keep_rollouts(done, batch, credit)
        elapsed_s, seconds = self.elapsed_s, dict(self.phase.seconds)
        record = describe(batch, credit, self.c.rollout.group_size) | update | synced
        record |= {"rollout_idle_share": batch.idle_share, "groups_refilled": batch.refilled} | batch.counts
        if self.c.rollout.extra_problems:
            record |= staleness(batch, done - 1)
        record |= {"elapsed_s": elapsed_s, "seconds": seconds}
        record["tokens_per_s"] = record["tokens"] / sum(s for phase, s in seconds.items() if phase not in ASIDE)
        record["alerts"] = self.health.look(done, record)
        self.metrics.train(done, record)
        for alert in record["alerts"]:
            self.metrics.warn(alert)
        kept = None
        if record["updates_skipped"] and self.ranks.main:
            kept = self.health.keep(done, skipped_batch(batch, credit, record))
            self.metrics.warn(skipped_update(done, kept))
        self.health.count(done, record["updates_skipped"], kept)
        self.metrics.responses(done, sample_of_responses(batch, "train", credit.reward.tolist()))
        self.metrics.solved(done, batch.solve_rates)
        self.phase.reset()

    def evaluation(self, step: int, record: dict[str, Any], batch: Batch) -> None:
        """Record an evaluation after `step` steps; 0 is before the first."""
        self.metrics.eval(step, record | function_terms(batch) | {"elapsed_s": self.elapsed_s})
        self.metrics.responses(step, sample_of_responses(batch, "test"))

    def close(self) -> None:
        """Flush buffers and stop watching."""
        self.metrics.close()
        if self.watchdog:
            self.watchdog.close()


def describe(batch: Batch, credit: LeadAdvantages, group_size: int) -> dict[str, Any]:
    """Statistics of a step's responses and rewards.

    To add a metric, add a key here and an entry in metric_table.py: metrics.jsonl, TensorBoard and Weights & Biases
    record every key, the console and the report's table (ROWS in report.py) show a selection. A metric of the update is
    a key in Learner.step.
    """
    correct = torch.tensor([s.correct for s in batch.scores], dtype=torch.float32)
    lengths = torch.tensor(batch.lengths, dtype=torch.float32)
    solved = correct.view(-1, group_size).sum(1)
    groups = len(batch.groups)
    moved = (credit.advantage.view(-1, group_size) != 0).any(1)

    def mean(x: torch.Tensor) -> float | None:
        return x.mean().item() if x.numel() else None

    return function_terms(batch) | {
        "reward_mean": credit.reward.mean().item(),
        "difficulty_weight_mean": credit.weight.mean().item(),
        "accuracy": correct.mean().item(),
        "solve_rate_histogram": torch.bincount(solved.long(), minlength=group_size + 1).tolist(),
        "solve_none": (solved == 0).sum().item() / groups,
        "solve_all": (solved == group_size).sum().item() / groups,
        "length_correct": mean(lengths[correct == 1]),
        "length_wrong": mean(lengths[correct == 0]),
        "length_mean": mean(lengths),
        "groups_with_gradient": moved.float().mean().item(),
        "length_correctness": length_correctness(lengths.view(-1, group_size), correct.view(-1, group_size)),
        "length_spread": length_spread(lengths.view(-1, group_size), correct.view(-1, group_size)),
        "truncated_share": sum(s.truncated for s in batch.scores) / len(batch.scores),
        "response_tokens": int(lengths.sum()),
        "tokens": int(lengths.sum()) + sum(len(g.prompt_ids) * len(g.samples) for g in batch.groups),
    }


def length_correctness(lengths_PG: torch.Tensor, correct_PG: torch.Tensor) -> float | None:
    """Correlation of length and correctness within groups, averaged over groups that have both outcomes; else None.

    Below 0, longer responses are more often wrong (overthinking); above 0, shorter ones (over-compression).
    """
    x, y = (v - v.mean(1, keepdim=True) for v in (lengths_PG, correct_PG))
    size = (x.square().sum(1) * y.square().sum(1)).sqrt()
    varies = size > 0
    return ((x * y).sum(1)[varies] / size[varies]).mean().item() if varies.any() else None


def length_spread(lengths_PG: torch.Tensor, correct_PG: torch.Tensor) -> float | None:
    """Standard deviation over mean of correct responses' lengths, averaged over groups with two or more of them."""
    n = correct_PG.sum(1)
    mean = (lengths_PG * correct_PG).sum(1) / n.clamp(min=1)
    squares = ((lengths_PG - mean[:, None]).square() * correct_PG).sum(1)
    spread = ((squares / (n - 1).clamp(min=1)).sqrt() / mean)[n > 1]
    return spread.mean().item() if spread.numel() else None


def function_terms(batch: Batch) -> dict[str, Any]:
    """Mean of each term that the user's reward function returned, over the responses that have it; else empty."""
    terms: dict[str, list[float]] = {}
    for score in batch.scores:
        for name, value in score.terms.items():
            terms.setdefault(name, []).append(value)
    if not terms:
        return {}
    failed = sum(s.failed for s in batch.scores)
    return {"reward_terms": {k: sum(v) / len(v) for k, v in terms.items()}, "reward_function_failed": failed}


def skipped_batch(batch: Batch, credit: LeadAdvantages, record: dict) -> dict:
    """Everything that entered a step whose update was skipped."""
    return {
        "record": record,
        "groups": [dataclasses.asdict(g) for g in batch.groups],
        "reward": credit.reward,
        "advantage": credit.advantage,
    }


def staleness(batch: Batch, version: int) -> dict[str, Any]:
    """Age of the tokens, in policy updates, when policy `version` is trained on them."""
    parts = [(version - v, tokens) for s in batch.samples for v, tokens in s.response.parts]
    ages, tokens = torch.tensor(parts).unbind(1)
    by_age = torch.bincount(ages, weights=tokens.double())
    return {
        "staleness_mean": ((ages * tokens).sum() / tokens.sum()).item(),
        "staleness_max": int(ages.max()),
        "tokens_by_age": (by_age.float() / int(tokens.sum())).tolist(),
    }


def sample_of_responses(batch: Batch, split: str, rewards: list[float] | None = None, count: int = 4) -> list[dict]:
    """Choose a few responses with their scores, spread over the batch."""
    flat = [(g.problem, s) for g in batch.groups for s in g.samples]
    every = max(1, len(flat) // count)
    rows = []
    for i in range(0, len(flat), every)[:count]:
        problem, sample = flat[i]
        row = {
            "split": split,
            "problem": problem.problem,
            "reference": problem.reference,
            "response": sample.response.text,
            "extracted": sample.score.extracted,
            "correct": sample.score.correct,
            "tokens": sample.response.length,
            "finish_reason": sample.response.finish_reason,
        }
        row |= {"terms": sample.score.terms} if sample.score.terms else {}
        rows.append(row | ({"reward": rewards[i]} if rewards else {}))
    return rows
