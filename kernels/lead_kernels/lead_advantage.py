"""Outcomes and lengths of whole groups -> shaped rewards, GRPO-LEAD advantages and solve rates.

For a group of G responses with lengths |o| (tokens), C the correct ones (arXiv 2504.09696):

    z      = (|o| - mean_C) / (std_C + eps)                 sample std over C; one correct response: z = 0
    R      = correct_reward * exp(-alpha z) if correct, else wrong_reward; + penalty
    A      = (R - mean(R)) / (std(R) + eps)                  over the whole group
    w(r)   = low + (high - low) / (1 + exp(slope (r - midpoint)))
    A'     = A w(rho) if A > 0 else A w(1 - rho)             rho the solve rate

dtypes: correct bool or 0/1, lengths any integer or float; all arithmetic fp32 (or the dtype of `wrong_reward`, if that
is a float64 tensor); out fp32. Means and deviations take two passes, so lengths near 14,000 that differ by a token
keep their digits. Refuses groups over 1,024 and sizes that are no multiple of the group size.

Floor: S x (1 + 4 + 8 + 4) bytes, a few microseconds at any batch size: one launch.
"""

from typing import Any, Literal, NamedTuple

import torch

from .rows import cpu_extension, in_triton

MAX_GROUP = 1024


class LeadAdvantages(NamedTuple):
    """reward, advantage: float32 [S]; solve_rate: float32 [P]; kept: bool [P], False for groups the filter drops."""

    reward: torch.Tensor
    advantage: torch.Tensor
    solve_rate: torch.Tensor
    kept: torch.Tensor


STD, RATE, FILTER = ("none", "sample", "mad"), ("correct", "positive"), ("none", "official", "uniform")


class GroupTable(NamedTuple):
    """Outcomes and lengths of whole groups, for a loss that computes its advantages itself.

    correct, lengths: [S], a group's responses side by side; options: keyword arguments of `lead_advantages`.
    """

    correct: torch.Tensor
    lengths: torch.Tensor
    group_size: int
    options: dict[str, Any] = {}  # noqa: RUF012

    def advantages(self) -> torch.Tensor:
        return lead_advantages(self.correct, self.lengths, self.group_size, **self.options).advantage

    def packed(self) -> tuple:
        """correct, lengths, wrong, penalty, group size, floats, ints: what the operators and kernels take."""
        check_groups(self.correct, self.lengths, self.group_size)
        wrong, penalty, floats, ints = pack_options(**self.options)
        return self.correct, self.lengths, wrong, penalty, self.group_size, floats, ints

    @classmethod
    def unpacked(cls, packed: tuple) -> "GroupTable":
        correct, lengths, wrong, penalty, group_size, floats, ints = packed
        return cls(correct, lengths, group_size, unpack_options(wrong, penalty, floats, ints))


def pack_options(
    *,
    alpha: float = 0.05,
    correct_reward: float = 1.0,
    wrong_reward: float | torch.Tensor = -1.0,
    penalty: torch.Tensor | None = None,
    length_reward: bool = True,
    difficulty: bool = True,
    weight_low: float = 0.4,
    weight_high: float = 1.5,
    slope: float = 10.0,
    midpoint: float = 0.75,
    eps: float = 1e-6,
    std: str = "sample",
    length_gate: float = 0.0,
    length_min_solve_rate: float = 0.0,
    nonnegative_correct: bool = False,
    rate: str = "correct",
    group_filter: str = "none",
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[float], list[int]]:
    """The options of `lead_advantages` as (wrong rewards [S] or None, penalty, floats, ints)."""
    each = isinstance(wrong_reward, torch.Tensor)
    floats = [alpha, correct_reward, 0.0 if each else wrong_reward, weight_low, weight_high, slope, midpoint, eps,
              length_gate, length_min_solve_rate]  # fmt: skip
    ints = [
        length_reward,
        difficulty,
        STD.index(std),
        nonnegative_correct,
        RATE.index(rate),
        FILTER.index(group_filter),
    ]
    return wrong_reward if each else None, penalty, [float(x) for x in floats], [int(x) for x in ints]


