"""The sparse backward: d hidden, and on request d head, from only those columns that carry a row's probability.

    d z_j = -(g / T) p_j, for the target (g / T) (1 - p_t)          d hidden = d z head          d head = d z^T hidden

Each row has a threshold on p: the largest 2^e (1 + m / 8), e from -40, for which the entries below it, not counting the
target, sum to at most `mass`. Those entries are left out; the target never is. The error of a row of d hidden is at
most

    |g| / T x (the sum of p over what is left out) x max_j ||head_j||_2

Unbiased form (`sample`): an entry below the threshold is kept with probability p / threshold, and then counts as the
threshold. The random number is a hash of (seed, row, column), so the choice is the same on every backend, in every run,
and however rows are cut into chunks.

A row that needs more than `most` columns is computed densely. On a CPU the entries of each row are multiplied by the
rows of the head that they need (csrc/sparse.cpp); on a GPU a block of 128 rows shares its columns, so that the product
runs on tensor cores (_triton_sparse.py). Lists are ascending, sums follow their order, and no atomics are used, so
every run gives the same bits.

dtypes: logits, hidden, head bf16, fp16, fp32 (csrc), and fp64 (plain torch); entries fp32 (fp64), sums fp32 (fp64).

Legend: C rows of a chunk, D hidden, V vocabulary, N entries of a chunk.
"""

from typing import Any, NamedTuple

import torch

from ._head import add_product_, add_rows_, rounded
from ._rows import capped, cpu_extension, row_gradient_
from .options import LossOptions, Softmax

SPARSE_METRICS = ("dropped_mass", "column_share", "max_hidden_error")
"""Metrics of a chunk: sums over rows of the mass below the threshold and of the share of columns that were multiplied,
and the largest bound on the error of a row of d hidden."""

OCTAVES = 40
DENSE_ABOVE = {"cpu": 1 / 32, "cuda": 0.3}
"""Share of the columns above which rows are computed densely. A CPU gathers for each row separately, without reuse
between rows, and stops gaining at a much smaller share than tensor cores would (`python bench/sparse.py`, temperature
1)."""


class Sparsity(NamedTuple):
    """What a call leaves out: mass per row, the most columns that a sparse row may have, seed of the draw or None."""

    mass: float
    most: int
    seed: int | None = None


