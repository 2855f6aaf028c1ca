"""Triton form of lead_advantages: one program per group, and the device function that the policy kernel shares.

Formulas and switches: advantage.py, whose plain torch form is the specification. The group's shortest length is
subtracted from all (exact in fp32 below 2^24 tokens) before the mean is taken, so that lengths near 14,000 keep their
digits. Divisions and roots of the statistics are correctly rounded; equal lengths or rewards have spread exactly 0.

The policy kernel runs with a different number of warps and with fused multiply-adds, and must still produce the same
bits. Sums over a group therefore go through `total`, whose order does not depend on the layout, and a product to which
something is added goes through `product`, which the compiler cannot fuse with the addition.

dtypes: outcomes fp32 [S, 4]; arithmetic and results fp32.
Floor: 16 bytes read and 8 written per response: one launch.

Legend: P problems, G responses in a group, S = P x G sequences.
"""

from collections import namedtuple
from dataclasses import fields
from typing import Any

import torch
import triton
import triton.language as tl

from .options import AdvantageOptions, LossOptions

READ = {record: namedtuple(record.__name__, [f.name for f in fields(record)])  # type: ignore[misc]
        for record in (LossOptions, AdvantageOptions)}  # fmt: skip


def in_kernel(options: Any, record: type) -> tuple:
    """Options as kernels read them: fields by name, numbers as arguments, everything else as constants."""

    def read(x: Any) -> Any:
        return tl.constexpr(x) if isinstance(x, (bool, str)) else None if x is None else float(x)

    return READ[record](*(read(getattr(options, f.name)) for f in fields(record)))


@triton.jit
def total(x):
    """Sum a vector by halves: the same order of additions in every kernel, whatever its layout and number of warps."""
    for _ in tl.static_range(10):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), 1)
    return tl.sum(x, 0)


@triton.jit
def product(x, y):
    """x times y, rounded before anything is added."""
    return tl.fma(x, y, 0.0)


@triton.jit
def difficulty_weight(rho, options):
    """AD's weight w(rho); 1 if AD is off."""
    weight = rho * 0.0 + 1.0
    if options.difficulty:
        span = options.weight_high - options.weight_low
        weight = options.weight_low + tl.div_rn(span, 1 + tl.exp(options.slope * (rho - options.midpoint)))
    return weight


