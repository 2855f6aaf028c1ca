"""Predict the seconds of a step's training half: products, attention, collectives, and the rest by bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..learner.fake_step import Numbers
from ..learner.model import head_dim
from ..learner.packing import assign
from .assumptions import NODE, Device, assumed
from .memory import Track
from .shapes import ModelSize


def collective_s(kind: str, size: float, calls: float, ranks: int, across_nodes: bool, d: Device) -> float:
    """Seconds of `calls` ring collectives of `size` bytes in total (of unsharded tensors) over `ranks`.

    A ring moves (ranks - 1) / ranks of the bytes over every link, twice for an all-reduce. Across nodes NCCL lays a
    ring over each network card, so that a ring over all GPUs has the bandwidth of all cards of a node; an all-reduce
    between copies of the model has only the card of its GPU.
    """
    if ranks == 1:
        return 0.0
    times = 2 if kind == "all_reduce" else 1
    link = d.nvlink if not across_nodes else d.network if kind == "all_reduce" else min(d.nvlink, NODE * d.network)
    return times * (ranks - 1) * (size / ranks / (link * assumed("collective")) + calls * assumed("hop_s"))


def mfu(lengths: Sequence[int], cost: Callable[[int], float], seconds: float, gpus: int, d: Device) -> dict[str, float]:
    """Useful FLOPs over what the GPUs could do in `seconds`, counting nothing recomputed, in two conventions.

    causal: three times the forward's `cost`, 6 N a token and 6 L D n for attention in a sequence of n tokens;
    torchtitan: 12 L D n, as if every token attended to all the others.
    """
    quadratic = (cost(2) - 2 * cost(1)) / 2
    useful = 3 * sum(map(cost, lengths))
    extra = 3 * quadratic * sum(n * n for n in lengths)
    possible = seconds * gpus * d.flops
    return {"causal": useful / possible, "torchtitan": (useful + extra) / possible}


@dataclass(frozen=True)
class Work:
    """Seconds of a pack's forward and backward, by use: `other` is neither product nor attention."""

    products: float
    attention: float
    other: float

    @property
    def seconds(self) -> float:
        return self.products + self.attention + self.other


