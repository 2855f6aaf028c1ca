"""Predict the memory of a training step from the numbers of packs that the fake step tracked."""

import math
from collections.abc import Callable

from ..learner.fake_step import KINDS, SEGMENTS, Numbers, line
from .assumptions import assumed, assumed_bytes

GRANULE = 256  # tokens; pack sizes are multiples of it
Track = Callable[[int], Numbers]  # maps a pack's tokens to its numbers


def peak(n: Numbers) -> tuple[str, dict[str, float]]:
    """The segment in which memory peaks, and its bytes by kind."""
    by_segment = {s: {k: n[f"{s}/{k}"] for k in KINDS} for s in SEGMENTS}
    highest = max(by_segment, key=lambda s: sum(by_segment[s].values()))
    return highest, by_segment[highest]


def training_bytes(n: Numbers) -> float:
    """Bytes that a GPU must have: the peak, plus what the allocator, CUDA and the sleeping engine need."""
    return sum(peak(n)[1].values()) * (1 + assumed("fragmentation")) + assumed_bytes("context", "engine_asleep")


def largest_pack(track: Track, limit_bytes: float, guess: int) -> tuple[int, dict[int, Numbers]]:
    """The largest pack, a multiple of GRANULE tokens, whose training_bytes are at most `limit_bytes`; 0 if none is.

    Args:
        guess: the first size to try.
    Returns:
        that size, and all sizes that were tracked on the way, the result among them.

    Memory is a maximum of linear functions of the tokens. So the line through two sizes is solved repeatedly, until it
    names a size that was tracked and fits, while the next larger size exceeds the limit (by the line through it).
    """
    tracked = {T: track(T) for T in (GRANULE * max(1, guess // GRANULE // 2), GRANULE * max(2, guess // GRANULE))}
    while True:
        sizes = sorted(tracked)
        over = [T for T in sizes if training_bytes(tracked[T]) > limit_bytes]
        upper = max(1, sizes.index(over[0]) if over else len(sizes) - 1)
        low, high = (training_bytes(tracked[sizes[i]]) for i in (upper - 1, upper))
        slope = (high - low) / (sizes[upper] - sizes[upper - 1])
        T = GRANULE * math.floor((sizes[upper - 1] + (limit_bytes - low) / slope) / GRANULE)
        if T < GRANULE:
            return 0, tracked
        if T in tracked:
            return T, tracked
        tracked[T] = track(T)


def interpolated(tracked: dict[int, Numbers]) -> Track:
    """Numbers of any pack, interpolated between the smallest and the largest that were tracked."""
    low, high = min(tracked), max(tracked)
    return lambda T: line((low, tracked[low]), (high, tracked[high]), T)
