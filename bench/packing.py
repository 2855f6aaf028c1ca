"""How well responses of very different lengths are spread over packs and ranks, beside three other ways.

    python bench/packing.py [--responses 256] [--ranks 8] [--budget 16384] [--seeds 5]

Lengths are lognormal, median 4,096 tokens, cut at 14,336; work is FLOPs of Qwen2.5-14B's shape, causal attention
counted. No model is run. Efficiency is the work that had to be done over what the ranks spend: the slowest rank's work,
padding included, times the number of ranks.

    lead-fast          the longest first to the rank with least work, there to the pack with least work and room
    first-fit          packs filled in order by tokens, dealt out to ranks in turn
    padded, sorted     micro-batches of 4 of similar length, padded to their longest, dealt out to ranks in turn
    padded             micro-batches of 4 as they come, padded to their longest, dealt out to ranks in turn
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import RESULTS, machine, write_json

from lead_fast.learner.packing import assign, flops_per_sequence

SHAPE = {"linear_params": 13_990_000_000, "layers": 48, "hidden": 5120}
Cost = Callable[[int], float]


def ours(lengths: Sequence[int], budget: int, ranks: int, cost: Cost) -> list[float]:
    return [sum(cost(lengths[i]) for pack in rank for i in pack) for rank in assign(lengths, budget, ranks, cost)]


def first_fit(lengths: Sequence[int], budget: int, ranks: int, cost: Cost) -> list[float]:
    packs: list[list[int]] = []
    for n in lengths:
        room = next((p for p in packs if sum(p) + n <= budget), None)
        if room is None:
            packs.append(room := [])
        room.append(n)
    return [sum(cost(n) for p in packs[r::ranks] for n in p) for r in range(ranks)]


def padded(lengths: Sequence[int], budget: int, ranks: int, cost: Cost) -> list[float]:
    batches = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    return [sum(len(b) * cost(max(b)) for b in batches[r::ranks]) for r in range(ranks)]


WAYS = {
    "lead-fast": ours,
    "first-fit": first_fit,
    "padded, sorted": lambda lengths, *rest: padded(sorted(lengths), *rest),
    "padded": padded,
}


def measure(lengths: Sequence[int], budget: int, ranks: int) -> dict[str, dict[str, float]]:
    """For each way: efficiency, the slowest rank over the mean, milliseconds."""
    cost = flops_per_sequence(**SHAPE)
    out = {}
    for name, way in WAYS.items():
        began = time.perf_counter()
        work = way(lengths, budget, ranks, cost)
        ms = 1e3 * (time.perf_counter() - began)
        slowest = max(work)
        out[name] = {"efficiency": sum(map(cost, lengths)) / ranks / slowest,
                     "slowest_over_mean": slowest * ranks / sum(work), "ms": ms}  # fmt: skip
    return out


def long_tail(responses: int, seed: int) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return (4096 * torch.exp(0.8 * torch.randn(responses, generator=g))).long().clamp(64, 14_336).tolist()


def main() -> None:
    p = argparse.ArgumentParser(description="How well responses are spread over packs and ranks.")
    p.add_argument("--responses", type=int, default=256)
    p.add_argument("--ranks", type=int, default=8)
    p.add_argument("--budget", type=int, default=16_384, help="tokens of a pack")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--out", type=Path, default=RESULTS / "packing.json")
    a = p.parse_args()
    runs = [measure(long_tail(a.responses, seed), a.budget, a.ranks) for seed in range(a.seeds)]
    rows = {n: {k: statistics.mean(run[n][k] for run in runs) for k in runs[0][n]} for n in WAYS}
    print(f"{'':16} {'efficiency':>10} {'slowest / mean':>15} {'ms':>7}")
    for name, row in rows.items():
        print(f"{name:16} {100 * row['efficiency']:9.1f}% {row['slowest_over_mean']:15.3f} {row['ms']:7.1f}")
    write_json(a.out, machine("cpu") | json.loads(json.dumps(rows)))


if __name__ == "__main__":
    main()
