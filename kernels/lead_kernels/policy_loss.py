"""Logits -> log-probs, entropy, clipped policy loss, metrics and the gradient with respect to the logits.

For a row with logits z / temperature, target t, sequence s, advantage A, token weight u = weights[s]:

    logp = z_t - lse(z)        H = lse - sum p z        p = softmax(z)
    r    = exp(min(logp - old, 20))                     old: given, or logp itself, detached (ratio 1)
    w    = min(exp(old - behavior), cap)                truncated importance weight, detached; or 0 above cap (mask)
    l    = -w min(r A, clip(r, 1 - low, 1 + high) A)    GRPO; dual clip: for A < 0 at most -w c A
           -w min(min(r, delta) A, clip(r, ...) A)      two-sided clip; as delta >= 1 + high: dual clip, c = delta
    l    = -w A sg(clip(r, 1 - low, 1 + high)) logp     CISPO; without clip_low there is no lower bound
    l    = -w A 4 sigmoid(tau (r - 1)) / tau            SAPO; tau = sapo_positive for A > 0, else sapo_negative
    GSPO: r = exp(mean over the sequence of logp - old), one ratio for all its tokens
    KL   = -d (k1), d^2 / 2 (k2), exp(d) - 1 - d (k3)   d = reference - logp
    loss = sum u (l + kl_coef KL - entropy_coef H)

and d loss / d z = [ g (onehot_t - p) - h p (log p + H) ] / temperature, with g = d loss / d logp, h = d loss / d H.
With a soft cap c, c tanh(z / c) replaces z, and d loss / d z gets the factor 1 - tanh(z / c)^2.

Over tokens sampled from the policy, the expected gradient of the KL term is 0 for k1, the gradient of KL(policy ||
reference) for k2, and that of KL(reference || policy) for k3. The gradient is 0 wherever a bound is active, except for
a NaN advantage, which always gives NaN.

Sources: CISPO arXiv 2506.13585 (and 2510.13786, without a lower bound), SAPO 2511.20347, two-sided clip 2505.07291,
GSPO 2507.18071, dual clip 1912.09729. Conventions of other libraries: options.py.

dtypes: logits bf16, fp16, fp32 or fp64; sums in fp32 (fp64 for fp64); loss, log-probs and entropy in fp32 (fp64);
gradient in the logits' dtype, scaled before it is rounded. Refuses targets outside 0..V-1.

Advantages are given, or computed from the outcomes of whole groups (Groups). In the second case Triton's row kernel
computes those of a row's group itself. The C++ and the plain torch form call `lead_advantages` once, before the first
row, because on a CPU repeating a group's arithmetic in every row would cost more than a vector of S numbers. Both use
the code of `lead_advantages`, so the advantages agree with it bit for bit.

The formulas of the loss are written three times: `rows_loss` here, `policy_rows_kernel` of _triton_rows.py and
`row_loss` of csrc/row_loss.cpp. A change to one must be made in all three and in the golden values of
tests/test_kernels.py; the oracle compares the other two with this one.

Floor per row: one read and one write of V logits; everything else is O(1) per row. The C++ takes each row from logits
to gradient while the row is in the cache (csrc/rows.cpp counts the instructions).

Legend: T rows, V vocabulary, S sequences.
"""

import contextlib
from typing import Any, Literal, NamedTuple

import torch

from ._checks import (
    check_logits,
    check_sequence_ids,
    check_targets,
    check_tokens,
    refuse_forward_mode,
    refuse_second_derivative,
)
from ._rows import Ready, RowStats, in_cpp, in_triton, row_gradient_, row_stats
from .advantage import lead_advantages
from .options import LossOptions, Softmax
from .records import (
    DEFAULT_LOSS,
    LOG_RATIO_CAP,
    METRICS,
    Groups,
    PolicyLoss,
    RowMetrics,
    Sequences,
    SequenceTerms,
    Tokens,
)


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
    """Compute each sequence's weight per token, so that a plain sum over all packs and ranks is the batch's mean.

    Args:
        lengths: response tokens of every sequence, [S].
        mean: `response`: mean over tokens of each response, then over responses (GRPO); `token`: over all tokens
            (DAPO); `constant`: sum over tokens / (responses x constant) (Dr. GRPO).
        n_sequences, n_tokens: counts of the whole batch, over all ranks and packs.
        constant: number of tokens to divide by, for mean=`constant`.
    Returns:
        float32 [S].
    Raises:
        ValueError: `constant` without a positive number of tokens.
    """
    lengths = lengths.float()
    if mean == "response":
        return 1.0 / (n_sequences * lengths.clamp(min=1))
    if mean == "token":
        return torch.full_like(lengths, 1.0 / n_tokens)
    if constant is None or constant <= 0:
        raise ValueError(f"mean is 'constant' and constant is {constant}: give the number of tokens to divide by.")
    return torch.full_like(lengths, 1.0 / (n_sequences * constant))


