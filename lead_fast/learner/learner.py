"""The learner: packs, gradient of the loss over global denominators, optimiser step.

Legend: S sequences of the whole batch, R response rows of a pack.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lead_kernels import LeadAdvantages
from lead_kernels.records import LOG_RATIO_CAP

from ..config import Config
from ..records import Batch
from ..runtime.health import must_be_finite
from ..runtime.journal import Journal
from ..runtime.ranks import Ranks
from . import checkpoint
from .advantage import LengthGuard, outcomes
from .loss import (
    Objective,
    check_agreement,
    needs_gradient,
    objective,
    pack_logprobs,
    policy_loss,
    reduce_metrics,
    rounding_limit,
)
from .memory import rehearse
from .optimizer import learning_rate, make_optimizer, update
from .packing import Pack, assign, assign_shared, efficiency, make_pack, shared_work
from .policy import load_policy

MOST_PACKS = 4099  # per update and rank; with no more packs, no two of them draw with the same seed
ROUNDING = 1e-4  # nats; how far above 0 a log-prob may be rounded


class Learner:
    """Owns the policy, its reference and the optimiser.

    Args:
        c: the configuration.
        ranks: of this job.
        journal: receives phases and progress.
    Raises:
        ValueError: the model cannot be loaded, or the largest pack does not fit the memory.
    """

    def __init__(self, c: Config, ranks: Ranks, journal: Journal):
        self.ranks, self.journal = ranks, journal
        self.policy = load_policy(c.model, c.parallel, ranks)
        sharded = dataclasses.replace(c.parallel, reshard=True)
        self.reference = load_policy(c.model, sharded, ranks).eval() if c.loss.kl_coef else None
        self.optimizer = make_optimizer(self.policy, c.optim)
        self.c = rehearse(self.policy, self.reference, self.optimizer, c, ranks)
        self._guard = LengthGuard(c.advantage)
        self._checkpoints: checkpoint.Checkpoints | None = None  # from the first save on
        self.checked = c.optim.updates > 1  # engine and trainer are compared at the first step with a gradient

    def step(self, batch: Batch, credit: LeadAdvantages, step: int) -> dict[str, Any]:
        """Learn from a batch; the result does not depend on how it is cut or spread. A collective.

        Args:
            batch: the graded groups, the same on every rank.
            credit: their rewards and advantages.
            step: for the learning rate's schedule; the first is 0.
        Returns:
            the update's part of the record in metrics.jsonl.
        Raises:
            ValueError: at the first step with a gradient, the engine's log-probs differ from the policy's.
        """
        c, ranks = self.c, self.ranks
        self._report_failed_saves()
        if c.debug:
            must_be_finite("rollout's log-probs", *map(torch.tensor, batch.logprobs), most=ROUNDING)
            must_be_finite("rewards and advantages", credit.reward, credit.advantage)
        lr = learning_rate(step, c.steps, c.optim)
        tokens = [len(p) + n - 1 for p, n in zip(batch.prompts, batch.lengths, strict=True)]
        kept_S = credit.kept.repeat_interleave(c.rollout.group_size)
        size = len(tokens) // c.optim.updates
        groups = outcomes(batch.scores, batch.lengths, c, ranks.device)
        oldest = max(step - s.response.policy_version for s in batch.samples)  # in a resumed run without extra problems
        ages = batch.ages(step) if c.rollout.extra_problems or oldest else None
        updates, parts, norms, balance, trained = [], [], [], [], set()
        with self.journal.phase("pack"):
            for first in range(0, len(tokens), size):
                in_update_S = torch.zeros_like(kept_S)
                in_update_S[first : first + size] = True
                o = objective(credit.advantage, batch.lengths, kept_S & in_update_S, c, groups)
                live = [i for i, moves in enumerate(needs_gradient(o, c)) if moves]
                plan, even = self._plan(live, batch.prompts, tokens)
                balance.append(even)
                updates.append((o, [self._pack(members, batch, ages) for members in plan[ranks.team]]))
                trained.update(live)
        with self.journal.phase("train"):  # old log-probs are the policy's before the first of the updates
            old = [[self._old_logprobs(pack) for pack in packs] for _, packs in updates]
        for (o, packs), old_R in zip(updates, old, strict=True):
            with self.journal.phase("train"):
                losses = self._backward(packs, old_R, o, step)
                parts += losses
            with self.journal.phase("optim"):
                loss = ranks.all_sum(torch.stack([p["loss"] for p in losses]).sum())
                norms.append(update(self.policy, self.optimizer, lr, c.optim.grad_clip, loss.item()))
        passes = len(parts)
        sums = reduce_metrics(parts, ranks)
        skipped = {
            "sequences_skipped": len(tokens) - len(trained),
            "tokens_skipped": sum(n for i, n in enumerate(tokens) if i not in trained),
            "head_rows_skipped": sum(tokens[i] - batch.lengths[i] for i in trained),
            "passes_skipped": passes * ((c.loss.old_logprobs != "recompute") + (self.reference is None)),
            "updates_skipped": sum(not math.isfinite(norm) for norm in norms),
        }
        record = means(sums, len(norms), reference=self.reference is not None) | skipped
        record |= {"grad_norm": sum(norms) / len(norms), "learning_rate": lr, "packs": passes}
        if ages:
            record["importance_by_age"] = weight_by_age(sums, c.rollout.max_age)
        record |= {"packing_efficiency": sum(balance) / len(balance), "groups_dropped": int((~credit.kept).sum())}
        if self._guard.margin:
            record["length_suspended"] = self._guard.suspended
        if not self.checked and sums["tokens"]:
            if not oldest:  # else older weights sampled some of a resumed run, and the canary has to do
                fullest = max(updates[0][1], key=lambda pack: len(pack.rows_R))
                limit = rounding_limit(self.policy, fullest, c, ranks)
                check_agreement(record["logprob_diff_mean"], limit, c, ranks.device.type)
            self.checked = True
        return record

    def _plan(
        self, live: list[int], prompts: list[list[int]], tokens: list[int]
    ) -> tuple[list[list[list[int]]], float]:
        """Deal the sequences `live` to packs and ranks; return the plan and how even the ranks' work is."""
        c, teams, cost = self.c.parallel, self.ranks.teams, self.policy.flops()
        prompts, lengths = [prompts[i] for i in live], [tokens[i] for i in live]
        if self.policy.shares_prompts:
            plan = assign_shared(prompts, lengths, c.pack_tokens, teams, cost)
            even = efficiency(plan, lambda pack: shared_work(pack, prompts, lengths, cost))
        else:
            plan = assign(lengths, c.pack_tokens, teams, cost)
            even = efficiency(plan, lambda pack: sum(cost(lengths[i]) for i in pack))
        return [[[live[i] for i in pack] for pack in rank] for rank in plan], even

    def _pack(self, members: list[int], batch: Batch, ages: list[list[int]] | None) -> Pack:
        part, shared = (self.ranks.member, self.ranks.sequence), self.policy.shares_prompts
        sampled = batch.prompts, batch.responses, batch.logprobs
        return make_pack(members, *sampled, self.ranks.device, part, ages, shared=shared)

    def _old_logprobs(self, pack: Pack) -> torch.Tensor | None:
        """Compute log-probs for the ratio's denominator where the configuration wants a separate pass for them."""
        if self.c.loss.old_logprobs != "recompute":
            return None
        return pack_logprobs(self.policy, pack, self.c.rollout.temperature, self.c.loss.fp32_logits)

    def _backward(
        self, packs: list[Pack], old: list[torch.Tensor | None], o: Objective, step: int
    ) -> list[dict[str, torch.Tensor]]:
        """Sum the gradient of all packs into the shards; return each pack's metrics and loss."""
        c, out = self.c, []
        progress = partial(self.journal.progress, "train", step + 1)
        for i, (pack, old_R) in enumerate(zip(packs, old, strict=True)):
            progress(i, len(packs))
            logprobs = partial(pack_logprobs, temperature=c.rollout.temperature, fp32_logits=c.loss.fp32_logits)
            ref_R = logprobs(self.reference, pack) if self.reference else None
            seed = ((c.seed * c.steps + step) * self.ranks.teams + self.ranks.team) * MOST_PACKS + i
            result = policy_loss(self.policy, pack, o, c, old_R, ref_R, seed % 2**32)
            if c.debug:
                where = f"log-probs of a pack of {len(pack.lengths)} sequences on rank {self.ranks.rank}"
                must_be_finite(where, result.logprobs, old_R, ref_R, most=ROUNDING)
                must_be_finite("loss and entropy of that pack", result.loss, result.entropy)
            result.loss.backward()
            if pack.behavior_R is not None:
                gap_R = result.logprobs - pack.behavior_R
                self.journal.token_values(pack.sequence_ids_R, pack.position_ids_T[pack.rows_R], gap_R, result.entropy)
            out.append(result.metrics | {"loss": result.loss.detach()} | age_sums(result.logprobs, pack, c))
        return out

    def saw(self, evaluation: dict[str, Any]) -> None:
        """Take in an evaluation (empty on ranks other than the first) for `advantage.length_guard`. A collective."""
        if not self._guard.margin:
            return
        pass_at_1, before = self.ranks.gather_objects(evaluation.get("pass_at_1"))[0], self._guard.suspended
        self._guard.saw(pass_at_1)
        self.c = dataclasses.replace(self.c, advantage=self._guard.now())
        if self._guard.suspended != before:
            below = f"{self._guard.best - pass_at_1:.3f} below the run's best"
            says = f"off, because it is {below}" if not before else "on again"
            self.journal.metrics.warn(f"Held-out Pass@1 is {pass_at_1:.3f}: rewards for brevity are {says}.")

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside weights and optimiser."""
        return self._guard.state()

    def resume(self) -> dict[str, Any]:
        """Read the newest complete checkpoint; return the state saved with it, {} without one. A collective.

        An engine that shares the GPU must not exist yet, or must sleep: reading needs memory too.
        """
        state = checkpoint.load(self.journal.folder, self.policy, self.optimizer, self.ranks) or {}
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self._guard.resume(state)
        self.c = dataclasses.replace(self.c, advantage=self._guard.now())
        return state

    def save(self, step: int, state: dict[str, Any], *, wait: bool) -> bool:
        """Begin to write a checkpoint after `step` steps; with `wait`, return when it is written. A collective.

        Returns:
            whether writing began, or with `wait` succeeded. A write that fails later is reported with the next step.
        """
        if self._checkpoints is None:
            progress = partial(self.journal.progress, "save")
            self._checkpoints = checkpoint.Checkpoints(self.journal.folder, self.ranks, progress)
        saved = self._checkpoints.save(step, self.policy, self.optimizer, state, wait=wait)
        self._report_failed_saves()
        return saved

    def _report_failed_saves(self) -> None:
        for sentence in self._checkpoints.failures() if self._checkpoints else []:
            self.journal.metrics.warn(sentence)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the model in Hugging Face layout, after a checkpoint that is still being written. A collective."""
        if self._checkpoints:
            self._checkpoints.finish()
        self._report_failed_saves()
        checkpoint.export(folder, self.policy, tokenizer, getattr(torch, self.c.model.dtype), self.ranks)