@dataclass(frozen=True)
class TrainingTime:
    """The training half of a step.

    seconds: by phase. compute: of forward and backward by kind, of one rank, summed over its packs. packs: per rank.
    balance: mean over the slowest rank's work. traffic_gb: sent by a GPU, by collective.
    """

    seconds: dict[str, float]
    compute: Work
    packs: int
    balance: float
    tokens: int
    mfu: dict[str, float]
    traffic_gb: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def training_time(c: Config, shape: Any, at: Track, gpus: int, lengths: Sequence[int], d: Device) -> TrainingTime:
    """Seconds, traffic and MFU of forward, backward and update over sequences of `lengths` tokens.

    Args:
        at: numbers of a pack of T tokens.
    """
    n, copies, together = at(c.parallel.pack_tokens), c.parallel.replicate, c.parallel.sequence
    shards, width = gpus // copies, shape.num_attention_heads * head_dim(shape)
    quadratic = (n["forward_flops_2"] - 2 * n["forward_flops_1"]) / 2

    def cost(t: int) -> float:
        return (n["forward_flops_1"] - quadratic) * t + quadratic * t * t

    def work(members: Sequence[int]) -> Work:
        x = at(max(1, sum(members)))
        calls = 2 * x["attention_forward_calls"] + 5 * x["attention_backward_calls"]
        attention = calls * width * sum(t * t for t in members) / together
        return Work(x["gemm_flops"] / d.flops / assumed("gemm"), attention / d.flops / assumed("attention"),
                    x["moved_bytes"] / (d.hbm * assumed("copy")))  # fmt: skip

    def traffic_s(kind: str, what: str = "bytes") -> float:
        size, calls = n.get(f"{kind}_{what}", 0.0), n.get(f"{kind}_calls", 0.0) if what == "bytes" else 1
        ranks = copies if kind == "all_reduce" else shards
        return collective_s(kind, size, calls, ranks, kind == "all_reduce" or shards > NODE, d)

    def exchange_s(members: Sequence[int]) -> float:
        """Ulysses: q, k, v and out of every block are exchanged in forward, backward and recomputation."""
        passes = 2 + (c.model.activation_checkpointing != "none")
        size = 4 * 2 * width * shape.num_hidden_layers * sum(members) / together
        return passes * size * (together - 1) / together / (d.nvlink * assumed("collective"))

    compute_s = exposed_s = ideal_s = 0.0
    parts: list[Work] = []
    packs = gathers = 0
    size = len(lengths) // c.optim.updates
    for first in range(0, len(lengths), size):
        part = lengths[first : first + size]
        dealt = assign(part, c.parallel.pack_tokens, gpus // together, cost)
        for m in range(len(dealt[0])):  # collectives keep ranks in lockstep: the slowest pack counts
            by_rank = [work([part[i] for i in rank[m]]) for rank in dealt]
            slowest = max(by_rank, key=lambda w: w.seconds)
            parts.append(slowest)
            gathered = c.parallel.reshard or m == 0
            kinds = ["reduce_scatter", "all_reduce", *(["all_gather"] if gathered else [])]
            compute_s, ideal_s = compute_s + slowest.seconds, ideal_s + sum(w.seconds for w in by_rank) / len(by_rank)
            first_and_last = sum(traffic_s(k, "largest") for k in kinds)
            exposed_s += max(first_and_last, sum(map(traffic_s, kinds)) - slowest.seconds)
            exposed_s += max(exchange_s([part[i] for i in rank[m]]) for rank in dealt)
            packs, gathers = packs + 1, gathers + gathered
    seconds = {
        "forward and backward": compute_s,
        "communication not hidden": exposed_s,
        # norm: 4 bytes a weight read; clipping: 8 read and written; AdamW: 16 read, 12 written
        "optimiser": c.optim.updates * 40 * n["parameters"] / shards / (d.hbm * assumed("copy")),
    }
    GB = 1e9
    traffic_gb = {
        "all-gather": gathers * n.get("all_gather_bytes", 0.0) / GB,
        "reduce-scatter": packs * n.get("reduce_scatter_bytes", 0.0) / GB,
        "all-reduce": packs * n.get("all_reduce_bytes", 0.0) / GB,
    }
    compute = Work(*(sum(getattr(w, k) for w in parts) for k in ("products", "attention", "other")))
    shares = mfu(lengths, cost, sum(seconds.values()), gpus, d)
    return TrainingTime(seconds, compute, packs, ideal_s / compute_s, sum(lengths), shares, traffic_gb)


def sync_s(n: Numbers, shards: int, d: Device) -> float:
    """Seconds until the engine has the new weights: gathered, and moved through memory several times."""
    moved_s = assumed("sync_passes") * 2 * n["parameters"] / (d.hbm * assumed("copy"))
    return collective_s("all_gather", n["sync_bytes"], 1, shards, shards > NODE, d) + moved_s


# ---------------------------------------------------------------------------------------------------------- by formula

# Bytes per token and block that are neither product nor attention, per unit of hidden, intermediate, query and
# key-value width: counted by the fake step in bfloat16 (tests/test_plan.py), with RMSNorm, RoPE and SwiGLU as one
# kernel each or as torch's operators.
OTHER_BYTES = {True: (62, 16, 18, 28), False: (306, 28, 58, 68)}  # by whether the kernels are fused
RECOMPUTED_BYTES = {True: (14, 6, 4, 4), False: (78, 10, 20, 20)}  # of a recomputed forward pass
SHARDING_BYTES = 27  # per weight and pack: FSDP's copies into and out of its buffers
LOGIT_BYTES = {True: 12, False: 30}  # per entry of the logits: a plain cross entropy, forward and backward


def block_bytes(m: ModelSize, fused: bool, again: int) -> float:
    """Bytes per token in all blocks that are neither product nor attention, including `again` recomputed forwards."""
    widths = (m.hidden, m.intermediate, m.q_width, m.kv_width)
    per_block = [once + again * more for once, more in zip(OTHER_BYTES[fused], RECOMPUTED_BYTES[fused], strict=True)]
    return m.layers * sum(a * b for a, b in zip(per_block, widths, strict=True))


def other_seconds_ratio(m: ModelSize, checkpointed: bool, t: TrainingTime, gpus: int, d: Device, fused: bool) -> float:
    """The share of forward and backward that would be neither product nor attention with blocks of the other kind.

    Args:
        t: as tracked, with RMSNorm, RoPE and SwiGLU as single kernels (`fused`) or as torch's operators.
    """
    change = block_bytes(m, not fused, checkpointed) - block_bytes(m, fused, checkpointed)
    other = t.compute.other + t.tokens / gpus * change / (d.hbm * assumed("copy"))
    return other / (t.compute.products + t.compute.attention + other)


def forward_and_backward_s(
    m: ModelSize, d: Device, length: float, pack_tokens: int, fused: bool, recomputed: float, forwards: int = 0
) -> Work:
    """Seconds per token of a model by closed forms, for systems that cannot be tracked here.

    Args:
        length: tokens of a sequence; for unequal ones, the mean weighted by tokens.
        pack_tokens: tokens of a micro-batch.
        fused: whether RMSNorm, RoPE and SwiGLU are single kernels.
        recomputed: share of the blocks' products that is computed twice: 1 with full checkpointing.
        forwards: additional passes without a gradient.
    """
    flops = (6 + 2 * recomputed + 2 * forwards) * m.blocks + (6 + 2 * forwards) * m.head
    attention = (2 + 5 + 2 * (recomputed == 1) + 2 * forwards) / 2 * m.attention_flops(length) / length
    other = block_bytes(m, fused, (recomputed > 0) + forwards)
    other += SHARDING_BYTES * m.multiplied / pack_tokens + LOGIT_BYTES[fused] * m.vocabulary
    return Work(flops / d.flops / assumed("gemm"), attention / d.flops / assumed("attention"),
                other / (d.hbm * assumed("copy")))  # fmt: skip