def rows_loss(
    logprob_T: torch.Tensor,
    entropy_T: torch.Tensor,
    advantage_T: torch.Tensor,
    weight_T: torch.Tensor,
    tokens: Tokens,
    terms: SequenceTerms,
    o: LossOptions,
) -> Rows:
    """Specification: each row's loss and its derivatives with respect to the row's log-prob and entropy, in O(T).

    Computed in the dtype of `logprob_T`, to which the log-probs of `tokens` are cast.
    """

    def cast(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(logprob_T.dtype)

    behavior_T, old_T, reference_T = cast(tokens.behavior), cast(tokens.old), cast(tokens.reference)
    old_T = logprob_T if old_T is None else old_T
    log_r = logprob_T - old_T if terms.log_ratio is None else terms.log_ratio
    capped = log_r > LOG_RATIO_CAP
    r = log_r.clamp(max=LOG_RATIO_CAP).exp()
    low, high = o.clip_range
    below, above = r < low, r > high
    a = advantage_T
    if o.ratio == "cispo":
        # The clipped ratio is a constant weight on log p.
        weight = r.clamp(low, high)
        loss, grad = -weight * a * logprob_T, -weight * a
    elif o.ratio == "sapo":
        tau = torch.where(a > 0, a.new_tensor(o.sapo_positive), o.sapo_negative)
        x = tau * (r - 1)
        loss = -a * (4 / tau) * torch.sigmoid(x)
        grad = -a * torch.where(capped, 0.0, 4 * r * torch.sigmoid(x) * torch.sigmoid(-x))
    else:
        free = r if o.delta is None else r.clamp(max=o.delta)
        loss = -torch.minimum(free * a, r.clamp(low, high) * a)
        constant = torch.where(a > 0, above, below) | capped  # the smaller objective does not depend on r
        if o.delta is not None:
            constant |= r > o.delta
        if o.dual_clip is not None:
            bounded = (a < 0) & (loss > -o.dual_clip * a)
            loss, constant = torch.where(bounded, -o.dual_clip * a, loss), constant | bounded
        grad = torch.where(constant, 0 * a, -r * a)  # 0 a, not 0: NaN stays NaN
    truncated = torch.zeros_like(r, dtype=torch.bool)
    if o.importance_cap is not None and behavior_T is not None:
        log_w = (old_T - behavior_T if terms.importance is None else terms.importance).clamp(max=LOG_RATIO_CAP)
        w = log_w.exp()
        truncated = w > o.importance_cap
        w = torch.where(truncated, 0.0, w) if o.importance_mode == "mask" else w.clamp(max=o.importance_cap)
        loss, grad = loss * w, grad * w
    kl_T = torch.zeros_like(r)
    if reference_T is not None and o.kl_coef:
        d = reference_T - logprob_T
        if o.kl == "k1":
            kl_T, dkl = -d, torch.ones_like(d)
        elif o.kl == "k2":
            kl_T, dkl = 0.5 * d * d, -d
        else:
            e = d.clamp(max=LOG_RATIO_CAP).exp()
            kl_T, dkl = e - 1 - d, 1 - torch.where(d > LOG_RATIO_CAP, 0.0, e)
        loss, grad = loss + o.kl_coef * kl_T, grad + o.kl_coef * dkl
    loss = loss - o.entropy_coef * entropy_T

    zero = torch.zeros((), dtype=r.dtype, device=r.device)
    diff = zero[None] if behavior_T is None else (logprob_T - behavior_T)
    d = diff.neg().clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP)
    counted = weight_T != 0
    sums = RowMetrics(
        kl_behavior=(d.neg().exp() - 1 + d).sum(),  # k3 of behaviour || policy, sampled from the behaviour policy
        clip_low=(below & (a < 0) & counted).sum().float(),
        clip_high=(above & (a > 0) & counted).sum().float(),
        ratio=r.sum(),
        ratio_capped=capped.sum().float(),
        importance_truncated=truncated.sum().float(),
        logprob_diff=diff.abs().sum(),
        kl_reference=kl_T.sum(),
    )
    metrics = {
        "tokens": torch.tensor(float(r.numel()), device=r.device),
        "entropy": entropy_T.sum(),
        **sums._asdict(),
        "max_logprob": logprob_T.amax() if logprob_T.numel() else zero - float("inf"),
        "max_logprob_diff": diff.abs().amax() if diff.numel() else zero,
    }
    return Rows(weight_T * loss, weight_T * grad, torch.full_like(weight_T, -o.entropy_coef) * weight_T, metrics)


