"""Compute shaped rewards and GRPO-LEAD's advantages from the scores of complete groups, by the kernel in lead_kernels.

Legend: P problems, G responses in a group, S = P x G sequences, the responses of a group side by side.
"""

from dataclasses import replace
from typing import Any

import torch

from lead_kernels import Groups, LeadAdvantages, Outcomes, batch_std, lead_advantages

from ..config import AdvantageConfig, Config
from ..records import Score
from ..reward.terms import bonus, wrong_reward


def outcomes(scores: list[Score], lengths: list[int], c: Config, device: torch.device) -> Groups:
    """Collect the outcomes of the whole batch with group size and options: everything that advantages depend on.

    Args:
        scores: of every response, [S], group by group.
        lengths: tokens of every response, [S].
        c: uses sections `reward` and `advantage`, and the group size.
        device: of the tensor.
    Returns:
        Groups whose outcomes are one float32 tensor, [S, 4].
    """
    wrong = [wrong_reward(s, c) for s in scores]
    added = [bonus(s, n, c) for s, n in zip(scores, lengths, strict=True)]
    batch = Outcomes(
        torch.tensor([s.correct for s in scores]),
        torch.tensor(lengths),
        torch.tensor(wrong, dtype=torch.float32),
        torch.tensor(added, dtype=torch.float32),
    )
    table, options = batch.table(), c.advantage
    if options.std == "batch":
        options = replace(options, batch_std=batch_std(table, c.rollout.group_size, options))
    return Groups(table.to(device), c.rollout.group_size, options)


class LengthGuard:
    """Turn off rewards for brevity while held-out accuracy is below its best by more than a margin.

    Shorter responses that cost accuracy are over-compression (arXiv 2606.22716): until the accuracy has recovered,
    correct responses get the same reward whatever their length.

    Args:
        options: of the run.
        margin: drop in Pass@1, from 0 to 1; 0 turns the guard off.
    """

    def __init__(self, options: AdvantageConfig):
        self.options, self.margin = options, options.length_guard
        self.best, self.last = 0.0, 0.0

    def saw(self, pass_at_1: float) -> None:
        """Record the Pass@1 of an evaluation."""
        self.last, self.best = pass_at_1, max(self.best, pass_at_1)

    @property
    def suspended(self) -> bool:
        """Whether rewards for brevity are off now."""
        return self.margin > 0 and self.last < self.best - self.margin

    def now(self) -> AdvantageConfig:
        """The options that apply now."""
        return replace(self.options, length_reward=False, length_advantage=0.0) if self.suspended else self.options

    def state(self) -> dict[str, list[float]]:
        """State for a checkpoint."""
        return {"length_guard": [self.best, self.last]} if self.margin else {}

    def resume(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.best, self.last = state.get("length_guard", (0.0, 0.0))


def advantages(scores: list[Score], lengths: list[int], c: Config, device: torch.device) -> LeadAdvantages:
    """Rewards, advantages, solve rates and difficulty weights of the whole batch. Arguments as for `outcomes`."""
    return lead_advantages(*outcomes(scores, lengths, c, device))
