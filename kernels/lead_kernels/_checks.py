"""Checks of arguments: what the public functions refuse, with the same one-sentence message on every backend.

Shapes, dtypes and combinations of options are checked before an operator is called. The range of ids, which depends on
values, is checked inside the operator: on a GPU by an assertion on the device, which neither waits nor copies, so that
a bad id surfaces as a CUDA error at the next synchronisation.

Legend: T rows, V vocabulary, S sequences.
"""

from typing import Any

import torch
from torch.autograd import forward_ad

from .options import LossOptions
from .records import Tokens


def check_ids(ids: torch.Tensor, size: int, name: str, of: str) -> None:
    """Raise ValueError if an id is outside 0..size-1; on a GPU the error is asynchronous, to avoid a wait."""
    if ids.is_cuda:
        inside = ((ids >= 0) & (ids < size)).all()
        return torch._assert_async(inside, f"a {name} is outside {of} {size}")  # type: ignore
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
        bad = ids[(ids < 0) | (ids >= size)][0]
        raise ValueError(f"{name} {int(bad)} is outside {of} {size}: give 0 to {size - 1}.")


def check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    """Raise ValueError if a target is not a column of the logits."""
    check_ids(targets, vocabulary, "target", "the vocabulary of")


def check_sequence_ids(sequence_ids: torch.Tensor, n_sequences: int) -> None:
    """Raise ValueError if a row's sequence id does not name one of the sequences."""
    check_ids(sequence_ids, n_sequences, "sequence id", "the number of sequences,")


def check_rows(rows: int, targets: torch.Tensor) -> None:
    """Raise ValueError unless there is one target per row, in int64, the dtype that torch.gather requires."""
    if targets.dtype != torch.int64 or targets.shape != (rows,):
        raise ValueError(f"targets are {targets.dtype} {list(targets.shape)}: give int64 [{rows}], one for each row.")


def check_logits(logits: torch.Tensor) -> None:
    """Raise ValueError unless the logits are a matrix of floats."""
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}: give [T, V] of a float dtype.")


def check_tokens(tokens: Tokens, rows: int, options: LossOptions) -> None:
    """Raise ValueError if the tokens do not match the rows, or if a tensor that the options need is missing."""
    if not isinstance(options, LossOptions):
        raise ValueError(f"options are of type {type(options).__name__}: give LossOptions.")
    check_rows(rows, tokens.targets)
    ids = tokens.sequence_ids
    if ids.shape != (rows,) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"sequence_ids are {ids.dtype} {list(ids.shape)}: give integers [{rows}], one for each row.")
    for name in ("behavior", "old", "reference"):
        x = getattr(tokens, name)
        if x is not None and (x.shape != (rows,) or not x.is_floating_point()):
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: give floats [{rows}], one for each row.")
    if options.kl_coef and tokens.reference is None:
        raise ValueError(f"kl_coef is {options.kl_coef} without reference log-probs: give Tokens.reference.")
    if options.importance_cap is not None and tokens.behavior is None:
        raise ValueError(f"importance_cap is {options.importance_cap} without the log-probs of the policy that "
                         "sampled: give Tokens.behavior.")  # fmt: skip


def refuse_forward_mode(*inputs: torch.Tensor | None) -> None:
    """Raise NotImplementedError for inputs with a tangent (forward mode), which would otherwise be dropped silently."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("lead_kernels has no forward-mode derivatives: use backward or torch.autograd.grad.")


def refuse_second_derivative() -> None:
    """Raise NotImplementedError in a backward with create_graph=True: the gradients it returns are constants."""
    if torch.is_grad_enabled():
        raise NotImplementedError("lead_kernels has no second derivatives: call backward without create_graph=True.")


def no_second_derivative(*_: Any) -> Any:
    """Raise NotImplementedError. Registered as the backward of a backward."""
    raise NotImplementedError("lead_kernels has no second derivatives: differentiate its results once.")
