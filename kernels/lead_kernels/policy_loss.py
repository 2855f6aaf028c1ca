"""Logits -> log-probs, entropy, clipped policy loss, metrics and the gradient with respect to the logits.

For a row with logits z / temperature, target t, sequence s, advantage A, token weight u = weights[s]:

    logp = z_t - lse(z)        H = lse - sum p z        p = softmax(z)
    r    = exp(min(logp - old, 20))                     old: given, or logp itself, detached (ratio 1)
    w    = min(exp(old - behavior), cap)                truncated importance weight, detached; or 0 above cap (mask)
    l    = -w min(r A, clip(r, 1 - low, 1 + high) A)    GRPO; dual clip: for A < 0 at most -w c A
    l    = -w A sg(min(r, 1 + high)) logp               CISPO
    GSPO: r = exp(mean over the sequence of logp - old), one ratio for all its tokens
    loss = sum u (l + kl_coef KL - entropy_coef H)

and d loss / d z = [ g (onehot_t - p) - h p (log p + H) ] / temperature, with g = d loss / d logp, h = d loss / d H.

dtypes: logits bf16, fp16, fp32 or fp64; accumulated in fp32 (fp64 for fp64); loss, log-probs, entropy fp32 (fp64);
gradient in the logits' dtype, scaled before rounding. Refuses targets outside 0..V-1.

Floor per row: one read and one write of V logits; everything else is O(1) a row.

Legend: T rows, V vocabulary, S sequences.
"""

import contextlib
from typing import Any, Literal, NamedTuple

import torch

from .lead_advantage import GroupTable
from .rows import Ready, in_triton, row_gradient_, row_stats

LOG_RATIO_CAP = 20.0
METRICS = ("tokens", "entropy", "kl_behavior", "clip_low", "clip_high", "ratio", "ratio_capped", "importance_truncated",
           "logprob_diff", "kl_reference", "max_logprob", "max_logprob_diff")  # fmt: skip


class PolicyLoss(NamedTuple):
    """loss: 0-dim, differentiable; logprobs, entropy: [T], detached; metrics: 0-dim sums (`max_*`: maxima) over T."""

    loss: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Rows(NamedTuple):
    """Per-row results: loss (weighted), d loss / d logp, d loss / d H, and the metrics' sums."""

    loss_T: torch.Tensor
    grad_logprob_T: torch.Tensor
    grad_entropy_T: torch.Tensor
    metrics: dict[str, torch.Tensor]


def loss_weights(
    lengths: torch.Tensor,
    mean: Literal["response", "token", "constant"] = "response",
    *,
    n_sequences: int,
    n_tokens: int,
    constant: float | None = None,
) -> torch.Tensor:
    """Weight of each token of each sequence, so that a plain sum over all packs and ranks is the batch's mean.

    Args:
        lengths: response tokens of every sequence, [S].
        mean: `response`: mean over tokens of each response, then over responses (GRPO); `token`: over all tokens
            (DAPO); `constant`: sum over tokens / (responses x constant) (Dr. GRPO).
        n_sequences, n_tokens: of the whole batch, over all ranks and packs.
        constant: tokens, for `constant`.
    Returns:
        float32 [S].
    """
    lengths = lengths.float()
    if mean == "response":
        return 1.0 / (n_sequences * lengths.clamp(min=1))
    if mean == "token":
        return torch.full_like(lengths, 1.0 / n_tokens)
    if constant is None or constant <= 0:
        raise ValueError(f"mean is 'constant' and constant is {constant}: give the number of tokens to divide by.")
    return torch.full_like(lengths, 1.0 / (n_sequences * constant))


def check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    """Raises ValueError if a target is no column of the logits; on a GPU the error is asynchronous, without a wait."""
    if targets.is_cuda:
        inside = ((targets >= 0) & (targets < vocabulary)).all()
        return torch._assert_async(inside, f"a target is outside the vocabulary of {vocabulary}")  # type: ignore
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= vocabulary):
        bad = targets[(targets < 0) | (targets >= vocabulary)][0]
        raise ValueError(f"target {int(bad)} is outside the vocabulary of {vocabulary}: check tokenizer and head.")


