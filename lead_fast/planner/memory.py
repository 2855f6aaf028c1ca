"""Memory of a training step, from the numbers of packs that the fake step tracked."""

import math
from collections.abc import Callable

from ..learner.fake_step import KINDS, SEGMENTS, Numbers, line
from .assumptions import assumed, assumed_bytes

GRANULE = 256  # tokens; sizes of packs are its multiples
Track = Callable[[int], Numbers]  # tokens of a pack to its numbers


def peak(n: Numbers) -> tuple[str, dict[str, float]]:
    """The segment in which memory is highest, and its bytes by kind."""
    by_segment = {s: {k: n[f"{s}/{k}"] for k in KINDS} for s in SEGMENTS}
    highest = max(by_segment, key=lambda s: sum(by_segment[s].values()))
    return highest, by_segment[highest]


def training_bytes(n: Numbers) -> float:
    """What a GPU must have: the peak, and what the allocator, CUDA and the sleeping engine take."""
    return sum(peak(n)[1].values()) * (1 + assumed("fragmentation")) + assumed_bytes("context", "engine_asleep")


def largest_pack(track: Track, limit_bytes: float, guess: int) -> tuple[int, dict[int, Numbers]]:
    """The largest pack, a multiple of GRANULE tokens, whose training_bytes are at most `limit_bytes`; 0 if none is.

    Args:
        guess: the first size looked at.
    Returns:
        that size, and all that was tracked on the way, the result among it.

    Memory is a maximum of straight lines in the tokens, so the line through two sizes is solved until it names a size
    that was tracked and fits, with the next one up over the limit (by the line through it).
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
    """Numbers of any pack, on the line through the smallest and the largest that were tracked."""
    low, high = min(tracked), max(tracked)
    return lambda T: line((low, tracked[low]), (high, tracked[high]), T)
