"""Tile sizes of the Triton kernels and rows per chunk of logits, from tables and not from autotuning.

Tables give every run the same bits, and no first step that stalls while it tunes. A row is read in tiles of `block`
logits by `warps` warps, and every entry of the table loads 16 bytes per thread and instruction
(docs/evidence/kernel_resources.md, written by `python -m lead_kernels.testing resources`, lists registers, spills, load
widths and instructions per logit). No entry has been timed on a device yet. A kernel that writes the gradient runs one
program per multiprocessor and loads the next 32 KiB tile while it computes the current one. At a vocabulary of 152,064
the rows in flight are then 40 MB of bf16 logits, which a 50 MB cache holds until the rows are read a second time.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """block: logits of a row that are processed together, a power of two; warps: warps per program."""

    block: int
    warps: int


# bytes per logit -> tile, by architecture; AMD's warps are 64 threads wide, so half as many are used
TILES: dict[str, dict[int, Tile]] = {
    "cuda": {2: Tile(16384, 16), 4: Tile(8192, 16)},
    "hip": {2: Tile(16384, 8), 4: Tile(8192, 8)},
}
# A kernel that writes no gradient reads a row once: many small programs per multiprocessor hide each other's tails.
FORWARD: dict[str, dict[int, Tile]] = {
    "cuda": {2: Tile(1024, 4), 4: Tile(1024, 4)},
    "hip": {2: Tile(1024, 2), 4: Tile(1024, 2)},
}


def full_tile(architecture: str, itemsize: int, capped: bool, gradient: bool) -> Tile:
    """Tile for long rows. With a soft cap a thread takes fewer logits, because the cap needs registers too."""
    block, warps = (TILES if gradient else FORWARD)[architecture][itemsize]
    return Tile(block // 4 if capped and gradient else block, warps)


def tile(dtype: torch.dtype, vocabulary: int, capped: bool, gradient: bool) -> Tile:
    """Tile for rows of `vocabulary` logits: the tile for long rows, or a smaller one where a row would not fill it.

    At least 128 logits: a shorter row has no full tile and takes the exact path.
    """
    full = full_tile("hip" if torch.version.hip else "cuda", dtype.itemsize, capped, gradient)
    block = min(full.block, max(128, 1 << (vocabulary.bit_length() - 1)))
    return Tile(block, max(1, full.warps * block // full.block))


# multiprocessors of a device -> hidden size -> rows per chunk with which d(hidden), in tiles of 128 rows x 256 columns,
# fills whole waves; so do multiples of them
WAVES: dict[int, dict[int, int]] = {132: {5120: 4224, 3584: 8448, 1536: 2816}}
MOST_ROWS = 8448
TILE_ROWS = 128


def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 0 for any other device, and for the GPU of fake tensors."""
    real = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if real else 0


def chunk_rows(rows: int, hidden: int, row_bytes: int, budget: int, processors: int) -> int:
    """Rows per chunk of logits.

    All rows, if their logits fit the budget. Otherwise, on a device listed in WAVES, the largest number of rows that
    fills whole waves, at most 8,448 and at most a quarter above the budget: 8,448 rows of V = 152,064 in bf16 are 2.4
    GiB. Otherwise equal chunks, on a GPU of a multiple of 128 rows. Free memory plays no part: the order of sums, and
    so the bits of a run, would depend on it.

    Args:
        rows: rows of the call, T.
        hidden: hidden size, D.
        row_bytes: bytes per row of logits.
        budget: bytes that the logits of one chunk should occupy.
        processors: multiprocessors of the device; 0 for a CPU.
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
