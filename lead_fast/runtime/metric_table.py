"""Metrics of metrics.jsonl: the meaning, unit and healthy range of every key, and the remedy outside that range.

The healthy ranges are defined here alone: the page that follows a run (view/pages.py), the alerts (health.py) and
docs/metrics.md read them. They are rules of thumb: none ends a run, except where `remedy` says so.
To add a metric, write its key into the record (journal.py, learner/learner.py) and add an entry here.
"""

import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

WINDOW = 50  # steps whose median a spike is measured against
SPIKE = 10.0  # times the median
SHARE, TOKENS, NATS, SECONDS = "share", "tokens", "nats", "seconds"


@dataclass(frozen=True)
class Metric:
    """A key of a record; or, with `value`, a number that the page computes from several keys.

    With `spike` the healthy range ends at SPIKE times the median of the last WINDOW steps.
    """

    key: str
    """Path in the record, levels separated by `/`; a word in capitals is any name or number (`seconds/PHASE`)."""
    unit: str
    """Unit of the value; `share` is a number from 0 to 1; empty for a count or a number without a unit."""
    meaning: str
    """One or two sentences."""
    title: str = ""
    """Name on the page; empty: the page does not show it."""
    low: float | None = None
    """Lowest healthy value; None: no bound."""
    high: float | None = None
    """Highest healthy value; None: no bound."""
    spike: bool = False
    """Whether the highest healthy value is computed from the steps before."""
    outside: str = ""
    """What is probably wrong outside the range."""
    remedy: str = ""
    """What to do about it; for a metric without a range, how to read it."""
    interval: bool = False
    """Whether KEY_ci follows it: [low, high] of the 95 % bootstrap interval over problems."""
    value: Callable[[Record], float | None] | None = None
    """Computes the number from a record, where it is not the value of `key`."""

    def of(self, record: Record) -> float | None:
        """The value in a record, None without one."""
        return self.value(record) if self.value else record.get(self.key)

    def bounds(self, before: list[Record]) -> tuple[float | None, float | None]:
        """Lowest and highest healthy value, given the records before; None where there is no bound."""
        usual = [r[self.key] for r in before[-WINDOW:] if r.get(self.key)] if self.spike else []
        return self.low, SPIKE * statistics.median(usual) if usual else self.high

    def fits(self, path: str) -> bool:
        """Whether this entry describes a path in a record."""
        pattern = re.sub(r"(?<![A-Za-z])[A-Z]+(?![A-Za-z])", "[^/]+", self.key)
        return bool(re.fullmatch(pattern + "(_ci)?" * self.interval, path)) and self.value is None


@dataclass(frozen=True)
class Section:
    """Metrics that are read together; `kinds` names the kinds of records that hold them."""

    title: str
    kinds: tuple[str, ...]
    metrics: tuple[Metric, ...]
    about: str = ""


def _mixed(r: Record) -> float | None:
    return None if r.get("solve_none") is None else 1 - r["solve_none"] - r["solve_all"]


def _clipped(r: Record) -> float | None:
    return None if r.get("clip_low_share") is None else r["clip_low_share"] + (r.get("clip_high_share") or 0.0)


def answers_of(record: Record) -> Record:
    """Share of responses that hold an answer, and share of those answers that are correct (None without answers)."""
    if record.get("no_answer_share") is None or record.get("pass_at_1") is None:
        return {}
    answered = 1.0 - record["no_answer_share"]
    return {"answered_share": answered, "precision": record["pass_at_1"] / answered if answered > 1e-9 else None}


M = Metric

EVERY = Section("Every record", ("train", "eval", "sft"), (
    M("kind", "", "`train`, `eval` or `sft`."),
    M("step", "steps", "Steps finished so far: 1 after the first; 0 in the evaluation before it."),
    M("elapsed_s", SECONDS, "Time since the run began, including its processes before a resume."),
))  # fmt: skip

