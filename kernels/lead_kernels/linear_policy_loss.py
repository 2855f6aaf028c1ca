"""Hidden states and head weight -> policy loss and both gradients, in chunks of rows of logits.

Per chunk of C rows: logits_CV = hidden_CD head_VD^T + bias_V; loss and d logits come from the row kernel of
policy_loss.py, which gives the formulas; d hidden_CD = dlogits head; d head_VD += dlogits^T hidden; d bias_V += dlogits
summed over its rows. The forward has all that the gradient needs, so it computes the gradient too, and the backward
only scales it.

Advantages are given, or computed from the outcomes of whole groups. Under Triton the row kernel computes those of a
row's group itself; the C++ and the plain torch form compute them once per call, before the first chunk, with the same
function (policy_loss.py says why).

dtypes: hidden, head, bias and the logits share one float dtype; loss, log-probs and entropy are fp32 (fp64 for fp64);
d(head) and d(bias) are accumulated in fp32 (fp64) whatever the number of chunks; gradients are returned in the inputs'
dtype. Refuses targets outside 0..V-1, a sharded head, and shapes that do not match.

In half precision the sampled token's logit, whose rounding error would pass to the log-prob one to one, is recomputed
in fp32 and replaces the rounded one (`_head.target_logits`). `fp32_logits` keeps all logits in fp32. That doubles the
bytes of a chunk's logits and the traffic of the row kernel, and adds a pass that rounds their gradient for the
products. On a CPU, where torch has no half-precision product with fp32 results, the logits' product runs in fp32, at
about half the speed.

With `dropped_mass`, d hidden is computed from only those columns that carry probability (_sparse.py), and with
`sparse_head` so is d head. If the head needs no gradient, a CPU then writes no gradient of the logits at all.

Floor: three GEMMs, 6 T D V FLOPs; two with `dropped_mass`, and one if d head is not needed or is sparse as well. Extra
memory: one chunk of logits and, if the head is trained, d head in fp32. The sequence modes (GSPO ratio, sequence
importance) need every row's log-prob first, which costs one more GEMM.

Legend: T rows, D hidden, V vocabulary, C rows of a chunk, S sequences.
"""

from typing import Any

import torch

from ._checks import (
    check_sequence_ids,
    check_targets,
    check_tokens,
    refuse_forward_mode,
    refuse_second_derivative,
)
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
from ._rows import Ready, RowStats, in_triton, row_stats
from ._sparse import SPARSE_METRICS, Gradients, dense_backward_, max_row_norm, sparse_backward_, sparsity
from .options import LossOptions, Softmax
from .policy_loss import (
    compiled_or_no_grad,
    decode_sequences,
    encode_sequences,
    for_row_kernel,
    named,
    needs_first_pass,
    policy_rows_,
    row_results,
    sequence_terms,
)
from .records import DEFAULT_LOSS, METRICS, PolicyLoss, Sequences, SequenceTerms, Tokens


