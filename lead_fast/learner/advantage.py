"""Scores of whole groups -> shaped rewards and GRPO-LEAD's advantages, by the kernel in lead_kernels.

Legend: P problems, G responses in a group, S = P x G sequences, a group's responses side by side.
"""

import torch

from lead_kernels import LeadAdvantages, lead_advantages

from ..config import Config
from ..records import Score
from ..reward.terms import soft_overlong_penalty, wrong_reward


def advantages(scores: list[Score], lengths: list[int], c: Config, device: torch.device) -> LeadAdvantages:
    """Advantages of the whole batch.

    Args:
        scores: of every response, [S], group by group.
        lengths: tokens of every response, [S].
        c: sections `reward` and `advantage` are used, and the group size.
        device: where the tensors go.
    Returns:
        reward and advantage float32 [S], solve_rate float32 [P], kept bool [P].
    """
    r, a = c.reward, c.advantage
    wrong = [wrong_reward(s, c) for s in scores]
    penalty = None
    if r.overlong_buffer:
        falls = [soft_overlong_penalty(n, c.rollout.max_tokens, r.overlong_buffer) for n in lengths]
        penalty = torch.tensor(falls, dtype=torch.float32, device=device)
    return lead_advantages(
        torch.tensor([s.correct for s in scores], device=device),
        torch.tensor(lengths, device=device),
        c.rollout.group_size,
        wrong_reward=torch.tensor(wrong, dtype=torch.float32, device=device),
        penalty=penalty,
        length_reward=a.length_reward,
        alpha=a.alpha,
        difficulty=a.difficulty,
        weight_low=a.weight_low,
        weight_high=a.weight_high,
        slope=a.slope,
        midpoint=a.midpoint,
        eps=a.eps,
        std=a.std,
        length_gate=a.length_gate,
        length_min_solve_rate=a.length_min_solve_rate,
        nonnegative_correct=a.nonnegative_correct,
        rate=a.rate,
        group_filter=a.group_filter,
    )


def difficulty_weight(solve_rate: torch.Tensor, c: Config) -> torch.Tensor:
    """w(rho) = A + (B - A) / (1 + exp(k (rho - rho0))), float32 [P] (arXiv 2504.09696); 1 without AD."""
    a = c.advantage
    if not a.difficulty:
        return torch.ones_like(solve_rate)
    return a.weight_low + (a.weight_high - a.weight_low) * torch.sigmoid(-a.slope * (solve_rate - a.midpoint))