OUTCOMES = Section("Rewards and outcomes", ("train",), (
    M("accuracy", SHARE, "Responses of the batch that are correct.", "correct responses", 0.1, 0.9,
      outside="most groups are all wrong or all correct",
      remedy="Too low: easier problems, or SFT first. Too high: harder ones (`data.min_difficulty`, "
             "`data.sampling=solve_rate`, or `lead_fast.data select`)."),
    M("reward_mean", "", "Mean reward, including E, L and the value of a reward function.", "mean reward",
      remedy="Should rise. Shorter correct responses alone can raise it, so read it beside `accuracy`."),
    M("reward_terms/NAME", "", "Mean of a term that the reward function returned, over the responses that have it; "
      "`reward` is the total. Only with `reward.function`; in evaluations too."),
    M("reward_function_failed", "responses", "Responses for which the reward function raised, timed out or "
      "did not return finite numbers. Only with `reward.function`; in evaluations too.", high=0,
      outside="the function does not handle some responses",
      remedy="Read the traceback in the warning; see `reward.function_timeout_s`."),
    M("difficulty_weight_mean", "", "Mean of the difficulty weight w(rho) over groups; 1 where AD is off.",
      remedy="Falls towards `advantage.weight_low` as solve rates rise."),
    M("solve_rate_histogram", "groups", "Number of groups with 0, 1, ... G correct responses."),
    M("solve_none", SHARE, "Groups without a correct response."),
    M("solve_all", SHARE, "Groups whose responses are all correct."),
    M("mixed_groups", SHARE, "1 - `solve_none` - `solve_all`; on the page, not in the file.",
      "groups with both outcomes", 0.3, value=_mixed, outside="few groups show what is right",
      remedy="Use problems nearer to the model's level, or `rollout.refill` with `advantage.group_filter`."),
    M("groups_with_gradient", SHARE, "Groups with an advantage other than 0.", "groups with a gradient", 0.3,
      outside="most rollouts contribute no gradient", remedy="As for `mixed_groups`."),
    M("groups_dropped", "groups", "Groups that `advantage.group_filter` dropped without a replacement.",
      remedy="If there are many, raise `rollout.refill`."),
    M("groups_refilled", "groups", "Groups that replaced dropped ones (`rollout.refill`)."),
))  # fmt: skip

LENGTHS = Section("Lengths", ("train",), (
    M("length_correct", TOKENS, "Mean length of correct responses.", "length of correct responses",
      remedy="Should fall slowly under L. If `accuracy` falls with it, lower `advantage.alpha`, or set "
             "`advantage.length_guard`."),
    M("length_wrong", TOKENS, "Mean length of wrong responses.", "length of wrong responses",
      remedy="If it grows while the others shrink, the model rambles where it does not know; see `reward.truncated`."),
    M("length_mean", TOKENS, "Mean length of all responses."),
    M("length_correctness", "", "Correlation of length and correctness within groups, mean over the groups that have "
      "both outcomes; from -1 to 1.", "length against correctness",
      remedy="Below 0, longer responses are more often wrong (overthinking); above 0, shorter ones, and L then works "
             "against accuracy."),
    M("length_spread", "", "Standard deviation of the correct responses' lengths, divided by their mean; averaged over "
      "groups with two or more.", "spread of correct lengths", 0.01,
      outside="a group's correct responses are equally long",
      remedy="Near 0, L has nothing left to choose between."),
    M("length_suspended", "", "Whether L and `advantage.length_advantage` are off. Only with "
      "`advantage.length_guard`.", remedy="True means that held-out Pass@1 is below the run's best by more than the "
      "margin."),
    M("truncated_share", SHARE, "Responses cut at the limit, stopped for repetition, or without `</think>` where one "
      "side of it is graded.", "truncated", high=0.2, outside="the limit cuts the reasoning short, or it loops",
      remedy="Raise `rollout.max_tokens`; if responses loop, see `reward.degenerate`."),
    M("response_tokens", TOKENS, "Tokens in all responses of the step."),
    M("tokens", TOKENS, "Tokens in the step's prompts and responses, each prompt counted once per response."),
))  # fmt: skip

