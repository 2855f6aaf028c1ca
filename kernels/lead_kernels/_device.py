"""Tile sizes of the Triton kernels. A table, not autotuning: every run the same bits, and no stall in the first step.

A row is read in tiles of `block` logits by `warps` warps; 16 bytes a thread and load are met by every row of the table
(docs/kernel_resources.md: registers, spills, load width, made by `python -m lead_kernels.testing resources`).
No row was timed on a device yet: they are chosen for at least two 16-byte loads in flight per thread.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """block: logits of a row looked at together, a power of two; warps: per program."""

    block: int
    warps: int


# bytes of a logit -> tile, by architecture; AMD's warps are 64 wide, so half as many
TILES: dict[str, dict[int, Tile]] = {
    "cuda": {2: Tile(16384, 16), 4: Tile(8192, 16)},
    "hip": {2: Tile(8192, 8), 4: Tile(4096, 8)},
}
# A kernel that writes no gradient looks at a row once: small programs, many to a processor, hide each other's ends.
FORWARD: dict[str, dict[int, Tile]] = {
    "cuda": {2: Tile(2048, 4), 4: Tile(2048, 4)},
    "hip": {2: Tile(2048, 2), 4: Tile(2048, 2)},
}


def full_tile(architecture: str, itemsize: int, capped: bool, gradient: bool) -> Tile:
    """The tile of long rows. A soft cap needs registers of its own: fewer logits a thread, or the kernel spills."""
    block, warps = (TILES if gradient else FORWARD)[architecture][itemsize]
    return Tile(block // (4 if gradient else 2) if capped else block, warps)


def tile(dtype: torch.dtype, vocabulary: int, capped: bool, gradient: bool) -> Tile:
    """The tile for rows of `vocabulary` logits: that of long rows, less where a row has none of those.

    128 logits at least: a row shorter than that is a rest without a full tile, and takes the exact path.
    """
    full = full_tile("hip" if torch.version.hip else "cuda", dtype.itemsize, capped, gradient)
    block = min(full.block, max(128, 1 << (vocabulary.bit_length() - 1)))
    return Tile(block, max(1, full.warps * block // full.block))
