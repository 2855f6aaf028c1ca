"""What every key of metrics.jsonl means, in which unit, where it is healthy, and what to do where it is not.

The one home of the healthy ranges: the page that follows a run (view/pages.py), the alerts (health.py) and
docs/metrics.md take them from here. They are rules of thumb; apart from what `remedy` names, no run ends by them.
A new metric is a key in the record (journal.py, learner/learner.py) and an entry here.
"""

import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

WINDOW = 50  # steps that a spike is measured against
SPIKE = 10.0  # times the median
SHARE, TOKENS, NATS, SECONDS = "share", "tokens", "nats", "seconds"


@dataclass(frozen=True)
class Metric:
    """A key of a record; or, with `value`, a number that the page works out from several.

    A spike, as a range: at most SPIKE times the median of the last WINDOW steps.
    """

    key: str
    """Path in the record, `/` between levels; a word in capitals stands for any name or number (`seconds/PHASE`)."""
    unit: str
    """Of the value; `share` is a number from 0 to 1; empty for a count or a number without a unit."""
    meaning: str
    """A sentence or two."""
    title: str = ""
    """Name on the page; empty: not shown there."""
    low: float | None = None
    """Least healthy value; None: no bound."""
    high: float | None = None
    """Greatest healthy value; None: no bound."""
    spike: bool = False
    """Whether the greatest healthy value follows from the steps before."""
    outside: str = ""
    """What is likely to be wrong outside the range."""
    remedy: str = ""
    """What to do about it, or how to read the number where it has no range."""
    interval: bool = False
    """Whether KEY_ci, [low, high] of the 95 % bootstrap interval over problems, stands beside it."""
    value: Callable[[Record], float | None] | None = None
    """The number from a record, where it is not the value of `key`."""

    def of(self, record: Record) -> float | None:
        """The value in a record, None without one."""
        return self.value(record) if self.value else record.get(self.key)

    def bounds(self, before: list[Record]) -> tuple[float | None, float | None]:
        """Least and greatest healthy value, given the records before; None where there is no bound."""
        usual = [r[self.key] for r in before[-WINDOW:] if r.get(self.key)] if self.spike else []
        return self.low, SPIKE * statistics.median(usual) if usual else self.high

    def fits(self, path: str) -> bool:
        """Whether this is the entry of a path in a record."""
        pattern = re.sub(r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])", "[^/]+", self.key)
        return bool(re.fullmatch(pattern + "(_ci)?" * self.interval, path)) and self.value is None


@dataclass(frozen=True)
class Section:
    """Metrics that are read together; `kinds`: in which records they stand."""

    title: str
    kinds: tuple[str, ...]
    metrics: tuple[Metric, ...]
    about: str = ""


def _mixed(r: Record) -> float | None:
    return None if r.get("solve_none") is None else 1 - r["solve_none"] - r["solve_all"]


def _clipped(r: Record) -> float | None:
    return None if r.get("clip_low_share") is None else r["clip_low_share"] + (r.get("clip_high_share") or 0.0)


def answers_of(record: Record) -> Record:
    """The share of responses that hold an answer, and the share of those that is correct (None where none is)."""
    if record.get("no_answer_share") is None or record.get("pass_at_1") is None:
        return {}
    answered = 1.0 - record["no_answer_share"]
    return {"answered_share": answered, "precision": record["pass_at_1"] / answered if answered > 1e-9 else None}


M = Metric

EVERY = Section("Every record", ("train", "eval", "sft"), (
    M("kind", "", "`train`, `eval` or `sft`."),
    M("step", "steps", "Steps that are finished: 1 after the first one; 0 in the evaluation before it."),
    M("elapsed_s", SECONDS, "Since the run began, the processes before a resume included."),
))  # fmt: skip

