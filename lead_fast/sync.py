"""Weights from FSDP's shards to the engine: gathered in buckets, whole tensors under Hugging Face names."""

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from .engine import Engine
from .model import Policy

BUCKET_BYTES = 1 << 30


@torch.no_grad()
def whole_weights(policy: Policy, bucket_bytes: int = BUCKET_BYTES) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, gathered; at most a bucket of them is in memory at once.

    A collective: every rank must consume the whole iterator.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, p in policy.model.named_parameters():
        bucket.append((name, p.detach()))
        held += p.numel() * p.element_size()
        if held >= bucket_bytes:
            yield from _gather(bucket)
            bucket, held = [], 0
    yield from _gather(bucket)


def _gather(bucket: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    return [(name, p.full_tensor() if isinstance(p, DTensor) else p) for name, p in bucket]


def sync(policy: Policy, engine: Engine, version: int) -> None:
    """Give the engine the policy's weights, which become policy version `version`. A collective."""
    engine.load_weights(whole_weights(policy), version)
