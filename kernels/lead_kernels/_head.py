"""Products with the head, and what the two operations over hidden states share: chunks, checks, dtypes.

A bias of the head is added inside the product, before its result is rounded, as torch.nn.Linear does: the row kernels
get logits that hold it and know nothing of it. Its gradient is the sum of the logits' gradient over all rows.

Legend: T rows, D hidden, V vocabulary.
"""

import functools

import torch

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}


def chunk_size(rows: int, head: torch.Tensor, chunk_rows: int | None) -> int:
    """Rows of a chunk: as asked, else `rows` in equal chunks of at most 64 MiB of logits on a CPU, 2 GiB on a GPU.

    On a GPU that is up to 7,061 rows of V = 152,064 in bf16: enough for the products to run at full rate.
    """
    fit = chunk_rows or max(1, CHUNK_BYTES.get(head.device.type, 2 << 30) // (head.shape[0] * head.element_size()))
    return -(-max(1, rows) // -(-max(1, rows) // fit))


def logits_of(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """hidden [C, D] times head [V, D]^T, plus bias [V], written to the first C rows of `out`."""
    out = out[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, head.T, out=out)
    return torch.addmm(bias, hidden, head.T, out=out)


def add_rows_(total: torch.Tensor, rows: torch.Tensor, first: bool) -> None:
    """total [V] (+)= the sum of rows [C, V] over C, in total's dtype and a fixed order; `first` overwrites total."""
    rows = rows.sum(0, dtype=total.dtype)
    total.copy_(rows) if first else total.add_(rows)


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

    torch 2.14 does and older ones refuse a float32 `self`; the documentation does not say which, so it is tried once.
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


def local(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Return a head's weight or bias as a plain tensor. Raises ValueError for one that is still sharded."""
    if hasattr(weight, "placements"):
        if any(not p.is_replicate() for p in weight.placements):  # type: ignore[attr-defined]
            raise ValueError(f"{name} is a sharded DTensor: call this inside the FSDP module's forward, or gather it.")
        return weight.to_local()  # type: ignore[attr-defined]
    return weight


def check_shapes(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> None:
    """Raise ValueError for shapes or dtypes that do not fit together."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, head_weight {list(head.shape)} and targets {list(targets.shape)}: "
            "give [T, D], [V, D] and [T]."
        )
    if hidden.dtype != head.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and head_weight {head.dtype}: give one dtype.")
    if bias is not None and (bias.shape != head.shape[:1] or bias.dtype != head.dtype):
        raise ValueError(
            f"head_bias is {bias.dtype} {list(bias.shape)} and head_weight {head.dtype} {list(head.shape)}: "
            "give [V] in the head's dtype."
        )


def computable(x: torch.Tensor) -> torch.Tensor:
    """Return x, in float32 on a CPU without half-precision arithmetic, where products are up to 100 times slower."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.float() if half and x.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else x


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient of the head is added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32