def age_sums(logprob_R: torch.Tensor, pack: Pack, c: Config) -> dict[str, torch.Tensor]:
    """Count response tokens and sum their importance weights (policy / engine), per age of the tokens."""
    if pack.age_R is None:
        return {}
    assert pack.behavior_R is not None
    weight_R = (logprob_R.float() - pack.behavior_R).clamp(max=LOG_RATIO_CAP).exp()
    most = c.rollout.max_age  # what is older, as in a run resumed with a lower limit, is counted with it
    age_R, ages = pack.age_R.long().clamp(max=most), most + 1
    sums = weight_R.new_zeros(2, ages).index_put_((torch.zeros_like(age_R), age_R), weight_R, accumulate=True)
    sums.index_put_((torch.ones_like(age_R), age_R), torch.ones_like(weight_R), accumulate=True)
    return {f"{name}_{age}": sums[k, age] for k, name in enumerate(("weight_age", "tokens_age")) for age in range(ages)}


def weight_by_age(sums: dict[str, float], max_age: int) -> list[float | None]:
    """Mean importance weight of the trained tokens of age 0, 1, ... `max_age`; None where there are none."""
    counted = [(sums[f"weight_age_{age}"], sums[f"tokens_age_{age}"]) for age in range(max_age + 1)]
    return [weight / tokens if tokens else None for weight, tokens in counted]


def means(sums: dict[str, float], updates: int, *, reference: bool) -> dict[str, Any]:
    """Average the loss's sums over the trained tokens; NaN for a batch without a gradient."""
    n = sums["tokens"] or float("nan")
    record: dict[str, Any] = {
        "loss": sums["loss"] / updates,
        "entropy": sums["entropy"] / n,
        "clip_low_share": sums["clip_low"] / n,
        "clip_high_share": sums["clip_high"] / n,
        "ratio_mean": sums["ratio"] / n,
        "ratio_capped_share": sums["ratio_capped"] / n,
        "kl_behavior": sums["kl_behavior"] / n,
        "logprob_diff_mean": sums["logprob_diff"] / n,
        "logprob_diff_max": sums["max_logprob_diff"],
        "importance_truncated_share": sums["importance_truncated"] / n,
    }
    if "dropped_mass" in sums:
        record |= {"dropped_mass": sums["dropped_mass"] / n, "column_share": sums["column_share"] / n}
        record |= {"max_hidden_error": sums["max_hidden_error"]}
    return record | ({"kl_reference": sums["kl_reference"] / n} if reference else {})
