"""Triton form of the row kernels: one program per row of logits.

`policy_rows_kernel` goes from logits to gradient in one kernel: log-sum-exp, gather, entropy, advantage (given, or
computed here from the outcomes of the row's group, bit for bit as `lead_advantages` does), ratio, clip, importance
weight, KL, loss, metrics, and the gradient, written to the tensor that the caller names, which may be the logits.
`row_stats_kernel` and `row_gradient_kernel` are its two halves for linear_logprobs, whose loss is not known here.

A row is read twice (two looks), and memory is meant to be the limit of both: together they take 12 to 13 instructions
per logit (docs/evidence/kernel_resources.md; a test holds them to it), and the next tile is loaded while the current
one is computed. The loops search for no maximum. The number subtracted, `top`, comes from the first tile and the
target: float32 reaches 2^127 above it, and the digits of the sums do not depend on it. With s = log2(e) / temperature
and r = round(top s), x = fma(z, s, -r) is rounded once, e = 2^x is one instruction, and the first look keeps only sum e
and sum e x. The second look's shift L = r + log2(sum e) is rounded; its error eps is known, and 2^eps goes into the
row's constants. The target's own element is written last, from its log-prob in float32.

Some rows take the exact path instead, with one look for the maximum, one for the sums and one for the gradient: rows
with a logit 2^24 times as likely as the first tile's and the target, with -inf (0 times -inf is NaN) or NaN, or with
logits of 10^5 and more, and rows shorter than a tile.

The compiler knows which inputs are absent, and a row pays nothing for them: a soft cap, a gradient, a gradient of the
entropy, exact logits of the targets, log-probs that no option needs. bf16 is read as two logits per 32-bit word if rows
have even length.

Formulas: _rows.py and policy_loss.py, whose plain torch form is the specification. dtypes: logits and gradient bf16,
fp16 or fp32 (last dimension contiguous, any row stride); arithmetic and results fp32; the gradient is rounded once,
after scaling. A target outside 0..V-1 or a sequence outside 0..S-1 is never used as an address: its log-prob or loss is
NaN. Rows without gradient get zeros and are not read again.

Sums run in a fixed order, with no atomics: the same bits on every run. Floor: V logits read and V written per row. The
second look runs from the end of the row to its beginning, so that it starts with the tile still in registers and then
finds what the cache still holds.

Legend: T rows, V vocabulary, S sequences; _B columns of a tile.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from ._device import tile
from ._triton_advantage import group_advantage, group_block, in_kernel, lead_advantages_triton, product  # noqa: F401
from .options import AdvantageOptions, LossOptions, Softmax
from .records import LOG_RATIO_CAP as CAP
from .records import Groups, RowMetrics, Sequences, SequenceTerms, Tokens

LOG_RATIO_CAP = tl.constexpr(CAP)
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
TWO_MINUS_INF = tl.constexpr(-8323200)  # 0xff80ff80
MAX_NORM, MAX_SHIFT = tl.constexpr(2.0**24), tl.constexpr(2.0**20)
# Cache hints for a row's logits: keep them until the second look, then evict them in favour of the next rows.
FIRST_LOOK, LAST_LOOK, NO_HINT = tl.constexpr("evict_last"), tl.constexpr("evict_first"), tl.constexpr("")


def place(name: str) -> tl.constexpr:
    """Row of the metrics' buffer that holds the field `name` of RowMetrics."""
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
def exp2(x):
    """2^x in one instruction, 0 where the result would be subnormal in fp32: tl.exp2 spends three more on those."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = libdevice.exp2(x)
    return y


@triton.jit
def reciprocal(x):
    """1 / x for x >= 1, within two units in the last place; a division would take eight instructions."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = libdevice.fast_dividef(1.0, x)
    return y


@triton.jit
def soft_cap(z, cap):
    """y = cap tanh(z / cap), rounded before anything is added.

    tanh is 1 - 2 q with q = 1 / (1 + exp(2 |z / cap|)); near 0, where that would cancel, a polynomial.
    """
    u = z * (1.0 / cap)
    size = tl.abs(u)
    q = reciprocal(1.0 + exp2(size * (2.0 * LOG2_E)))
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
    """dy / dz = 4 q (1 - q), which keeps its digits where tanh rounds to 1 and 1 - tanh^2 would lose them."""
    q = reciprocal(1.0 + exp2(tl.abs(z * (1.0 / cap)) * (2.0 * LOG2_E)))
    return 4.0 * q * (1.0 - q)