def sequence_mean(x_T: torch.Tensor, sequence_ids: torch.Tensor, n: int, mean: bool = True) -> torch.Tensor:
    """Mean (or sum) of x over each row's sequence, expanded back to the rows."""
    index = sequence_ids.long()
    total = torch.zeros(n, dtype=x_T.dtype, device=x_T.device).index_add(0, index, x_T)
    if mean:
        total = total / torch.zeros_like(total).index_add(0, index, torch.ones_like(x_T)).clamp(min=1)
    return total[index]


def needs_first_pass(o: LossOptions) -> bool:
    """Whether every row's log-prob must be known before the first row's loss is."""
    return o.ratio == "sequence" or o.importance_level == "sequence"


def sequence_terms(logprob_T: torch.Tensor, tokens: Tokens, n_sequences: int, o: LossOptions) -> SequenceTerms:
    """Compute what the sequence modes need from the log-probs of a first pass."""
    old = logprob_T if tokens.old is None else tokens.old.to(logprob_T.dtype)
    log_ratio = importance = None
    if o.ratio == "sequence":
        log_ratio = sequence_mean(logprob_T - old, tokens.sequence_ids, n_sequences)
    if o.importance_level == "sequence" and tokens.behavior is not None:
        difference = old - tokens.behavior.to(old.dtype)
        importance = sequence_mean(difference, tokens.sequence_ids, n_sequences, mean=False)
    return SequenceTerms(log_ratio, importance)


def for_row_kernel(sequences: Sequences, logits: torch.Tensor) -> Sequences:
    """Convert sequences to the form that the row kernel for these logits accepts.

    Triton's kernel accepts Groups and computes their advantages itself, in float32. For every other kernel, and for
    outcomes in float64, `lead_advantages` computes them here, once for all rows.
    """
    groups = sequences.advantages
    if isinstance(groups, Groups):
        table = groups.table()
        if not in_triton(logits) or table.dtype == torch.float64:
            return sequences._replace(advantages=lead_advantages(table, groups.group_size, groups.options).advantage)
    return sequences