class Entries(NamedTuple):
    """d loss / d logits of a chunk as lists, and what the lists leave out.

    starts: int64 [C + 1], where each row's entries begin; columns: int32 [N], ascending in each row; values: [N].
    dropped: [C], the sum of p below the row's threshold; drawn: [C], the part of it that the draw puts back.
    threshold: [C], on p; -1 for a row that is computed densely and so has no entries.
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    dropped: torch.Tensor
    drawn: torch.Tensor
    threshold: torch.Tensor


def sparsity(o: LossOptions, head: torch.Tensor, seed: int) -> Sparsity | None:
    """What a call with these options leaves out; None for nothing, as with an entropy gradient, which has no bound."""
    if not o.dropped_mass or o.entropy_coef:
        return None
    most = max(1, int(DENSE_ABOVE.get(head.device.type, 0.3) * head.shape[0]))
    return Sparsity(o.dropped_mass, most, seed if o.sample_dropped else None)


def edges(like: torch.Tensor) -> torch.Tensor:
    """Possible thresholds, ascending: 2^e (1 + m / 8), and 1."""
    octave, eighth = (torch.arange(n, dtype=torch.float64, device=like.device) for n in (OCTAVES, 8))
    steps = (torch.exp2(octave - OCTAVES)[:, None] * (1 + eighth / 8)).flatten()
    return torch.cat([steps, steps.new_ones(1)]).to(like.dtype)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32 bits, held in int64 (C. Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def uniform(seed: int, first_row: int, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """The random number of every entry, float32 [C, V] in [0, 1)."""
    C, V = shape
    key = mix(torch.tensor(seed & 0xFFFFFFFF, device=device))
    key = mix((torch.arange(first_row, first_row + C, device=device) & 0xFFFFFFFF) ^ key)
    return (mix(torch.arange(V, device=device) ^ key[:, None]) >> 8).float() * 2.0**-24


def sparse_rows_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    softmax: Softmax,
    s: Sparsity,
    first_row: int = 0,
) -> Entries:
    """Specification of `sparse_rows`."""
    top, log_norm, logprob, _ = stats.unsqueeze(-1).unbind(1)
    temperature, softcap = softmax
    z = logits.to(stats.dtype)
    p = ((capped(z, softcap) - top) / temperature - log_norm).exp()
    at_target = torch.zeros_like(p, dtype=torch.bool).scatter_(1, targets[:, None], True)
    others = p.masked_fill(at_target, 0.0)
    ordered = others.sort(1).values
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    candidates = edges(stats)
    below = sums.gather(1, torch.searchsorted(ordered, candidates.expand(len(p), -1).contiguous()))
    best = ((below <= s.mass).sum(1, keepdim=True) - 1).clamp(min=0)
    threshold, dropped = candidates[best], below.gather(1, best)
    keep = (p >= threshold) | at_target
    value, drawn = p, torch.zeros_like(dropped)
    if s.seed is not None:
        chosen = ~keep & (uniform(s.seed, first_row, p.shape, p.device).to(p.dtype) * threshold < p)
        value, keep = torch.where(chosen, threshold, p), keep | chosen
        drawn = threshold * chosen.sum(1, keepdim=True)
    value = torch.where(at_target, torch.expm1(logprob), value) * (-g[:, None] / temperature)
    if softcap is not None:
        value = value * torch.cosh(z / softcap) ** -2
    lost = (log_norm + logprob).isnan() | g[:, None].isnan()  # one NaN makes the whole row of d hidden NaN
    keep = torch.where(lost, at_target, keep) & (g != 0)[:, None]
    count = keep.sum(1)
    dense = count > s.most
    keep = keep & ~dense[:, None]
    starts = torch.nn.functional.pad(torch.where(dense, 0, count).cumsum(0), (1, 0))
    gone = dense | lost[:, 0] | (g == 0)
    dropped, drawn = (x[:, 0].masked_fill(gone, 0.0) for x in (dropped, drawn))
    return Entries(starts, keep.nonzero()[:, 1].int(), value[keep], dropped, drawn,
                   threshold[:, 0].masked_fill(gone, 0.0).masked_fill(dense, -1.0))  # fmt: skip


def in_sparse_cpp(rows: torch.Tensor) -> Any | None:
    """The C++ operators if they support these rows, else None."""
    takes = rows.device.type == "cpu" and rows.stride(1) == 1 and rows.dtype != torch.float64
    return cpu_extension() if takes else None


def sparse_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    softmax: Softmax,
    s: Sparsity,
    first_row: int = 0,
) -> Entries:
    """Select the entries of a chunk's d loss / d logits that are kept.

    Args:
        logits: [C, V].
        targets: int64 [C], each in 0..V-1.
        stats: what `row_stats` returned, [C, 4].
        g: d loss / d logp, [C], in the dtype of `stats`.
        softmax: temperature and soft cap.
        s: what to leave out.
        first_row: index in the call of the chunk's first row, for the draw.
    """
    if cpp := in_sparse_cpp(logits):
        sample, seed = s.seed is not None, (s.seed or 0) & 0xFFFFFFFF
        found = cpp.sparse_rows(
            logits,
            targets.contiguous(),
            stats.contiguous(),
            g.contiguous(),
            *softmax,
            s.mass,
            s.most,
            sample,
            seed,
            first_row,
        )
        return Entries(*found)
    return sparse_rows_reference(logits, targets, stats, g, softmax, s, first_row)


def dense_matrix(entries: Entries, columns: int) -> torch.Tensor:
    """The entries as a matrix [C, columns]."""
    count = entries.starts.diff()
    rows = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    out = entries.values.new_zeros(len(count), columns)
    out[rows, entries.columns.long()] = entries.values
    return out


def sparse_product_(out: torch.Tensor, entries: Entries, weight: torch.Tensor) -> None:
    """Write the entries' matrix [C, V] times weight [V, D] to out [C, D], summed in fp32 (fp64) and rounded once."""
    if cpp := in_sparse_cpp(weight):
        cpp.sparse_product_(out, *entries[:3], weight)
    else:
        matrix = dense_matrix(entries, weight.shape[0])
        out.copy_(matrix @ weight.to(matrix.dtype))


