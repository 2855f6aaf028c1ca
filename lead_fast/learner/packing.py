"""Sequences to packs and packs to ranks: no padding, equal work, the same number of packs on every rank.

The responses to one prompt may share its tokens: they are in the pack once, and the responses behind the first attend
to them where they stand.

Legend: S sequences, T packed tokens, M packs.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

UNITS_PER_RANK = 8  # so many let `deal` even out the ranks


@dataclass(frozen=True)
class Pack:
    """Whole sequences laid end to end; the loss looks only at rows that predict a response token.

    input_ids_T, position_ids_T: int64 [T]; positions start at 0 in every sequence.
    cu_seqlens: int32 [sequences + 1], offsets of the sequences in T (in the whole pack's T, where this is a part).
    rows_R: int64 [R], the positions in T whose next token is a response token.
    targets_R: int64 [R], those next tokens.
    sequence_ids_R: int32 [R], index of the row's sequence in the whole batch (0..S-1).
    behavior_R: float32 [R], the engine's log-probs of the targets, or None where there is no engine (SFT).
    lengths: tokens of the sequences that cu_seqlens separates, on the host: nobody asks the device for them.
    prefixes: per such sequence the first position in T and the number of the tokens that it continues, a prompt that
        stands before another response; (0, 0) for a sequence that begins with its own prompt. Empty: all do.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    rows_R: torch.Tensor
    targets_R: torch.Tensor
    sequence_ids_R: torch.Tensor
    behavior_R: torch.Tensor | None
    lengths: list[int]
    prefixes: list[tuple[int, int]] = field(default_factory=list)


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
    return deal(lengths, [cost(n) for n in lengths], budget, ranks)


def assign_shared(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    budget: int,
    ranks: int,
    cost: Callable[[int], float],
) -> tuple[list[list[list[int]]], float]:
    """`assign` where the responses to a prompt share its tokens: they stay together as far as packs and balance allow.

    Args:
        prompts: token ids of every sequence's prompt.
        lengths, budget, ranks, cost: as in `assign`; lengths with the prompt.
    Returns:
        the plan, in each pack the sequences of one prompt beside each other; the balance over ranks (`efficiency`).

    The responses to a prompt are one unit of `deal`, or several where they fill more than a pack or more than a
    UNITS_PER_RANK-th of a rank's tokens; every unit but the first computes the prompt again.
    """
    cap = min(budget, sum(lengths) // (ranks * UNITS_PER_RANK))
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(i)
    units: list[list[int]] = []
    tokens: list[int] = []
    works: list[float] = []
    for prompt, members in groups.items():
        for k, i in enumerate(members):
            own = lengths[i] - len(prompt)
            if k and tokens[-1] + own <= cap:
                units[-1].append(i)
                tokens[-1] += own
                works[-1] += cost(lengths[i]) - cost(len(prompt))
            else:
                units.append([i])
                tokens.append(lengths[i])
                works.append(cost(lengths[i]))
    plan = deal(tokens, works, budget, ranks)
    return [[[i for u in pack for i in units[u]] for pack in rank] for rank in plan], balance(plan, works)


def deal(lengths: Sequence[int], works: Sequence[float], budget: int, ranks: int) -> list[list[list[int]]]:
    """`assign` with the work of each item given."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    loads: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0.0, r) for r in range(ranks)]
    for i in order:
        work, r = heapq.heappop(heap)
        loads[r].append(i)
        heapq.heappush(heap, (work + works[i], r))
    most = max(math.ceil(sum(min(lengths[i], budget) for i in load) / budget) for load in loads)
    packs = max(1, most)
    while True:
        out = [_fill(load, lengths, works, budget, packs) for load in loads]
        if all(rank is not None for rank in out):
            return [rank for rank in out if rank is not None]
        packs += 1


def _fill(
    load: list[int], lengths: Sequence[int], works: Sequence[float], budget: int, packs: int
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(packs)]
    used, work = [0] * packs, [0.0] * packs
    for i in load:
        room = [m for m in range(packs) if used[m] + lengths[i] <= budget or not bins[m]]
        if not room:
            return None
        m = min(room, key=lambda m: work[m])
        bins[m].append(i)
        used[m] += lengths[i]
        work[m] += works[i]
    return bins


def make_pack(
    members: Sequence[int],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]] | None,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    shared: bool = False,
) -> Pack:
    """One pack of the sequences `members` (indices into the batch). An empty pack holds one token and no rows.

    Args:
        members: which sequences.
        prompts, responses: token ids of every sequence of the batch.
        logprobs: the engine's log-probs of the response tokens, or None.
        device: where the tensors go.
        part: (i, n), the i-th of n equal parts of the pack's tokens and their rows, for ranks that share it; the pack
            is filled up to a multiple of n with a sequence of its own, and cu_seqlens are the whole pack's.
        shared: members beside each other with equal prompts share the prompt's tokens.
    """
    ids: list[int] = []
    positions: list[int] = []
    cu = [0]
    prefixes: list[tuple[int, int]] = []
    rows: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    behavior: list[float] = []
    first, before = 0, None  # where the prompt of the sequence before begins, and that prompt
    for s in members:
        prompt, response = prompts[s], responses[s]
        start, n = len(ids), len(prompt) + len(response) - 1  # the last token is only ever a target
        if shared and prompt == before:
            ids += response[:-1]
            positions += range(len(prompt), n)
            rows += [first + len(prompt) - 1, *range(start, start + len(response) - 1)]
            prefixes += [(first, len(prompt))] * (len(response) > 1)
        else:
            ids += [*prompt, *response][:n]
            positions += range(n)
            rows += range(start + len(prompt) - 1, start + n)
            prefixes.append((0, 0))
            first, before = start, prompt
        cu += [len(ids)] * (len(ids) > start)
        targets += response
        owner += [s] * len(response)
        if logprobs is not None:
            behavior += logprobs[s]
    if not ids:
        ids, positions, cu = [0], [0], [0, 1]
    assert len(rows) == len(targets) and (logprobs is None or len(behavior) == len(rows))
    i, n = part
    if n > 1:
        if fill := -len(ids) % n:
            ids += [0] * fill
            positions += range(fill)
            cu.append(len(ids))
            prefixes.append((0, 0))
        first, last = i * len(ids) // n, (i + 1) * len(ids) // n
        ids, positions = ids[first:last], positions[first:last]
        here = [k for k, row in enumerate(rows) if first <= row < last]
        rows = [rows[k] - first for k in here]
        targets, owner = [targets[k] for k in here], [owner[k] for k in here]
        behavior = [behavior[k] for k in here] if logprobs is not None else []

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
        prefixes if any(n for _, n in prefixes) else [],
    )


def efficiency(packed: list[list[list[int]]], lengths: Sequence[int], cost: Callable[[int], float]) -> float:
    """Mean work over the slowest rank's: the share of the ranks' time that is not spent waiting for the last one."""
    return balance(packed, [cost(n) for n in lengths])


def balance(packed: list[list[list[int]]], works: Sequence[float]) -> float:
    """`efficiency` with the work of each item given."""
    work = [sum(works[i] for pack in rank for i in pack) for rank in packed]
    return sum(work) / len(work) / max(work) if max(work) > 0 else 1.0
