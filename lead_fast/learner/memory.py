"""Measure room for the largest pack before the first step, where running out of memory costs minutes, not hours.

Legend: T packed tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch

from ..checks import chosen_engine
from ..config import Config, SftConfig
from ..runtime.ranks import Ranks
from .loss import Objective, pack_logprobs, policy_loss
from .packing import Pack, make_pack
from .policy import Policy

GRANULE = 512  # tokens; a measured budget is a multiple of it
SPARE = 0.05  # fraction of a GPU's memory left for the allocator's gaps and for NCCL
PROBES = (2048, 6144)  # tokens of the two packs through which a straight line is drawn
SLEEPING_VLLM = (
    3 << 30
)  # bytes of a GPU that vLLM keeps while it sleeps: CUDA graphs, buffers of its collectives; a guess
SPARED_PACK = 16384  # the budget if there is no GPU to measure
AnyConfig = TypeVar("AnyConfig", Config, SftConfig)


def worst_pack(tokens: int, longest: int, ranks: Ranks) -> tuple[Pack, Objective]:
    """A pack of `tokens` tokens, nearly all in responses, in sequences of at most `longest`, and its objective."""
    lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest > 1 else [])
    lengths = [max(2, n) for n in lengths]
    responses = [[1] * n for n in lengths]
    part = (ranks.member, ranks.sequence)
    pack = make_pack(
        range(len(lengths)), [[0]] * len(lengths), responses, [[-1.0] * n for n in lengths], ranks.device, part
    )
    ones = torch.ones(len(lengths), device=ranks.device)
    return pack, Objective(ones, ones / tokens)


def gradient(policy: Policy, reference: Policy | None, tokens: int, c: Config, ranks: Ranks) -> None:
    """Run everything that a step does with a pack, on the largest one, and discard the gradient."""
    pack, o = worst_pack(tokens, c.data.max_prompt_tokens + c.rollout.max_tokens, ranks)
    old_R = (
        pack_logprobs(policy, pack, c.rollout.temperature, c.loss.fp32_logits)
        if c.loss.old_logprobs == "recompute"
        else None
    )
    ref_R = pack_logprobs(reference, pack, c.rollout.temperature, c.loss.fp32_logits) if reference else None
    for _ in range(2):  # in the second pass gradients are already in memory
        policy_loss(policy, pack, o, c, old_R, ref_R).loss.backward()


def rehearse(
    policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer, c: Config, ranks: Ranks
) -> Config:
    """Run one worst-case GRPO step, so that a lack of memory shows now; see rehearse_pack."""
    longest = c.data.max_prompt_tokens + c.rollout.max_tokens
    aside = engine_bytes(policy, c, ranks.device.type)
    return rehearse_pack(
        policy, optimizer, c, longest, lambda n: gradient(policy, reference, n, c, ranks), ranks, aside
    )


def engine_bytes(policy: Policy, c: Config, device_type: str) -> int:
    """Bytes of a GPU that the engine will hold while the policy trains; it does not exist when packs are measured."""
    if device_type != "cuda":
        return 0
    if chosen_engine(c, device_type) == "vllm":
        return SLEEPING_VLLM
    copy = sum(p.numel() for p in policy.parameters())  # the transformers engine keeps its weights
    return copy * getattr(torch, c.model.dtype).itemsize


def rehearse_pack(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    c: AnyConfig,
    longest: int,
    gradient: Callable[[int], None],
    ranks: Ranks,
    aside: int = 0,
) -> AnyConfig:
    """Run one worst-case step, so that a lack of memory shows now. Weights and optimiser are unchanged afterwards.

    Args:
        longest: tokens of the longest possible sequence.
        gradient: runs forward and backward of a pack of N tokens, twice: gradients are in memory in the second pass.
        aside: bytes that must remain free, held while the packs run.
    Returns:
        the configuration, with the measured parallel.pack_tokens if it was 0.
    Raises:
        ValueError: it does not fit; the sentence says what to change.
    """
    cuda = ranks.device.type == "cuda"
    tokens = c.parallel.pack_tokens
    if not tokens and not cuda:
        tokens = SPARED_PACK
    asked = c.parallel.rehearse
    if tokens and (asked == "never" or (asked == "auto" and not cuda)):
        return dataclasses.replace(c, parallel=dataclasses.replace(c.parallel, pack_tokens=tokens))
    fresh = not optimizer.state
    held = None
    try:
        held = torch.empty(aside, dtype=torch.uint8, device=ranks.device)
        if fresh:  # allocate the optimiser's state by a step that changes nothing
            _still(policy, optimizer)
        if not tokens:
            tokens = _budget(gradient, ranks)
        gradient(max(tokens, longest))
        policy.to_shards()
    except (torch.OutOfMemoryError, RuntimeError) as e:
        if not isinstance(e, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(e):
            raise
        raise ValueError(
            f"Out of memory in the largest pack of a step (budget {max(tokens, 1):,} tokens, longest sequence "
            f"{longest:,}) on rank {ranks.rank}: {remedy(c, tokens, longest, ranks)}."
        ) from e
    finally:
        del held
        optimizer.zero_grad(set_to_none=True)
        if fresh:
            optimizer.state.clear()
        if cuda:
            torch.cuda.empty_cache()
    if ranks.main:
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB per GPU" if cuda else ""
        print(f"Rehearsal: a pack of {tokens:,} tokens fits{peak}.", flush=True)
    return dataclasses.replace(c, parallel=dataclasses.replace(c.parallel, pack_tokens=tokens))


def _still(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


def _budget(gradient: Callable[[int], None], ranks: Ranks) -> int:
    """The largest number of tokens per pack, from the peaks of two small packs: memory is linear in tokens."""
    peaks = []
    for tokens in PROBES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        gradient(tokens)
        peaks.append(torch.cuda.max_memory_allocated())
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved()
    tokens = line_budget(PROBES, (peaks[0], peaks[1]), int(free + own - SPARE * total))
    least = ranks.all_max(torch.tensor(-float(tokens), device=ranks.device))
    return max(GRANULE, int(-least.item()))


def line_budget(tokens: tuple[int, int], peaks: tuple[int, int], room: int) -> int:
    """Where the line through two points (tokens, peak bytes) reaches `room` bytes, rounded down to a GRANULE."""
    slope = max(1.0, (peaks[1] - peaks[0]) / (tokens[1] - tokens[0]))
    most = tokens[0] + (room - peaks[0]) / slope
    return int(most // GRANULE * GRANULE)


def remedy(c: Config | SftConfig, tokens: int, longest: int, ranks: Ranks) -> str:
    """What to change first so that the largest pack needs less memory."""
    limit = "rollout.max_tokens" if isinstance(c, Config) else "max_solution_tokens"
    if c.model.activation_checkpointing != "full":
        return "give --model.activation_checkpointing=full"
    if not c.parallel.reshard:
        return "give --parallel.reshard=true"
    if tokens > longest:
        return f"give --parallel.pack_tokens={longest}, the longest sequence"
    if c.parallel.sequence < ranks.world:
        return f"give --parallel.sequence={2 * c.parallel.sequence}, so that ranks share a sequence"
    if c.parallel.offload == "none":
        return f"give --parallel.offload=both, or a smaller {limit}"
    return f"give a smaller {limit}, or more GPUs"