def sparse_outer_(total: torch.Tensor, entries: Entries, hidden: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Add entries^T [V, C] times hidden [C, D] to total [V, D], and the entries summed over C to bias [V]."""
    if cpp := in_sparse_cpp(hidden):
        cpp.sparse_outer_(total, *entries[:3], hidden, bias)
        return
    matrix = dense_matrix(entries, total.shape[0])
    total.add_(matrix.T @ hidden.to(matrix.dtype))
    if bias is not None:
        bias.add_(matrix.sum(0))


def max_row_norm(weight: torch.Tensor) -> torch.Tensor:
    """max_j ||weight_j||_2, 0-dim, float32 (float64 for float64)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if cpp := in_sparse_cpp(weight):
        return torch.tensor(cpp.max_row_norm(weight), dtype=dtype)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).amax()


class Gradients(NamedTuple):
    """Where a chunk's gradients are written; None for one that is not needed.

    hidden: the chunk's rows, [C, D], overwritten. head, bias: [V, D] and [V], to which every chunk adds; the first
    chunk overwrites them.
    """

    hidden: torch.Tensor | None
    head: torch.Tensor | None
    bias: torch.Tensor | None


def dense_backward_(
    gradient_CV: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, to: Gradients, first: bool
) -> None:
    """Compute the three gradients from the gradient of a chunk's logits."""
    if to.hidden is not None:
        torch.mm(gradient_CV, head, out=to.hidden)
    if to.head is not None:
        add_product_(to.head, gradient_CV.T, hidden, first)
    if to.bias is not None:
        add_rows_(to.bias, gradient_CV, first)


def sparse_backward_(
    logits_CV: torch.Tensor,
    targets: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    softmax: Softmax,
    s: Sparsity,
    to: Gradients,
    *,
    sparse_head: bool,
    norm: torch.Tensor,
    first_row: int,
    target_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a chunk's gradients from its logits, which may be overwritten; d head is dense unless `sparse_head`.

    Args:
        norm: `max_row_norm` of the head, 0-dim.
    Returns:
        the chunk's SPARSE_METRICS, [3].
    """
    first, trains_head = first_row == 0, to.head is not None or to.bias is not None
    entries = sparse_rows(logits_CV, targets, stats, g, softmax, s, first_row)
    is_dense = entries.threshold < 0
    dense = is_dense.nonzero()[:, 0]

    def gradient_(logits: torch.Tensor, at: Any = slice(None)) -> torch.Tensor:
        exact = None if target_logits is None else target_logits[at]
        g_at = g[at]
        out = row_gradient_(logits, targets[at], stats[at], g_at, torch.zeros_like(g_at), softmax, None, exact)
        return rounded(out, head.dtype)

    if 2 * len(dense) > len(g):
        dense_backward_(gradient_(logits_CV), hidden, head, to, first)
        return torch.tensor([0.0, float(len(g)), 0.0], dtype=stats.dtype, device=stats.device)
    if trains_head and not sparse_head:
        gradient_CV = gradient_(logits_CV)
        dense_gradient = gradient_CV[dense]
        dense_backward_(gradient_CV, hidden, head, to._replace(hidden=None), first)
    else:
        dense_gradient = gradient_(logits_CV[dense], dense)
        if trains_head:
            lists = to._replace(hidden=None)
            for total in (lists.head, lists.bias) if first else ():
                if total is not None:
                    total.zero_()
            if to.head is not None:
                sparse_outer_(to.head, entries, hidden, to.bias)
            elif to.bias is not None:
                to.bias.add_(dense_matrix(entries, len(to.bias)).sum(0))
            if len(dense):
                dense_backward_(dense_gradient, hidden[dense], head, lists, first=False)
    if to.hidden is not None:
        sparse_product_(to.hidden, entries, head)
        if len(dense):
            to.hidden[dense] = dense_gradient @ head
    share = (entries.starts.diff().to(stats.dtype) / head.shape[0]).masked_fill(is_dense, 1.0)
    bound = g.abs() / softmax.temperature * (entries.dropped + entries.drawn) * norm
    most = bound.amax() if len(bound) else bound.new_zeros(())
    return torch.stack([entries.dropped.sum(), share.sum(), most])
