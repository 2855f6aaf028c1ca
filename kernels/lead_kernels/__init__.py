"""Kernels for GRPO-LEAD: from raw outcomes to the gradient, without a whole matrix of logits."""

from .lead_advantage import GroupTable, LeadAdvantages, lead_advantages
from .linear_logprobs import linear_logprobs
from .linear_policy_loss import linear_policy_loss
from .policy_loss import PolicyLoss, loss_weights, policy_loss

__all__ = [
    "GroupTable",
    "LeadAdvantages",
    "PolicyLoss",
    "lead_advantages",
    "linear_logprobs",
    "linear_policy_loss",
    "loss_weights",
    "policy_loss",
]
