"""Compare four ways of distributing responses of very different lengths over packs and ranks.

    python bench/packing.py [--responses 256] [--ranks 8] [--budget 16384] [--seeds 5]

Lengths are lognormal with a median of 4,096 tokens, cut at 14,336. Work is FLOPs in Qwen2.5-14B's shape, including
causal attention; no model is run. It prints for each way its efficiency, the slowest rank's work over the mean, and the
milliseconds that the distribution takes, and finishes within seconds. Efficiency is the necessary work divided by the
work of the slowest rank, padding included, times the number of ranks.

    lead-fast          longest first, to the rank with the least work, there to the roomy pack with the least work
    first-fit          packs filled in order by tokens, dealt to ranks in turn
    padded, sorted     micro-batches of 4 of similar length, padded to the longest, dealt to ranks in turn
    padded             micro-batches of 4 in sampling order, padded to the longest, dealt to ranks in turn
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
    """Measure each way: efficiency, the slowest rank's work over the mean, milliseconds."""
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
    p = argparse.ArgumentParser(description="Compare four ways of distributing responses over packs and ranks.")
    p.add_argument("--responses", type=int, default=256)
    p.add_argument("--ranks", type=int, default=8)
    p.add_argument("--budget", type=int, default=16_384, help="tokens per pack")
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
