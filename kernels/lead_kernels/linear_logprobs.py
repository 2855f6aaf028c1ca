"""Hidden states and head weight -> log-probs of the targets and entropy, in chunks of rows.

    z = hidden head^T / temperature      logp = z_t - lse(z)      H = lse - sum p z

For behaviour and reference passes (forward only) and for SFT (with gradients; the backward makes each chunk's logits
again, so that any function of log-probs and entropy can follow).

dtypes: hidden and head of one float dtype; log-probs and entropy fp32 (fp64 for fp64), rounded from logits of the
inputs' dtype; d(head) accumulated in fp32 (fp64). Refuses targets outside 0..V-1 and a sharded head.

Floor: one GEMM forward, 2 T D V FLOPs; four with the backward.

Legend: T rows, D hidden, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch

from ._head import accumulate, add_product_, check_shapes, chunk_size, computable, local
from ._rows import RowStats, row_gradient_, row_stats
from .policy_loss import check_targets


@torch.library.custom_op("lead_kernels::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log-probs [T], entropy [T], and the rows' statistics [T, 4], which the backward needs."""
    check_targets(targets, head.shape[0])
    hidden, head = computable(hidden), computable(head)
    buffer, parts = torch.empty(step, head.shape[0], dtype=head.dtype, device=head.device), []
    for i in range(0, max(1, hidden.shape[0]), step):
        h = hidden[i : i + step]
        parts.append(row_stats(torch.mm(h, head.T, out=buffer[: len(h)]), targets[i : i + step], temperature))
    stats = torch.cat(parts)
    row = RowStats(*stats.unbind(1))
    return row.logprob.clone(), row.entropy.clone(), stats


@linear_logprobs_op.register_fake
def _(hidden, head, targets, temperature, step):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    T = hidden.shape[0]
    return hidden.new_empty(T, dtype=dtype), hidden.new_empty(T, dtype=dtype), hidden.new_empty(T, 4, dtype=dtype)


@torch.library.custom_op("lead_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward_op(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, stats: torch.Tensor, grad_logprob: torch.Tensor,
    grad_entropy: torch.Tensor, temperature: float, step: int, train_hidden: bool, train_head: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """d hidden [T, D], d head [V, D]; empty where not asked for."""
    dtypes = hidden.dtype, head.dtype
    hidden, head = computable(hidden), computable(head)
    grad_hidden = torch.empty(hidden.shape if train_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    grad_head = torch.empty(head.shape if train_head else (0,), dtype=accumulate(head.dtype), device=head.device)
    buffer = torch.empty(step, head.shape[0], dtype=head.dtype, device=head.device)
    for i in range(0, max(1, hidden.shape[0]), step):
        at = slice(i, i + step)
        h = hidden[at]
        logits_CV = torch.mm(h, head.T, out=buffer[: len(h)])
        d_CV = row_gradient_(logits_CV, targets[at], stats[at], grad_logprob[at], grad_entropy[at], temperature)
        if train_hidden:
            torch.mm(d_CV, head, out=grad_hidden[at])
        if train_head:
            add_product_(grad_head, d_CV.T, h, first=i == 0)
    return grad_hidden.to(dtypes[0]), grad_head.to(dtypes[1])


@linear_logprobs_backward_op.register_fake
def _(hidden, head, targets, stats, grad_logprob, grad_entropy, temperature, step, train_hidden, train_head):
    return (
        torch.empty(hidden.shape if train_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(head.shape if train_head else (0,), dtype=head.dtype, device=head.device),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, head, targets, ctx.temperature, ctx.step = inputs
    _, _, stats = output
    ctx.save_for_backward(hidden, head, targets, stats)


def _backward(ctx: Any, grad_logprob: torch.Tensor, grad_entropy: torch.Tensor, grad_stats: Any) -> tuple:
    hidden, head, targets, stats = ctx.saved_tensors
    train_hidden, train_head, *others = ctx.needs_input_grad
    d_hidden, d_head = torch.ops.lead_kernels.linear_logprobs_backward(
        hidden, head, targets, stats, grad_logprob, grad_entropy, ctx.temperature, ctx.step, train_hidden, train_head
    )
    return d_hidden if train_hidden else None, d_head if train_head else None, *[None] * len(others)


linear_logprobs_op.register_autograd(_backward, setup_context=_save)


def linear_logprobs(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probs of the targets and entropy under softmax(hidden @ head_weight.T / temperature).

    Args:
        hidden: [T, D], any float dtype.
        head_weight: [V, D], same dtype; a plain tensor or a replicated DTensor.
        targets: int64 [T], each in 0..V-1.
        temperature: divides the logits.
        chunk_rows: most rows of logits at once; None: as many as fit 64 MiB (2 GiB on a GPU).
    Returns:
        logprobs, entropy: float32 [T] (float64 for float64), differentiable.
    Raises:
        ValueError: a target outside the vocabulary, a sharded head.
    """
    head = local(head_weight)
    check_shapes(hidden, head, targets)
    step = chunk_size(hidden.shape[0], head, chunk_rows)
    logprobs, entropy, _ = torch.ops.lead_kernels.linear_logprobs(hidden, head, targets, temperature, step)
    return logprobs, entropy
