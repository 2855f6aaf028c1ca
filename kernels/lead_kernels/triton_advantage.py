"""Triton form of lead_advantages: one program per group, and the device function that the policy kernel shares.

Formulas and switches: lead_advantage.py, whose plain torch is the specification. Lengths are shifted by the group's
shortest (exact in fp32 below 2^24 tokens) before their mean is taken, so lengths near 14,000 keep their digits;
divisions and roots of the statistics are correctly rounded; equal lengths or rewards have spread exactly 0.

dtypes: correct bool or any number, lengths any number; arithmetic and results fp32.
Floor: 1 + 8 + 4 bytes read and 8 written per response: one launch.

Legend: P problems, G responses in a group, S = P x G sequences.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def group_advantage(
    right, length, wrong, penalty, cols, size,
    alpha, correct_reward, weight_low, weight_high, slope, midpoint, eps, length_gate, length_min_solve_rate,
    LENGTH_REWARD: tl.constexpr, DIFFICULTY: tl.constexpr, STD: tl.constexpr, NONNEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rewards and advantages of one group's members ([BLOCK], those past `size` ignored), its solve rate, and kept."""
    inf = float("inf")
    member = cols < size
    count = tl.sum(tl.where(member, 1.0, 0.0), 0)  # not from size: an argument that is 1 is no tensor
    one = tl.where(member & right, 1.0, 0.0)
    n = tl.sum(one, 0)

    # L: z over the correct responses only.
    shortest = tl.min(tl.where(member, length, inf), 0)
    moved = tl.where(member, length - shortest, 0.0)
    spread = tl.max(tl.where(one > 0, moved, -inf), 0) > tl.min(tl.where(one > 0, moved, inf), 0)
    mean = tl.div_rn(tl.sum(moved * one, 0), tl.maximum(n, 1.0))
    off = tl.where(spread, (moved - mean) * one, 0.0)
    sigma = tl.where(n > 1, tl.sqrt_rn(tl.div_rn(tl.sum(off * off, 0), tl.maximum(n - 1, 1.0))), 1.0)
    z = tl.div_rn(off, sigma + eps)
    rate = tl.div_rn(n, count)
    factor = tl.exp(-alpha * z)
    if LENGTH_REWARD:
        if length_gate > 0:
            rest = tl.where(member, length, inf)
            total = 0.0
            for _ in tl.static_range(3):
                low = tl.min(rest, 0)
                total += low
                rest = tl.where(cols == tl.min(tl.where(rest == low, cols, BLOCK), 0), inf, rest)
            gated = (count >= 3) & (tl.div_rn(total, 3.0) <= length_gate)
            factor = tl.where(gated, 1.0, factor)
        if length_min_solve_rate > 0:
            factor = tl.where(rate > length_min_solve_rate, factor, 1.0)
    else:
        factor = tl.full([BLOCK], 1.0, tl.float32)
    reward = tl.where(right, correct_reward * factor, wrong) + penalty

    # Group-relative normalisation.
    highest = tl.max(tl.where(member, reward, -inf), 0)
    lowest = tl.min(tl.where(member, reward, inf), 0)
    center = tl.where(highest == lowest, highest, tl.div_rn(tl.sum(tl.where(member, reward, 0.0), 0), count))
    center = tl.where(count == 1, 0.0, center)
    off = tl.where(member, reward - center, 0.0)
    advantage = off
    if size > 1:
        if STD == 1:
            advantage = tl.div_rn(off, tl.sqrt_rn(tl.div_rn(tl.sum(off * off, 0), count - 1)) + eps)
        if STD == 2:
            advantage = tl.div_rn(off, tl.div_rn(tl.sum(tl.abs(off), 0), count) + eps)

    # AD: the weight's argument turns with the sign of the advantage.
    rho = rate
    if POSITIVE:
        rho = tl.div_rn(tl.sum(tl.where(member & (reward > 0), 1.0, 0.0), 0), count)
    if DIFFICULTY:
        above = weight_low + tl.div_rn(weight_high - weight_low, 1 + tl.exp(slope * (rho - midpoint)))
        below = weight_low + tl.div_rn(weight_high - weight_low, 1 + tl.exp(slope * ((1 - rho) - midpoint)))
        advantage = advantage * tl.where(advantage > 0, above, below)
    if NONNEGATIVE:
        advantage = tl.where(right & (advantage < 0), 0.0, advantage)
    kept = n >= 0
    if FILTER == 1:
        kept = (highest > 0) & ((lowest != correct_reward) | (highest != correct_reward))
    if FILTER == 2:
        kept = (n > 0) & (n < count)
    return reward, tl.where(kept, advantage, 0.0), rho, kept


