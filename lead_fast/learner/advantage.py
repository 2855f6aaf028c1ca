"""Scores of whole groups -> shaped rewards and GRPO-LEAD's advantages, by the kernel in lead_kernels.

Legend: P problems, G responses in a group, S = P x G sequences, a group's responses side by side.
"""

import torch

from lead_kernels import Groups, LeadAdvantages, Outcomes, lead_advantages

from ..config import Config
from ..records import Score
from ..reward.terms import bonus, wrong_reward


def outcomes(scores: list[Score], lengths: list[int], c: Config, device: torch.device) -> Groups:
    """Outcomes of the whole batch with group size and options: all that advantages follow from.

    Args:
        scores: of every response, [S], group by group.
        lengths: tokens of every response, [S].
        c: sections `reward` and `advantage` are used, and the group size.
        device: where the tensor goes.
    Returns:
        Groups whose outcomes are one float32 tensor, [S, 4].
    """
    wrong = [wrong_reward(s, c) for s in scores]
    added = [bonus(s, n, c) for s, n in zip(scores, lengths, strict=True)]
    found = Outcomes(
        torch.tensor([s.correct for s in scores]),
        torch.tensor(lengths),
        torch.tensor(wrong, dtype=torch.float32),
        torch.tensor(added, dtype=torch.float32),
    )
    return Groups(found.table().to(device), c.rollout.group_size, c.advantage)


def advantages(scores: list[Score], lengths: list[int], c: Config, device: torch.device) -> LeadAdvantages:
    """Rewards, advantages, solve rates and difficulty weights of the whole batch. Arguments as `outcomes`."""
    return lead_advantages(*outcomes(scores, lengths, c, device))