UPDATE = Section("Loss and gradient", ("train", "sft"), (
    M("loss", "", "Loss of the batch, mean over `optim.updates`. In SFT: mean negative log-likelihood, nats per token.",
      spike=True, outside="a spike compared with the median of recent steps",
      remedy="As for `grad_norm`. Otherwise a policy loss is near 0 by construction and says little; SFT's should "
             "fall."),
    M("grad_norm", "", "Global norm of the gradient before clipping, mean over `optim.updates`.", "gradient norm",
      spike=True, outside="a spike compared with the median of recent steps",
      remedy="A single spike is clipped (`optim.grad_clip`). If spikes recur, lower `optim.lr` and read the step's "
             "responses. 0 means that no group had a gradient."),
    M("learning_rate", "", "AdamW's learning rate in this step."),
    M("updates_skipped", "updates", "Optimiser steps of this batch that were skipped because the loss or gradient was "
      "not finite.", "updates skipped", high=0, outside="the loss or gradient was not finite",
      remedy="Inspect the batch in RUN_DIR/nonfinite, lower `optim.lr`, run with `debug`; the run ends after "
             "`optim.max_skipped` consecutive skipped steps."),
    M("alerts", "", "What is unusual in this step, in the sentences that were printed; [] if nothing is."),
))  # fmt: skip

POLICY = Section("Policy, ratio and engine", ("train",), (
    M("entropy", NATS, "Mean entropy per trained token, at the sampling temperature.", "entropy, nats per token", 0.02,
      outside="the policy hardly explores",
      remedy="Lower `optim.lr`, raise `rollout.temperature` or `loss.clip_high`, or set `loss.entropy_coef`. If it "
             "keeps growing, the policy is degenerating: lower `optim.lr`."),
    M("ratio_mean", "", "Mean importance ratio r over the trained tokens.", "mean ratio", 0.9, 1.1,
      outside="the batch is stale, or engine and trainer disagree",
      remedy="Compare `logprob_diff_mean`; lower `optim.updates` or `rollout.max_age`."),
    M("ratio_capped_share", SHARE, "Trained tokens whose log-ratio is capped at 20 before exp.", high=0,
      outside="the policy is far from the one that sampled the batch",
      remedy="Lower `optim.lr`; see `logprob_diff_mean`."),
    M("clip_low_share", SHARE, "Trained tokens with a negative advantage whose ratio is below 1 - `loss.clip_low`."),
    M("clip_high_share", SHARE, "Trained tokens with a positive advantage whose ratio is above 1 + `loss.clip_high`."),
    M("clipped_share", SHARE, "`clip_low_share` + `clip_high_share`; on the page, not in the file.", "clipped tokens",
      high=0.2, value=_clipped, outside="steps are too large, or the batch is stale",
      remedy="Lower `optim.lr`, `optim.updates` or `rollout.max_age`."),
    M("kl_behavior", NATS, "KL(engine || policy) per trained token, estimated by k3 on its samples.", high=0.05,
      outside="the policy is no longer the one that sampled the batch",
      remedy="With quantised rollouts, a run saves and ends above 0.05: resume it without "
             "`rollout.quantization`. Otherwise as for `ratio_mean`."),
    M("kl_reference", NATS, "KL to the reference model per trained token, by `loss.kl`. Only with `loss.kl_coef`.",
      remedy="Should rise slowly; if it jumps, raise `loss.kl_coef` or lower `optim.lr`."),
    M("logprob_diff_mean", NATS, "Mean absolute difference between the trainer's and the engine's log-probs of the "
      "trained tokens.", "gap to the engine, nats", high=0.5, outside="trainer and engine disagree",
      remedy="At the first step the run ends unless rounding explains the gap. Later, lower `optim.updates` or "
             "`rollout.max_age`, set `loss.importance_cap`, or try `rollout.engine=transformers` for a step."),
    M("logprob_diff_max", NATS, "The largest such difference in the batch.",
      remedy="Differences of several nats at single tokens are common in bfloat16; judge by the mean."),
    M("importance_truncated_share", SHARE, "Trained tokens whose importance weight exceeds `loss.importance_cap`: it "
      "is capped, or the token dropped.", high=0.1, outside="engine and trainer disagree on many tokens",
      remedy="As for `logprob_diff_mean`."),
    M("importance_by_age", "", "Mean importance weight (policy over engine) of the trained tokens of age 0, 1, ..., "
      "`rollout.max_age`; null where there are none. Only if tokens can be older than one step.",
      remedy="Should be near 1; if it is far from 1 at high ages, lower `rollout.max_age`."),
    M("dropped_mass", SHARE, "Probability mass left out of the gradient, mean over trained tokens. Only with "
      "`loss.dropped_mass`, like the next two."),
    M("column_share", SHARE, "Columns of the head that the backward pass multiplied, mean over trained tokens.",
      remedy="Near 1, the sparse backward pass saves nothing: leave `loss.dropped_mass` at 0."),
    M("max_hidden_error", "", "Largest bound on the error of any row of d(hidden)."),
))  # fmt: skip