OUTCOMES = Section("Rewards and outcomes", ("train",), (
    M("accuracy", SHARE, "Responses of the batch that are correct.", "correct responses", 0.1, 0.9,
      outside="most groups are all wrong or all correct",
      remedy="Too low: easier problems, or SFT first. Too high: harder ones (`data.min_difficulty`, "
             "`data.sampling=solve_rate`, or `lead_fast.data select`)."),
    M("reward_mean", "", "Mean reward, with E, L and what a reward function adds.", "mean reward",
      remedy="Rises; it can rise by shorter correct responses alone, so read it beside `accuracy`."),
    M("reward_terms/NAME", "", "Mean of a term that the reward function returned, over the responses that have it; "
      "`reward` is the total. Only with `reward.function`; in evaluations too."),
    M("reward_function_failed", "responses", "Responses for which the reward function raised, ran out of time or "
      "returned no finite number. Only with `reward.function`; in evaluations too.", high=0,
      outside="the function does not handle some responses",
      remedy="Read the warning with its traceback; see `reward.function_timeout_s`."),
    M("difficulty_weight_mean", "", "Mean of the difficulty weight w(rho) over groups; 1 where AD is off.",
      remedy="Falls towards `advantage.weight_low` as solve rates rise."),
    M("solve_rate_histogram", "groups", "Number of groups with 0, 1, ... G correct responses."),
    M("solve_none", SHARE, "Groups without a correct response."),
    M("solve_all", SHARE, "Groups whose responses are all correct."),
    M("mixed_groups", SHARE, "1 - `solve_none` - `solve_all`; on the page, not in the file.",
      "groups with both outcomes", 0.3, value=_mixed, outside="few groups teach what is right",
      remedy="Problems nearer to the model's level, or `rollout.refill` with `advantage.group_filter`."),
    M("groups_with_gradient", SHARE, "Groups with an advantage other than 0.", "groups with a gradient", 0.3,
      outside="most of the rollouts move nothing", remedy="As for groups with both outcomes."),
    M("groups_dropped", "groups", "Groups that `advantage.group_filter` dropped and none replaced.",
      remedy="Many of them: raise `rollout.refill`."),
    M("groups_refilled", "groups", "Groups that stand in for dropped ones (`rollout.refill`)."),
))  # fmt: skip

LENGTHS = Section("Lengths", ("train",), (
    M("length_correct", TOKENS, "Mean length of correct responses.", "length of correct responses",
      remedy="Falls slowly under L. Falls together with `accuracy`: lower `advantage.alpha`, or set "
             "`advantage.length_guard`."),
    M("length_wrong", TOKENS, "Mean length of wrong responses.", "length of wrong responses",
      remedy="Grows while the others shorten: the model rambles where it does not know; see `reward.truncated`."),
    M("length_mean", TOKENS, "Mean length of all responses."),
    M("length_correctness", "", "Correlation of length and correctness within groups, mean over the groups that have "
      "both outcomes; from -1 to 1.", "length against correctness",
      remedy="Below 0 longer responses are more often wrong (overthinking); above 0 shorter ones are: L then works "
             "against accuracy."),
    M("length_spread", "", "Standard deviation over mean of the correct responses' lengths, mean over groups with two "
      "or more.", "spread of correct lengths", 0.01, outside="a group's correct responses are equally long",
      remedy="Near 0 there is nothing left for L to choose between."),
    M("length_suspended", "", "Whether L and `advantage.length_advantage` are off. Only with "
      "`advantage.length_guard`.", remedy="True: held-out Pass@1 has fallen below the run's best by more than the "
      "margin."),
    M("truncated_share", SHARE, "Responses cut at the limit, ended for repetition, or without `</think>` where a side "
      "of it is graded.", "truncated", high=0.2, outside="the limit cuts thoughts short, or they loop",
      remedy="Raise `rollout.max_tokens`; if responses loop, see `reward.degenerate`."),
    M("response_tokens", TOKENS, "Tokens of all responses of the step."),
    M("tokens", TOKENS, "Prompts and responses of the step, each prompt counted once per response."),
))  # fmt: skip

