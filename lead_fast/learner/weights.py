"""Gather weights from FSDP's shards, one bucket of unsharded tensors at a time.

A bucket takes one collective for all the tensors in it; nothing passes through files or host memory.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from .policy import Policy

all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13


@torch.no_grad()
def gathered_weights(policy: Policy, dtype: torch.dtype, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield every parameter in `dtype`, unsharded, under its Hugging Face name, in lists up to `bucket_bytes` (or one).

    A collective: every rank must consume the whole iterator.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, p in policy.model.named_parameters():
        size = p.numel() * dtype.itemsize
        if bucket and held + size > bucket_bytes:
            yield _gather(bucket, dtype)
            bucket, held = [], 0
        bucket.append((name, p.detach()))
        held += size
    if bucket:
        yield _gather(bucket, dtype)


def _gather(bucket: list[tuple[str, torch.Tensor]], dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """Gather a bucket in one collective. FSDP shards dimension 0 as torch.chunk does: the last shard may be short."""
    shards = [p for _, p in bucket if isinstance(p, DTensor)]
    if not shards:
        return [(name, p.to(dtype)) for name, p in bucket]
    mesh = shards[0].device_mesh
    world = mesh.size(-1)  # the last dimension spans one complete copy of the model
    shape = (Replicate(), Shard(0)) if mesh.ndim == 2 else (Shard(0),)
    assert all(p.placements == shape for p in shards)
    rows = [-(-p.shape[0] // world) for p in shards]
    sizes = [r * p.shape[1:].numel() for r, p in zip(rows, shards, strict=True)]
    local = torch.zeros(sum(sizes), dtype=dtype, device=mesh.device_type)
    for p, at in zip(shards, local.split(sizes), strict=True):
        rows_here = p.to_local()
        at[: rows_here.numel()].copy_(rows_here.reshape(-1))
    every = torch.empty(world * local.numel(), dtype=dtype, device=local.device)
    all_gather(every, local, group=mesh.get_group(mesh.ndim - 1))
    pieces = iter(every.view(world, -1).split(sizes, dim=1))
    out = []
    for name, p in bucket:
        if isinstance(p, DTensor):
            tensor = next(pieces).reshape(-1, *p.shape[1:])[: p.shape[0]]
        else:
            tensor = p.to(dtype)
        out.append((name, tensor))
    return out