def check_levels(ratio: str, importance_level: str, importance_cap: float | None) -> None:
    """Raises ValueError for a weight per token beside one ratio for the whole sequence."""
    if ratio == "sequence" and importance_cap is not None and importance_level == "token":
        raise ValueError("ratio is 'sequence' and importance_level is 'token': give importance_level='sequence'.")


def rows_loss(
    logprob_T: torch.Tensor,
    entropy_T: torch.Tensor,
    advantage_T: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    behavior_T: torch.Tensor | None,
    old_T: torch.Tensor | None,
    reference_T: torch.Tensor | None,
    sequence_ratio_T: torch.Tensor | None,
    importance_T: torch.Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    importance_cap: float | None,
    importance_mode: str,
    kl: str,
    kl_coef: float,
    entropy_coef: float,
) -> Rows:
    """The loss of every row and its derivative with respect to the row's log-prob and entropy (all O(T))."""
    old_T = logprob_T if old_T is None else old_T.to(logprob_T.dtype)
    log_r = logprob_T - old_T if sequence_ratio_T is None else sequence_ratio_T
    r = log_r.clamp(max=LOG_RATIO_CAP).exp()
    below, above = r < 1 - clip_low, r > 1 + clip_high
    a = advantage_T
    live = torch.where(a > 0, ~above, ~below)  # where the unclipped branch gives the smaller objective
    if ratio == "cispo":
        # The clipped ratio is a constant weight on log p.
        weight = r.clamp(1 - clip_low, 1 + clip_high)
        loss, grad = -weight * a * logprob_T, -weight * a
    else:
        objective = torch.minimum(r * a, r.clamp(1 - clip_low, 1 + clip_high) * a)
        loss, grad = -objective, torch.where(live, -r * a, 0.0)
        if dual_clip is not None:
            bounded = (a < 0) & (loss > -dual_clip * a)
            loss, grad = torch.where(bounded, -dual_clip * a, loss), torch.where(bounded, 0.0, grad)
        grad = torch.where(log_r > LOG_RATIO_CAP, 0.0, grad)
    truncated = torch.zeros_like(r, dtype=torch.bool)
    if importance_cap is not None and behavior_T is not None:
        log_w = (old_T - behavior_T if importance_T is None else importance_T).clamp(max=LOG_RATIO_CAP)
        w = log_w.exp()
        truncated = w > importance_cap
        w = torch.where(truncated, 0.0, w) if importance_mode == "mask" else w.clamp(max=importance_cap)
        loss, grad = loss * w, grad * w
    kl_T = torch.zeros_like(r)
    if reference_T is not None and kl_coef:
        d = reference_T - logprob_T
        if kl == "k1":
            kl_T, dkl = -d, torch.ones_like(d)
        elif kl == "k2":
            kl_T, dkl = 0.5 * d * d, -d
        else:
            e = d.clamp(max=LOG_RATIO_CAP).exp()
            kl_T, dkl = e - 1 - d, 1 - torch.where(d > LOG_RATIO_CAP, 0.0, e)
        loss, grad = loss + kl_coef * kl_T, grad + kl_coef * dkl
    loss = loss - entropy_coef * entropy_T

    zero = torch.zeros((), dtype=r.dtype, device=r.device)
    diff = zero[None] if behavior_T is None else (logprob_T - behavior_T)
    d = diff.neg().clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP)
    clipped = weight_T != 0
    metrics = {
        "tokens": torch.tensor(float(r.numel()), device=r.device),
        "entropy": entropy_T.sum(),
        "kl_behavior": (d.neg().exp() - 1 + d).sum(),  # k3 of behaviour || policy, sampled from the behaviour policy
        "clip_low": (below & (a < 0) & clipped).sum().float(),
        "clip_high": (above & (a > 0) & clipped).sum().float(),
        "ratio": r.sum(),
        "ratio_capped": (log_r > LOG_RATIO_CAP).sum().float(),
        "importance_truncated": truncated.sum().float(),
        "logprob_diff": diff.abs().sum(),
        "kl_reference": kl_T.sum(),
        "max_logprob": logprob_T.amax() if logprob_T.numel() else zero - float("inf"),
        "max_logprob_diff": diff.abs().amax() if diff.numel() else zero,
    }
    return Rows(weight_T * loss, weight_T * grad, torch.full_like(weight_T, -entropy_coef) * weight_T, metrics)


