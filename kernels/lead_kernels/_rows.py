"""The row kernel: statistics of each row of logits that the loss needs, and the gradient written over the row.

    x = (z - max z) / temperature    log_norm = log sum exp x    logp = x_t - log_norm    H = log_norm - sum p x
    d z = (g (onehot_t - p) - h p (log p + H)) / temperature         g = d loss / d logp, h = d loss / d H

With a soft cap c, y = c tanh(z / c) replaces z throughout, and d z = d y (1 - (y / c)^2).

A target may have an exact logit z* (`target_logits`, float32) besides the rounded one in the matrix. z* then replaces
the rounded one throughout: in the maximum, log_norm, H and the gradient. A log-prob inherits the rounding error of its
own logit one to one, and that of every other logit weighted by its p, so this one number per row removes most of the
error.

Everything between statistics and gradient, from log-prob to g and h, is O(1) per row and specified in policy_loss.py,
whose kernels do all three in one go. On a CPU the kernels run in C++ (csrc/rows.cpp), on a GPU in Triton
(_triton_rows.py; not for float64); a machine with neither runs the plain torch below, which is the specification.
Half-precision logits count as exact inputs: log-sum-exp and gather are computed in float32 from the same rounded
values, so a log-prob is never above 0.

Floor per row: the statistics read V logits once (their second look is served by the cache); the gradient reads and
writes them.

Legend: T rows, V vocabulary.
"""

import functools
import importlib
import os
import warnings
from typing import Any, NamedTuple

import torch

from ._checks import refuse_second_derivative
from .options import Softmax


class RowStats(NamedTuple):
    """Statistics of every row: max of the logits, log_norm, log-prob of the target (nats), entropy (nats).

    With a soft cap the maximum is that of the capped logits; Triton returns a logit near the maximum instead. Each is
    [T], a column of the [T, 4] tensor that `row_stats` returns: RowStats(*stats.unbind(1)).
    """

    top: torch.Tensor
    log_norm: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor


@functools.cache
def cpu_extension() -> Any | None:
    """The operators of csrc, or None with a warning, given once, of what that costs."""
    try:
        importlib.import_module("lead_kernels._C")
    except ImportError as e:
        reason = str(e).splitlines()[0]
        warnings.warn(
            f"lead_kernels runs without its C++ extension, slower on a CPU ({reason}); to build it, install a C++ "
            "compiler and torch, then pip install --no-build-isolation .",
            stacklevel=2,
        )
        return None
    return torch.ops.lead_kernels_cpu


def in_cpp(logits: torch.Tensor) -> Any | None:
    """The C++ operators if they support these logits, else None."""
    takes = logits.device.type == "cpu" and logits.stride(1) == 1
    return cpu_extension() if takes else None


@functools.cache
def triton_kernels() -> Any | None:
    """The module _triton_rows, or None with a warning, given once, of what that costs."""
    try:
        return importlib.import_module("lead_kernels._triton_rows")
    except ImportError as e:
        warnings.warn(f"lead_kernels runs without Triton, slower on a GPU ({e}); pip install triton.", stacklevel=2)
        return None


