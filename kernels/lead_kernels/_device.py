"""Tile sizes of the Triton kernels and rows of a chunk of logits: tables, not autotuning.

Every run gets the same bits, and no first step stalls. A row is read in tiles of `block` logits by `warps` warps; 16
bytes a thread and load are met by every row of the table (docs/evidence/kernel_resources.md: registers, spills, width,
instructions per logit, made by `python -m lead_kernels.testing resources`). No row was timed on a device yet. A kernel
that writes the gradient has one program to a processor, with 32 KiB of the next tile under way while one is computed:
what all processors look at is then 40 MB of bf16 logits at a vocabulary of 152,064, which a cache of 50 MB holds until
the second look.
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
    "hip": {2: Tile(16384, 8), 4: Tile(8192, 8)},
}
# A kernel that writes no gradient looks at a row once: small programs, many to a processor, hide each other's ends.
FORWARD: dict[str, dict[int, Tile]] = {
    "cuda": {2: Tile(1024, 4), 4: Tile(1024, 4)},
    "hip": {2: Tile(1024, 2), 4: Tile(1024, 2)},
}


def full_tile(architecture: str, itemsize: int, capped: bool, gradient: bool) -> Tile:
    """The tile of long rows. A soft cap needs registers of its own: fewer logits a thread, or the kernel spills."""
    block, warps = (TILES if gradient else FORWARD)[architecture][itemsize]
    return Tile(block // 4 if capped and gradient else block, warps)


def tile(dtype: torch.dtype, vocabulary: int, capped: bool, gradient: bool) -> Tile:
    """The tile for rows of `vocabulary` logits: that of long rows, less where a row has none of those.

    128 logits at least: a row shorter than that is a rest without a full tile, and takes the exact path.
    """
    full = full_tile("hip" if torch.version.hip else "cuda", dtype.itemsize, capped, gradient)
    block = min(full.block, max(128, 1 << (vocabulary.bit_length() - 1)))
    return Tile(block, max(1, full.warps * block // full.block))


# processors of a device -> hidden size -> rows of a chunk with which d(hidden), in tiles of 128 rows x 256 columns,
# fills whole waves; so do their multiples
WAVES: dict[int, dict[int, int]] = {132: {5120: 4224, 3584: 8448, 1536: 2816}}
MOST_ROWS = 8448
TILE_ROWS = 128


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 0 for another device, and where a GPU is only pretended."""
    real = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if real else 0


def chunk_rows(rows: int, hidden: int, row_bytes: int, budget: int, processors: int) -> int:
    """Rows of a chunk of logits.

    All rows where their logits fit the budget. Else, on a device of WAVES, the most rows that fill whole waves, up to
    8,448, and up to a quarter above the budget: 8,448 rows of V = 152,064 in bf16 are 2.4 GiB. Else equal chunks, on a
    GPU of a multiple of 128 rows. Free memory is not asked for: a run would not repeat its sums' order.

    Args:
        rows: of the call, T.
        hidden: D.
        row_bytes: bytes of one row of logits.
        budget: bytes that a chunk's logits should take.
        processors: of the device; 0: a CPU.
    """
    rows, most = max(1, rows), max(1, budget // row_bytes)
    if rows <= most:
        return rows
    if wave := WAVES.get(processors, {}).get(hidden):
        waves = min(MOST_ROWS, budget * 5 // 4 // row_bytes) // wave
        if waves:
            return min(rows, waves * wave)
    unit = TILE_ROWS if processors and most >= TILE_ROWS else 1
    chunks = -(-rows // (most // unit * unit))
    return min(rows, -(-rows // (chunks * unit)) * unit)