UPDATE = Section("Loss and gradient", ("train", "sft"), (
    M("loss", "", "Loss of the batch, mean over `optim.updates`. SFT: mean negative log-likelihood per token, nats.",
      spike=True, outside="a spike beside the median of recent steps",
      remedy="As for `grad_norm`. Else a policy loss is near 0 by construction and says little; SFT's falls."),
    M("grad_norm", "", "Global norm of the gradient before clipping, mean over `optim.updates`.", "gradient norm",
      spike=True, outside="a spike beside the median of recent steps",
      remedy="One spike is clipped (`optim.grad_clip`). Repeated ones: lower `optim.lr`, and look at the step's "
             "responses. 0: no group had a gradient."),
    M("learning_rate", "", "Of AdamW in this step."),
    M("updates_skipped", "updates", "Optimiser steps of this batch that were thrown away because loss or gradient was "
      "not finite.", "updates skipped", high=0, outside="loss or gradient was not finite",
      remedy="Look at the batch in RUN_DIR/nonfinite, lower `optim.lr`, run with `debug`; the run ends after "
             "`optim.max_skipped` consecutive ones."),
    M("alerts", "", "Sentences on what is unusual in this step, as printed; [] where nothing is."),
))  # fmt: skip

POLICY = Section("Policy, ratio and engine", ("train",), (
    M("entropy", NATS, "Mean entropy per trained token, at the sampling temperature.", "entropy, nats per token", 0.02,
      outside="the policy hardly explores",
      remedy="Lower `optim.lr`, raise `rollout.temperature` or `loss.clip_high`, or give `loss.entropy_coef`. Growing "
             "without end: the policy falls apart; lower `optim.lr`."),
    M("ratio_mean", "", "Mean importance ratio r of the trained tokens.", "mean ratio", 0.9, 1.1,
      outside="the batch is stale, or engine and trainer disagree",
      remedy="Compare `logprob_diff_mean`; fewer `optim.updates`, a lower `rollout.max_age`."),
    M("ratio_capped_share", SHARE, "Trained tokens whose log-ratio is cut at 20 before exp.", high=0,
      outside="the policy has left the batch that it learns from", remedy="Lower `optim.lr`; see `logprob_diff_mean`."),
    M("clip_low_share", SHARE, "Trained tokens with a negative advantage whose ratio is below 1 - `loss.clip_low`."),
    M("clip_high_share", SHARE, "Trained tokens with a positive advantage whose ratio is above 1 + `loss.clip_high`."),
    M("clipped_share", SHARE, "`clip_low_share` + `clip_high_share`; on the page, not in the file.", "clipped tokens",
      high=0.2, value=_clipped, outside="steps are too large, or the batch is stale",
      remedy="Lower `optim.lr`, `optim.updates` or `rollout.max_age`."),
    M("kl_behavior", NATS, "KL(engine || policy) per trained token, estimated by k3 on its samples.", high=0.05,
      outside="the policy is no longer what sampled the batch",
      remedy="With a quantised rollout the run saves and ends above 0.05: resume without "
             "`rollout.quantization`. Else as for `ratio_mean`."),
    M("kl_reference", NATS, "KL to the reference model per trained token, by `loss.kl`. Only with `loss.kl_coef`.",
      remedy="Rises slowly; a jump: raise `loss.kl_coef` or lower `optim.lr`."),
    M("logprob_diff_mean", NATS, "Mean absolute difference between the trainer's and the engine's log-probs of the "
      "trained tokens.", "gap to the engine, nats", high=0.5, outside="trainer and engine disagree",
      remedy="At the first step the run ends if rounding does not explain it. Later: lower `optim.updates` or "
             "`rollout.max_age`, give `loss.importance_cap`, try `rollout.engine=transformers` for a step."),
    M("logprob_diff_max", NATS, "The largest such difference of the batch.",
      remedy="Single tokens of several nats are common in bfloat16; read the mean."),
    M("importance_truncated_share", SHARE, "Trained tokens whose importance weight is above `loss.importance_cap`, "
      "cut or dropped.", high=0.1, outside="engine and trainer disagree on many tokens",
      remedy="As for `logprob_diff_mean`."),
    M("importance_by_age", "", "Mean importance weight (policy over engine) of trained tokens of age 0, 1, ... "
      "`rollout.max_age`; null where there are none. Only where tokens can be older than a step.",
      remedy="Near 1; far from it at high ages: a lower `rollout.max_age`."),
    M("dropped_mass", SHARE, "Probability that the gradient left out, mean over trained tokens. Only with "
      "`loss.dropped_mass`, as the next two."),
    M("column_share", SHARE, "Columns of the head that were multiplied, mean over trained tokens.",
      remedy="Near 1: the sparse backward saves nothing; leave `loss.dropped_mass` at 0."),
    M("max_hidden_error", "", "Largest bound on the error of a row of d(hidden)."),
))  # fmt: skip