@triton.jit
def group_advantage(table_ptr, first, size, options, BLOCK: tl.constexpr):
    """Compute rewards and advantages, [BLOCK], of the group that starts at `first`; entries past `size` are ignored.

    Also returns the group's solve rate, whether it is kept, and its difficulty weight.
    """
    inf = float("inf")
    cols = tl.arange(0, BLOCK)
    member = cols < size
    row_ptr = table_ptr + (first + cols) * 4  # Outcomes.table
    right = tl.load(row_ptr, mask=member, other=0.0) != 0
    length = tl.load(row_ptr + 1, mask=member, other=0.0)
    wrong = tl.load(row_ptr + 2, mask=member, other=0.0)
    bonus = tl.load(row_ptr + 3, mask=member, other=0.0)
    count = total(tl.where(member, 1.0, 0.0))  # not from `size`: Triton makes an argument of 1 a constant, not a tensor
    correct = member & right
    n = total(tl.where(correct, 1.0, 0.0))

    # L: z over the correct responses only.
    shortest = tl.min(tl.where(member, length, inf), 0)
    moved = tl.where(member, length - shortest, 0.0)
    spread = tl.max(tl.where(correct, moved, -inf), 0) > tl.min(tl.where(correct, moved, inf), 0)
    mean = tl.div_rn(total(tl.where(correct, moved, 0.0)), tl.maximum(n, 1.0))
    off = tl.where(spread, tl.where(correct, moved - mean, 0.0), 0.0)
    sigma = tl.where(n > 1, tl.sqrt_rn(tl.div_rn(total(product(off, off)), tl.maximum(n - 1, 1.0))), 1.0)
    z = tl.div_rn(off, sigma + options.eps)
    rate = tl.div_rn(n, count)
    shaped = tl.where(n >= 0, 1.0, 0.0)  # a factor of 1 or 0 instead of a product: see the top of the file
    if options.length_gate > 0:
        rest = tl.where(member, length, inf)
        three = 0.0
        for _ in tl.static_range(3):
            low = tl.min(rest, 0)
            three += low
            rest = tl.where(cols == tl.min(tl.where(rest == low, cols, BLOCK), 0), inf, rest)
        gated = (count >= 3) & (tl.div_rn(three, 3.0) <= options.length_gate)
        shaped = tl.where(gated, 0.0, shaped)
    if options.length_min_solve_rate > 0:
        shaped = tl.where(rate > options.length_min_solve_rate, shaped, 0.0)
    if options.length_reward:
        factor = tl.where(shaped > 0, tl.exp(-options.alpha * z), 1.0)
    else:
        factor = tl.full([BLOCK], 1.0, tl.float32)
    reward = tl.where(right, factor, wrong) + bonus

    # Group-relative normalisation.
    highest = tl.max(tl.where(member, reward, -inf), 0)
    lowest = tl.min(tl.where(member, reward, inf), 0)
    center = tl.where(highest == lowest, highest, tl.div_rn(total(tl.where(member, reward, 0.0)), count))
    center = tl.where(count == 1, 0.0, center)
    off = tl.where(member, reward - center, 0.0)
    advantage = off
    if options.baseline == "length":
        weighted = tl.div_rn(total(tl.where(member, product(length, reward), 0.0)), total(length))
        weighted = tl.where(highest == lowest, highest, weighted)
        advantage = tl.where(member, reward - tl.where(count == 1, 0.0, weighted), 0.0)
    if options.std == "batch":
        advantage = tl.div_rn(advantage, options.batch_std + options.eps)
    if size > 1:
        if options.std == "sample":
            advantage = tl.div_rn(advantage, tl.sqrt_rn(tl.div_rn(total(product(off, off)), count - 1)) + options.eps)
        if options.std == "mad":
            advantage = tl.div_rn(advantage, tl.div_rn(total(tl.abs(off)), count) + options.eps)
    if options.length_advantage > 0:
        brevity = product(options.length_advantage * rate, z)
        advantage = advantage - tl.where(shaped > 0, tl.where(correct, brevity, 0.0), 0.0)

    # AD: w(rho) for a positive advantage, w(1 - rho) for a negative one.
    rho = rate
    if options.rate == "positive":
        rho = tl.div_rn(total(tl.where(member & (reward > 0), 1.0, 0.0)), count)
    weight = difficulty_weight(rho, options)
    if options.difficulty:
        advantage = product(advantage, tl.where(advantage > 0, weight, difficulty_weight(1 - rho, options)))
    if options.nonnegative_correct:
        advantage = tl.where(right & (advantage < 0), 0.0, advantage)
    kept = n >= 0
    if options.group_filter == "official":
        kept = (highest > 0) & ((lowest != 1) | (highest != 1))
    if options.group_filter == "uniform":
        kept = (n > 0) & (n < count)
    return reward, tl.where(kept, advantage, 0.0), rho, kept, weight


@triton.jit
def lead_advantages_kernel(
    table_ptr, reward_ptr, advantage_ptr, rate_ptr, kept_ptr, weight_ptr, size, group_options, BLOCK: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0)
    first = group.to(tl.int64) * size
    reward, advantage, rate, kept, weight = group_advantage(table_ptr, first, size, group_options, BLOCK)
    cols = tl.arange(0, BLOCK)
    tl.store(reward_ptr + first + cols, reward, mask=cols < size)
    tl.store(advantage_ptr + first + cols, advantage, mask=cols < size)
    tl.store(rate_ptr + group, rate)
    tl.store(kept_ptr + group, kept.to(tl.int8))
    tl.store(weight_ptr + group, weight)


def group_block(group_size: int) -> int:
    """Size of the block that holds a group: the next power of two, at least 16."""
    return max(16, 1 << (group_size - 1).bit_length())


def lead_advantages_triton(
    table: torch.Tensor, group_size: int, options: AdvantageOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return reward [S], advantage [S], solve rate [P], kept [P], weight [P] of outcomes, contiguous float32 [S, 4]."""
    S, P = table.shape[0], table.shape[0] // group_size
    assert table.is_contiguous() and table.dtype == torch.float32
    reward, advantage, rate, weight = (
        torch.empty(n, dtype=torch.float32, device=table.device) for n in (S, S, P, P)
    )  # fmt: skip
    kept = torch.empty(P, dtype=torch.int8, device=table.device)
    if P:
        with torch.cuda.device_of(table):
            lead_advantages_kernel[(P,)](
                table, reward, advantage, rate, kept, weight, group_size, in_kernel(options, AdvantageOptions),
                BLOCK=group_block(group_size), num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return reward, advantage, rate, kept.bool(), weight
