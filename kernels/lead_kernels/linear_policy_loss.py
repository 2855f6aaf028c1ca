"""Hidden states and head weight -> policy loss and both gradients, in chunks of rows: logits are never whole.

Per chunk of C rows: logits_CV = hidden_CD head_VD^T + bias_V; loss and d logits by the row kernel of policy_loss.py,
whose formulas these are; d hidden_CD = dlogits head; d head_VD += dlogits^T hidden; d bias_V += dlogits summed over its
rows. The loss's gradient needs only what the forward has, so it is taken there and the backward only scales it.

The advantages are given, or follow from the outcomes of whole groups. Under Triton the row kernel computes those of a
row's group itself; the C++ and the plain torch form have them computed once per call, before the first chunk, by the
same function (policy_loss.py says why).

dtypes: hidden, head and bias of one float dtype, and so the logits; loss, log-probs and entropy fp32 (fp64 for fp64);
d(head) and d(bias) accumulated in fp32 (fp64) whatever the number of chunks, gradients returned in the inputs' dtype.
Refuses targets outside 0..V-1, a sharded head, and shapes that do not fit.

Floor: three GEMMs, 6 T D V FLOPs; extra memory one chunk of logits and, where the head is trained, d head in fp32.
The sequence modes (GSPO ratio, sequence importance) need every row's log-prob first: a fourth GEMM.

Legend: T rows, D hidden, V vocabulary, C rows of a chunk, S sequences.
"""

from typing import Any

import torch

from ._head import accumulate, add_product_, add_rows_, check_shapes, chunk_size, computable, local, logits_of
from ._rows import Ready, RowStats, row_stats
from .options import LossOptions, Softmax
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
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    sequence_ids: torch.Tensor, behavior: torch.Tensor | None, old: torch.Tensor | None,
    reference: torch.Tensor | None, weights: torch.Tensor, advantages: torch.Tensor, groups: list[float],
    options: list[float], plan: list[int],
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """loss, log-probs [T], entropy [T], metrics [12], d hidden [T, D], d head [V, D], d bias [V].

    A gradient that is not asked for is empty.

    Args: `Tokens`, `encode_sequences` and `LossOptions.encode` of the public function's arguments; plan: rows of a
    chunk, and whether (1 or 0) the gradients of hidden, of head and of bias are asked for.
    """
    check_targets(targets, head.shape[0])
    tokens = Tokens(targets, sequence_ids, behavior, old, reference)
    (o, softmax), (step, train_hidden, train_head, train_bias) = LossOptions.decode(options), plan
    rows, h, w, b = hidden.shape[0], computable(hidden), computable(head), None if bias is None else computable(bias)
    sequences, terms = for_row_kernel(decode_sequences(weights, advantages, groups), h), SequenceTerms()
    buffer = torch.empty(step, w.shape[0], dtype=h.dtype, device=h.device)
    if needs_first_pass(o):
        parts = [
            RowStats(*row_stats(logits_of(h[at], w, b, buffer), targets[at], softmax).unbind(1)).logprob
            for at in (slice(i, i + step) for i in range(0, rows, step))
        ]
        terms = sequence_terms(torch.cat(parts) if parts else h.new_zeros(0), tokens, weights.numel(), o)
    grad_hidden = torch.empty(h.shape if train_hidden else (0,), dtype=h.dtype, device=h.device)
    grad_head, grad_bias = (
        torch.empty(shape if wanted else (0,), dtype=accumulate(w.dtype), device=w.device)
        for shape, wanted in ((w.shape, train_head), (w.shape[:1], train_bias))
    )
    losses, logprobs, entropies, metrics = [], [], [], []
    for i in range(0, max(rows, 1), step):
        at = slice(i, i + step)
        logits_CV = logits_of(h[at], w, b, buffer)
        gradient = logits_CV if any(plan[1:]) else None
        loss_C, logprob_C, entropy_C, metrics_C = policy_rows_(
            logits_CV, cut(tokens, at), sequences, cut(terms, at), o, softmax, gradient
        )
        losses.append(loss_C.sum())
        logprobs.append(logprob_C)
        entropies.append(entropy_C)
        metrics.append(metrics_C)
        if train_hidden:  # logits_CV holds their gradient now
            torch.mm(logits_CV, w, out=grad_hidden[at])
        if train_head:
            add_product_(grad_head, logits_CV.T, h[at], first=i == 0)
        if train_bias:
            add_rows_(grad_bias, logits_CV, first=i == 0)
    return (
        torch.stack(losses).sum(), torch.cat(logprobs), torch.cat(entropies), add_up(metrics),
        grad_hidden.to(hidden.dtype), grad_head.to(head.dtype), grad_bias.to(head.dtype),
    )  # fmt: skip