def policy_rows_(
    logits: torch.Tensor,
    tokens: Tokens,
    sequences: Sequences,
    terms: SequenceTerms,
    options: LossOptions,
    softmax: Softmax,
    gradient: torch.Tensor | None,
    target_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, log-probs, entropy, [T] each, and metrics [12], as METRICS; `sequences` come from `for_row_kernel`.

    The logits' gradient is written to `gradient`, which may be the logits themselves; None: forward only.
    `target_logits`: as in `row_stats`, and the same as in the first pass of a sequence mode.
    """
    kernels, cpp = in_triton(logits), in_cpp(logits)
    if kernels or cpp:
        if kernels:
            loss_T, logprob_T, entropy_T, sums = kernels.policy_rows_triton(
                logits, tokens, sequences, terms, options, softmax, gradient, target_logits
            )
        else:
            assert cpp and isinstance(sequences.advantages, torch.Tensor)
            exact = None if target_logits is None else target_logits.contiguous()
            loss_T, logprob_T, entropy_T, sums = cpp.policy_rows_(
                logits, tokens, terms, *sequences, options.encode(softmax), options.clip_range, gradient, exact
            )
        count = torch.full((1,), float(loss_T.numel()), dtype=loss_T.dtype, device=logits.device)
        most = logprob_T.amax() if loss_T.numel() else count[0] - float("inf")
        diff = RowMetrics(*sums).logprob_diff.amax() if loss_T.numel() else torch.zeros_like(most)
        metrics = torch.cat([count, entropy_T.sum()[None], sums.sum(1), torch.stack([most, diff])])
        return loss_T, logprob_T, entropy_T, metrics
    stats, rows, metrics = row_results(logits, tokens, sequences, terms, options, softmax, target_logits)
    if gradient is not None:
        grads = rows.grad_logprob_T, rows.grad_entropy_T
        row_gradient_(logits, tokens.targets, stats, *grads, softmax, gradient, target_logits)
    row = RowStats(*stats.unbind(1))
    return rows.loss_T, row.logprob.clone(), row.entropy.clone(), metrics


def row_results(
    logits: torch.Tensor,
    tokens: Tokens,
    sequences: Sequences,
    terms: SequenceTerms,
    options: LossOptions,
    softmax: Softmax,
    target_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Rows, torch.Tensor]:
    """Return what `row_stats` returns, the rows' loss with derivatives, and metrics [12]; not used under Triton."""
    assert isinstance(sequences.advantages, torch.Tensor)
    stats = row_stats(logits, tokens.targets, softmax, target_logits)
    row, index = RowStats(*stats.unbind(1)), tokens.sequence_ids.long()
    advantage_T, weight_T = (x.to(stats.dtype)[index] for x in (sequences.advantages, sequences.weights))
    rows = rows_loss(row.logprob, row.entropy, advantage_T, weight_T, tokens, terms, options)
    return stats, rows, torch.stack([rows.metrics[k].to(stats.dtype) for k in METRICS])


def logits_loss_(
    logits: torch.Tensor,
    tokens: Tokens,
    sequences: Sequences,
    options: LossOptions,
    softmax: Softmax,
    gradient: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, log-probs [T], entropy [T], metrics [12]; write the gradient as `policy_rows_` does."""
    check_targets(tokens.targets, logits.shape[1])
    check_sequence_ids(tokens.sequence_ids, sequences.weights.numel())
    terms = SequenceTerms()
    if needs_first_pass(options):
        row = RowStats(*row_stats(logits, tokens.targets, softmax).unbind(1))
        terms = sequence_terms(row.logprob, tokens, sequences.weights.numel(), options)
    sequences = for_row_kernel(sequences, logits)
    rows = policy_rows_(logits, tokens, sequences, terms, options, softmax, gradient)
    loss_T, logprobs, entropy, metrics = rows
    return loss_T.sum(), logprobs, entropy, metrics


def decode_sequences(weights: torch.Tensor, advantages: torch.Tensor, groups: list[float]) -> Sequences:
    """The sequences that `encode_sequences` was called on."""
    return Sequences(weights, Groups.decode(advantages, groups) if groups else advantages)


def encode_sequences(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Return weights [S], advantages [S] or outcomes [S, 4], and the encoded groups of the outcomes (empty: none).

    Raises:
        ValueError: weights and advantages of different sizes.
    """
    weights, advantages = sequences
    table, groups = advantages.encode() if isinstance(advantages, Groups) else (advantages, [])
    if weights.shape != table.shape[:1] or table.dim() != (2 if groups else 1):
        raise ValueError(f"weights are {list(weights.shape)} and advantages or outcomes {list(table.shape)}: "
                         "give one weight and one advantage for each sequence.")  # fmt: skip
    return weights, table, groups


@torch.library.custom_op("lead_kernels::policy_loss", mutates_args=())
def policy_loss_op(
    logits: torch.Tensor, targets: torch.Tensor, sequence_ids: torch.Tensor, behavior: torch.Tensor | None,
    old: torch.Tensor | None, reference: torch.Tensor | None, weights: torch.Tensor, advantages: torch.Tensor,
    groups: list[float], options: list[float], train: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return loss, log-probs [T], entropy [T], metrics [12], d logits [T, V] (empty if `train` is False).

    Args: `Tokens`, `encode_sequences` and `LossOptions.encode` of the public function's arguments.
    """
    tokens = Tokens(targets, sequence_ids, behavior, old, reference)
    sequences = decode_sequences(weights, advantages, groups)
    out = torch.empty(logits.shape if train else (0,), dtype=logits.dtype, device=logits.device)
    return *logits_loss_(logits, tokens, sequences, *LossOptions.decode(options), out if train else None), out


@policy_loss_op.register_fake
def _(logits, targets, sequence_ids, behavior, old, reference, weights, advantages, groups, options, train):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs, entropy = (logits.new_empty(targets.shape, dtype=dtype) for _ in range(2))
    loss, metrics = (logits.new_empty(shape, dtype=dtype) for shape in ((), (len(METRICS),)))
    return loss, logprobs, entropy, metrics, logits.new_empty(logits.shape if train else (0,))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *_, grad = output
    ctx.save_for_backward(grad)


def _scale(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple:
    """Scale the gradient that the forward computed; inputs other than the logits have none."""
    refuse_second_derivative()
    (grad,) = ctx.saved_tensors
    return grad * grad_loss.to(grad.dtype) if grad.dim() == 2 else None, *[None] * (len(ctx.needs_input_grad) - 1)


policy_loss_op.register_autograd(_scale, setup_context=_save)


def compiled_or_no_grad() -> contextlib.AbstractContextManager:
    """Let torch.compile trace the operators' own autograd; disable it otherwise, where `Ready` passes gradients on."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.no_grad()


def named(metrics: torch.Tensor, names: tuple[str, ...] = METRICS) -> dict[str, torch.Tensor]:
    """Metrics by name."""
    return dict(zip(names, metrics.unbind(), strict=True))


def policy_loss(
    logits: torch.Tensor,
    tokens: Tokens,
    sequences: Sequences,
    options: LossOptions = DEFAULT_LOSS,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
) -> PolicyLoss:
    """Compute the policy loss of packed rows of logits, once differentiable in the logits.

    Args:
        logits: [T, V], bf16, fp16, fp32 or fp64.
        tokens: what is known of each row's token, [T] each.
        sequences: weights and advantages, [S]; the advantages may be the Groups from which to compute them.
        options: options of the loss; formulas at the top of this file.
        temperature: divides the logits, as it did when the tokens were sampled.
        softcap: bound on the logits, softcap tanh(z / softcap), applied before the temperature; None: no bound.
            `options.Softmax` says how to fold a model's multipliers into temperature and soft cap.
        inplace: overwrite the logits with their gradient (not under torch.compile).
    Returns:
        PolicyLoss: fp32, or fp64 for fp64 logits.
    Raises:
        ValueError: a target outside the vocabulary or a sequence id without a sequence (on a GPU both are device-side
            assertions instead, without synchronisation), shapes, dtypes or options that do not match, or an input that
            an option needs is missing.
        NotImplementedError: a second or a forward-mode derivative.
    """
    check_logits(logits)
    check_tokens(tokens, logits.shape[0], options)
    refuse_forward_mode(logits)
    train = logits.requires_grad and torch.is_grad_enabled()
    softmax = Softmax(temperature, softcap)
    encoded = options.encode(softmax)
    if inplace:
        with torch.no_grad():
            grad = logits.detach()
            encode_sequences(sequences)  # raises ValueError for sizes that differ
            loss, logprobs, entropy, metrics = logits_loss_(
                grad, tokens, sequences, options, softmax, grad if train else None
            )
    else:
        with compiled_or_no_grad():
            loss, logprobs, entropy, metrics, grad = torch.ops.lead_kernels.policy_loss(
                logits, *tokens, *encode_sequences(sequences), encoded, train
            )
    if train and not torch.compiler.is_compiling():
        loss = Ready.apply(loss, [grad], logits)
        del grad
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named(metrics.detach()))
