"""Outcomes and lengths of whole groups -> shaped rewards, GRPO-LEAD advantages, solve rates and difficulty weights.

For a group of G responses with lengths |o| (tokens), C the correct ones (arXiv 2504.09696):

    z      = (|o| - mean_C) / (std_C + eps)                 sample std over C; one correct response: z = 0
    R      = exp(-alpha z) if correct, else wrong_reward; + bonus
    b      = mean(R), or sum(|o| R) / sum(|o|)               over the whole group (baseline)
    A      = (R - b) / (std(R) + eps)                        over the whole group, or std over the batch
    A      = A - length_advantage rho z if correct           nothing by default
    w(r)   = low + (high - low) / (1 + exp(slope (r - midpoint)))
    A'     = A w(rho) if A > 0 else A w(1 - rho)             rho the solve rate

dtypes: correct is bool or 0/1, lengths any integer or float, exact below 2^24 tokens; arithmetic is fp32 (fp64 if one
of the tensors is float64; the C++ of csrc always computes in fp64); results are fp32. Means and deviations take two
passes, so lengths near 14,000 that differ by one token keep their digits. Refuses groups of more than 1,024 and numbers
of responses that are not a multiple of the group size.

On CUDA Triton runs (_triton_advantage.py), on a CPU the C++ of csrc/lead_advantages.cpp. The policy loss accepts the
same outcomes and computes advantages with the same device function, so that both agree bit for bit (policy_loss.py).

The formulas are written three times: here, in _triton_advantage.py and in csrc/lead_advantages.cpp. A change to one
must be made in all three, and in the golden vectors of tests/test_kernels.py and the record of
tests/test_recorded_step.py.

Floor: S x (16 + 8) bytes. A few microseconds at any batch size: the cost is one launch.

Legend: P problems, G responses in a group, S = P x G sequences; the responses of a group are adjacent.
"""

from dataclasses import replace

import torch

from ._rows import cpu_extension, in_triton
from .options import AdvantageOptions
from .records import DEFAULT_ADVANTAGE, Groups, LeadAdvantages, Outcomes


def difficulty_weight(rho: torch.Tensor, o: AdvantageOptions) -> torch.Tensor:
    """AD's weight w(rho); 1 if AD is off."""
    if not o.difficulty:
        return torch.ones_like(rho)
    return o.weight_low + (o.weight_high - o.weight_low) / (1 + torch.exp(o.slope * (rho - o.midpoint)))