@linear_policy_loss_op.register_fake
def _(hidden, head, bias, targets, ids, behavior, old, reference, weights, advantages, groups, options, plan):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (hidden.new_empty(targets.shape, dtype=dtype) for _ in range(2))
    loss, metrics = (hidden.new_empty(shape, dtype=dtype) for shape in ((), (len(METRICS),)))
    shapes = zip((hidden.shape, head.shape, head.shape[:1]), plan[1:], strict=True)
    grads = [torch.empty(s if wanted else (0,), dtype=head.dtype, device=head.device) for s, wanted in shapes]
    return loss, logprobs, entropy, metrics, *grads


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *_, plan = inputs
    ctx.train = plan[1:]
    ctx.save_for_backward(*output[4:])


def _scale(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple:
    """Scale the gradients, which were taken in the forward; inputs but hidden, head and bias have none."""
    asked_for = zip(ctx.saved_tensors, ctx.train, strict=True)
    grads = [g * grad_loss.to(g.dtype) if wanted else None for g, wanted in asked_for]
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
    softcap: float | None = None,
    head_bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> PolicyLoss:
    """Compute `policy_loss` of `hidden @ head_weight.T + head_bias`, differentiable in all three.

    Args:
        hidden: [T, D], any float dtype, any strides.
        head_weight: [V, D], same dtype; a plain tensor or a replicated DTensor.
        tokens: of each row, [T].
        sequences: of each sequence, [S]; its advantages may be the Groups they follow from.
        options: of the loss; formulas in policy_loss.py.
        temperature: divides the logits, as it did when the tokens were sampled.
        softcap: bound on the logits, softcap tanh(z / softcap), before the temperature; None: none. `options.Softmax`
            says how a model's multipliers are folded into the two.
        head_bias: [V], the head's dtype, added to the logits before anything else; None: none.
        chunk_rows: most rows of logits at once; None: as many as fit 64 MiB (2 GiB on a GPU).
    Returns:
        PolicyLoss: fp32, or fp64 for fp64 inputs.
    Raises:
        ValueError: shapes or options that do not fit, a target outside the vocabulary, a sharded head.
    """
    head, bias = local(head_weight, "head_weight"), None if head_bias is None else local(head_bias, "head_bias")
    check_shapes(hidden, head, bias, tokens.targets)
    on, inputs = torch.is_grad_enabled(), (hidden, head, bias)
    train = [int(on and x is not None and x.requires_grad) for x in inputs]
    plan = [chunk_size(hidden.shape[0], head, chunk_rows), *train]
    with compiled_or_no_grad():
        loss, logprobs, entropy, metrics, *grads = torch.ops.lead_kernels.linear_policy_loss(
            *inputs, *tokens, *encode_sequences(sequences), options.encode(Softmax(temperature, softcap)), plan
        )
    if any(train) and not torch.compiler.is_compiling():
        grads = [g if wanted else None for g, wanted in zip(grads, train, strict=True)]
        loss = Ready.apply(loss, grads, *inputs)
        del grads
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named(metrics.detach()))
