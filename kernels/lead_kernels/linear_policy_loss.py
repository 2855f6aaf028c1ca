"""Hidden states and head weight -> policy loss and both gradients, in chunks of rows: logits are never whole.

Per chunk of C rows: logits_CV = hidden_CD head_VD^T; loss and d logits by the row kernel of policy_loss.py, whose
formulas these are; d hidden_CD = dlogits head; d head_VD += dlogits^T hidden. The loss's gradient needs only what the
forward has, so it is taken there and the backward only scales it.

The advantages are given, or follow from the outcomes of whole groups. Under Triton the row kernel computes those of a
row's group itself; the C++ and the plain torch form have them computed once per call, before the first chunk, by the
same function (policy_loss.py says why).

dtypes: hidden and head of one float dtype, and so the logits; loss, log-probs and entropy fp32 (fp64 for fp64); d(head)
accumulated in fp32 (fp64) whatever the number of chunks, gradients returned in the inputs' dtype. Refuses targets
outside 0..V-1, a sharded head, and shapes that do not fit.

Floor: three GEMMs, 6 T D V FLOPs; extra memory one chunk of logits and, where the head is trained, d head in fp32.
The sequence modes (GSPO ratio, sequence importance) need every row's log-prob first: a fourth GEMM.

Legend: T rows, D hidden, V vocabulary, C rows of a chunk, S sequences.
"""

from typing import Any

import torch

from ._head import accumulate, add_product_, check_shapes, chunk_size, computable, local
from ._rows import Ready, RowStats, row_stats
from .options import LossOptions
from .policy_loss import (
    DEFAULT,
    MAXIMA,
    METRICS,
    PolicyLoss,
    Sequences,
    SequenceTerms,
    Tokens,
    check_targets,
    compiled_or_no_grad,
    decode_sequences,
    encode_sequences,
    for_row_kernel,
    named,
    needs_first_pass,
    policy_rows_,
    sequence_terms,
)


def cut(x: Any, rows: slice) -> Any:
    """A record of [T] tensors, some of them None, with only these rows."""
    return type(x)(*(None if t is None else t[rows] for t in x))


def add_up(chunks: list[torch.Tensor]) -> torch.Tensor:
    """Metrics of all rows from those of each chunk, [12] each in the order of METRICS: sums, and at the end maxima."""
    sums, maxima = torch.stack(chunks).split([len(METRICS) - len(MAXIMA), len(MAXIMA)], 1)
    return torch.cat([sums.sum(0), maxima.amax(0)])