def lead_advantages_reference(table: torch.Tensor, group_size: int, o: AdvantageOptions) -> LeadAdvantages:
    """Specification of `lead_advantages` in plain torch, computed in the dtype of `table` (Outcomes.table)."""
    correct, length, wrong, bonus = (x.view(-1, group_size) for x in table.unbind(1))
    right = correct != 0
    n = right.sum(1, keepdim=True)
    solve_rate = n.to(table.dtype) / group_size

    # L: z over the correct responses only.
    mean = (length * right).sum(1, keepdim=True) / n.clamp(min=1)
    off = (length - mean) * right
    sigma = torch.where(n > 1, ((off * off).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt(), 1.0)
    z = off / (sigma + o.eps)
    shaped = torch.ones_like(n, dtype=torch.bool)
    if o.length_gate > 0 and group_size >= 3:
        shaped = shaped & (length.sort(1).values[:, :3].mean(1, keepdim=True) > o.length_gate)
    if o.length_min_solve_rate > 0:
        shaped = shaped & (solve_rate > o.length_min_solve_rate)
    factor = torch.where(shaped, torch.exp(-o.alpha * z), 1.0) if o.length_reward else 1.0
    reward = torch.where(right, factor, wrong) + bonus

    # Group-relative normalisation. Equal rewards have spread exactly 0.
    first = reward[:, :1]
    same = (reward == first).all(1, keepdim=True)
    center = torch.where(same, first, reward.mean(1, keepdim=True))
    off = reward - center if group_size > 1 else reward
    advantage = off
    if o.baseline == "length" and group_size > 1:
        weighted = (length * reward).sum(1, keepdim=True) / length.sum(1, keepdim=True)
        advantage = reward - torch.where(same, first, weighted)
    if o.std == "batch":
        advantage = advantage / (o.batch_std + o.eps)
    elif o.std == "mad" and group_size > 1:
        advantage = advantage / (off.abs().mean(1, keepdim=True) + o.eps)
    elif o.std == "sample" and group_size > 1:
        advantage = advantage / (((off * off).sum(1, keepdim=True) / (group_size - 1)).sqrt() + o.eps)
    if o.length_advantage:
        advantage = advantage - torch.where(right & shaped, o.length_advantage * solve_rate * z, 0.0)

    # AD: w(rho) for a positive advantage, w(1 - rho) for a negative one.
    rho = solve_rate if o.rate == "correct" else (reward > 0).to(table.dtype).mean(1, keepdim=True)
    weight = difficulty_weight(rho, o)
    advantage = advantage * torch.where(advantage > 0, weight, difficulty_weight(1 - rho, o))
    if o.nonnegative_correct:
        advantage = torch.where(right, advantage.clamp(min=0), advantage)
    kept = torch.ones_like(n, dtype=torch.bool)
    if o.group_filter == "official":
        kept = ~((reward <= 0).all(1, keepdim=True) | (reward == 1).all(1, keepdim=True))
    elif o.group_filter == "uniform":
        kept = (n > 0) & (n < group_size)
    advantage = torch.where(kept, advantage, 0.0)
    return LeadAdvantages(
        reward.flatten().float(), advantage.flatten().float(), rho[:, 0].float(), kept[:, 0], weight[:, 0].float()
    )  # fmt: skip


@torch.library.custom_op("lead_kernels::lead_advantages", mutates_args=())
def lead_advantages_op(
    outcomes: torch.Tensor, groups: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return reward [S], advantage [S], solve rate [P], kept [P], weight [P]; arguments as from Groups.encode."""
    table, group_size, options = Groups.decode(outcomes.contiguous(), groups)
    assert isinstance(table, torch.Tensor)
    if kernels := in_triton(table):  # not for float64
        return kernels.lead_advantages_triton(table, group_size, options)
    if table.device.type == "cpu" and (cpp := cpu_extension()):
        return cpp.lead_advantages(table, group_size, options.encode())
    return lead_advantages_reference(table, group_size, options)


@lead_advantages_op.register_fake
def _(outcomes, groups):
    S = outcomes.shape[0]
    P = S // int(groups[0])
    reward, advantage, rate, weight = (outcomes.new_empty((n,), dtype=torch.float32) for n in (S, S, P, P))
    return reward, advantage, rate, outcomes.new_empty((P,), dtype=torch.bool), weight


def batch_std(outcomes: Outcomes | torch.Tensor, group_size: int, options: AdvantageOptions) -> float:
    """Compute the standard deviation of a batch's rewards, each taken about the mean of its group.

    sqrt(sum (R - mean_group(R))^2 / (S - 1)) over all S responses (arXiv 2510.15110). The result is a Python float on
    the host, so outcomes on a CPU cost no synchronisation with a device. Arguments are those of `lead_advantages`.
    """
    reward = lead_advantages(outcomes, group_size, replace(options, std="none")).reward.double().view(-1, group_size)
    off = reward - reward.mean(1, keepdim=True)
    return (off.square().sum() / max(1, reward.numel() - 1)).sqrt().item()


def lead_advantages(
    outcomes: Outcomes | torch.Tensor, group_size: int, options: AdvantageOptions = DEFAULT_ADVANTAGE
) -> LeadAdvantages:
    """Compute GRPO-LEAD's rewards and advantages.

    Args:
        outcomes: of S = P x group_size responses, those of a group adjacent; or their `table()`, [S, 4].
        group_size: G, 1 to 1024.
        options: how rewards are shaped, normalised and weighted, and which groups are dropped.
    Returns:
        LeadAdvantages, float32 and bool on the outcomes' device, not differentiable.
    Raises:
        ValueError: shapes that do not match, or a group size outside 1 to 1024.
    """
    return LeadAdvantages(*torch.ops.lead_kernels.lead_advantages(*Groups(outcomes, group_size, options).encode()))