PACKING = Section("Packing and work left out", ("train",), (
    M("packs", "packs", "Forward and backward passes per rank, over all updates."),
    M("packing_efficiency", SHARE, "Mean work of the ranks over that of the slowest: 1 - the time lost by waiting.",
      low=0.8, outside="ranks wait for the one with the most work",
      remedy="More `rollout.problems`, or smaller packs (`parallel.pack_tokens`)."),
    M("sequences_skipped", "sequences", "Responses that cannot move the weights and are not trained on."),
    M("tokens_skipped", TOKENS, "Their tokens, prompts included."),
    M("head_rows_skipped", "rows", "Prompt tokens of trained sequences for which the head is not computed."),
    M("passes_skipped", "passes", "Forward passes that a trainer with separate passes for old and reference log-probs "
      "would make besides."),
))  # fmt: skip

ROLLOUT = Section("Rollouts", ("train",), (
    M("rollout_idle_share", SHARE, "Time between a rank's own last token and the slowest rank's, share of all.",
      "ranks idle in rollouts", high=0.3, outside="long responses make ranks wait",
      remedy="`rollout.extra_problems`, more `rollout.problems`, or a lower `rollout.max_tokens`."),
    M("acceptance_length", TOKENS, "Tokens per verification, the model's own included. Only with "
      "`rollout.speculative.method`, as the next.", low=1.3, outside="the drafter guesses too little",
      remedy="Another drafter, or `rollout.speculative.method=none`."),
    M("acceptance_rate", SHARE, "Proposed tokens that the model accepted.",
      remedy="Below a half: fewer `rollout.speculative.tokens`."),
))  # fmt: skip

PARTIAL = Section("Partial rollouts", ("train",), (
    M("groups_waiting", "groups", "Groups that were asked and are not trained on yet, after this step."),
    M("tokens_waiting_mean", TOKENS, "Mean length so far of their responses."),
    M("group_age_mean", "steps", "Steps that this step's groups waited, mean."),
    M("group_age_max", "steps", "The longest such wait; at most `rollout.max_age`."),
    M("staleness_mean", "updates", "Age of the batch's tokens: policy updates since the one that sampled them, mean.",
      remedy="Lower `rollout.extra_problems` or `rollout.max_age` if `ratio_mean` or `clipped_share` suffer."),
    M("staleness_max", "updates", "The oldest token's age."),
    M("tokens_by_age", SHARE, "Share of the tokens of age 0, 1, ..."),
    M("length_bias", "", "Mean length of the groups trained on in a step over that of the groups asked in it, - 1; of "
      "the last step whose groups are all known.",
      remedy="Below 0 short responses are trained on first; it averages out over steps unless lengths keep growing."),
    M("length_bias_step", "steps", "The step that `length_bias` is of."),
), "With `rollout.extra_problems`.")  # fmt: skip

TIME = Section("Time", ("train", "sft"), (
    M("seconds/PHASE", SECONDS, "Time of each phase on the first rank: `rollout`, `reward`, `advantage`, `pack`, "
      "`train`, `optim`, `sync`, `keep` (rollouts written), `evaluate`, `save` (of the checkpoint before).",
      remedy="`rollout` and `train` are most of a step; `docs/performance.md` says what moves them."),
    M("tokens_per_s", "tokens/s", "`tokens` over the step's seconds without `evaluate` and `save`; all ranks together.",
      "tokens per second"),
))  # fmt: skip

