"""Hidden states and head weight -> policy loss and both gradients, in chunks of rows: logits are never whole.

Per chunk of C rows: logits_CV = hidden_CD head_VD^T; loss and d logits by the row kernel of policy_loss.py;
d hidden_CD = dlogits head; d head_VD += dlogits^T hidden, accumulated in fp32 whatever the number of chunks. The
loss's gradient needs only what the forward has, so it is taken there and the backward only scales it.

Floor: three GEMMs, 6 T D V FLOPs; extra memory one chunk of logits and, where the head is trained, d head in fp32.
The sequence modes (GSPO ratio, sequence importance) need every row's log-prob first: a fourth GEMM.

Legend: T rows, D hidden, V vocabulary, C rows of a chunk.
"""

import functools
from typing import Any

import torch

from .lead_advantage import GroupTable
from .policy_loss import (
    METRICS,
    PolicyLoss,
    check_levels,
    check_targets,
    compiled_or_no_grad,
    named,
    policy_rows_,
    sequence_terms,
)
from .rows import Ready, row_stats

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}


def chunk_size(rows: int, head: torch.Tensor, chunk_rows: int | None) -> int:
    """Rows of a chunk: as asked, else `rows` in equal chunks of at most 64 MiB of logits on a CPU, 2 GiB on a GPU.

    On a GPU that is up to 7,061 rows of V = 152,064 in bf16: enough for the products to run at full rate.
    """
    fit = chunk_rows or max(1, CHUNK_BYTES.get(head.device.type, 2 << 30) // (head.shape[0] * head.element_size()))
    return -(-max(1, rows) // -(-max(1, rows) // fit))


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total (+)= a @ b, added in total's dtype inside the product; `first` overwrites what total holds."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif not total.is_cuda:
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif adds_in_product(total.device):
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:
        add_in_slices_(total, a, b, first)


@functools.cache
def adds_in_product(device: torch.device) -> bool:
    """Whether the installed torch adds a product of bf16 matrices to a float32 one inside the product, on a GPU.

    torch 2.14 does and older ones refuse a float32 `self`; which of them is not written anywhere, so it is tried once.
    """
    a, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def add_in_slices_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total (+)= a @ b in slices of rows, each product rounded to total's dtype alone; at most 256 MiB beside total."""
    rows = max(1, (256 << 20) // (b.shape[1] * total.element_size()))
    for i in range(0, total.shape[0], rows):
        product = torch.mm(a[i : i + rows], b, out_dtype=total.dtype)
        total[i : i + rows].copy_(product) if first else total[i : i + rows].add_(product)


def local(weight: torch.Tensor) -> torch.Tensor:
    """A head weight as a plain tensor. Raises ValueError for one that is still sharded."""
    if hasattr(weight, "placements"):
        if any(not p.is_replicate() for p in weight.placements):  # type: ignore[attr-defined]
            raise ValueError(
                "head_weight is a sharded DTensor: call this inside the FSDP module's forward, or gather it."
            )
        return weight.to_local()  # type: ignore[attr-defined]
    return weight


def check_shapes(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> None:
    """Raises ValueError for shapes or dtypes that do not fit together."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, head_weight {list(head.shape)} and targets {list(targets.shape)}: "
            "give [T, D], [V, D] and [T]."
        )
    if hidden.dtype != head.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and head_weight {head.dtype}: give one dtype.")


def computable(x: torch.Tensor) -> torch.Tensor:
    """x, in float32 on a CPU without half-precision arithmetic, where such products are up to 100 times slower."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half and x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else x


@torch.library.custom_op("lead_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss_op(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, sequence_ids: torch.Tensor, weights: torch.Tensor,
    advantages: torch.Tensor, behavior: torch.Tensor | None, old: torch.Tensor | None, reference: torch.Tensor | None,
    temperature: float, ratio: str, clip_low: float, clip_high: float, dual_clip: float | None,
    importance_cap: float | None, importance_mode: str, importance_level: str, kl: str, kl_coef: float,
    entropy_coef: float, step: int, train_hidden: bool, train_head: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """loss, log-probs [T], entropy [T], metrics [12], d hidden [T, D], d head [V, D] (empty where not asked for)."""
    check_targets(targets, head.shape[0])
    rows, h, w = hidden.shape[0], computable(hidden), computable(head)
    log_ratio = importance = None
    if ratio == "sequence" or importance_level == "sequence":
        parts = [
            row_stats(h[i : i + step] @ w.T, targets[i : i + step], temperature)[:, 2] for i in range(0, rows, step)
        ]
        every = torch.cat(parts) if parts else h.new_zeros(0)
        log_ratio, importance = sequence_terms(
            every, sequence_ids, weights.numel(), behavior, old, ratio, importance_level
        )
    grad_hidden = torch.empty(h.shape if train_hidden else (0,), dtype=h.dtype, device=h.device)
    grad_head = torch.empty(w.shape if train_head else (0,), dtype=_accumulate(w.dtype), device=w.device)
    buffer = torch.empty(step, w.shape[0], dtype=h.dtype, device=h.device)
    losses, logprobs, entropies, sums = [], [], [], []
    for i in range(0, max(rows, 1), step):
        at = slice(i, i + step)

        def cut(x: torch.Tensor | None, at: slice = at) -> torch.Tensor | None:
            return None if x is None else x[at]

        logits_CV = torch.mm(h[at], w.T, out=buffer[: len(h[at])])
        loss_C, logprob_C, entropy_C, metrics = policy_rows_(
            logits_CV,
            targets[at],
            sequence_ids=sequence_ids[at],
            weights=weights,
            advantages=advantages,
            behavior_logprobs=cut(behavior),
            old_logprobs=cut(old),
            reference_logprobs=cut(reference),
            sequence_log_ratio=cut(log_ratio),
            sequence_importance=cut(importance),
            temperature=temperature,
            gradient=logits_CV if train_hidden or train_head else None,
            ratio=ratio,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            importance_cap=importance_cap,
            importance_mode=importance_mode,
            kl=kl,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
        )
        losses.append(loss_C.sum())
        logprobs.append(logprob_C)
        entropies.append(entropy_C)
        sums.append(metrics)
        if train_hidden:  # logits_CV holds their gradient now
            torch.mm(logits_CV, w, out=grad_hidden[at])
        if train_head:
            add_product_(grad_head, logits_CV.T, h[at], first=i == 0)
    parts = torch.stack(sums)
    is_sum = sum(not k.startswith("max_") for k in METRICS)  # the maxima stand last
    metrics = torch.cat([parts[:, :is_sum].sum(0), parts[:, is_sum:].amax(0)])
    return (
        torch.stack(losses).sum(), torch.cat(logprobs), torch.cat(entropies), metrics, grad_hidden.to(hidden.dtype),
        grad_head.to(head.dtype),
    )  # fmt: skip


@linear_policy_loss_op.register_fake
def _(hidden, head, targets, *rest):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = [hidden.new_empty(targets.shape, dtype=dtype) for _ in range(2)]
    small = [hidden.new_empty(s, dtype=dtype) for s in ((), (len(METRICS),))]
    d_hidden = torch.empty(hidden.shape if rest[-2] else (0,), dtype=hidden.dtype, device=hidden.device)
    d_head = torch.empty(head.shape if rest[-1] else (0,), dtype=head.dtype, device=head.device)
    return small[0], *rows, small[1], d_hidden, d_head


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[4], output[5])


def _scale(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple:
    """The gradients were taken in the forward: the backward only scales them."""
    grads = [g * grad_loss.to(g.dtype) if g.dim() == 2 else None for g in ctx.saved_tensors]
    return *grads, *[None] * 21


linear_policy_loss_op.register_autograd(_scale, setup_context=_save)


def linear_policy_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    sequence_ids: torch.Tensor,
    weights: torch.Tensor,
    advantages: torch.Tensor | GroupTable,
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
        chunk_rows: most rows of logits at once; None: as many as fit 64 MiB (2 GiB on a GPU).
        the rest: as `policy_loss`.
    Returns:
        PolicyLoss.
    Raises:
        ValueError: shapes that do not fit, a target outside the vocabulary, a sharded head.
    """
    head = local(head_weight)
    check_shapes(hidden, head, targets)
    check_levels(ratio, importance_level, importance_cap)
    if isinstance(advantages, GroupTable):
        advantages = advantages.advantages()
    step = chunk_size(hidden.shape[0], head, chunk_rows)
    on = torch.is_grad_enabled()
    train = on and hidden.requires_grad, on and head.requires_grad
    with compiled_or_no_grad():
        loss, logprobs, entropy, metrics, *grads = torch.ops.lead_kernels.linear_policy_loss(
            hidden, head, targets, sequence_ids, weights, advantages, behavior_logprobs, old_logprobs,
            reference_logprobs, temperature, ratio, clip_low, clip_high, dual_clip, importance_cap, importance_mode,
            importance_level, kl, kl_coef, entropy_coef, step, *train,
        )  # fmt: skip
    if any(train) and not torch.compiler.is_compiling():
        grads = [g if wanted else None for g, wanted in zip(grads, train, strict=True)]
        loss = Ready.apply(loss, grads, hidden, head)
        del grads
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named(metrics.detach()))


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
