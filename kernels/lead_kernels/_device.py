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
    "cuda": {2: Tile(8192, 16), 4: Tile(4096, 16)},
    "hip": {2: Tile(8192, 8), 4: Tile(4096, 8)},
}


def full_tile(architecture: str, itemsize: int, capped: bool) -> Tile:
    """The tile of long rows. With a soft cap it is half the table's, by half the warps: the same work per thread.

    At the table's 16 warps the capped kernel spilled 8 bytes on sm_80, where the compiler aims at two programs at once.
    """
    block, warps = TILES[architecture][itemsize]
    return Tile(block // 2, warps // 2) if capped else Tile(block, warps)


def tile(dtype: torch.dtype, vocabulary: int, capped: bool) -> Tile:
    """The tile for rows of `vocabulary` logits of `dtype`: that of long rows, less where a row is shorter."""
    full = full_tile("hip" if torch.version.hip else "cuda", dtype.itemsize, capped)
    block = min(full.block, max(128, 1 << (vocabulary - 1).bit_length()))
    return Tile(block, max(1, full.warps * block // full.block))