SYNC = Section("Weights to the engine", ("train",), (
    M("sync_s", SECONDS, "Time to hand the weights to the engine and compare them on both sides."),
    M("sync_bytes", "bytes", "Size of the weights, unsharded, as each rank sends them."),
    M("sync_gb_per_s", "GB/s", "One over the other.",
      remedy="Far below the link's rate: a larger `rollout.sync_bucket_mib`."),
))  # fmt: skip

EVALUATION = Section("Evaluation", ("eval",), (
    M("problems", "problems", "Held-out problems that were asked."),
    M("samples", "", "Responses per problem, K."),
    M("pass_at_1", SHARE, "Correct responses, mean over problems.", interval=True,
      remedy="Rises; a difference inside the intervals is noise: more `evaluate.problems` or `evaluate.samples`."),
    M("pass_at_K", SHARE, "Unbiased chance that one of k samples is correct, k = 2, 4, ... and K.", interval=True,
      remedy="Falls while `pass_at_1` rises: the policy loses variety; see `entropy`."),
    M("cons_at_k", SHARE, "Majority vote over each problem's K answers is right. Only with three samples or "
      "more, and not of programs.",
      interval=True),
    M("length_correct", TOKENS, "Mean length of correct responses.", interval=True),
    M("length_wrong", TOKENS, "Mean length of wrong responses.", interval=True),
    M("length_mean", TOKENS, "Mean length of all responses.", interval=True),
    M("truncated_share", SHARE, "As in training.", interval=True, high=0.2,
      outside="the limit cuts thoughts short, or they loop", remedy="Raise `rollout.max_tokens`."),
    M("no_answer_share", SHARE, "Responses in which no answer was found.", interval=True, high=0.2,
      outside="the model does not write answers as they are read",
      remedy="See `data.instruction` and `reward.grade`; a short SFT teaches the format."),
    M("budget/tokens", TOKENS, "Of each of up to 16 token budgets, the tokens."),
    M("budget/accuracy", SHARE, "Responses that are correct within this budget; longer ones count as wrong.",
      interval=True),
    M("by_difficulty/LEVEL/problems", "problems", "Problems of this difficulty."),
    M("by_difficulty/LEVEL/pass_at_1", SHARE, "Their Pass@1.", interval=True),
    M("by_difficulty/LEVEL/length_correct", TOKENS, "Mean length of the correct responses to them."),
    M("by_difficulty/LEVEL/length_mean", TOKENS, "Mean length of all responses to them."),
    M("reward_terms/NAME", "", "As in training."),
    M("reward_function_failed", "responses", "As in training.", high=0,
      outside="the function does not handle some responses", remedy="Read the warning with its traceback."),
), "`lead_fast.evaluate` writes the same record to evaluation.json.")  # fmt: skip

SFT = Section("SFT alone", ("sft",), (
    M("validation_loss", NATS, "Mean negative log-likelihood per token of the held-out solutions, where it was "
      "measured (`validate_every`).", remedy="Rises while `loss` falls: too many `steps`."),
    M("packs", "packs", "Forward and backward passes per rank."),
    M("tokens", TOKENS, "Of the step's examples, prompts included."),
))  # fmt: skip

SECTIONS = (EVERY, OUTCOMES, LENGTHS, UPDATE, POLICY, PACKING, ROLLOUT, PARTIAL, TIME, SYNC, EVALUATION, SFT)


def metric(key: str, kind: str = "train") -> Metric:
    """The entry of a path in a record of this kind. Raises KeyError without one."""
    for section in SECTIONS:
        for m in section.metrics:
            if kind in section.kinds and (m.fits(key) or (m.value and m.key == key)):
                return m
    raise KeyError(f"{key} of {kind} records has no entry in lead_fast/runtime/metric_table.py")


def paths(record: Any, prefix: str = "") -> Iterator[str]:
    """Paths of a record's values, such as `seconds/rollout`; a list of objects has those of its objects."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield from paths(value, f"{prefix}/{key}" if prefix else key)
    elif isinstance(record, list) and record and isinstance(record[0], dict):
        for value in record:
            yield from paths(value, prefix)
    else:
        yield prefix
