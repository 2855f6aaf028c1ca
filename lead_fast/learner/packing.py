"""Sequences to packs and packs to ranks: no padding, equal work, the same number of packs on every rank.

Legend: S sequences, T packed tokens, M packs.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pack:
    """Whole sequences laid end to end; the loss looks only at rows that predict a response token.

    input_ids_T, position_ids_T: int64 [T]; positions start at 0 in every sequence.
    cu_seqlens: int32 [sequences + 1], offsets of the sequences in T (in the whole pack's T, where this is a part).
    rows_R: int64 [R], the positions in T whose next token is a response token.
    targets_R: int64 [R], those next tokens.
    sequence_ids_R: int32 [R], index of the row's sequence in the whole batch (0..S-1).
    behavior_R: float32 [R], the engine's log-probs of the targets, or None where there is no engine (SFT).
    age_R: int32 [R], policy updates since the target was sampled, or None where all are 0.
    lengths: tokens of the sequences that cu_seqlens separates, on the host: nobody asks the device for them.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    rows_R: torch.Tensor
    targets_R: torch.Tensor
    sequence_ids_R: torch.Tensor
    behavior_R: torch.Tensor | None
    lengths: list[int]
    age_R: torch.Tensor | None = None


def flops_per_sequence(linear_params: int, layers: int, hidden: int) -> Callable[[int], float]:
    """Forward FLOPs of one sequence of n tokens: 2 per weight and token, and causal attention, 2 n^2 D per layer."""
    return lambda n: 2.0 * linear_params * n + 2.0 * layers * hidden * n * n


def assign(lengths: Sequence[int], budget: int, ranks: int, cost: Callable[[int], float]) -> list[list[list[int]]]:
    """Which sequence goes to which pack of which rank.

    Args:
        lengths: tokens of every sequence, prompt included.
        budget: most tokens in a pack; a longer sequence gets a pack of its own.
        ranks: number of ranks.
        cost: work of a sequence of n tokens (any unit).
    Returns:
        [ranks][M] lists of indices into `lengths`; every rank has the same M; some packs may be empty.

    Longest first, each to the rank with the least work, and on it to the least loaded pack with room; M grows from
    its lower bound until all fit.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    loads: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, r) for r in range(ranks)]
    for i in order:
        work, r = heapq.heappop(heap)
        loads[r].append(i)
        heapq.heappush(heap, (work + cost(lengths[i]), r))
    most = max(math.ceil(sum(min(lengths[i], budget) for i in load) / budget) for load in loads)
    packs = max(1, most)
    while True:
        out = [_fill(load, lengths, budget, packs, cost) for load in loads]
        if all(rank is not None for rank in out):
            return [rank for rank in out if rank is not None]
        packs += 1


def _fill(load: list[int], lengths: Sequence[int], budget: int, packs: int, cost: Callable) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(packs)]
    used, work = [0] * packs, [0.0] * packs
    for i in load:
        room = [m for m in range(packs) if used[m] + lengths[i] <= budget or not bins[m]]
        if not room:
            return None
        m = min(room, key=lambda m: work[m])
        bins[m].append(i)
        used[m] += lengths[i]
        work[m] += cost(lengths[i])
    return bins


def make_pack(
    members: Sequence[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]] | None,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    ages: Sequence[Sequence[int]] | None = None,
) -> Pack:
    """One pack of the sequences `members` (indices into the batch). An empty pack holds one token and no rows.

    Args:
        members: which sequences.
        prompts, responses: token ids of every sequence of the batch.
        logprobs: the engine's log-probs of the response tokens, or None.
        device: where the tensors go.
        part: (i, n), the i-th of n equal parts of the pack's tokens and their rows, for ranks that share it; the pack
            is filled up to a multiple of n with a sequence of its own, and cu_seqlens are the whole pack's.
        ages: of every response token, or None.
    """
    ids: list[int] = []
    positions: list[int] = []
    cu = [0]
    rows: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    behavior: list[float] = []
    age: list[int] = []
    for s in members:
        prompt, response = prompts[s], responses[s]
        start, n = len(ids), len(prompt) + len(response) - 1  # the last token is only ever a target
        ids += [*prompt, *response][:n]
        positions += range(n)
        cu.append(start + n)
        rows += range(start + len(prompt) - 1, start + n)
        targets += response
        owner += [s] * len(response)
        if logprobs is not None:
            behavior += logprobs[s]
        if ages is not None:
            age += ages[s]
    if not ids:
        ids, positions, cu = [0], [0], [0, 1]
    assert len(rows) == len(targets) and (logprobs is None or len(behavior) == len(rows))
    assert ages is None or len(age) == len(rows)
    i, n = part
    if n > 1:
        if fill := -len(ids) % n:
            ids += [0] * fill
            positions += range(fill)
            cu.append(len(ids))
        first, last = i * len(ids) // n, (i + 1) * len(ids) // n
        ids, positions = ids[first:last], positions[first:last]
        here = [k for k, row in enumerate(rows) if first <= row < last]
        rows = [rows[k] - first for k in here]
        targets, owner = [targets[k] for k in here], [owner[k] for k in here]
        behavior = [behavior[k] for k in here] if logprobs is not None else []
        age = [age[k] for k in here] if ages is not None else []

    def tensor(x: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(x, dtype=dtype).to(device, non_blocking=True)

    return Pack(
        tensor(ids, torch.int64),
        tensor(positions, torch.int64),
        tensor(cu, torch.int32),
        tensor(rows, torch.int64),
        tensor(targets, torch.int64),
        tensor(owner, torch.int32),
        None if logprobs is None else tensor(behavior, torch.float32),
        [end - start for start, end in itertools.pairwise(cu)],
        None if ages is None else tensor(age, torch.int32),
    )


def efficiency(packed: list[list[list[int]]], lengths: Sequence[int], cost: Callable[[int], float]) -> float:
    """Mean work over the slowest rank's: the share of the ranks' time that is not spent waiting for the last one."""
    work = [sum(cost(lengths[i]) for pack in rank for i in pack) for rank in packed]
    return sum(work) / len(work) / max(work) if max(work) > 0 else 1.0
