"""Transfer weights from FSDP's shards to the engine in buckets: cast, gather once, load, check.

A bucket takes one collective, in the engine's dtype, for all its tensors; nothing passes through files or host memory.
"""

import time
from collections.abc import Iterator

import torch

from ..checks import chosen_engine
from ..config import Config
from ..learner.loss import disagreement, pack_logprobs, rounding_limit
from ..learner.packing import Pack, make_pack
from ..learner.policy import Policy
from ..learner.weights import gathered_weights
from ..runtime.ranks import Ranks
from .engine import Engine, Sampling, Work, fingerprint

CANARY_TOKENS = 32


def publish(policy: Policy, engine: Engine, version: int, c: Config, ranks: Ranks) -> dict:
    """Give the engine the policy's weights, which become policy version `version`. A collective.

    Returns:
        numbers for metrics.jsonl: sync_s, sync_bytes (of unsharded tensors, per rank) and sync_gb_per_s.
    Raises:
        ValueError: an engine does not hold what was sent to it; raised on every rank.
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
    """Say how the engine's tensors differ from those that were sent, or return None if they do not.

    Compares sum and sum of squares of every tensor, added up for fused tensors.

    A tensor of the engine that was not sent is an error, unless the engine also lacks some of the names that were sent:
    then it renames tensors, and the renamed ones are not compared. An engine over several ranks holds parts: only
    tensors that it holds completely are compared.
    """
    held = engine.checksums()
    known = {name for x in held for name in x.names}
    renamed = bool(sent.keys() - known)
    for x in held:
        missing = [name for name in x.names if name not in sent]
        if missing and not renamed:
            return f"Sync left out {missing[0]}, so the engine would generate with old weights"
        if missing:
            continue
        total, squares, size = (sum(sent[name][k] for name in x.names) for k in range(3))
        if tensor_parallel > 1 and 0 < x.size < size:
            continue
        near = 1e-9 * (squares * size) ** 0.5 + 1e-30  # the effect of summing in fp64 in another order
        if not (abs(x.total - total) <= near and abs(x.squares - squares) <= 1e-9 * squares + 1e-30):
            return (
                f"After sync the engine's {' + '.join(x.names)} differs from the policy's (sum {x.total:.9g}, sent "
                f"{total:.9g}): the engine did not load these weights"
            )
    return None


def canary(policy: Policy, engine: Engine, prompt: list[int], c: Config, ranks: Ranks) -> float:
    """Mean |difference| of engine's and trainer's log-probs on tokens that the engine samples. A collective.

    Raises:
        ValueError: the difference is larger than rounding explains (learner/loss.py, rounding_limit).
    """
    members = c.rollout.tensor_parallel
    work = Work([prompt], 1, [c.seed], ranks.store, f"canary-{next(ranks.tickets)}/{ranks.rank // members}")
    work.member, work.members = ranks.rank % members, members
    response = engine.generate(work, Sampling(CANARY_TOKENS, c.rollout.temperature))[0][0]
    sampled = (response.token_ids, response.logprobs)
    if ranks.sequence > 1:  # ranks that share a pack use the first rank's
        sampled = ranks.gather_objects(sampled)[ranks.team * ranks.sequence]
    part = ranks.member, ranks.sequence
    pack = make_pack([0], [prompt], [sampled[0]], [sampled[1]], ranks.device, part)
    assert pack.behavior_R is not None
    trainer_R = pack_logprobs(policy, pack, c.rollout.temperature)
    untempered_R = pack_logprobs(policy, pack, 1.0)
    limit = rounding_limit(policy, pack, c, ranks)
    policy.to_shards()
    off, off_untempered = (
        ranks.all_max((x - pack.behavior_R).abs().sum() / max(1, len(x))).item() for x in (trainer_R, untempered_R)
    )
    if not off <= limit:
        detail = _detail(trainer_R, pack) if ranks.sequence == 1 else ""
        if c.rollout.temperature != 1 and off_untempered <= limit:
            detail = f"; it reports them before the temperature of {c.rollout.temperature:g} (its logprobs_mode)"
        raise ValueError(f"At the first sync {disagreement(off, limit, c, ranks.device.type, detail)}.")
    return off


def _detail(trainer_R: torch.Tensor, pack: Pack) -> str:
    """Where the two differ most, as text."""
    assert pack.behavior_R is not None
    if not len(trainer_R):
        return ""
    i = int((trainer_R - pack.behavior_R).abs().nan_to_num(float("inf")).argmax())
    return (
        f", most at token {i + 1} of {len(trainer_R)} (id {int(pack.targets_R[i])}: engine "
        f"{pack.behavior_R[i].item():.4g}, trainer {trainer_R[i].item():.4g})"
    )
