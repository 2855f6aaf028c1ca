"""Triton form of the row kernels: a program per row of logits.

`policy_rows_kernel` is one kernel from logits to gradient: log-sum-exp (online, fp32), gather, entropy, advantage
(given, or computed here from the outcomes of the row's group, with the bits of `lead_advantages`), ratio, clip,
importance weight, KL, loss, metrics, and the gradient written where the caller says, over the logits if that is the
same tensor. `row_stats_kernel` and `row_gradient_kernel` are its two halves for linear_logprobs, whose loss is not
known here.

A soft cap is None, which the compiler sees, or a number: rows without one pay nothing.

Formulas: _rows.py and policy_loss.py, whose plain torch is the specification. dtypes: logits and gradient bf16, fp16 or
fp32 (last dimension contiguous, any row stride); arithmetic and results fp32; the gradient is rounded once, after
scaling. A target outside 0..V-1 or a sequence outside 0..S-1 is never read: its log-prob or its loss is NaN. Rows
without gradient get zeros and are not read again.

Sums run in a fixed order, with no atomics: the same bits on every run. Floor: V logits read and V written per row; the
second look runs from the end of the row to its beginning, so that it meets what the cache still holds.

Legend: T rows, V vocabulary, S sequences.
"""

import torch
import triton
import triton.language as tl

from ._device import tile
from ._triton_advantage import group_advantage, group_block, in_kernel, lead_advantages_triton  # noqa: F401
from .options import AdvantageOptions, LossOptions, Softmax
from .records import LOG_RATIO_CAP as CAP
from .records import Groups, RowMetrics, Sequences, SequenceTerms, Tokens

LOG_RATIO_CAP = tl.constexpr(CAP)


def place(name: str) -> tl.constexpr:
    """The row of the metrics' buffer that holds RowMetrics' field `name`."""
    return tl.constexpr(RowMetrics._fields.index(name))


KL_BEHAVIOR = place("kl_behavior")
CLIP_LOW = place("clip_low")
CLIP_HIGH = place("clip_high")
RATIO = place("ratio")
RATIO_CAPPED = place("ratio_capped")
IMPORTANCE_TRUNCATED = place("importance_truncated")
LOGPROB_DIFF = place("logprob_diff")
KL_REFERENCE = place("kl_reference")


@triton.jit
def soft_cap(z, cap):
    """y = cap tanh(z / cap), rounded before anything is added to it.

    tanh is 1 - 2 q with q = 1 / (1 + exp(2 |z / cap|)), or near 0, where that would cancel, a polynomial.
    """
    u = z * (1.0 / cap)
    size = tl.abs(u)
    q = 1.0 / (1.0 + tl.exp(2.0 * size))
    square = u * u
    p = tl.fma(square, -0.00627423963, 0.0210716780)
    p = tl.fma(p, square, -0.0538523085)
    p = tl.fma(p, square, 0.133325860)
    p = tl.fma(p, square, -0.333333164)
    large = tl.fma(q, -2.0, 1.0)
    t = tl.where(size < 0.55, tl.fma(p, u * square, u), tl.where(u < 0, -large, large))
    return tl.fma(t, cap, 0.0)


@triton.jit
def soft_cap_slope(z, cap):
    """dy / dz = 4 q (1 - q), with the digits that 1 - tanh^2 would lose where tanh is 1 but for rounding."""
    q = 1.0 / (1.0 + tl.exp(2.0 * tl.abs(z * (1.0 / cap))))
    return 4.0 * q * (1.0 - q)


