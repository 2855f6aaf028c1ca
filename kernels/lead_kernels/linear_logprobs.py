"""Hidden states and head weight -> log-probs of the targets and entropy, in chunks of rows.

    z = hidden head^T + bias      y = softcap tanh(z / softcap), or z      x = y / temperature
    logp = x_t - lse(x)           H = lse - sum p x

For log-probs under the sampling and the reference policy (forward only), and for SFT (with gradients). The backward
recomputes each chunk's logits, so that any function of log-probs and entropy may follow.

dtypes: hidden and head share one float dtype; log-probs and entropy are fp32 (fp64 for fp64), computed from logits
rounded to the inputs' dtype, except that for half precision the target's own logit is kept in fp32; d(head) and d(bias)
are accumulated in fp32 (fp64). Refuses targets outside 0..V-1 and a sharded head.

Floor: one GEMM forward, 2 T D V FLOPs; four with the backward.

Legend: T rows, D hidden, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch

from ._checks import check_rows, check_targets, no_second_derivative, refuse_forward_mode
from ._head import (
    accumulate,
    check_shapes,
    chunk_size,
    computable,
    full_reductions,
    local,
    logits_buffer,
    logits_of,
    rounded,
    target_logits,
)
from ._rows import RowStats, row_gradient_, row_stats
from ._sparse import Gradients, dense_backward_
from .options import Softmax


@torch.library.custom_op("lead_kernels::linear_logprobs", mutates_args=())
@full_reductions()
def linear_logprobs_op(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, softmax: list[float],
    step: int, fp32: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return log-probs [T], entropy [T], and the rows' statistics [T, 4], which the backward needs.

    Args: `Softmax.encode`; step: rows per chunk; fp32: whether logits are kept in float32; others as in the public
    function.
    """
    check_targets(targets, head.shape[0])
    hidden, head, bias = computable(hidden), computable(head), None if bias is None else computable(bias)
    buffer, parts = logits_buffer(step, head, fp32), []
    for i in range(0, max(1, hidden.shape[0]), step):
        at = slice(i, i + step)
        exact = None if fp32 else target_logits(hidden[at], head, bias, targets[at])
        parts.append(row_stats(logits_of(hidden[at], head, bias, buffer), targets[at], Softmax.decode(softmax), exact))
    stats = torch.cat(parts)
    row = RowStats(*stats.unbind(1))
    return row.logprob.clone(), row.entropy.clone(), stats


@linear_logprobs_op.register_fake
def _(hidden, head, bias, targets, softmax, step, fp32):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    T = hidden.shape[0]
    return hidden.new_empty(T, dtype=dtype), hidden.new_empty(T, dtype=dtype), hidden.new_empty(T, 4, dtype=dtype)


@torch.library.custom_op("lead_kernels::linear_logprobs_backward", mutates_args=())
@full_reductions()
def linear_logprobs_backward_op(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, stats: torch.Tensor,
    grad_logprob: torch.Tensor, grad_entropy: torch.Tensor, softmax: list[float], step: int, fp32: bool,
    train: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return d hidden [T, D], d head [V, D], d bias [V]; empty for those that `train` does not ask for."""
    dtype, (train_hidden, train_head, train_bias) = hidden.dtype, train
    hidden, head, bias = computable(hidden), computable(head), None if bias is None else computable(bias)
    grad_hidden = torch.empty(hidden.shape if train_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    grad_head, grad_bias = (
        torch.empty(shape if wanted else (0,), dtype=accumulate(head.dtype, added), device=head.device)
        for shape, wanted, added in (
            (head.shape, train_head, -(-hidden.shape[0] // step)),
            (head.shape[:1], train_bias, 2),
        )
    )
    buffer = logits_buffer(step, head, fp32)
    for i in range(0, max(1, hidden.shape[0]), step):
        at = slice(i, i + step)
        logits_CV, grads = logits_of(hidden[at], head, bias, buffer), (grad_logprob[at], grad_entropy[at])
        exact = None if fp32 else target_logits(hidden[at], head, bias, targets[at])
        d_CV = row_gradient_(logits_CV, targets[at], stats[at], *grads, Softmax.decode(softmax), None, exact)
        to = Gradients(
            grad_hidden[at] if train_hidden else None,
            grad_head if train_head else None,
            grad_bias if train_bias else None,
        )
        dense_backward_(rounded(d_CV, head.dtype), hidden[at], head, to, first=i == 0)
    return grad_hidden.to(dtype), grad_head.to(dtype), grad_bias.to(dtype)


@linear_logprobs_backward_op.register_fake
def _(hidden, head, bias, targets, stats, grad_logprob, grad_entropy, softmax, step, fp32, train):
    shapes = zip((hidden.shape, head.shape, head.shape[:1]), train, strict=True)
    return tuple(torch.empty(s if wanted else (0,), dtype=hidden.dtype, device=hidden.device) for s, wanted in shapes)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softmax, ctx.step, ctx.fp32 = inputs
    _, _, stats = output
    ctx.save_for_backward(*tensors, stats)


def _backward(ctx: Any, grad_logprob: torch.Tensor, grad_entropy: torch.Tensor, grad_stats: Any) -> tuple:
    train = list(ctx.needs_input_grad[:3])  # hidden, head, bias
    grads = torch.ops.lead_kernels.linear_logprobs_backward(
        *ctx.saved_tensors, grad_logprob, grad_entropy, ctx.softmax, ctx.step, ctx.fp32, train
    )
    grads = [g if wanted else None for g, wanted in zip(grads, train, strict=True)]
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


linear_logprobs_op.register_autograd(_backward, setup_context=_save)
linear_logprobs_backward_op.register_autograd(no_second_derivative)


def linear_logprobs(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    head_bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    fp32_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probs of the targets and entropy under softmax(hidden @ head_weight.T / temperature).

    Differentiable in hidden, head_weight and head_bias.

    Args:
        hidden: [T, D], any float dtype.
        head_weight: [V, D], the same dtype; a plain tensor or a replicated DTensor.
        targets: int64 [T], each in 0..V-1.
        temperature: divides the logits.
        softcap: bound on the logits, softcap tanh(z / softcap), applied before the temperature; None: no bound.
            `options.Softmax` says how to fold a model's multipliers into temperature and soft cap.
        head_bias: [V], the head's dtype, added to the logits before anything else; None: no bias.
        chunk_rows: largest number of rows of logits held at once; None: as many as fit 128 MiB (2 GiB on a GPU).
        fp32_logits: keep a chunk's logits in float32; linear_policy_loss.py says what that costs.
    Returns:
        logprobs, entropy: float32 [T] (float64 for float64), differentiable.
    Raises:
        ValueError: a target outside the vocabulary (on a GPU a device-side assertion instead, without synchronisation),
            shapes or dtypes that do not match, or a sharded head.
        NotImplementedError: a second or a forward-mode derivative.
    """
    head, bias = local(head_weight, "head_weight"), None if head_bias is None else local(head_bias, "head_bias")
    check_shapes(hidden, head, bias)
    check_rows(hidden.shape[0], targets)
    refuse_forward_mode(hidden, head, bias)
    step, softmax = chunk_size(hidden.shape[0], head, chunk_rows, fp32_logits), Softmax(temperature, softcap).encode()
    logprobs, entropy, _ = torch.ops.lead_kernels.linear_logprobs(
        hidden, head, bias, targets, softmax, step, fp32_logits
    )
    return logprobs, entropy
