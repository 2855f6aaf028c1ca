"""Hidden states and head weight -> policy loss and both gradients, in chunks of rows: logits are never whole.

Per chunk of C rows: logits_CV = hidden_CD head_VD^T; loss and d logits by the row kernel of policy_loss.py;
d hidden_CD = dlogits head; d head_VD += dlogits^T hidden, accumulated in fp32 whatever the number of chunks. The
loss's gradient needs only what the forward has, so it is taken there and the backward only scales it.

Floor: three GEMMs, 6 T D V FLOPs; extra memory one chunk of logits and, where the head is trained, d head in fp32.
The sequence modes (GSPO ratio, sequence importance) need every row's log-prob first: a fourth GEMM.

Legend: T rows, D hidden, V vocabulary, C rows of a chunk.
"""

from typing import Any

import torch

from .policy_loss import PolicyLoss, attach, check_levels, check_targets, policy_rows_, sequence_terms
from .rows import row_stats

CHUNK_BYTES = 256 << 20


def chunk_size(rows: int, vocabulary: int, chunk_rows: int | None) -> int:
    """Rows of a chunk: as asked, else as many as give 256 MiB of fp32 logits on a CPU, at least 1."""
    return max(1, min(rows or 1, chunk_rows or CHUNK_BYTES // (4 * vocabulary)))


def local(weight: torch.Tensor) -> torch.Tensor:
    """A head weight as a plain tensor. Raises ValueError for one that is still sharded."""
    if hasattr(weight, "placements"):
        if any(not p.is_replicate() for p in weight.placements):  # type: ignore[attr-defined]
            raise ValueError(
                "head_weight is a sharded DTensor: call this inside the FSDP module's forward, or gather it."
            )
        return weight.to_local()  # type: ignore[attr-defined]
    return weight


def computable(x: torch.Tensor) -> torch.Tensor:
    """x, in float32 on a CPU without half-precision arithmetic, where such products are up to 100 times slower."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half and x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else x


def linear_policy_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    sequence_ids: torch.Tensor,
    weights: torch.Tensor,
    advantages: torch.Tensor,
    behavior_logprobs: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    temperature: float = 1.0,
    ratio: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance_cap: float | None = None,
    importance_mode: str = "truncate",
    importance_level: str = "token",
    kl: str = "k3",
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    chunk_rows: int | None = None,
) -> PolicyLoss:
    """`policy_loss` of `hidden @ head_weight.T`, differentiable in hidden and head_weight.

    Args:
        hidden: [T, D], any float dtype, any strides.
        head_weight: [V, D], same dtype; a plain tensor or a replicated DTensor.
        chunk_rows: rows of logits at once; None: as many as fit 256 MiB in fp32.
        the rest: as `policy_loss`.
    Returns:
        PolicyLoss.
    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, a sharded head.
    """
    head = local(head_weight)
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, head_weight {list(head.shape)} and targets {list(targets.shape)}: "
            "give [T, D], [V, D] and [T]."
        )
    check_targets(targets, head.shape[0])
    check_levels(ratio, importance_level, importance_cap)
    rows, step = hidden.shape[0], chunk_size(hidden.shape[0], head.shape[0], chunk_rows)
    train_hidden, train_head = hidden.requires_grad, head.requires_grad
    fixed: dict[str, Any] = {
        "weights": weights,
        "advantages": advantages,
        "temperature": temperature,
        "ratio": ratio,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "importance_cap": importance_cap,
        "importance_mode": importance_mode,
        "kl": kl,
        "kl_coef": kl_coef,
        "entropy_coef": entropy_coef,
    }
    with torch.no_grad():
        h, w = computable(hidden.detach()), computable(head.detach())
        log_ratio = importance = None
        if ratio == "sequence" or importance_level == "sequence":
            parts = [
                row_stats(h[i : i + step] @ w.T, targets[i : i + step], temperature)[:, 2] for i in range(0, rows, step)
            ]
            every = torch.cat(parts) if parts else h.new_zeros(0)
            log_ratio, importance = sequence_terms(
                every, sequence_ids, advantages.numel(), behavior_logprobs, old_logprobs, ratio, importance_level
            )
        grad_hidden = torch.empty_like(h) if train_hidden else None
        grad_head = torch.zeros(w.shape, dtype=_accumulate(w.dtype), device=w.device) if train_head else None
        losses, logprobs, entropies, sums = [], [], [], []
        for i in range(0, max(rows, 1), step):
            at = slice(i, i + step)

            def cut(x: torch.Tensor | None, at: slice = at) -> torch.Tensor | None:
                return None if x is None else x[at]

            logits_CV = h[at] @ w.T
            out, logprob_C, entropy_C = policy_rows_(
                logits_CV,
                targets[at],
                gradient=logits_CV if train_hidden or train_head else None,
                sequence_ids=sequence_ids[at],
                behavior_logprobs=cut(behavior_logprobs),
                old_logprobs=cut(old_logprobs),
                reference_logprobs=cut(reference_logprobs),
                sequence_log_ratio=cut(log_ratio),
                sequence_importance=cut(importance),
                **fixed,
            )
            losses.append(out.loss_T.sum())
            logprobs.append(logprob_C)
            entropies.append(entropy_C)
            sums.append(out.metrics)
            if grad_hidden is not None:  # logits_CV holds their gradient now
                grad_hidden[at] = logits_CV @ w
            if grad_head is not None:
                grad_head += logits_CV.T @ h[at]
        loss = torch.stack(losses).sum()
        metrics = {
            k: torch.stack([m[k] for m in sums]).amax() if k.startswith("max_") else sum_of([m[k] for m in sums])
            for k in sums[0]
        }
    pairs = []
    if grad_hidden is not None:
        pairs.append((hidden, grad_hidden.to(hidden.dtype)))
    if grad_head is not None:
        pairs.append((head, grad_head.to(head.dtype)))
    return PolicyLoss(attach(loss, pairs) if pairs else loss, torch.cat(logprobs), torch.cat(entropies), metrics)


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).sum()


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
