"""Triton form of the sparse backward: d hidden of a block of rows from the columns that any of its rows needs.

Its input is the gradient of a chunk's logits, written by the row kernel; formula, thresholds and draw are those of
_sparse.py. |d z_j| T / |g| is p_j, and |g| / T follows from the target's entry, so no statistics are read again.

    threshold_rows   a row's threshold, from a histogram of its p; a bin's mass is bounded by its upper edge
    needed           which columns any row of a block needs, and what each row drops
    pack             a block's columns side by side, [ROWS, n]
    gather_product   the packed block times the rows of the head that its columns name

For d head, rows and columns change places: a block of columns needs the rows in which any of its columns is kept.

dtypes: gradient, head and hidden bf16, fp16 or fp32; thresholds and sums fp32. Lists are ascending, from a scan over
flags. Only the histogram's integers are added by atomics, so every run gives the same bits.

Floor: two reads of the gradient and n / V of a dense product. The host waits once per chunk, for the lengths of the
lists.

Legend: C rows of a chunk, D hidden, V vocabulary, B blocks, N entries of all lists.
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._sparse import OCTAVES, Gradients, Sparsity

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter's dot reads the bits of bf16 as integers
ROWS, TILE = 128, 128
BINS = 512  # a power of two above 8 OCTAVES plus one bin for what is not counted
COUNTED = tl.constexpr(8 * OCTAVES)
FIRST_BIN = tl.constexpr((127 - OCTAVES) << 3)
UNCOUNTED = tl.constexpr(BINS - 1)
SLACK = tl.constexpr(1 + 2.0**-6)  # error of p, which is the quotient of two half-precision numbers


@triton.jit
def mix(x):
    """The hash of _sparse.mix, in uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def threshold_rows(
    grad_ptr, stride, target_ptr, logp_ptr, inverse_ptr, threshold_ptr, V, mass,
    BINS_: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute T / |g| and the threshold on p for each row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = grad_ptr + row * stride
    target = tl.load(target_ptr + row)
    logp = tl.load(logp_ptr + row)
    # 1 - p of the target, without the cancellation near p = 1
    others = tl.where(logp > -0.02, -logp * (1 + logp * (0.5 + logp * 0.16666667)), 1 - tl.exp(logp))
    at_target = tl.abs(tl.load(row_ptr + target).to(tl.float32))
    inverse = tl.where(at_target > 0, others / at_target, 0.0)
    counts = tl.zeros([BINS_], tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        p = tl.abs(tl.load(row_ptr + at, mask=at < V, other=0.0).to(tl.float32)) * inverse
        bin = (p.to(tl.int32, bitcast=True) >> 20) - FIRST_BIN
        bin = tl.minimum(tl.maximum(bin, 0), COUNTED - 1)
        counts += tl.histogram(tl.where((at < V) & (at != target) & (p > 0), bin, UNCOUNTED), BINS_)
    at = tl.arange(0, BINS_)
    upper = ((at + FIRST_BIN + 1) << 20).to(tl.float32, bitcast=True)
    sums = tl.cumsum(tl.where(at < COUNTED, counts.to(tl.float32) * upper * SLACK, 0.0), 0)
    best = tl.sum(((sums <= mass) & (at < COUNTED)).to(tl.int32), 0)
    threshold = ((best + FIRST_BIN) << 20).to(tl.float32, bitcast=True)
    tl.store(inverse_ptr + row, inverse)
    tl.store(threshold_ptr + row, tl.where(others <= mass, 1.0, threshold))


@triton.jit
def entries(
    grad_ptr, stride, target_ptr, inverse_ptr, threshold_ptr, key, first_row, rows, cols, C, V, SAMPLE: tl.constexpr
):
    """d, p, and masks of the entries that are kept and that are drawn, at `rows` x `cols`, which broadcast."""
    inside = (rows < C) & (cols < V)
    d = tl.load(grad_ptr + rows.to(tl.int64) * stride + cols, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ptr + rows, mask=rows < C, other=0.0)
    threshold = tl.load(threshold_ptr + rows, mask=rows < C, other=1.0)
    is_target = tl.load(target_ptr + rows, mask=rows < C, other=-1) == cols
    p = tl.abs(d) * inverse
    kept = inside & (((p >= threshold) & (d != 0)) | is_target | (d != d))  # NaN is kept too
    drawn = kept & (p < 0)
    if SAMPLE:
        row_key = mix((first_row + rows).to(tl.uint32) ^ key.to(tl.uint32))
        u = (mix(cols.to(tl.uint32) ^ row_key) >> 8).to(tl.float32) * 5.9604644775390625e-08
        drawn = inside & (kept == 0) & (u * threshold < p)
        small = (kept | drawn) == 0
        at_threshold = threshold / inverse
        d = tl.where(drawn, tl.where(d < 0, -at_threshold, at_threshold), tl.where(small, 0.0, d))
    return d, p, kept, drawn


@triton.jit
def needed(
    grad_ptr, stride, target_ptr, inverse_ptr, threshold_ptr, key, first_row, flag_ptr, dropped_ptr, C, V, tiles,
    BY_COLUMN: tl.constexpr, SAMPLE: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write flags [blocks of R rows, V], and the mass that each row drops in this tile of W columns, [C, tiles].

    BY_COLUMN: flags [blocks of W columns, C] instead.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    rows, cols = block * R + tl.arange(0, R), tile * W + tl.arange(0, W)
    d, p, kept, drawn = entries(grad_ptr, stride, target_ptr, inverse_ptr, threshold_ptr, key, first_row, rows[:, None],
                                cols[None, :], C, V, SAMPLE)  # fmt: skip
    needs = (kept | drawn).to(tl.int8)
    if BY_COLUMN:
        tl.store(flag_ptr + tile.to(tl.int64) * C + rows, tl.max(needs, 1), mask=rows < C)
    else:
        tl.store(flag_ptr + block.to(tl.int64) * V + cols, tl.max(needs, 0), mask=cols < V)
        left_out = tl.where(kept, 0.0, p)
        if SAMPLE:
            left_out += tl.where(drawn, tl.load(threshold_ptr + rows, mask=rows < C, other=1.0)[:, None], 0.0)
        tl.store(dropped_ptr + rows.to(tl.int64) * tiles + tile, tl.sum(left_out, 1), mask=rows < C)


@triton.jit
def pack(
    grad_ptr, stride, target_ptr, inverse_ptr, threshold_ptr, key, first_row, start_ptr, list_ptr, packed_ptr, C, V,
    BY_COLUMN: tl.constexpr, SAMPLE: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Pack the columns of d that each block lists, [R, n], one block after another; BY_COLUMN: of d transposed."""
    block = tl.program_id(0)
    start, end = tl.load(start_ptr + block), tl.load(start_ptr + block + 1)
    at = start + tl.program_id(1) * W + tl.arange(0, W)
    inner = tl.load(list_ptr + at, mask=at < end, other=0)[None, :]
    outer = (block * R + tl.arange(0, R))[:, None]
    if BY_COLUMN:
        rows, cols = inner, outer
    else:
        rows, cols = outer, inner
    d, p, kept, drawn = entries(grad_ptr, stride, target_ptr, inverse_ptr, threshold_ptr, key, first_row, rows, cols, C,
                                V, SAMPLE)  # fmt: skip
    to = packed_ptr + start * R + tl.arange(0, R)[:, None] * (end - start) + (at - start)[None, :]
    tl.store(to, d.to(packed_ptr.dtype.element_ty), mask=(at < end)[None, :] & (outer >= 0))


@triton.jit
def gather_product(
    packed_ptr, start_ptr, list_ptr, x_ptr, x_stride, out_ptr, out_stride, n_out, D,
    ADD: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[block of R, tile of W] (+)= packed [R, n] times the n rows of x that the block's list names, in fp32."""
    block = tl.program_id(0)
    start, end = tl.load(start_ptr + block), tl.load(start_ptr + block + 1)
    rows, cols = tl.arange(0, R), tl.program_id(1) * W + tl.arange(0, W)
    a_ptr = packed_ptr + start * R + rows[:, None] * (end - start)
    total = tl.zeros([R, W], tl.float32)
    for k in range(0, (end - start).to(tl.int32), K):
        at = k + tl.arange(0, K)
        inside = at < end - start
        a = tl.load(a_ptr + at[None, :], mask=inside[None, :], other=0.0)
        index = tl.load(list_ptr + start + at, mask=inside, other=0).to(tl.int64)
        x = tl.load(
            x_ptr + index[:, None] * x_stride + cols[None, :], mask=inside[:, None] & (cols < D)[None, :], other=0.0
        )
        if WIDE:
            a, x = a.to(tl.float32), x.to(tl.float32)
        total = tl.dot(a, x, total, input_precision="ieee")
    at = block.to(tl.int64) * R + rows
    to = out_ptr + at[:, None] * out_stride + cols[None, :]
    mask = (at < n_out)[:, None] & (cols < D)[None, :]
    if ADD:
        total += tl.load(to, mask=mask, other=0.0)
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=mask)


class Lists(NamedTuple):
    """Columns (rows) that each block of rows (columns) needs: starts int64 [B + 1], ascending lists int64 [N].

    lengths: length of each list, on the host; dropped: [C], for blocks of rows only.
    """

    starts: torch.Tensor
    lists: torch.Tensor
    lengths: list[int]
    dropped: torch.Tensor


class Chunk(NamedTuple):
    """A chunk's gradient [C, V] and the numbers that decide which entries are kept."""

    gradient: torch.Tensor
    targets: torch.Tensor
    inverse: torch.Tensor
    threshold: torch.Tensor
    key: int
    first_row: int
    sample: bool

    @property
    def arguments(self) -> tuple:
        return (
            self.gradient,
            self.gradient.stride(0),
            self.targets,
            self.inverse,
            self.threshold,
            self.key,
            self.first_row,
        )


def host_mix(x: int) -> int:
    """_sparse.mix of one number, on the host."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def chunk_of(
    gradient: torch.Tensor, targets: torch.Tensor, logprob: torch.Tensor, s: Sparsity, first_row: int
) -> Chunk:
    """Compute the thresholds of a chunk from the gradient of its logits."""
    C, V = gradient.shape
    inverse, threshold = (torch.empty(C, dtype=torch.float32, device=gradient.device) for _ in range(2))
    targets = targets.contiguous()
    if C:
        block = min(2048, max(128, triton.next_power_of_2(V)))
        threshold_rows[(C,)](gradient, gradient.stride(0), targets, logprob.contiguous(), inverse, threshold, V, s.mass,
                             BINS_=BINS, BLOCK=block, num_warps=8)  # fmt: skip
    key = host_mix((s.seed or 0) & 0xFFFFFFFF)
    key = key - (1 << 32) if key >= 1 << 31 else key  # an int32 with the same bits
    return Chunk(gradient, targets, inverse, threshold, key, first_row, s.seed is not None)


def lists_of(c: Chunk, by_column: bool, most: int | None = None) -> Lists:
    """List what every block needs; a block that needs more than `most` gets an empty list, but its true length."""
    C, V = c.gradient.shape
    tiles = triton.cdiv(V, TILE)
    shape = (tiles, C) if by_column else (triton.cdiv(C, ROWS), V)
    flags = torch.empty(shape, dtype=torch.int8, device=c.gradient.device)
    dropped = torch.empty((C, tiles), dtype=torch.float32, device=c.gradient.device)
    if C:
        needed[(triton.cdiv(C, ROWS), tiles)](*c.arguments, flags, dropped, C, V, tiles, BY_COLUMN=by_column,
                                              SAMPLE=c.sample, R=ROWS, W=TILE, num_warps=8)  # fmt: skip
    counts = flags.sum(1, dtype=torch.int64)
    lengths = counts.tolist()
    if most is not None:
        fits = counts <= most
        flags, counts = flags * fits[:, None], counts * fits
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Lists(starts, flags.nonzero()[:, 1], lengths, dropped.new_zeros(C) if by_column else dropped.sum(1))


def product_(out: torch.Tensor, c: Chunk, lists: Lists, x: torch.Tensor, by_column: bool) -> None:
    """out = (for d head: +=) the chunk's gradient, or its transpose, times x, computed from the blocks' lists."""
    C, V = c.gradient.shape
    B, D = len(lists.lengths), x.shape[1]
    listed = int(lists.lists.numel())
    most = max((n for n in lists.lengths if n <= listed), default=0)
    packed = torch.empty(ROWS * max(1, listed), dtype=c.gradient.dtype, device=out.device)
    if most:
        pack[(B, triton.cdiv(most, TILE))](*c.arguments, lists.starts, lists.lists, packed, C, V, BY_COLUMN=by_column,
                                           SAMPLE=c.sample, R=ROWS, W=TILE, num_warps=8)  # fmt: skip
    width = 128 if c.gradient.element_size() == 2 else 64
    grid = (B, triton.cdiv(D, width))
    gather_product[grid](packed, lists.starts, lists.lists, x, x.stride(0), out, out.stride(0), len(out), D,
                         ADD=by_column, WIDE=INTERPRETED, R=ROWS, W=width, K=32, num_warps=8, num_stages=3)  # fmt: skip


def sparse_backward_triton_(
    gradient_CV: torch.Tensor,
    targets: torch.Tensor,
    logprob: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    s: Sparsity,
    to: Gradients,
    *,
    sparse_head: bool,
    norm: torch.Tensor,
    first_row: int,
) -> torch.Tensor:
    """`_sparse.sparse_backward_` from the gradient of the chunk's logits; returns the chunk's SPARSE_METRICS, [3]."""
    from ._sparse import dense_backward_

    C, V = gradient_CV.shape
    c = chunk_of(gradient_CV, targets, logprob, s, first_row)
    lists = lists_of(c, False, s.most)
    dense = [i for i, n in enumerate(lists.lengths) if n > s.most]
    if to.hidden is not None and C:
        product_(to.hidden, c, lists, head if head.stride(1) == 1 else head.contiguous(), False)
        for at in (slice(i * ROWS, (i + 1) * ROWS) for i in dense):
            torch.mm(gradient_CV[at], head, out=to.hidden[at])
    dropped = lists.dropped
    if dense:
        block = torch.arange(C, device=head.device) // ROWS
        dropped = dropped.masked_fill(torch.isin(block, torch.tensor(dense, device=head.device)), 0.0)
    shares = [(1.0 if n > s.most else n / V) * min(ROWS, C - i * ROWS) for i, n in enumerate(lists.lengths)]
    heads = to._replace(hidden=None)
    if to.head is not None and sparse_head and to.head.is_contiguous() and C:
        if first_row == 0:
            to.head.zero_()
        lists = lists_of(c, True)
        product_(to.head, c, lists, hidden.contiguous(), True)
        heads = heads._replace(head=None)
    dense_backward_(gradient_CV, hidden, head, heads, first_row == 0)
    bound = torch.where(c.inverse > 0, dropped / c.inverse, 0.0) * norm
    most = bound.amax() if C else norm.new_zeros(())
    return torch.stack([dropped.sum(), dropped.new_tensor(sum(shares)), most])