@torch.library.custom_op("lead_kernels::linear_policy_loss", mutates_args=())
def linear_policy_loss_op(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, sequence_ids: torch.Tensor,
    behavior: torch.Tensor | None, old: torch.Tensor | None, reference: torch.Tensor | None, weights: torch.Tensor,
    advantages: torch.Tensor, groups: list[float], options: list[float], step: int, train: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """loss, log-probs [T], entropy [T], metrics [12], d hidden [T, D], d head [V, D] (empty where not asked for).

    Args: `Tokens`, `encode_sequences` and `LossOptions.encode` of the public function's arguments; step: rows of a
    chunk; train: whether the gradient of hidden and that of head is asked for.
    """
    check_targets(targets, head.shape[0])
    tokens = Tokens(targets, sequence_ids, behavior, old, reference)
    (o, temperature), (train_hidden, train_head) = LossOptions.decode(options), train
    rows, h, w = hidden.shape[0], computable(hidden), computable(head)
    sequences, terms = for_row_kernel(decode_sequences(weights, advantages, groups), h), SequenceTerms()
    if needs_first_pass(o):
        parts = [
            RowStats(*row_stats(h[i : i + step] @ w.T, targets[i : i + step], temperature).unbind(1)).logprob
            for i in range(0, rows, step)
        ]
        terms = sequence_terms(torch.cat(parts) if parts else h.new_zeros(0), tokens, weights.numel(), o)
    grad_hidden = torch.empty(h.shape if train_hidden else (0,), dtype=h.dtype, device=h.device)
    grad_head = torch.empty(w.shape if train_head else (0,), dtype=accumulate(w.dtype), device=w.device)
    buffer = torch.empty(step, w.shape[0], dtype=h.dtype, device=h.device)
    losses, logprobs, entropies, metrics = [], [], [], []
    for i in range(0, max(rows, 1), step):
        at = slice(i, i + step)
        logits_CV = torch.mm(h[at], w.T, out=buffer[: len(h[at])])
        gradient = logits_CV if train_hidden or train_head else None
        loss_C, logprob_C, entropy_C, metrics_C = policy_rows_(
            logits_CV, cut(tokens, at), sequences, cut(terms, at), o, temperature, gradient
        )
        losses.append(loss_C.sum())
        logprobs.append(logprob_C)
        entropies.append(entropy_C)
        metrics.append(metrics_C)
        if train_hidden:  # logits_CV holds their gradient now
            torch.mm(logits_CV, w, out=grad_hidden[at])
        if train_head:
            add_product_(grad_head, logits_CV.T, h[at], first=i == 0)
    return (
        torch.stack(losses).sum(), torch.cat(logprobs), torch.cat(entropies), add_up(metrics),
        grad_hidden.to(hidden.dtype), grad_head.to(head.dtype),
    )  # fmt: skip


@linear_policy_loss_op.register_fake
def _(hidden, head, targets, ids, behavior, old, reference, weights, advantages, groups, options, step, train):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (hidden.new_empty(targets.shape, dtype=dtype) for _ in range(2))
    loss, metrics = (hidden.new_empty(shape, dtype=dtype) for shape in ((), (len(METRICS),)))
    grads = [
        torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)
        for x, wanted in zip((hidden, head), train, strict=True)
    ]
    return loss, logprobs, entropy, metrics, *grads


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *_, grad_hidden, grad_head = output
    ctx.save_for_backward(grad_hidden, grad_head)


def _scale(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple:
    """Scale the gradients, which were taken in the forward; inputs but hidden and head have none."""
    grads = [g * grad_loss.to(g.dtype) if g.dim() == 2 else None for g in ctx.saved_tensors]
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


linear_policy_loss_op.register_autograd(_scale, setup_context=_save)


def linear_policy_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    tokens: Tokens,
    sequences: Sequences,
    options: LossOptions = DEFAULT,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> PolicyLoss:
    """`policy_loss` of `hidden @ head_weight.T`, differentiable in hidden and head_weight.

    Args:
        hidden: [T, D], any float dtype, any strides.
        head_weight: [V, D], same dtype; a plain tensor or a replicated DTensor.
        tokens: of each row, [T].
        sequences: of each sequence, [S]; its advantages may be the Groups they follow from.
        options: of the loss; formulas in policy_loss.py.
        temperature: divides the logits, as it did when the tokens were sampled.
        chunk_rows: most rows of logits at once; None: as many as fit 64 MiB (2 GiB on a GPU).
    Returns:
        PolicyLoss: fp32, or fp64 for fp64 inputs.
    Raises:
        ValueError: shapes or options that do not fit, a target outside the vocabulary, a sharded head.
    """
    head = local(head_weight)
    check_shapes(hidden, head, tokens.targets)
    step = chunk_size(hidden.shape[0], head, chunk_rows)
    on = torch.is_grad_enabled()
    train = [on and hidden.requires_grad, on and head.requires_grad]
    with compiled_or_no_grad():
        loss, logprobs, entropy, metrics, *grads = torch.ops.lead_kernels.linear_policy_loss(
            hidden, head, *tokens, *encode_sequences(sequences), options.encode(temperature), step, train
        )
    if any(train) and not torch.compiler.is_compiling():
        grads = [g if wanted else None for g, wanted in zip(grads, train, strict=True)]
        loss = Ready.apply(loss, grads, hidden, head)
        del grads
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named(metrics.detach()))
