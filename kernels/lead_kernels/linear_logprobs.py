"""Hidden states and head weight -> log-probs of the targets and entropy, in chunks of rows.

    z = hidden head^T / temperature      logp = z_t - lse(z)      H = lse - sum p z

For behaviour and reference passes (forward only, one GEMM, 2 T D V FLOPs) and for SFT (with gradients; the backward
makes each chunk's logits again, so that any function of log-probs and entropy can follow: four GEMMs).

Legend: T rows, D hidden, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch

from .linear_policy_loss import _accumulate, chunk_size, computable, local
from .policy_loss import check_targets
from .rows import row_gradient_, row_stats


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float, step: int
    ):
        parts = [
            row_stats(hidden[i : i + step] @ head.T, targets[i : i + step], temperature)
            for i in range(0, max(1, hidden.shape[0]), step)
        ]
        stats = torch.cat(parts)
        ctx.save_for_backward(hidden, head, targets, stats)
        ctx.temperature, ctx.step = temperature, step
        return stats[:, 2].clone(), stats[:, 3].clone()

    @staticmethod
    def backward(ctx: Any, grad_logprob: torch.Tensor, grad_entropy: torch.Tensor):  # type: ignore[override]
        hidden, head, targets, stats = ctx.saved_tensors
        want_hidden, want_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_head = torch.zeros(head.shape, dtype=_accumulate(head.dtype), device=head.device) if want_head else None
        for i in range(0, hidden.shape[0], ctx.step):
            at = slice(i, i + ctx.step)
            h, t = hidden[at], targets[at]
            d_CV = row_gradient_(h @ head.T, t, stats[at], grad_logprob[at], grad_entropy[at], ctx.temperature)
            if grad_hidden is not None:
                grad_hidden[at] = d_CV @ head
            if grad_head is not None:
                grad_head += d_CV.T @ h
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None


def linear_logprobs(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the targets and entropy under softmax(hidden @ head_weight.T / temperature).

    Args:
        hidden: [T, D], any float dtype.
        head_weight: [V, D], same dtype; a plain tensor or a replicated DTensor.
        targets: int64 [T], each in 0..V-1.
        temperature: divides the logits.
        chunk_rows: rows of logits at once; None: as many as fit 256 MiB in fp32.
    Returns:
        logprobs, entropy: float32 [T] (float64 for float64), differentiable.
    Raises:
        ValueError: a target outside the vocabulary, a sharded head.
    """
    head = local(head_weight)
    check_targets(targets, head.shape[0])
    step = chunk_size(hidden.shape[0], head.shape[0], chunk_rows)
    return _LinearLogprobs.apply(computable(hidden), computable(head), targets, temperature, step)  # type: ignore[return-value]