def in_triton(logits: torch.Tensor) -> Any | None:
    """The Triton launchers, on a GPU or under Triton's interpreter, if they support these logits; else None."""
    if not (logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return triton_kernels() if logits.dtype != torch.float64 and logits.stride(-1) == 1 else None


def backend(device: torch.device) -> str:
    """Describe in words which kernels run on this device."""
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        if triton_kernels():
            return f"Triton {importlib.import_module('triton').__version__}"
        return "plain torch, slower (Triton is not installed)"
    if cpu_extension():
        return f"C++ ({torch.backends.cpu.get_cpu_capability()})"
    return "plain torch, slower (the C++ extension was not built)"


class Ready(torch.autograd.Function):
    """Ready.apply(loss, [gradient or None for each input], *inputs): a loss whose forward has computed its gradients.

    The backward only multiplies them by the gradient of the loss, which is usually 1. Unless autograd keeps the graph,
    it hands out the gradients themselves, scaled in place if need be, so that no second matrix is allocated.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, grads: list[torch.Tensor | None], *inputs: Any):  # type: ignore
        ctx.grads = grads  # saved tensors would be shared, and therefore copied when handed out
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor):  # type: ignore[override]
        refuse_second_derivative()
        grads, again = ctx.grads, torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore
        if grads is None:
            raise RuntimeError("backward through this loss a second time: give retain_graph=True to the first.")
        if not again:
            ctx.grads = None
        return None, None, *(None if g is None else scaled(g, factor, keep=again) for g in grads)


def scaled(grad: torch.Tensor, factor: torch.Tensor, keep: bool) -> torch.Tensor:
    """grad x factor (0-dim): computed in place, or grad itself for a factor of 1, unless grad is to be kept."""
    traced = type(grad) is not torch.Tensor or type(factor) is not torch.Tensor
    if not (keep or traced):
        if kernels := in_triton(grad):
            return kernels.scale_triton_(grad, factor)
        if grad.device.type == "cpu":
            number = factor.item()
            return grad if number == 1 else grad.mul_(number)
    return grad * factor.to(grad.dtype)


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """softcap tanh(z / softcap), or z itself without a soft cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def with_targets(
    logits: torch.Tensor, targets: torch.Tensor, target_logits: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The logits in `dtype`, with those of the targets replaced by `target_logits` [T] where given."""
    z = logits.to(dtype)
    return z if target_logits is None else z.scatter(1, targets[:, None], target_logits[:, None].to(dtype))


def row_stats_reference(
    logits: torch.Tensor, targets: torch.Tensor, softmax: Softmax, target_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Specification of `row_stats`: max, log_norm, logp, H of every row, float32 (float64 for float64) [T, 4]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    y = capped(with_targets(logits, targets, target_logits, dtype), softmax.softcap)
    top = y.amax(1, keepdim=True)
    x = (y - top) / softmax.temperature
    log_norm = x.logsumexp(1, keepdim=True)
    p = (x - log_norm).exp()
    entropy = (log_norm - torch.where(p > 0, p * x, 0.0).sum(1, keepdim=True)).clamp(min=0)
    return torch.cat([top, log_norm, x.gather(1, targets[:, None]) - log_norm, entropy], 1)


def row_gradient_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor,
    softmax: Softmax,
    target_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Specification of `row_gradient_`: the gradient [T, V] in the logits' dtype, rounded once, after all scaling."""
    top, log_norm, _, entropy = stats.unsqueeze(-1).unbind(1)
    temperature, softcap = softmax
    z = with_targets(logits, targets, target_logits, stats.dtype)
    y = capped(z, softcap)
    x = (y - top) / temperature
    p = (x - log_norm).exp()
    inner = torch.where(p > 0, x - log_norm + entropy, 0.0)
    grad = p * (-g[:, None] - h[:, None] * inner) / temperature
    grad.scatter_add_(1, targets[:, None], (g / temperature)[:, None])
    if softcap is not None:
        grad *= torch.cosh(z / softcap) ** -2  # 1 - tanh^2, without its cancellation
    return grad.to(logits.dtype)


def row_stats(
    logits: torch.Tensor, targets: torch.Tensor, softmax: Softmax, target_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute max, log_norm, log-prob of the target and entropy of every row.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64.
        targets: int64 [T], each in 0..V-1 (checked by the caller).
        softmax: temperature and soft cap.
        target_logits: exact logits of the targets, before the cap and with the head's bias, float32 (float64 for
            float64) [T]; they replace those in `logits`. None: use those in `logits`.
    Returns:
        float32 (float64 for float64) [T, 4].
    """
    if kernels := in_triton(logits):
        return kernels.row_stats_triton(logits, targets, softmax, target_logits)
    if cpp := in_cpp(logits):
        exact = None if target_logits is None else target_logits.contiguous()
        return cpp.row_stats(logits, targets.contiguous(), *softmax, exact)
    return row_stats_reference(logits, targets, softmax, target_logits)


def row_gradient_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    stats: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor,
    softmax: Softmax,
    out: torch.Tensor | None = None,
    target_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the gradient over `logits`, or to `out`, from d loss / d logp and d loss / d H of every row, [T] each.

    `stats` is what `row_stats` returned, `target_logits` what it was given.
    """
    to = logits if out is None else out
    if kernels := in_triton(logits):
        kernels.row_gradient_triton_(logits, targets, stats, g, h, softmax, to, target_logits)
        return to
    if cpp := in_cpp(logits):
        temperature, softcap = softmax
        grads = g.contiguous(), h.contiguous()
        exact = None if target_logits is None else target_logits.contiguous()
        cpp.row_gradient_(logits, targets.contiguous(), stats, *grads, temperature, to, softcap, exact)
        return to
    return to.copy_(row_gradient_reference(logits, targets, stats, g, h, softmax, target_logits))
