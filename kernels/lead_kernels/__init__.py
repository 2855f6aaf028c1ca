"""Kernels for GRPO-LEAD: from raw outcomes to the gradient, without ever holding the full matrix of logits."""

from .advantage import batch_std, lead_advantages
from .linear_logprobs import linear_logprobs
from .linear_policy_loss import linear_policy_loss
from .options import AdvantageOptions, LossOptions
from .policy_loss import loss_weights, policy_loss
from .records import Groups, LeadAdvantages, Outcomes, PolicyLoss, Sequences, Tokens

__all__ = [
    "AdvantageOptions",
    "Groups",
    "LeadAdvantages",
    "LossOptions",
    "Outcomes",
    "PolicyLoss",
    "Sequences",
    "Tokens",
    "batch_std",
    "lead_advantages",
    "linear_logprobs",
    "linear_policy_loss",
    "loss_weights",
    "policy_loss",
]