PACKING = Section("Packing and work left out", ("train",), (
    M("packs", "packs", "Forward and backward passes per rank, over all updates."),
    M("packing_efficiency", SHARE, "Mean work per rank over that of the slowest rank; the rest is waiting.",
      low=0.8, outside="ranks wait for the rank with the most work",
      remedy="Raise `rollout.problems`, or use smaller packs (`parallel.pack_tokens`)."),
    M("sequences_skipped", "sequences", "Responses that cannot change the weights and are therefore not trained on."),
    M("tokens_skipped", TOKENS, "Their tokens, prompts included."),
    M("head_rows_skipped", "rows", "Prompt tokens of trained sequences for which the head is not computed."),
    M("passes_skipped", "passes", "Additional forward passes that a trainer with separate passes for old and reference "
      "log-probs would make."),
))  # fmt: skip

ROLLOUT = Section("Rollouts", ("train",), (
    M("rollout_idle_share", SHARE, "Share of the ranks' time spent waiting for the slowest rank's last token.",
      "ranks idle in rollouts", high=0.3, outside="ranks wait for long responses",
      remedy="Set `rollout.extra_problems`, raise `rollout.problems`, or lower `rollout.max_tokens`."),
    M("acceptance_length", TOKENS, "Tokens gained per verification, the model's own included. Only with "
      "`rollout.speculative.method`, like the next.", low=1.3, outside="the drafter guesses too few tokens",
      remedy="Use another drafter, or `rollout.speculative.method=none`."),
    M("acceptance_rate", SHARE, "Proposed tokens that the model accepted.",
      remedy="Below a half, lower `rollout.speculative.tokens`."),
))  # fmt: skip

PARTIAL = Section("Partial rollouts", ("train",), (
    M("groups_waiting", "groups", "Groups that were asked but not yet trained on after this step."),
    M("tokens_waiting_mean", TOKENS, "Mean length of their responses so far."),
    M("group_age_mean", "steps", "Mean number of steps that this step's groups waited."),
    M("group_age_max", "steps", "The longest such wait; at most `rollout.max_age`."),
    M("staleness_mean", "updates", "Mean age of the batch's tokens: policy updates since they were sampled.",
      remedy="Lower `rollout.extra_problems` or `rollout.max_age` if `ratio_mean` or `clipped_share` suffer."),
    M("staleness_max", "updates", "Age of the oldest token."),
    M("tokens_by_age", SHARE, "Tokens of age 0, 1, ..."),
    M("length_bias", "", "Mean length of the groups that a step trained on, divided by that of the groups asked in "
      "it, minus 1; for the last step whose groups have all been trained on.",
      remedy="Below 0, short responses are trained on first; it averages out over steps unless lengths keep growing."),
    M("length_bias_step", "steps", "The step that `length_bias` describes."),
), "With `rollout.extra_problems`.")  # fmt: skip

TIME = Section("Time", ("train", "sft"), (
    M("seconds/PHASE", SECONDS, "Time of each phase on the first rank: `rollout`, `reward`, `advantage`, `pack`, "
      "`train`, `optim`, `sync`, `keep` (writing rollouts), `evaluate`, `save` (of the previous checkpoint).",
      remedy="`rollout` and `train` take most of a step; `docs/performance.md` says what shortens them."),
    M("tokens_per_s", "tokens/s", "`tokens` of all ranks over the step's seconds without `evaluate` and `save`.",
      "tokens per second"),
))  # fmt: skip