def unpack_options(
    wrong: torch.Tensor | None, penalty: torch.Tensor | None, floats: list[float], ints: list[int]
) -> dict[str, Any]:
    """The inverse of `pack_options`."""
    names = ("alpha", "correct_reward", "wrong_reward", "weight_low", "weight_high", "slope", "midpoint", "eps",
             "length_gate", "length_min_solve_rate")  # fmt: skip
    options: dict[str, Any] = dict(zip(names, floats, strict=True))
    if wrong is not None:
        options["wrong_reward"] = wrong
    return options | {"penalty": penalty, "length_reward": bool(ints[0]), "difficulty": bool(ints[1]),
                      "std": STD[ints[2]], "nonnegative_correct": bool(ints[3]), "rate": RATE[ints[4]],
                      "group_filter": FILTER[ints[5]]}  # fmt: skip


def check_groups(correct: torch.Tensor, lengths: torch.Tensor, group_size: int) -> None:
    """Raises ValueError for shapes that do not fit."""
    if not 1 <= group_size <= MAX_GROUP:
        raise ValueError(f"group_size is {group_size}: give 1 to {MAX_GROUP}.")
    if correct.dim() != 1 or correct.shape != lengths.shape or correct.numel() % group_size:
        raise ValueError(
            f"correct is {list(correct.shape)} and lengths {list(lengths.shape)}: give two vectors of the same size, "
            f"a multiple of group_size {group_size}."
        )


