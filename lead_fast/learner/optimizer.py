"""AdamW, its schedule and gradient clipping."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from ..config import OptimConfig
from ..runtime.ranks import host_threads
from .policy import Policy


def make_optimizer(policy: Policy, c: OptimConfig) -> torch.optim.AdamW:
    """Make AdamW over the sharded fp32 master weights that are trained (see model.freeze_head).

    Norms and biases, which have one dimension, may be a group without decay.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups: list[dict] = [{"params": trained}]
    if not c.decay_norms_and_biases:
        decayed, spared = ([p for p in trained if (p.dim() < 2) == small] for small in (False, True))
        groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, weight_decay=c.weight_decay, fused=True)


def learning_rate(step: int, steps: int, c: OptimConfig) -> float:
    """The learning rate at `step` (0 is the first) of `steps`."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    x = (step - c.warmup_steps) / max(1, steps - c.warmup_steps)
    return c.lr * {"constant": 1.0, "linear": 1.0 - x, "cosine": 0.5 * (1.0 + math.cos(math.pi * x))}[c.schedule]


def update(policy: Policy, optimizer: torch.optim.Optimizer, lr: float, clip: float, loss: float = 0.0) -> float:
    """Take one optimiser step on the shards, or skip it if the gradient or `loss` is not finite.

    Args:
        clip: largest global norm of the gradient; 0: no clipping.
        loss: of the whole batch, the same number on every rank.
    Returns:
        the gradient's global norm before clipping; not finite if the step was skipped, the same on every rank.
    """
    policy.to_shards()
    for group in optimizer.param_groups:
        group["lr"] = lr
    with threads_for(policy):
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        value = float(norm) if math.isfinite(loss) else math.nan
        if math.isfinite(value):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


@contextlib.contextmanager
def threads_for(policy: Policy) -> Iterator[None]:
    """Use this rank's part of the cores for computation on shards in host memory: torchrun leaves one thread."""
    before = torch.get_num_threads()
    in_host_memory = all(_on_cpu(p) for p in policy.parameters())
    if in_host_memory:
        torch.set_num_threads(host_threads())
    try:
        yield
    finally:
        if in_host_memory:
            torch.set_num_threads(before)


def _on_cpu(p: torch.Tensor) -> bool:
    return (p.to_local() if isinstance(p, DTensor) else p).device.type == "cpu"