SYNC = Section("Weights to the engine", ("train",), (
    M("sync_s", SECONDS, "Time to hand the weights to the engine and compare them on both sides."),
    M("sync_bytes", "bytes", "Size of the unsharded weights that each rank sends."),
    M("sync_gb_per_s", "GB/s", "`sync_bytes` over `sync_s`.",
      remedy="If it is far below the link's rate, raise `rollout.sync_bucket_mib`."),
))  # fmt: skip

EVALUATION = Section("Evaluation", ("eval",), (
    M("problems", "problems", "Held-out problems that were asked."),
    M("samples", "", "Responses per problem, K."),
    M("pass_at_1", SHARE, "Correct responses, mean over problems.", interval=True,
      remedy="Should rise; differences within the intervals are noise: raise `evaluate.problems` "
             "or `evaluate.samples`."),
    M("pass_at_K", SHARE, "Unbiased estimate of the chance that one of k samples is correct, k = 2, 4, ... and K.",
      interval=True,
      remedy="If it falls while `pass_at_1` rises, the policy loses diversity; see `entropy`."),
    M("cons_at_k", SHARE, "Problems whose majority vote over K answers is correct. Only with three samples or "
      "more, and not for programs.",
      interval=True),
    M("length_correct", TOKENS, "Mean length of correct responses.", interval=True),
    M("length_wrong", TOKENS, "Mean length of wrong responses.", interval=True),
    M("length_mean", TOKENS, "Mean length of all responses.", interval=True),
    M("truncated_share", SHARE, "As in training.", interval=True, high=0.2,
      outside="the limit cuts the reasoning short, or it loops", remedy="Raise `rollout.max_tokens`."),
    M("no_answer_share", SHARE, "Responses without an answer that could be extracted.", interval=True, high=0.2,
      outside="the model does not write answers in the form that is read",
      remedy="See `data.instruction` and `reward.grade`; a short SFT teaches the format."),
    M("budget/tokens", TOKENS, "Each of up to 16 token budgets."),
    M("budget/accuracy", SHARE, "Responses that are correct within that budget; longer ones count as wrong.",
      interval=True),
    M("by_difficulty/LEVEL/problems", "problems", "Problems of this difficulty."),
    M("by_difficulty/LEVEL/pass_at_1", SHARE, "Their Pass@1.", interval=True),
    M("by_difficulty/LEVEL/length_correct", TOKENS, "Mean length of the correct responses to them."),
    M("by_difficulty/LEVEL/length_mean", TOKENS, "Mean length of all responses to them."),
    M("reward_terms/NAME", "", "As in training."),
    M("reward_function_failed", "responses", "As in training.", high=0,
      outside="the function does not handle some responses", remedy="Read the traceback in the warning."),
), "`lead_fast.evaluate` writes the same record to evaluation.json.")  # fmt: skip

SFT = Section("SFT only", ("sft",), (
    M("validation_loss", NATS, "Mean negative log-likelihood per token of the held-out solutions, in steps that "
      "measure it (`validate_every`).", remedy="If it rises while `loss` falls, lower `steps`."),
    M("packs", "packs", "Forward and backward passes per rank."),
    M("tokens", TOKENS, "Tokens in the step's examples, prompts included."),
))  # fmt: skip

SECTIONS = (EVERY, OUTCOMES, LENGTHS, UPDATE, POLICY, PACKING, ROLLOUT, PARTIAL, TIME, SYNC, EVALUATION, SFT)


def metric(key: str, kind: str = "train") -> Metric:
    """Find the entry for a path in a record of this kind. Raises KeyError if there is none."""
    for section in SECTIONS:
        for m in section.metrics:
            if kind in section.kinds and (m.fits(key) or (m.value and m.key == key)):
                return m
    raise KeyError(f"{key} of {kind} records has no entry in lead_fast/runtime/metric_table.py")


def paths(record: Any, prefix: str = "") -> Iterator[str]:
    """Yield the paths of a record's values, such as `seconds/rollout`; a list of objects yields its objects' paths."""
    if isinstance(record, dict):
        for key, value in record.items():
            yield from paths(value, f"{prefix}/{key}" if prefix else key)
    elif isinstance(record, list) and record and isinstance(record[0], dict):
        for value in record:
            yield from paths(value, prefix)
    else:
        yield prefix
