"""Records that the operations take and return: tokens, sequences, groups of outcomes, and results.

Holds everything that the public functions and the kernels of all backends share, so that no backend imports an
operation.

Legend: T rows, S sequences, P problems.
"""

from typing import NamedTuple

import torch

from .options import AdvantageOptions, LossOptions

MAX_GROUP = 1024
LOG_RATIO_CAP = 20.0  # log-ratios and log-weights are cut here before exp
DEFAULT_LOSS, DEFAULT_ADVANTAGE = LossOptions(), AdvantageOptions()


class Outcomes(NamedTuple):
    """Outcomes of responses, from which rewards and advantages are computed.

    correct: bool or 0/1, [S].
    lengths: tokens, [S].
    wrong_reward: reward of an incorrect response, a number or [S]; None: -1.
    bonus: added to the reward of every response, [S]; None: 0 (a soft overlong penalty is a negative bonus).
    """

    correct: torch.Tensor
    lengths: torch.Tensor
    wrong_reward: float | torch.Tensor | None = None
    bonus: torch.Tensor | None = None

    def table(self) -> torch.Tensor:
        """Stack the four columns, [S, 4], in float64 if one of the tensors is float64, else in float32.

        Raises:
            ValueError: columns of different sizes.
        """
        S = self.correct.shape
        if len(S) != 1 or self.lengths.shape != S:
            raise ValueError(
                f"correct is {list(S)} and lengths {list(self.lengths.shape)}: give two vectors of the same size."
            )
        given = [x for x in self if isinstance(x, torch.Tensor)]
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
        columns = [self.correct != 0, self.lengths]
        for name, x, default in (("wrong_reward", self.wrong_reward, -1.0), ("bonus", self.bonus, 0.0)):
            if not isinstance(x, torch.Tensor):
                x = self.lengths.new_full(S, default if x is None else x, dtype=dtype)
            if x.shape not in ((), S):
                raise ValueError(f"{name} is {list(x.shape)} and correct {list(S)}: give one number for each response.")
            columns.append(x.expand(S))
        return torch.stack([x.to(dtype) for x in columns], 1)


class Groups(NamedTuple):
    """Outcomes of whole groups, for a loss that computes advantages itself; given as `Sequences.advantages`.

    outcomes: Outcomes, or their `table()`, [S, 4], which saves a copy per call.
    group_size: G, 1 to 1024.
    options: options of the advantages. Always pass them in a function that torch 2.11 compiles: it cannot trace a
    default.
    """

    outcomes: Outcomes | torch.Tensor
    group_size: int
    options: AdvantageOptions = DEFAULT_ADVANTAGE

    def table(self) -> torch.Tensor:
        """Return the outcomes as one tensor, [S, 4]. Raises ValueError for shapes or a group size that do not match."""
        table = self.outcomes.table() if isinstance(self.outcomes, Outcomes) else self.outcomes
        if not 1 <= self.group_size <= MAX_GROUP:
            raise ValueError(f"group_size is {self.group_size}: give 1 to {MAX_GROUP}.")
        if table.dim() != 2 or table.shape[1] != 4 or table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"The outcomes are {table.dtype} {list(table.shape)}: give Outcomes(...).table().")
        if table.shape[0] % self.group_size:
            raise ValueError(
                f"There are outcomes of {table.shape[0]} responses: give a multiple of group_size {self.group_size}."
            )
        return table

    def encode(self) -> tuple[torch.Tensor, list[float]]:
        """Return the table of outcomes, and group size and options as numbers, in the form that operators take."""
        return self.table(), [float(self.group_size), *self.options.encode()]

    @staticmethod
    def decode(table: torch.Tensor, encoded: list[float]) -> "Groups":
        """Restore the groups that `encode` was called on, with the table as outcomes."""
        return Groups(table, int(encoded[0]), AdvantageOptions.decode(encoded[1:]))


class LeadAdvantages(NamedTuple):
    """Rewards, advantages and solve rates of whole groups.

    reward, advantage: float32 [S].
    solve_rate: rho, float32 [P].
    kept: bool [P], False for groups that the filter drops; their advantages are 0.
    weight: the difficulty weight w(rho), float32 [P]; 1 if AD is off.
    """

    reward: torch.Tensor
    advantage: torch.Tensor
    solve_rate: torch.Tensor
    kept: torch.Tensor
    weight: torch.Tensor


class Tokens(NamedTuple):
    """What is known of each row's token, [T] each.

    targets: the sampled tokens, int64, each in 0..V-1.
    sequence_ids: index of the row's sequence into the [S] tensors, any integer type. If ratio or importance_level is
        `sequence`, one call must hold all rows of a sequence.
    behavior: log-probs under the policy that sampled the tokens.
    old: log-probs in the denominator of the ratio; None: the policy itself, detached.
    reference: log-probs of the reference model, for the KL term.
    """

    targets: torch.Tensor
    sequence_ids: torch.Tensor
    behavior: torch.Tensor | None = None
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None


class Sequences(NamedTuple):
    """What is known of each sequence.

    weights: weight of each token of the sequence, [S]; see `loss_weights`.
    advantages: [S], or Groups of S responses from which to compute them.
    """

    weights: torch.Tensor
    advantages: torch.Tensor | Groups


class SequenceTerms(NamedTuple):
    """Results of the first pass that the sequence modes need, expanded to rows, [T]; None if the mode is `token`.

    log_ratio: mean of logp - old over the row's sequence.
    importance: sum of old - behavior over the row's sequence.
    """

    log_ratio: torch.Tensor | None = None
    importance: torch.Tensor | None = None


class RowMetrics(NamedTuple):
    """Metrics that are computed per row and summed over rows, in the order in which the kernels write them."""

    kl_behavior: torch.Tensor
    clip_low: torch.Tensor
    clip_high: torch.Tensor
    ratio: torch.Tensor
    ratio_capped: torch.Tensor
    importance_truncated: torch.Tensor
    logprob_diff: torch.Tensor
    kl_reference: torch.Tensor


MAXIMA = ("max_logprob", "max_logprob_diff")
METRICS = ("tokens", "entropy", *RowMetrics._fields, *MAXIMA)


class PolicyLoss(NamedTuple):
    """Result of a policy loss over T rows.

    loss: 0-dim, differentiable.
    logprobs, entropy: [T], detached.
    metrics: sums over the rows, 0-dim each (`max_*`: maxima).
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    metrics: dict[str, torch.Tensor]