@triton.jit
def load_tile(row_ptr, i, V, MASKED: tl.constexpr, POLICY: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Load tile i of a row as it lies in memory. PAIRS: two bf16 per 32-bit word; MASKED: -inf past the row's end."""
    if PAIRS:
        at = i * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        words_ptr = row_ptr.to(tl.pointer_type(tl.int32))
        if MASKED:
            tile = tl.load(words_ptr + at, mask=at < V // 2, other=TWO_MINUS_INF, eviction_policy=POLICY)
        else:
            tile = tl.load(words_ptr + at, eviction_policy=POLICY)
    else:
        at = i * BLOCK + tl.arange(0, BLOCK)
        if MASKED:
            tile = tl.load(row_ptr + at, mask=at < V, other=-float("inf"), eviction_policy=POLICY)
        else:
            tile = tl.load(row_ptr + at, eviction_policy=POLICY)
    return tile


@triton.jit
def unpack(tile, PAIRS: tl.constexpr):
    """Split a tile of `load_tile` into even and odd columns in fp32, [BLOCK / 2] each, which needs no further moves."""
    if PAIRS:
        even = (tile << 16).to(tl.float32, bitcast=True)
        odd = (tile & -65536).to(tl.float32, bitcast=True)
    else:
        even, odd = tl.split(tl.reshape(tile.to(tl.float32), [tile.shape[0] // 2, 2]))
    return even, odd


@triton.jit
def interleave(even, odd):
    """Put even and odd columns back in order, [BLOCK]."""
    return tl.reshape(tl.join(even, odd), [2 * even.shape[0]])


@triton.jit
def exact_tile(row_ptr, start, target, z_target, V, softcap, BLOCK: tl.constexpr):
    """A tile of capped logits, with the target's exact logit in its place and -inf past the row's end."""
    at = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + at, mask=at < V, other=-float("inf")).to(tl.float32)
    z = tl.where((at == target) & (at < V), z_target, z)
    if softcap is not None:
        z = tl.where(at < V, soft_cap(z, softcap), -float("inf"))  # a capped -inf would be finite
    return z


@triton.jit
def exact_statistics(row_ptr, target, z_target, V, scale, softcap, BLOCK: tl.constexpr):
    """max y, sum e and sum e x for x = (y - max) * scale, e = 2^x, of any row, in two looks."""
    top_B = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        top_B = tl.maximum(top_B, exact_tile(row_ptr, start, target, z_target, V, softcap, BLOCK))
    top = tl.max(top_B, 0)
    sum_B = tl.zeros([BLOCK], tl.float32)
    dot_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        y = exact_tile(row_ptr, start, target, z_target, V, softcap, BLOCK)
        x = (y - top) * scale
        e = tl.where(y == -float("inf"), 0.0, exp2(x))
        sum_B += e
        dot_B += tl.where(e == 0, 0.0, e * x)
    return top, tl.sum(sum_B, 0), tl.sum(dot_B, 0)


@triton.jit
def row_statistics(
    row_ptr, target, target_logit_ptr, V, scale, softcap,
    FIRST: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of a row in octaves: y are the capped logits, x = y * scale with scale = log2(e) / temperature.

    If the target's exact logit is given, its term replaces the rounded logit's term in the finished sums.

    Returns:
        top (a capped logit that no other exceeds by 24 octaves), log_norm = log2 sum 2^(x - top * scale), the target's
        logit, its log2-probability, entropy (nats), whether the row took the exact path, and its last full tile as
        loaded.
    """
    inf = float("inf")
    # Read before the loop, whose reductions are barriers: all warps have it before any writes a gradient over the row.
    inside = (target >= 0) & (target < V)
    z_target = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    tile = load_tile(row_ptr, 0, V, True, FIRST, PAIRS, BLOCK)
    n = V // BLOCK
    rest = load_tile(row_ptr, n, V, True, FIRST, PAIRS, BLOCK)
    even, odd = unpack(tile, PAIRS)
    at_target, rounded = z_target, z_target
    if target_logit_ptr is not None:
        z_target = tl.load(target_logit_ptr, mask=inside, other=float("nan"))
        at_target = z_target
    if softcap is not None:
        at_target, rounded = soft_cap(z_target, softcap), soft_cap(rounded, softcap)
        even, odd = soft_cap(even, softcap), soft_cap(odd, softcap)
    top = tl.maximum(tl.max(tl.maximum(even, odd), 0), tl.maximum(at_target, rounded))
    shift = -product(top, scale)

    y = interleave(*unpack(rest, PAIRS))
    if softcap is not None:
        y = tl.where(n * BLOCK + tl.arange(0, BLOCK) < V, soft_cap(y, softcap), -inf)
    x = tl.fma(y, scale, shift)
    e = exp2(x)
    even, odd = tl.split(tl.reshape(e, [BLOCK // 2, 2]))
    sum_B = even + odd
    even, odd = tl.split(tl.reshape(tl.where(e == 0, 0.0, e * x), [BLOCK // 2, 2]))
    dot_B = even + odd
    for i in range(1, n):
        following = load_tile(row_ptr, i, V, False, FIRST, PAIRS, BLOCK)
        sum_B, dot_B = add_tile(sum_B, dot_B, tile, scale, shift, softcap, PAIRS)
        tile = following
    sum_B, dot_B = add_tile(sum_B, dot_B, tile, scale, shift, softcap, PAIRS)
    norm, dot = tl.sum(sum_B, 0), tl.sum(dot_B, 0)

    # 0 times -inf is NaN. Past 2^24 the entropy would cancel, and past 2^20 the shift would not be exact enough.
    exact = (V < BLOCK) | (dot != dot) | (norm < 0.5) | (norm > MAX_NORM)
    exact = exact | ((tl.abs(shift) <= MAX_SHIFT) == 0)
    if target_logit_ptr is not None:
        x, x_rounded = tl.fma(at_target, scale, shift), tl.fma(rounded, scale, shift)
        e, e_rounded = tl.where(inside, exp2(x), 0.0), tl.where(inside, exp2(x_rounded), 0.0)
        all_but_target = norm - e_rounded
        exact = exact | (all_but_target + e < 0.25 * norm)  # the subtraction has lost two bits or more
        norm = all_but_target + e
        dot += tl.where(e == 0, 0.0, e * x) - tl.where(inside, e_rounded * x_rounded, 0.0)
    if exact:
        top, norm, dot = exact_statistics(row_ptr, target, z_target, V, scale, softcap, BLOCK // 4)
        at_target = (at_target - top) * scale
    else:
        at_target = tl.fma(at_target, scale, shift)
    log_norm = tl.log2(norm)
    logp = at_target - log_norm
    entropy = (log_norm - dot / norm) * LN_2
    entropy = tl.where(entropy < 0, 0.0, entropy)
    return top, log_norm, z_target, tl.where(logp > 0, 0.0, logp), entropy, exact, tile


@triton.jit
def add_tile(sum_B, dot_B, tile, scale, shift, softcap, PAIRS: tl.constexpr):
    """Add a tile to the sums of e = 2^x and of e x: five instructions per logit, unpacking of bf16 included."""
    even, odd = unpack(tile, PAIRS)
    if softcap is not None:
        even, odd = soft_cap(even, softcap), soft_cap(odd, softcap)
    even, odd = tl.fma(even, scale, shift), tl.fma(odd, scale, shift)
    e_even, e_odd = exp2(even), exp2(odd)
    return sum_B + e_even + e_odd, tl.fma(e_odd, odd, tl.fma(e_even, even, dot_B))


@triton.jit
def store_gradient(
    out_ptr, i, tile, V, scale, shift, constant, slope, softcap, MASKED: tl.constexpr, ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr, LAST: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write e (constant + slope log2 p) for tile i; e = 2^(y scale + shift) is p up to a factor, which both contain."""
    z = interleave(*unpack(tile, PAIRS))
    y = z
    if softcap is not None:
        y = soft_cap(z, softcap)
    x = tl.fma(y, scale, shift)
    e = exp2(x)
    if ENTROPY:
        if CLAMP:
            x = tl.maximum(x, -1e30)  # e is 0 there, and 0 times -inf NaN
        d = e * tl.fma(x, slope, constant)
    else:
        d = e * constant
    if softcap is not None:
        d = d * soft_cap_slope(z, softcap)
    at = i * BLOCK + tl.arange(0, BLOCK)
    d = d.to(out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + at, d, mask=at < V, eviction_policy=LAST)
    else:
        tl.store(out_ptr + at, d, eviction_policy=LAST)


@triton.jit
def write_gradient(
    row_ptr, out_ptr, target, z_target, tile, V, inverse, softcap, top, log_norm, logp, entropy, exact, g, h,
    ENTROPY: tl.constexpr, CLAMP: tl.constexpr, LAST: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d z = (g (onehot - p) - h p (log p + H)) / temperature over a row, from its end to its beginning.

    With a soft cap this is d y, and d z = d y dy/dz. `tile` is the row's last full tile, already in registers.
    """
    scale = inverse * LOG2_E
    g, h = g * inverse, h * inverse
    n = V // BLOCK
    if exact:
        for start in range(0, V, BLOCK // 4):
            at = start + tl.arange(0, BLOCK // 4)
            z = tl.load(row_ptr + at, mask=at < V, other=-float("inf")).to(tl.float32)
            y = z
            if softcap is not None:
                y = soft_cap(z, softcap)
            log_p = (y - top) * scale - log_norm
            p = exp2(log_p)
            d = p * (-g - h * tl.where(p > 0, log_p * LN_2 + entropy, 0.0))
            if softcap is not None:
                d = d * soft_cap_slope(z, softcap)
            tl.store(out_ptr + at, d.to(out_ptr.dtype.element_ty), mask=at < V)
    else:
        # log2 p = y scale - L with L = r + log_norm; its rounding error, a factor 2^eps on p, goes into the row's
        # constants.
        r = product(top, scale)
        L = r + log_norm
        eps = (L - r) - log_norm
        factor = exp2(eps)
        constant = (-g - h * (entropy + eps * LN_2)) * factor
        slope = -h * LN_2 * factor
        for i in range(1, n):
            following = load_tile(row_ptr, n - 1 - i, V, False, LAST, PAIRS, BLOCK)
            store_gradient(
                out_ptr, n - i, tile, V, scale, -L, constant, slope, softcap, False, ENTROPY, CLAMP, LAST, PAIRS,
                BLOCK,
            )  # fmt: skip
            tile = following
        rest = load_tile(row_ptr, n, V, True, LAST, PAIRS, BLOCK)
        store_gradient(
            out_ptr, 0, tile, V, scale, -L, constant, slope, softcap, False, ENTROPY, CLAMP, LAST, PAIRS, BLOCK
        )
        store_gradient(
            out_ptr, n, rest, V, scale, -L, constant, slope, softcap, True, ENTROPY, True, LAST, PAIRS, BLOCK
        )
    # The target's own element, from its log-prob in fp32, after all warps have written theirs.
    p = exp2(logp)
    d = g - p * (g + h * tl.where(p > 0, logp * LN_2 + entropy, 0.0))
    if softcap is not None:
        d = d * soft_cap_slope(z_target, softcap)
    tl.debug_barrier()
    tl.store(out_ptr + target, d.to(out_ptr.dtype.element_ty), mask=(target >= 0) & (target < V))


@triton.jit
def zero_row(out_ptr, V, BLOCK: tl.constexpr):
    """Write zeros over a row that has no gradient; its logits are not read."""
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def one_of(ptr, row):
    """Address of a row's number; None for a vector that is not given."""
    return ptr + row if ptr is not None else None


@triton.jit
def load_one(ptr, row):
    """Load a row's number; None for a vector that is not given."""
    return tl.load(ptr + row) if ptr is not None else None


@triton.jit
def row_stats_kernel(
    logits_ptr, stride, target_ptr, target_logit_ptr, stats_ptr, V, inverse, softcap,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    top, log_norm, _, logp, entropy, _, _ = row_statistics(
        logits_ptr + row * stride,
        target,
        one_of(target_logit_ptr, row),
        V,
        inverse * LOG2_E,
        softcap,
        NO_HINT,
        PAIRS,
        BLOCK,
    )
    tl.store(stats_ptr + 4 * row, top)
    tl.store(stats_ptr + 4 * row + 1, log_norm * LN_2)
    tl.store(stats_ptr + 4 * row + 2, logp * LN_2)
    tl.store(stats_ptr + 4 * row + 3, entropy)


@triton.jit
def row_gradient_kernel(
    logits_ptr, stride, grad_ptr, grad_stride, target_ptr, target_logit_ptr, stats_ptr, g_ptr, h_ptr, V, inverse,
    softcap, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr, out_ptr, target = logits_ptr + row * stride, grad_ptr + row * grad_stride, tl.load(target_ptr + row)
    top, log_norm = tl.load(stats_ptr + 4 * row), tl.load(stats_ptr + 4 * row + 1) * LOG2_E
    logp, entropy = tl.load(stats_ptr + 4 * row + 2) * LOG2_E, tl.load(stats_ptr + 4 * row + 3)
    g, h = tl.load(g_ptr + row), tl.load(h_ptr + row)
    if (g == 0) & (h == 0):
        zero_row(out_ptr, V, BLOCK)
    else:
        z_target = tl.load(row_ptr + target, mask=(target >= 0) & (target < V), other=0.0).to(tl.float32)
        tl.debug_barrier()  # all warps have read it before any of them writes
        if target_logit_ptr is not None:
            z_target = tl.load(target_logit_ptr + row)
        tile = load_tile(row_ptr, tl.maximum(V // BLOCK - 1, 0), V, True, LAST_LOOK, PAIRS, BLOCK)
        exact = (V < BLOCK) | ((tl.abs(top * inverse * LOG2_E) <= MAX_SHIFT) == 0)
        if h == 0:
            write_gradient(
                row_ptr, out_ptr, target, z_target, tile, V, inverse, softcap, top, log_norm, logp, entropy, exact, g,
                h, False, False, LAST_LOOK, PAIRS, BLOCK,
            )  # fmt: skip
        else:
            write_gradient(
                row_ptr, out_ptr, target, z_target, tile, V, inverse, softcap, top, log_norm, logp, entropy, exact, g,
                h, True, True, LAST_LOOK, PAIRS, BLOCK,
            )  # fmt: skip


@triton.jit
def row_loss(logp, entropy, a, u, behavior, old, reference, log_ratio, log_importance, low, high, options):
    """`rows_loss` of policy_loss.py for one row: loss, d loss / d logp, and RowMetrics. Absent inputs are None.

    Uses tl.where instead of tl.minimum because it keeps NaN.
    """
    if old is None:
        old = logp
    log_r = logp - old
    if log_ratio is not None:
        log_r = log_ratio
    capped = log_r > LOG_RATIO_CAP
    r = tl.exp(tl.where(capped, LOG_RATIO_CAP, log_r))
    below, above = r < low, r > high
    clipped = tl.where(below, low, tl.where(above, high, r))
    if options.ratio == "cispo":
        loss = -clipped * a * logp
        g = -clipped * a
    elif options.ratio == "sapo":
        tau = tl.where(a > 0, options.sapo_positive, options.sapo_negative)
        gate, rest = 1 / (1 + tl.exp(tau * (1 - r))), 1 / (1 + tl.exp(tau * (r - 1)))
        loss = -a * (4 / tau) * gate
        g = -a * tl.where(capped, 0.0, 4 * r * gate * rest)
    else:
        free, bound = r * a, clipped * a
        constant = tl.where(a > 0, above, below) | capped
        if options.delta is not None:
            over = r > options.delta
            free = tl.where(over, options.delta, r) * a
            constant = constant | over
        loss = -tl.where(bound < free, bound, free)
        if options.dual_clip is not None:
            dual = (a < 0) & (loss > -options.dual_clip * a)
            loss = tl.where(dual, -options.dual_clip * a, loss)
            constant = constant | dual
        g = tl.where(constant, 0.0 * a, -r * a)  # 0 a, not 0: NaN stays NaN
    diff = 0.0
    truncated = False
    if behavior is not None:
        diff = logp - behavior
        if options.importance_cap is not None:
            log_w = old - behavior
            if log_importance is not None:
                log_w = log_importance
            w = tl.exp(tl.where(log_w > LOG_RATIO_CAP, LOG_RATIO_CAP, log_w))
            truncated = w > options.importance_cap
            w = tl.where(truncated, options.importance_cap if options.importance_mode == "truncate" else 0.0, w)
            loss = loss * w
            g = g * w
    kl = 0.0
    if reference is not None:
        d = reference - logp
        if options.kl == "k1":
            kl = -d
            slope_kl = 1.0
        elif options.kl == "k2":
            kl = 0.5 * d * d
            slope_kl = -d
        else:
            far = d > LOG_RATIO_CAP
            e = tl.exp(tl.where(far, LOG_RATIO_CAP, d))
            kl = e - 1 - d
            slope_kl = 1 - tl.where(far, 0.0, e)
        loss = loss + options.kl_coef * kl
        g = g + options.kl_coef * slope_kl
    loss = u * (loss - options.entropy_coef * entropy)
    near = tl.where(diff > LOG_RATIO_CAP, LOG_RATIO_CAP, tl.where(diff < -LOG_RATIO_CAP, -LOG_RATIO_CAP, diff))
    weighted = u != 0
    return (
        loss, u * g, tl.exp(near) - 1 - near, (below & (a < 0) & weighted).to(tl.float32),
        (above & (a > 0) & weighted).to(tl.float32), r, capped.to(tl.float32), tl.where(truncated, 1.0, 0.0),
        tl.abs(diff), kl,
    )  # fmt: skip


@triton.jit
def policy_rows_kernel(
    logits_ptr, stride, grad_ptr, grad_stride, target_ptr, sequence_ptr, weight_ptr,  # grad_ptr None: forward only
    advantage_ptr, table_ptr, size, group_options,  # [S], or None and the outcomes [S, 4] of groups of `size`
    target_logit_ptr, behavior_ptr, old_ptr, reference_ptr, log_ratio_ptr, importance_ptr,  # [T], each may be None
    loss_ptr, logp_ptr, entropy_ptr, sums_ptr, T, S, V, inverse, softcap, low, high, loss_options,
    ENTROPY: tl.constexpr, HINTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
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
    behavior = load_one(behavior_ptr, row)
    old = load_one(old_ptr, row)
    reference = load_one(reference_ptr, row)
    log_ratio = load_one(log_ratio_ptr, row)
    log_importance = load_one(importance_ptr, row)

    FIRST: tl.constexpr = FIRST_LOOK if HINTS and grad_ptr is not None else NO_HINT
    top, log_norm, z_target, log2_p, entropy, exact, tile = row_statistics(
        row_ptr, target, one_of(target_logit_ptr, row), V, inverse * LOG2_E, softcap, FIRST, PAIRS, BLOCK
    )
    logp = log2_p * LN_2
    loss, g, kl_behavior, clip_low, clip_high, r, capped, truncated, diff, kl = row_loss(
        logp, entropy, a, u, behavior, old, reference, log_ratio, log_importance, low, high, loss_options
    )
    tl.store(loss_ptr + row, loss)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(sums_ptr + KL_BEHAVIOR * T + row, kl_behavior)
    tl.store(sums_ptr + CLIP_LOW * T + row, clip_low)
    tl.store(sums_ptr + CLIP_HIGH * T + row, clip_high)
    tl.store(sums_ptr + RATIO * T + row, r)
    tl.store(sums_ptr + RATIO_CAPPED * T + row, capped)
    tl.store(sums_ptr + IMPORTANCE_TRUNCATED * T + row, truncated)
    tl.store(sums_ptr + LOGPROB_DIFF * T + row, diff)
    tl.store(sums_ptr + KL_REFERENCE * T + row, kl)
    if grad_ptr is not None:
        out_ptr = grad_ptr + row * grad_stride
        h = -u * loss_options.entropy_coef
        if (g == 0) & (h == 0):
            zero_row(out_ptr, V, BLOCK)
        else:
            write_gradient(
                row_ptr, out_ptr, target, z_target, tile, V, inverse, softcap, top, log_norm, log2_p, entropy, exact,
                g, h, ENTROPY, False, LAST_LOOK if HINTS else NO_HINT, PAIRS, BLOCK,
            )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """x *= factor over [n]; for a factor of 1 x is neither read nor written."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
            tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < n)


def scale_triton_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply x (contiguous) by factor (0-dim) in place, without waiting for the device to know the factor."""
    assert x.is_contiguous()
    if x.numel():
        block = 4096
        with torch.cuda.device_of(x):
            scale_kernel[(min(1024, triton.cdiv(x.numel(), block)),)](x, factor, x.numel(), BLOCK=block, num_warps=8)
    return x


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """A vector as kernels read it."""
    return None if x is None else x.float().contiguous()


def shape(logits: torch.Tensor, softmax: Softmax, gradient: bool) -> dict[str, int | bool]:
    """Compile-time parameters of a row kernel: tile, warps, and whether bf16 is read in pairs (even, aligned rows)."""
    block, warps = tile(logits.dtype, logits.shape[1], softmax.softcap is not None, gradient)
    even = all(n % 2 == 0 for n in (logits.shape[1], logits.stride(0), logits.data_ptr() // 2))
    pairs = logits.dtype == torch.bfloat16 and even
    return {"PAIRS": pairs, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def row_stats_triton(
    logits: torch.Tensor, targets: torch.Tensor, softmax: Softmax, target_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Launch `row_stats_kernel`: max, log_norm, logp, H of every row, float32 [T, 4]."""
    T, V = logits.shape
    stats = torch.empty(T, 4, dtype=torch.float32, device=logits.device)
    if T:
        with torch.cuda.device_of(logits):
            row_stats_kernel[(T,)](
                logits, logits.stride(0), targets.contiguous(), flat(target_logits), stats, V,
                1.0 / softmax.temperature, softmax.softcap, **shape(logits, softmax, gradient=False),
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
    """Launch `row_gradient_kernel`, which writes the gradient to `out`; `out` may be the logits."""
    T, V = logits.shape
    if T:
        with torch.cuda.device_of(logits):
            row_gradient_kernel[(T,)](
                logits, logits.stride(0), out, out.stride(0), targets.contiguous(), flat(target_logits), stats,
                g.contiguous(), h.contiguous(), V, 1.0 / softmax.temperature, softmax.softcap,
                **shape(logits, softmax, gradient=True),
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
    """Return loss, logp, entropy, float32 [T], and sums, float32 [8, T] in the order of RowMetrics; write `gradient`.

    `gradient` has the logits' shape and dtype and may be the logits; None: forward only.
    """
    (T, V), S = logits.shape, sequences.weights.numel()
    assert all(x is None or x.shape == (T,) for x in (*tokens, *terms))
    loss, logp, entropy = (torch.empty(T, dtype=torch.float32, device=logits.device) for _ in range(3))
    sums = torch.empty(len(RowMetrics._fields), T, dtype=torch.float32, device=logits.device)

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
        with torch.cuda.device_of(logits):
            policy_rows_kernel[(T,)](
                logits, logits.stride(0), gradient, 0 if gradient is None else gradient.stride(0),
                tokens.targets.contiguous(), tokens.sequence_ids.contiguous(), flat(sequences.weights),
                advantages, table, size, in_kernel(group_options, AdvantageOptions),
                flat(target_logits), flat(tokens.behavior), flat(tokens.old), flat(reference), flat(terms.log_ratio),
                flat(terms.importance), loss, logp, entropy, sums, T, S, V, 1.0 / softmax.temperature, softmax.softcap,
                *options.clip_range, in_kernel(options, LossOptions), ENTROPY=options.entropy_coef != 0,
                HINTS=True, BLOCK_G=group_block(size), **shape(logits, softmax, gradient is not None),
            )  # fmt: skip
    return loss, logp, entropy, sums