def cut_one(x: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The given rows of a [T] tensor; None for None."""
    return None if x is None else x[rows]


def cut(x: Any, rows: slice) -> Any:
    """The given rows of a record of [T] tensors, some of which may be None."""
    return type(x)(*(cut_one(t, rows) for t in x))


def add_up(chunks: list[torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    """Combine the metrics of all chunks, in the order of `names`: sums, or maxima for names that begin with `max_`."""
    values = torch.stack(chunks)
    return torch.stack(
        [
            column.amax() if name.startswith("max_") else column.sum()
            for name, column in zip(names, values.unbind(1), strict=True)
        ]
    )


def metric_names(o: LossOptions) -> tuple[str, ...]:
    """Names of the metrics that a call with these options returns."""
    return METRICS + (SPARSE_METRICS if o.dropped_mass else ())


@torch.library.custom_op("lead_kernels::linear_policy_loss", mutates_args=())
@full_reductions()
def linear_policy_loss_op(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    sequence_ids: torch.Tensor, behavior: torch.Tensor | None, old: torch.Tensor | None,
    reference: torch.Tensor | None, weights: torch.Tensor, advantages: torch.Tensor, groups: list[float],
    options: list[float], plan: list[int],
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """Return loss, log-probs [T], entropy [T], metrics, d hidden [T, D], d head [V, D], d bias [V].

    Metrics are in the order of `metric_names`. A gradient that is not needed is empty.

    Args: `Tokens`, `encode_sequences` and `LossOptions.encode` of the public function's arguments; plan: rows per
    chunk, whether (1 or 0) the gradients of hidden, of head and of bias are needed, and the seed.
    """
    check_targets(targets, head.shape[0])
    check_sequence_ids(sequence_ids, weights.numel())
    tokens = Tokens(targets, sequence_ids, behavior, old, reference)
    (o, softmax), (step, train_hidden, train_head, train_bias, seed) = LossOptions.decode(options), plan
    rows, h, w, b = hidden.shape[0], computable(hidden), computable(head), None if bias is None else computable(bias)
    buffer, terms = logits_buffer(step, w, o.fp32_logits), SequenceTerms()
    sequences = for_row_kernel(decode_sequences(weights, advantages, groups), buffer)
    exact = None if o.fp32_logits else target_logits(h, w, b, targets)
    if needs_first_pass(o):
        parts = [
            RowStats(
                *row_stats(logits_of(h[at], w, b, buffer), targets[at], softmax, cut_one(exact, at)).unbind(1)
            ).logprob
            for at in (slice(i, i + step) for i in range(0, rows, step))
        ]
        terms = sequence_terms(torch.cat(parts) if parts else h.new_zeros(0), tokens, weights.numel(), o)
    chunks = 2 if o.sparse_head else -(-rows // step)
    grad_hidden = torch.empty(h.shape if train_hidden else (0,), dtype=h.dtype, device=h.device)
    grad_head, grad_bias = (
        torch.empty(shape if wanted else (0,), dtype=accumulate(w.dtype, added), device=w.device)
        for shape, wanted, added in ((w.shape, train_head, chunks), (w.shape[:1], train_bias, 2))
    )
    train, s, kernels = any(plan[1:4]), sparsity(o, w, seed), in_triton(buffer)
    if not train_hidden and not o.sparse_head:
        s = None  # no product is left that could be sparse
    norm = max_row_norm(w) if train and s else None
    losses, logprobs, entropies, metrics = [], [], [], []
    for i in range(0, max(rows, 1), step):
        at = slice(i, i + step)
        logits_CV, exact_C, chunk = logits_of(h[at], w, b, buffer), cut_one(exact, at), cut(tokens, at)
        to = Gradients(
            grad_hidden[at] if train_hidden else None,
            grad_head if train_head else None,
            grad_bias if train_bias else None,
        )
        row_inputs = chunk, sequences, cut(terms, at), o, softmax
        extra = [0.0, float(len(logits_CV)), 0.0]  # metrics of a dense chunk
        if norm is not None and s and not kernels:
            stats, results, metrics_C = row_results(logits_CV, *row_inputs, exact_C)
            loss_C, logprob_C, entropy_C = results.loss_T, stats[:, 2].clone(), stats[:, 3].clone()
            extra = sparse_backward_(
                logits_CV, chunk.targets, stats, results.grad_logprob_T, h[at], w, softmax, s, to,
                sparse_head=o.sparse_head, norm=norm, first_row=i, target_logits=exact_C,
            )  # fmt: skip
        else:
            gradient = logits_CV if train else None
            loss_C, logprob_C, entropy_C, metrics_C = policy_rows_(logits_CV, *row_inputs, gradient, exact_C)
            if norm is not None and s:
                from ._triton_sparse import sparse_backward_triton_

                extra = sparse_backward_triton_(
                    rounded(logits_CV, w.dtype), chunk.targets, logprob_C, h[at], w, s, to, sparse_head=o.sparse_head,
                    norm=norm, first_row=i,
                )  # fmt: skip
            elif train:  # logits_CV now holds the gradient
                dense_backward_(rounded(logits_CV, w.dtype), h[at], w, to, first=i == 0)
        losses.append(loss_C.sum())
        logprobs.append(logprob_C)
        entropies.append(entropy_C)
        if o.dropped_mass:
            metrics_C = torch.cat([metrics_C, torch.as_tensor(extra, dtype=metrics_C.dtype, device=metrics_C.device)])
        metrics.append(metrics_C)
    return (
        torch.stack(losses).sum(), torch.cat(logprobs), torch.cat(entropies), add_up(metrics, metric_names(o)),
        grad_hidden.to(hidden.dtype), grad_head.to(head.dtype), grad_bias.to(head.dtype),
    )  # fmt: skip


@linear_policy_loss_op.register_fake
def _(hidden, head, bias, targets, ids, behavior, old, reference, weights, advantages, groups, options, plan):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (hidden.new_empty(targets.shape, dtype=dtype) for _ in range(2))
    names = metric_names(LossOptions.decode(options)[0])
    loss, metrics = (hidden.new_empty(shape, dtype=dtype) for shape in ((), (len(names),)))
    shapes = zip((hidden.shape, head.shape, head.shape[:1]), plan[1:4], strict=True)
    grads = [torch.empty(s if wanted else (0,), dtype=head.dtype, device=head.device) for s, wanted in shapes]
    return loss, logprobs, entropy, metrics, *grads


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *_, plan = inputs
    ctx.train = plan[1:4]
    ctx.save_for_backward(*output[4:])


def _scale(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple:
    """Scale the gradients that the forward computed; inputs other than hidden, head and bias have none."""
    refuse_second_derivative()
    asked_for = zip(ctx.saved_tensors, ctx.train, strict=True)
    grads = [g * grad_loss.to(g.dtype) if wanted else None for g, wanted in asked_for]
    return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


linear_policy_loss_op.register_autograd(_scale, setup_context=_save)


def linear_policy_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    tokens: Tokens,
    sequences: Sequences,
    options: LossOptions = DEFAULT_LOSS,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    head_bias: torch.Tensor | None = None,
    chunk_rows: int | None = None,
    seed: int = 0,
) -> PolicyLoss:
    """Compute `policy_loss` of `hidden @ head_weight.T + head_bias`, differentiable in all three.

    Args:
        hidden: [T, D], any float dtype, any strides.
        head_weight: [V, D], the same dtype; a plain tensor or a replicated DTensor.
        tokens: what is known of each row's token, [T] each.
        sequences: weights and advantages, [S]; the advantages may be the Groups from which to compute them.
        options: options of the loss; formulas in policy_loss.py.
        temperature: divides the logits, as it did when the tokens were sampled.
        softcap: bound on the logits, softcap tanh(z / softcap), applied before the temperature; None: no bound.
            `options.Softmax` says how to fold a model's multipliers into temperature and soft cap.
        head_bias: [V], the head's dtype, added to the logits before anything else; None: no bias.
        chunk_rows: largest number of rows of logits held at once; None: as many as fit 128 MiB (2 GiB on a GPU).
        seed: for options.sample_dropped, whose draw depends on seed, row and column only: pass a new one in every call.
    Returns:
        PolicyLoss: fp32, or fp64 for fp64 inputs. With options.dropped_mass its metrics include those of
            `_sparse.SPARSE_METRICS`.
    Raises:
        ValueError: a target outside the vocabulary or a sequence id without a sequence (on a GPU both are device-side
            assertions instead, without synchronisation), shapes, dtypes or options that do not match, an input that an
            option needs is missing, or a sharded head.
        NotImplementedError: a second or a forward-mode derivative.
    """
    head, bias = local(head_weight, "head_weight"), None if head_bias is None else local(head_bias, "head_bias")
    check_shapes(hidden, head, bias)
    check_tokens(tokens, hidden.shape[0], options)
    refuse_forward_mode(hidden, head, bias)
    on, inputs = torch.is_grad_enabled(), (hidden, head, bias)
    train = [int(on and x is not None and x.requires_grad) for x in inputs]
    plan = [chunk_size(hidden.shape[0], head, chunk_rows, options.fp32_logits), *train, seed % 2**32]
    with compiled_or_no_grad():
        loss, logprobs, entropy, metrics, *grads = torch.ops.lead_kernels.linear_policy_loss(
            *inputs, *tokens, *encode_sequences(sequences), options.encode(Softmax(temperature, softcap)), plan
        )
    if any(train) and not torch.compiler.is_compiling():
        grads = [g if wanted else None for g, wanted in zip(grads, train, strict=True)]
        loss = Ready.apply(loss, grads, *inputs)
        del grads
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named(metrics.detach(), metric_names(options)))