@torch.library.custom_op("lead_kernels::lead_advantages", mutates_args=())
def lead_advantages_op(
    correct: torch.Tensor, lengths: torch.Tensor, wrong: torch.Tensor | None, penalty: torch.Tensor | None,
    group_size: int, floats: list[float], ints: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """reward [S], advantage [S], solve rate [P], kept [P]."""
    wrong, penalty = (None if x is None else x.expand(correct.shape) for x in (wrong, penalty))
    exact = wrong is not None and wrong.dtype == torch.float64
    if not exact and (kernels := in_triton(lengths)):
        return kernels.lead_advantages_triton(correct, lengths, wrong, penalty, group_size, floats, ints)
    if lengths.device.type == "cpu" and (cpp := cpu_extension()):
        return cpp.lead_advantages(correct, lengths, wrong, penalty, group_size, floats, ints)
    return lead_advantages_reference(correct, lengths, group_size, **unpack_options(wrong, penalty, floats, ints))


@lead_advantages_op.register_fake
def _(correct, lengths, wrong, penalty, group_size, floats, ints):
    reward, advantage = (correct.new_empty(correct.shape, dtype=torch.float32) for _ in range(2))
    P = correct.shape[0] // group_size
    return reward, advantage, *(correct.new_empty((P,), dtype=t) for t in (torch.float32, torch.bool))


def lead_advantages(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    group_size: int,
    *,
    alpha: float = 0.05,
    correct_reward: float = 1.0,
    wrong_reward: float | torch.Tensor = -1.0,
    penalty: torch.Tensor | None = None,
    length_reward: bool = True,
    difficulty: bool = True,
    weight_low: float = 0.4,
    weight_high: float = 1.5,
    slope: float = 10.0,
    midpoint: float = 0.75,
    eps: float = 1e-6,
    std: Literal["sample", "none", "mad"] = "sample",
    length_gate: float = 0.0,
    length_min_solve_rate: float = 0.0,
    nonnegative_correct: bool = False,
    rate: Literal["correct", "positive"] = "correct",
    group_filter: Literal["none", "official", "uniform"] = "none",
) -> LeadAdvantages:
    """GRPO-LEAD's rewards and advantages.

    Args:
        correct: bool or 0/1, [S]; S = groups x group_size, a group's responses side by side.
        lengths: tokens of every response, [S].
        group_size: G, 1 to 1024.
        alpha: strength of the length reward.
        correct_reward: reward of a correct response before shaping.
        wrong_reward: reward of an incorrect response, one number or [S].
        penalty: [S], added to the reward of every response (soft overlong or repetition penalty).
        length_reward: L on or off.
        difficulty: AD on or off, with weight_low, weight_high, slope, midpoint.
        eps: added to standard deviations.
        std: normalise by the sample standard deviation, by nothing (Dr. GRPO), or by the mean absolute deviation.
        length_gate: tokens; a group whose three shortest responses average at most this keeps its correct responses'
            reward unshaped (the released code: 4000); 0 is off; fewer than three responses: no gate.
        length_min_solve_rate: shape only groups with a share of correct responses above this.
        nonnegative_correct: a correct response's advantage is never below 0 (DRPO).
        rate: rho is the share of correct responses, or of those with a reward above 0.
        group_filter: `official` drops groups whose rewards are all <= 0 or all exactly correct_reward; `uniform`
            those with solve rate 0 or 1 (DAPO). A dropped group's advantages are 0.
    Raises:
        ValueError: shapes that do not fit, or a group size outside 1 to 1024.
    """
    check_groups(correct, lengths, group_size)
    for name, value, values in (("std", std, STD), ("rate", rate, RATE), ("group_filter", group_filter, FILTER)):
        if value not in values:
            raise ValueError(f"{name} is {value!r}: give one of {', '.join(values)}.")
    packed = pack_options(
        alpha=alpha, correct_reward=correct_reward, wrong_reward=wrong_reward, penalty=penalty,
        length_reward=length_reward, difficulty=difficulty, weight_low=weight_low, weight_high=weight_high, slope=slope,
        midpoint=midpoint, eps=eps, std=std, length_gate=length_gate, length_min_solve_rate=length_min_solve_rate,
        nonnegative_correct=nonnegative_correct, rate=rate, group_filter=group_filter,
    )  # fmt: skip
    wrong, penalties, floats, ints = packed
    return LeadAdvantages(
        *torch.ops.lead_kernels.lead_advantages(correct, lengths, wrong, penalties, group_size, floats, ints)
    )


def lead_advantages_reference(
    correct: torch.Tensor,
    lengths: torch.Tensor,
    group_size: int,
    *,
    alpha: float,
    correct_reward: float,
    wrong_reward: float | torch.Tensor,
    penalty: torch.Tensor | None,
    length_reward: bool,
    difficulty: bool,
    weight_low: float,
    weight_high: float,
    slope: float,
    midpoint: float,
    eps: float,
    std: str,
    length_gate: float,
    length_min_solve_rate: float,
    nonnegative_correct: bool,
    rate: str,
    group_filter: str,
) -> LeadAdvantages:
    """The specification, in plain torch; arguments as `lead_advantages`."""
    dtype = wrong_reward.dtype if isinstance(wrong_reward, torch.Tensor) else torch.float32
    dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def table(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).view(-1, group_size)

    right = table(correct != 0)
    length = table(lengths)
    wrong = table(torch.as_tensor(wrong_reward, dtype=dtype, device=correct.device).expand(correct.shape))
    n = right.sum(1, keepdim=True)

    # L: z over the correct responses only.
    mean = (length * right).sum(1, keepdim=True) / n.clamp(min=1)
    off = (length - mean) * right
    sigma = torch.where(n > 1, ((off * off).sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt(), 1.0)
    z = off / (sigma + eps)
    shaped = torch.full_like(n, float(length_reward), dtype=torch.bool)
    if length_gate > 0 and group_size >= 3:
        shaped = shaped & (length.sort(1).values[:, :3].mean(1, keepdim=True) > length_gate)
    if length_min_solve_rate > 0:
        shaped = shaped & (n / group_size > length_min_solve_rate)
    reward = torch.where(right > 0, correct_reward * torch.where(shaped, torch.exp(-alpha * z), 1.0), wrong)
    if penalty is not None:
        reward = reward + table(penalty)

    # Group-relative normalisation. Equal rewards have spread exactly 0.
    first = reward[:, :1]
    same = (reward == first).all(1, keepdim=True)
    center = torch.where(same, first, reward.mean(1, keepdim=True))
    off = reward - center if group_size > 1 else reward
    if group_size == 1 or std == "none":
        advantage = off.clone()
    elif std == "mad":
        advantage = off / (off.abs().mean(1, keepdim=True) + eps)
    else:
        advantage = off / (((off * off).sum(1, keepdim=True) / (group_size - 1)).sqrt() + eps)

    # AD: the weight's argument turns with the sign of the advantage.
    rho = n / group_size if rate == "correct" else (reward > 0).to(dtype).mean(1, keepdim=True)

    def weight(r: torch.Tensor) -> torch.Tensor:
        return weight_low + (weight_high - weight_low) / (1 + torch.exp(slope * (r - midpoint)))

    if difficulty:
        advantage = advantage * torch.where(advantage > 0, weight(rho), weight(1 - rho))
    if nonnegative_correct:
        advantage = torch.where(right > 0, advantage.clamp(min=0), advantage)
    kept = torch.ones_like(n, dtype=torch.bool)
    if group_filter == "official":
        kept = ~((reward <= 0).all(1, keepdim=True) | (reward == correct_reward).all(1, keepdim=True))
    elif group_filter == "uniform":
        kept = (n > 0) & (n < group_size)
    advantage = torch.where(kept, advantage, 0.0)
    return LeadAdvantages(
        reward.flatten().float(),
        advantage.flatten().float(),
        rho[:, 0].float(),
        kept[:, 0],
    )
