"""Weights from FSDP's shards to the engine, in buckets: cast, gathered once, loaded, and checked.

A bucket is one collective, in the engine's dtype, over all the tensors in it; no file, no bounce through host memory.
"""

import time
from collections.abc import Iterator

import torch

from ..checks import chosen_engine
from ..config import Config
from ..learner.loss import pack_logprobs
from ..learner.packing import make_pack
from ..learner.policy import Policy
from ..learner.weights import gathered_weights
from ..runtime.ranks import Ranks
from .engine import Engine, Sampling, Work, fingerprint

CANARY_TOKENS = 32
CANARY_LIMIT = {"float32": 1e-3, "bfloat16": 0.1}  # nats, mean over the canary's tokens


def publish(policy: Policy, engine: Engine, version: int, c: Config, ranks: Ranks) -> dict:
    """Give the engine the policy's weights, which become policy version `version`. A collective.

    Returns:
        what metrics.jsonl keeps: sync_s, sync_bytes (of unsharded tensors, per rank) and sync_gb_per_s.
    Raises:
        ValueError: an engine does not hold what was sent; on every rank, if on any.
    """
    began = time.perf_counter()
    dtype = getattr(torch, c.model.dtype)
    sent: dict[str, tuple[float, float, int]] = {}

    def watched() -> Iterator[list[tuple[str, torch.Tensor]]]:
        for bucket in gathered_weights(policy, dtype, c.rollout.sync_bucket_mib << 20):
            values = fingerprint([t for _, t in bucket])
            sent.update(zip([name for name, _ in bucket], values, strict=True))
            yield bucket

    engine.load_weights(watched(), version)
    faults = ranks.gather_objects(compare(sent, engine, c.rollout.tensor_parallel))
    rank = next((rank for rank, fault in enumerate(faults) if fault), None)
    if rank is not None:
        remedy = "report this with the model's name"
        if chosen_engine(c, ranks.device.type) == "vllm":
            remedy = f"give --rollout.engine=transformers, or {remedy}"
        raise ValueError(f"{faults[rank]} (rank {rank}): {remedy}.")
    size = sum(n for *_, n in sent.values()) * dtype.itemsize
    seconds = time.perf_counter() - began
    return {"sync_s": seconds, "sync_bytes": size, "sync_gb_per_s": size / seconds / 1e9}


def compare(sent: dict[str, tuple[float, float, int]], engine: Engine, tensor_parallel: int) -> str | None:
    """What is wrong with what the engine holds against what was sent, or None where nothing is.

    Compared are sum and sum of squares of every tensor, added up for fused ones.

    Names of the engine that nobody sent are an error, unless there are sent names that it does not know either: then
    it calls them differently, and those tensors are not compared. An engine over several ranks holds parts: only what
    it holds unsharded is compared.
    """
    held = engine.checksums()
    known = {name for x in held for name in x.names}
    renamed = bool(sent.keys() - known)
    for x in held:
        missing = [name for name in x.names if name not in sent]
        if missing and not renamed:
            return f"Sync left out {missing[0]}, and the engine would generate with old weights"
        if missing:
            continue
        total, squares, size = (sum(sent[name][k] for name in x.names) for k in range(3))
        if tensor_parallel > 1 and x.size < size:
            continue
        near = 1e-9 * (squares * size) ** 0.5 + 1e-30  # what the order of an fp64 sum can change
        if not (abs(x.total - total) <= near and abs(x.squares - squares) <= 1e-9 * squares + 1e-30):
            return (
                f"After sync the engine's {' + '.join(x.names)} differs from the policy's (sum {x.total:.9g}, sent "
                f"{total:.9g}): the engine did not take these weights"
            )
    return None


def canary(policy: Policy, engine: Engine, prompt: list[int], c: Config, ranks: Ranks) -> float:
    """Mean |difference| of engine's and trainer's log-probs on a few tokens that the engine samples. A collective.

    Raises:
        ValueError: the difference is over CANARY_LIMIT.
    """
    members = c.rollout.tensor_parallel
    work = Work([prompt], 1, [c.seed], ranks.store, f"canary-{next(ranks.tickets)}/{ranks.rank // members}")
    work.member, work.members = ranks.rank % members, members
    response = engine.generate(work, Sampling(CANARY_TOKENS, c.rollout.temperature))[0][0]
    said = (response.token_ids, response.logprobs)
    if ranks.sequence > 1:  # ranks that share a pack look at the first one's
        said = ranks.gather_objects(said)[ranks.team * ranks.sequence]
    pack = make_pack([0], [prompt], [said[0]], [said[1]], ranks.device, (ranks.member, ranks.sequence))
    ours = pack_logprobs(policy, pack, c.rollout.temperature)
    assert pack.behavior_R is not None
    off = (ours - pack.behavior_R).abs().sum() / max(1, len(ours))
    difference = ranks.all_max(off).item()
    policy.to_shards()
    if not difference <= CANARY_LIMIT[c.model.dtype]:
        raise ValueError(
            f"At the first sync the engine's log-probs differ from the trainer's by {difference:.3g} nats on average "
            f"(limit {CANARY_LIMIT[c.model.dtype]:g} in {c.model.dtype}): weights that were not taken, another dtype, "
            "or a model that the engine computes differently; give --rollout.engine=transformers."
        )
    return difference
