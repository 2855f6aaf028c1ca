"""Matrix products with the head, and the chunks, checks and dtypes that both operations on hidden states share.

A bias of the head is added inside the product, before the result is rounded, as torch.nn.Linear does. The row kernels
therefore receive logits that include it and need not know of it. Its gradient is the logits' gradient summed over rows.

Legend: T rows, D hidden, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from . import _device

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}


def chunk_size(rows: int, head: torch.Tensor, chunk_rows: int | None, fp32_logits: bool = False) -> int:
    """Rows per chunk: equal chunks of at most `chunk_rows`; for None what `_device.chunk_rows` derives from its budget.

    The budget is 128 MiB of logits on a CPU and 2 GiB on a GPU.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}: give 1 or more, or None.")
    if chunk_rows is not None:
        return -(-max(1, rows) // -(-max(1, rows) // chunk_rows))
    row_bytes = head.shape[0] * (max(4, head.element_size()) if fp32_logits else head.element_size())
    budget = CHUNK_BYTES.get(head.device.type, 2 << 30)
    return _device.chunk_rows(rows, head.shape[1], row_bytes, budget, _device.processors(head.device))


def logits_buffer(rows: int, head: torch.Tensor, fp32: bool) -> torch.Tensor:
    """Allocate a buffer for a chunk's logits, [C, V], in the head's dtype, or with `fp32` in at least float32."""
    dtype = torch.promote_types(head.dtype, torch.float32) if fp32 else head.dtype
    return torch.empty(rows, head.shape[0], dtype=dtype, device=head.device)


def logits_of(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """Write hidden [C, D] times head [V, D]^T, plus bias [V], to the first C rows of `out`, in the dtype of `out`."""
    out = out[: len(hidden)]
    if out.dtype != head.dtype:
        if out.is_cuda:
            torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
        else:
            torch.mm(hidden.to(out.dtype), head.T.to(out.dtype), out=out)
        return out if bias is None else out.add_(bias)
    if bias is None:
        return torch.mm(hidden, head.T, out=out)
    return torch.addmm(bias, hidden, head.T, out=out)


def rounded(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round the logits' gradient to the inputs' dtype, for the products that follow; a no-op if it has that dtype."""
    return gradient.to(dtype)


@contextlib.contextmanager
def full_reductions() -> Iterator[None]:
    """Accumulate half-precision products in float32 on a GPU whatever torch's global switches say; restore them after.

    By default a product that is split along the summed dimension may add its parts in half precision, and d(hidden)
    sums over V.
    """
    cublas: Any = torch.backends.cuda.matmul
    names = (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    )
    before = {name: (getattr(cublas, name), getattr(cublas, name + "_split_k", None)) for name in names}

    def put(name: str, value: bool, split_k: bool | None) -> None:
        setattr(cublas, name, value if split_k is None else (value, split_k))  # newer torch takes a pair

    try:
        for name, (_, split_k) in before.items():
            put(name, False, split_k)
        yield
    finally:
        for name, (value, split_k) in before.items():
            put(name, value, split_k)


def target_logits(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor | None:
    """Logits of the targets, float32 [C], from hidden [C, D]; None for inputs that are not in half precision.

    One gather and one dot product per row, 2 C D FLOPs. Rounding a row's logits to bf16 moves its log-prob by up to
    0.06 nats at |z| = 25 through the target's own logit, and by far less through the sum over all other logits.
    """
    if head.dtype not in (torch.bfloat16, torch.float16):
        return None
    rows = 1024  # at a time, to hold at most [1024, D] in float32
    parts = [
        torch.linalg.vecdot(hidden[i : i + rows].float(), head[targets[i : i + rows]].float())
        for i in range(0, max(1, len(hidden)), rows)
    ]
    exact = torch.cat(parts)
    return exact if bias is None else exact + bias[targets].float()


def add_rows_(total: torch.Tensor, rows: torch.Tensor, first: bool) -> None:
    """Add rows [C, V], summed over C in total's dtype and in a fixed order, to total [V]; `first` overwrites total."""
    rows = rows.sum(0, dtype=total.dtype)
    total.copy_(rows) if first else total.add_(rows)


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """Add a @ b to total, in total's dtype and inside the product; `first` overwrites total instead."""
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
    """Whether the installed torch can add a product of bf16 matrices to a float32 matrix within the product, on a GPU.

    torch 2.14 can; older versions refuse a float32 `self`. The documentation does not say since when, so it is tried
    once.
    """
    a, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def add_in_slices_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """Add a @ b to total in slices of rows, each product rounded once, to total's dtype; takes at most 256 MiB more."""
    rows = max(1, (256 << 20) // (b.shape[1] * total.element_size()))
    for i in range(0, total.shape[0], rows):
        product = torch.mm(a[i : i + rows], b, out_dtype=total.dtype)
        total[i : i + rows].copy_(product) if first else total[i : i + rows].add_(product)


def local(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Return a head's weight or bias as a plain tensor. Raises ValueError if it is still sharded."""
    if hasattr(weight, "placements"):
        if any(not p.is_replicate() for p in weight.placements):  # type: ignore[attr-defined]
            raise ValueError(f"{name} is a sharded DTensor: call this inside the FSDP module's forward, or gather it.")
        return weight.to_local()  # type: ignore[attr-defined]
    return weight


def check_shapes(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError for shapes or dtypes that do not match."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or not head.shape[0]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and head_weight {list(head.shape)}: give [T, D] and [V, D], V above 0."
        )
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype} and head_weight {head.dtype}: give one float dtype.")
    if bias is not None and (bias.shape != head.shape[:1] or bias.dtype != head.dtype):
        raise ValueError(
            f"head_bias is {bias.dtype} {list(bias.shape)} and head_weight {head.dtype} {list(head.shape)}: "
            "give [V] in the head's dtype."
        )


def computable(x: torch.Tensor) -> torch.Tensor:
    """Return x, in float32 on CPUs without half-precision arithmetic, where its products are up to 100 times slower."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half and x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else x


def accumulate(dtype: torch.dtype, chunks: int = 2) -> torch.dtype:
    """Dtype in which a gradient of the head is accumulated; for one chunk it is a single product, which rounds once."""
    if chunks == 1:
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32