def sequence_mean(x_T: torch.Tensor, sequence_ids: torch.Tensor, n: int, mean: bool = True) -> torch.Tensor:
    """Each row's sequence mean (or sum) of x, back on the rows."""
    index = sequence_ids.long()
    total = torch.zeros(n, dtype=x_T.dtype, device=x_T.device).index_add(0, index, x_T)
    if mean:
        total = total / torch.zeros_like(total).index_add(0, index, torch.ones_like(x_T)).clamp(min=1)
    return total[index]


def policy_rows_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    sequence_ids: torch.Tensor,
    weights: torch.Tensor,
    advantages: torch.Tensor | GroupTable,
    behavior_logprobs: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
    reference_logprobs: torch.Tensor | None,
    sequence_log_ratio: torch.Tensor | None,
    sequence_importance: torch.Tensor | None,
    temperature: float,
    gradient: torch.Tensor | None,
    **loss: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss [T], log-probs [T], entropy [T] and metrics [12] in the order of METRICS.

    The logits' gradient is written to `gradient`, which may be the logits themselves; None: forward only.
    """
    if kernels := in_triton(logits):
        table = isinstance(advantages, GroupTable)
        loss_T, logprob_T, entropy_T, sums = kernels.policy_rows_triton(
            logits,
            targets,
            sequence_ids,
            weights,
            None if table else advantages,
            advantages.packed() if table else NO_GROUPS,
            behavior_T=behavior_logprobs,
            old_T=old_logprobs,
            reference_T=reference_logprobs,
            sequence_ratio_T=sequence_log_ratio,
            importance_T=sequence_importance,
            temperature=temperature,
            gradient=gradient,
            **loss,
        )
        tokens = torch.full((1,), float(loss_T.numel()), device=logits.device)
        most = logprob_T.amax() if loss_T.numel() else tokens[0] - float("inf")
        diff = sums[6].amax() if loss_T.numel() else torch.zeros_like(most)
        metrics = torch.cat([tokens, entropy_T.sum()[None], sums.sum(1), torch.stack([most, diff])])
        return loss_T, logprob_T, entropy_T, metrics
    if isinstance(advantages, GroupTable):
        advantages = advantages.advantages()
    stats = row_stats(logits, targets, temperature)
    logprob_T, entropy_T = stats[:, 2], stats[:, 3]
    dtype, index = stats.dtype, sequence_ids.long()
    rows = rows_loss(
        logprob_T,
        entropy_T,
        advantages.to(dtype)[index],
        weights.to(dtype)[index],
        behavior_T=None if behavior_logprobs is None else behavior_logprobs.to(dtype),
        old_T=old_logprobs,
        reference_T=None if reference_logprobs is None else reference_logprobs.to(dtype),
        sequence_ratio_T=sequence_log_ratio,
        importance_T=sequence_importance,
        **loss,
    )
    if gradient is not None:
        row_gradient_(logits, targets, stats, rows.grad_logprob_T, rows.grad_entropy_T, temperature, gradient)
    metrics = torch.stack([rows.metrics[k].to(dtype) for k in METRICS])
    return rows.loss_T, logprob_T.clone(), entropy_T.clone(), metrics


def _logits_loss(
    logits: torch.Tensor, targets: torch.Tensor, advantages: torch.Tensor | GroupTable, out: torch.Tensor | None,
    *, temperature: float, ratio: str, importance_level: str, sequence_ids: torch.Tensor,
    behavior_logprobs: torch.Tensor | None, old_logprobs: torch.Tensor | None, n_sequences: int, **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    check_targets(targets, logits.shape[1])
    log_ratio = importance = None
    if ratio == "sequence" or importance_level == "sequence":
        log_ratio, importance = sequence_terms(
            row_stats(logits, targets, temperature)[:, 2],
            sequence_ids,
            n_sequences,
            behavior_logprobs,
            old_logprobs,
            ratio,
            importance_level,
        )
    loss_T, logprobs, entropy, metrics = policy_rows_(
        logits,
        targets,
        sequence_ids=sequence_ids,
        advantages=advantages,
        behavior_logprobs=behavior_logprobs,
        old_logprobs=old_logprobs,
        sequence_log_ratio=log_ratio,
        sequence_importance=importance,
        temperature=temperature,
        gradient=out,
        ratio=ratio,
        **rest,
    )
    return loss_T.sum(), logprobs, entropy, metrics


@torch.library.custom_op("lead_kernels::policy_loss", mutates_args=())
def policy_loss_op(
    logits: torch.Tensor, targets: torch.Tensor, sequence_ids: torch.Tensor, weights: torch.Tensor,
    advantages: torch.Tensor | None, correct: torch.Tensor | None, lengths: torch.Tensor | None,
    wrong: torch.Tensor | None, penalty: torch.Tensor | None, group_size: int, floats: list[float], ints: list[int],
    behavior: torch.Tensor | None, old: torch.Tensor | None, reference: torch.Tensor | None, temperature: float,
    ratio: str, clip_low: float, clip_high: float, dual_clip: float | None, importance_cap: float | None,
    importance_mode: str, importance_level: str, kl: str, kl_coef: float, entropy_coef: float, gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """loss, log-probs [T], entropy [T], metrics [12], d logits [T, V] (empty if `gradient` is False)."""
    out = torch.empty(logits.shape if gradient else (0,), dtype=logits.dtype, device=logits.device)
    if advantages is None:
        assert correct is not None and lengths is not None
        given: torch.Tensor | GroupTable = GroupTable.unpacked(
            (correct, lengths, wrong, penalty, group_size, floats, ints)
        )
    else:
        given = advantages
    values = _logits_loss(
        logits, targets, given, out if gradient else None, sequence_ids=sequence_ids, weights=weights,
        behavior_logprobs=behavior, old_logprobs=old, reference_logprobs=reference, n_sequences=weights.numel(),
        temperature=temperature, ratio=ratio, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        importance_cap=importance_cap, importance_mode=importance_mode, importance_level=importance_level, kl=kl,
        kl_coef=kl_coef, entropy_coef=entropy_coef,
    )  # fmt: skip
    return *values, out


@policy_loss_op.register_fake
def _(logits, targets, *rest):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = [logits.new_empty(targets.shape, dtype=dtype) for _ in range(2)]
    small = [logits.new_empty(s, dtype=dtype) for s in ((), (len(METRICS),))]
    return small[0], *rows, small[1], logits.new_empty(logits.shape if rest[-1] else (0,))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[4])


def _scale(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple:
    """The gradient was taken in the forward: the backward only scales it."""
    (grad,) = ctx.saved_tensors
    return grad * grad_loss.to(grad.dtype) if grad.dim() == 2 else None, *[None] * 26


policy_loss_op.register_autograd(_scale, setup_context=_save)


def policy_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    sequence_ids: torch.Tensor,
    weights: torch.Tensor,
    advantages: torch.Tensor | GroupTable,
    behavior_logprobs: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    temperature: float = 1.0,
    ratio: Literal["token", "sequence", "cispo"] = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance_cap: float | None = None,
    importance_mode: Literal["truncate", "mask"] = "truncate",
    importance_level: Literal["token", "sequence"] = "token",
    kl: Literal["k1", "k2", "k3"] = "k3",
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    inplace: bool = False,
) -> PolicyLoss:
    """Policy loss of packed rows of logits.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64.
        targets: the sampled tokens, int64 [T], each in 0..V-1.
        sequence_ids: each row's index into the [S] tensors, any integer type, [T]. Sequences are whole: all response
            rows of a sequence are in this call where ratio or importance_level is `sequence`.
        weights: weight of each token of a sequence, [S]; see `loss_weights`.
        advantages: [S], or the GroupTable they follow from: on a GPU the same kernel then computes them.
        inplace: write the gradient over the logits, which are lost (not under torch.compile).
        behavior_logprobs: log-probs under the policy that sampled, [T].
        old_logprobs: denominator of the ratio, [T]; None: the policy itself, detached.
        reference_logprobs: of the reference model, [T], for the KL term.
        temperature: divides the logits, as it did when the tokens were sampled.
        ratio, clip_low, clip_high, dual_clip, importance_*, kl, kl_coef, entropy_coef: see the formulas above.
    Returns:
        PolicyLoss.
    Raises:
        ValueError: a target outside the vocabulary, or a token-level importance weight beside a sequence ratio.
    """
    check_levels(ratio, importance_level, importance_cap)
    options: dict[str, Any] = {
        "temperature": temperature, "ratio": ratio, "clip_low": clip_low, "clip_high": clip_high,
        "dual_clip": dual_clip, "importance_cap": importance_cap, "importance_mode": importance_mode,
        "importance_level": importance_level, "kl": kl, "kl_coef": kl_coef, "entropy_coef": entropy_coef,
    }  # fmt: skip
    train = logits.requires_grad and torch.is_grad_enabled()
    if inplace:
        with torch.no_grad():
            grad = logits.detach()
            loss, logprobs, entropy, metrics = _logits_loss(
                grad, targets, advantages, grad if train else None, sequence_ids=sequence_ids,
                weights=weights, behavior_logprobs=behavior_logprobs, old_logprobs=old_logprobs,
                reference_logprobs=reference_logprobs, n_sequences=weights.numel(), **options,
            )  # fmt: skip
    else:
        table = isinstance(advantages, GroupTable)
        with compiled_or_no_grad():
            loss, logprobs, entropy, metrics, grad = torch.ops.lead_kernels.policy_loss(
                logits, targets, sequence_ids, weights, None if table else advantages,
                *(advantages.packed() if table else NO_GROUPS), behavior_logprobs, old_logprobs, reference_logprobs,
                **options, gradient=train,
            )  # fmt: skip
    if train and not torch.compiler.is_compiling():
        loss = Ready.apply(loss, [grad], logits)
        del grad
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named(metrics.detach()))


def compiled_or_no_grad() -> contextlib.AbstractContextManager:
    """Under torch.compile the operators' own autograd is traced; else `Ready` takes their gradients on."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.no_grad()


def named(metrics: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(METRICS, metrics.unbind(), strict=True))


NO_GROUPS = (None, None, None, None, 1, [0.0] * 10, [0] * 6)


def sequence_terms(
    logprob_T: torch.Tensor,
    sequence_ids: torch.Tensor,
    n: int,
    behavior: torch.Tensor | None,
    old: torch.Tensor | None,
    ratio: str,
    importance_level: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the sequence modes need from a first pass: mean log-ratio and summed log importance weight, on the rows."""
    old = logprob_T if old is None else old.to(logprob_T.dtype)
    log_ratio = sequence_mean(logprob_T - old, sequence_ids, n) if ratio == "sequence" else None
    importance = None
    if importance_level == "sequence" and behavior is not None:
        importance = sequence_mean(old - behavior.to(old.dtype), sequence_ids, n, mean=False)
    return log_ratio, importance