@triton.jit
def row_statistics(row_ptr, target, V, inverse, softcap, BLOCK: tl.constexpr):
    """max of the logits as capped, and of x = (y - max) / temperature: log sum exp, log-prob of the target, entropy."""
    inf = float("inf")
    cols = tl.arange(0, BLOCK)
    # Read before the loop, whose reductions are barriers: when any warp writes a gradient over the row, all have it.
    inside = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    if softcap is not None:
        at_target = soft_cap(at_target, softcap)
    top = -inf
    sum_B = tl.zeros([BLOCK], tl.float32)
    dot_B = tl.zeros([BLOCK], tl.float32)  # of x e^x
    for start in range(0, V, BLOCK):
        at = start + cols
        z = tl.load(row_ptr + at, mask=at < V, other=-inf).to(tl.float32)
        if softcap is not None:
            z = tl.where(at < V, soft_cap(z, softcap), -inf)  # the cap of -inf is finite
        higher = tl.maximum(top, tl.max(z, 0))
        # Where nothing but -inf was seen, all sums are 0 and the shift is too.
        shift = tl.where(top == -inf, 0.0, (higher - top) * inverse)
        keep = tl.exp(-shift)
        x = (z - higher) * inverse
        e = tl.where(z == -inf, 0.0, tl.exp(x))
        dot_B = (dot_B - shift * sum_B) * keep + tl.where(e == 0, 0.0, x * e)
        sum_B = sum_B * keep + e
        top = higher
    total = tl.sum(sum_B, 0)
    log_norm = tl.log(total)
    entropy = log_norm - tl.sum(dot_B, 0) / total
    return top, log_norm, (at_target - top) * inverse - log_norm, tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def write_gradient(row_ptr, out_ptr, target, V, inverse, softcap, top, log_norm, entropy, g, h, BLOCK: tl.constexpr):
    """d z = (g (onehot - p) - h p (log p + H)) / temperature over a row; zeros without reading where g = h = 0.

    With a soft cap that is d y, and d z = d y dy/dz.
    """
    cols = tl.arange(0, BLOCK)
    if (g == 0) & (h == 0):
        for start in range(0, V, BLOCK):
            at = start + cols
            tl.store(out_ptr + at, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < V)
    else:
        tiles = tl.cdiv(V, BLOCK)
        for i in range(0, tiles):
            at = (tiles - 1 - i) * BLOCK + cols
            z = tl.load(row_ptr + at, mask=at < V, other=-float("inf")).to(tl.float32)
            if softcap is not None:
                slope = soft_cap_slope(z, softcap)
                z = soft_cap(z, softcap)
            log_p = (z - top) * inverse - log_norm
            p = tl.exp(log_p)
            inner = tl.where(p > 0, log_p + entropy, 0.0)
            d = p * (-g - h * inner) + tl.where(at == target, g, 0.0)
            if softcap is not None:
                d = d * slope
            tl.store(out_ptr + at, (d * inverse).to(out_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def row_stats_kernel(logits_ptr, stride, target_ptr, stats_ptr, V, inverse, softcap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    top, log_norm, logp, entropy = row_statistics(logits_ptr + row * stride, target, V, inverse, softcap, BLOCK)
    tl.store(stats_ptr + 4 * row, top)
    tl.store(stats_ptr + 4 * row + 1, log_norm)
    tl.store(stats_ptr + 4 * row + 2, logp)
    tl.store(stats_ptr + 4 * row + 3, entropy)


@triton.jit
def row_gradient_kernel(
    logits_ptr, stride, grad_ptr, grad_stride, target_ptr, stats_ptr, g_ptr, h_ptr, V, inverse, softcap,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    write_gradient(
        logits_ptr + row * stride, grad_ptr + row * grad_stride, tl.load(target_ptr + row), V, inverse,
        softcap, tl.load(stats_ptr + 4 * row),
        tl.load(stats_ptr + 4 * row + 1), tl.load(stats_ptr + 4 * row + 3), tl.load(g_ptr + row), tl.load(h_ptr + row),
        BLOCK,
    )  # fmt: skip


@triton.jit
def policy_rows_kernel(
    logits_ptr, stride, grad_ptr, grad_stride, target_ptr, sequence_ptr, weight_ptr,
    advantage_ptr, table_ptr, size, group_options,  # [S], or None and the outcomes [S, 4] of groups of `size`
    behavior_ptr, old_ptr, reference_ptr, log_ratio_ptr, importance_ptr,  # [T], each may be None
    loss_ptr, logp_ptr, entropy_ptr, sums_ptr, T, S, V, inverse, softcap, low, high, loss_options,
    BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(target_ptr + row)
    sequence = tl.load(sequence_ptr + row).to(tl.int64)
    known = (sequence >= 0) & (sequence < S)
    sequence = tl.where(known, sequence, 0)
    u = tl.where(known, tl.load(weight_ptr + sequence), float("nan"))
    if advantage_ptr is not None:
        a = tl.load(advantage_ptr + sequence)
    else:
        first = sequence // size * size
        _, every, _, _, _ = group_advantage(table_ptr, first, size, group_options, BLOCK_G)
        a = tl.sum(tl.where(tl.arange(0, BLOCK_G) == sequence - first, every, 0.0), 0)

    top, log_norm, logp, entropy = row_statistics(row_ptr, target, V, inverse, softcap, BLOCK)

    # From here to the gradient: rows_loss of policy_loss.py. tl.where, not minimum: it keeps NaN.
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + row)
    log_r = logp - old
    if log_ratio_ptr is not None:
        log_r = tl.load(log_ratio_ptr + row)
    capped = log_r > LOG_RATIO_CAP
    r = tl.exp(tl.where(capped, LOG_RATIO_CAP, log_r))
    below, above = r < low, r > high
    clipped = tl.where(below, low, tl.where(above, high, r))
    if loss_options.ratio == "cispo":
        loss = -clipped * a * logp
        g = -clipped * a
    elif loss_options.ratio == "sapo":
        tau = tl.where(a > 0, loss_options.sapo_positive, loss_options.sapo_negative)
        gate, rest = 1 / (1 + tl.exp(tau * (1 - r))), 1 / (1 + tl.exp(tau * (r - 1)))
        loss = -a * (4 / tau) * gate
        g = -a * tl.where(capped, 0.0, 4 * r * gate * rest)
    else:
        free, bound = r * a, clipped * a
        constant = tl.where(a > 0, above, below) | capped
        if loss_options.delta is not None:
            over = r > loss_options.delta
            free = tl.where(over, loss_options.delta, r) * a
            constant = constant | over
        loss = -tl.where(bound < free, bound, free)
        if loss_options.dual_clip is not None:
            dual = (a < 0) & (loss > -loss_options.dual_clip * a)
            loss = tl.where(dual, -loss_options.dual_clip * a, loss)
            constant = constant | dual
        g = tl.where(constant, 0.0 * a, -r * a)  # 0 a, not 0: NaN stays NaN
    diff = 0.0
    truncated = False
    if behavior_ptr is not None:
        behavior = tl.load(behavior_ptr + row)
        diff = logp - behavior
        if loss_options.importance_cap is not None:
            log_w = old - behavior
            if importance_ptr is not None:
                log_w = tl.load(importance_ptr + row)
            w = tl.exp(tl.where(log_w > LOG_RATIO_CAP, LOG_RATIO_CAP, log_w))
            truncated = w > loss_options.importance_cap
            w = tl.where(
                truncated, loss_options.importance_cap if loss_options.importance_mode == "truncate" else 0.0, w
            )
            loss = loss * w
            g = g * w
    kl = 0.0
    if reference_ptr is not None:
        d = tl.load(reference_ptr + row) - logp
        if loss_options.kl == "k1":
            kl = -d
            slope_kl = 1.0
        elif loss_options.kl == "k2":
            kl = 0.5 * d * d
            slope_kl = -d
        else:
            far = d > LOG_RATIO_CAP
            e = tl.exp(tl.where(far, LOG_RATIO_CAP, d))
            kl = e - 1 - d
            slope_kl = 1 - tl.where(far, 0.0, e)
        loss = loss + loss_options.kl_coef * kl
        g = g + loss_options.kl_coef * slope_kl
    loss = u * (loss - loss_options.entropy_coef * entropy)

    tl.store(loss_ptr + row, loss)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    near = tl.where(diff > LOG_RATIO_CAP, LOG_RATIO_CAP, tl.where(diff < -LOG_RATIO_CAP, -LOG_RATIO_CAP, diff))
    live = u != 0
    tl.store(sums_ptr + KL_BEHAVIOR * T + row, tl.exp(near) - 1 - near)
    tl.store(sums_ptr + CLIP_LOW * T + row, (below & (a < 0) & live).to(tl.float32))
    tl.store(sums_ptr + CLIP_HIGH * T + row, (above & (a > 0) & live).to(tl.float32))
    tl.store(sums_ptr + RATIO * T + row, r)
    tl.store(sums_ptr + RATIO_CAPPED * T + row, capped.to(tl.float32))
    tl.store(sums_ptr + IMPORTANCE_TRUNCATED * T + row, tl.where(truncated, 1.0, 0.0))
    tl.store(sums_ptr + LOGPROB_DIFF * T + row, tl.abs(diff))
    tl.store(sums_ptr + KL_REFERENCE * T + row, kl)
    if grad_ptr is not None:
        out_ptr = grad_ptr + row * grad_stride
        h = -u * loss_options.entropy_coef
        write_gradient(row_ptr, out_ptr, target, V, inverse, softcap, top, log_norm, entropy, u * g, h, BLOCK)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """x *= factor over [n]; nothing is read or written where the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < n)


def scale_triton_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x (contiguous) times factor (0-dim), in place, without asking the device what the factor is."""
    assert x.is_contiguous()
    if x.numel():
        block = 4096
        with torch.cuda.device_of(x):
            scale_kernel[(min(1024, triton.cdiv(x.numel(), block)),)](x, factor, x.numel(), BLOCK=block, num_warps=8)
    return x


def refuse(target_logits: torch.Tensor | None) -> None:
    """Raise NotImplementedError for exact logits of the targets."""
    if target_logits is not None:
        raise NotImplementedError("target_logits are not in the Triton kernels.")


def row_stats_triton(
    logits: torch.Tensor, targets: torch.Tensor, softmax: Softmax, target_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """max, log_norm, logp, H of every row: float32 [T, 4]."""
    refuse(target_logits)
    T, V = logits.shape
    stats = torch.empty(T, 4, dtype=torch.float32, device=logits.device)
    if T:
        block, warps = tile(logits.dtype, V, softmax.softcap is not None)
        with torch.cuda.device_of(logits):
            row_stats_kernel[(T,)](
                logits, logits.stride(0), targets.contiguous(), stats, V, 1.0 / softmax.temperature,
                softmax.softcap, BLOCK=block, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return stats


def row_gradient_triton_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor,
    softmax: Softmax,
    out: torch.Tensor,
    target_logits: torch.Tensor | None = None,
) -> None:
    """Write the gradient to `out`, which may be the logits."""
    refuse(target_logits)
    T, V = logits.shape
    if T:
        block, warps = tile(logits.dtype, V, softmax.softcap is not None)
        with torch.cuda.device_of(logits):
            row_gradient_kernel[(T,)](
                logits, logits.stride(0), out, out.stride(0), targets.contiguous(), stats, g.contiguous(),
                h.contiguous(), V, 1.0 / softmax.temperature, softmax.softcap, BLOCK=block, num_warps=warps,
                enable_fp_fusion=True,
            )  # fmt: skip


def policy_rows_triton(
    logits: torch.Tensor,
    tokens: Tokens,
    sequences: Sequences,
    terms: SequenceTerms,
    options: LossOptions,
    softmax: Softmax,
    gradient: torch.Tensor | None,
    target_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, logp, entropy: float32 [T]; sums float32 [8, T] in the order of RowMetrics; `gradient` is written.

    `gradient`: the logits' shape and dtype, may be the logits; None: forward only.
    """
    refuse(target_logits)
    (T, V), S = logits.shape, sequences.weights.numel()
    assert all(x is None or x.shape == (T,) for x in (*tokens, *terms))
    loss, logp, entropy = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(3))
    sums = torch.empty(len(RowMetrics._fields), T, dtype=torch.float32, device=logits.device)

    def flat(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.float().contiguous()

    if isinstance(sequences.advantages, Groups):
        _, size, group_options = sequences.advantages
        advantages, table = None, flat(sequences.advantages.table())
        assert table.shape == (S, 4)
    else:
        size, group_options = 1, AdvantageOptions()
        advantages, table = flat(sequences.advantages), None
        assert advantages.shape == (S,)
    reference = tokens.reference if options.kl_coef else None
    if T:
        block, warps = tile(logits.dtype, V, softmax.softcap is not None)
        with torch.cuda.device_of(logits):
            policy_rows_kernel[(T,)](
                logits, logits.stride(0), gradient, 0 if gradient is None else gradient.stride(0),
                tokens.targets.contiguous(), tokens.sequence_ids.contiguous(), flat(sequences.weights),
                advantages, table, size, in_kernel(group_options, AdvantageOptions),
                flat(tokens.behavior), flat(tokens.old), flat(reference), flat(terms.log_ratio), flat(terms.importance),
                loss, logp, entropy, sums, T, S, V, 1.0 / softmax.temperature, softmax.softcap,
                *options.clip_range, in_kernel(options, LossOptions), BLOCK_G=group_block(size), BLOCK=block,
                num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return loss, logp, entropy, sums