@triton.jit
def load_group(correct_ptr, length_ptr, wrong_ptr, wrong_reward, penalty_ptr, first, cols, size):
    """right, length, wrong, penalty of the group whose first member is `first`; wrong_ptr, penalty_ptr may be None."""
    member = cols < size
    right = tl.load(correct_ptr + first + cols, mask=member, other=0).to(tl.float32) != 0
    length = tl.load(length_ptr + first + cols, mask=member, other=0).to(tl.float32)
    wrong = tl.zeros_like(length) + wrong_reward
    if wrong_ptr is not None:
        wrong = tl.load(wrong_ptr + first + cols, mask=member, other=0.0)
    penalty = tl.zeros_like(length)
    if penalty_ptr is not None:
        penalty = tl.load(penalty_ptr + first + cols, mask=member, other=0.0)
    return right, length, wrong, penalty


@triton.jit
def lead_advantages_kernel(
    correct_ptr, length_ptr, wrong_ptr, penalty_ptr, reward_ptr, advantage_ptr, rate_ptr, kept_ptr, size,
    alpha, correct_reward, wrong_reward, weight_low, weight_high, slope, midpoint, eps, length_gate,
    length_min_solve_rate,
    LENGTH_REWARD: tl.constexpr, DIFFICULTY: tl.constexpr, STD: tl.constexpr, NONNEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr, FILTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    first = group.to(tl.int64) * size
    right, length, wrong, penalty = load_group(
        correct_ptr, length_ptr, wrong_ptr, wrong_reward, penalty_ptr, first, cols, size
    )
    reward, advantage, rate, kept = group_advantage(
        right, length, wrong, penalty, cols, size, alpha, correct_reward, weight_low, weight_high, slope, midpoint, eps,
        length_gate, length_min_solve_rate, LENGTH_REWARD, DIFFICULTY, STD, NONNEGATIVE, POSITIVE, FILTER, BLOCK,
    )  # fmt: skip
    tl.store(reward_ptr + first + cols, reward, mask=cols < size)
    tl.store(advantage_ptr + first + cols, advantage, mask=cols < size)
    tl.store(rate_ptr + group, rate)
    tl.store(kept_ptr + group, kept.to(tl.int8))


def group_block(group_size: int) -> int:
    """Members looked at together: the next power of two, at least 16."""
    return max(16, 1 << (group_size - 1).bit_length())


def lead_advantages_triton(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    wrong: torch.Tensor | None,
    penalty: torch.Tensor | None,
    group_size: int,
    floats: list[float],
    ints: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """reward [S], advantage [S], solve rate [P], kept [P]; see `lead_advantage.options` for floats and ints."""
    S, P = correct.numel(), correct.numel() // group_size
    reward, advantage = (torch.empty(S, dtype=torch.float32, device=correct.device) for _ in range(2))
    rate = torch.empty(P, dtype=torch.float32, device=correct.device)
    kept = torch.empty(P, dtype=torch.int8, device=correct.device)
    if P:
        with torch.cuda.device_of(correct):
            lead_advantages_kernel[(P,)](
                correct.contiguous(), lengths.contiguous(),
                None if wrong is None else wrong.float().expand(S).contiguous(),
                None if penalty is None else penalty.float().expand(S).contiguous(),
                reward, advantage, rate, kept, group_size, *floats, *ints, BLOCK=group_block(group_size), num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
    return reward, advantage, rate, kept.bool()
