"""Sequences to packs and packs to ranks: no padding, equal work, the same number of packs on every rank.

Responses to one prompt may share its tokens: a pack then holds the prompt once, and every later response attends to
that copy. Attention in plain torch (attention.py) supports this, on a CPU or in float32. In bfloat16 on a GPU every
response keeps its own prompt: with 150 tokens before a response of 7,000, sharing would save 2 % of a pack.

Legend: S sequences, T packed tokens, M packs.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

EVEN = 1.01  # the slowest rank's work over the least possible; below it no other plan is tried


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
    lengths: tokens of the sequences that cu_seqlens separates, on the host, so that the device need not be asked.
    prefixes: per sequence the first position in T and the length of the shared prompt that it continues; (0, 0) for a
        sequence that begins with its own prompt. Empty if all do. A one-token response to a shared prompt has no
        sequence: its one row is the prompt's last.
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
    prefixes: list[tuple[int, int]] = field(default_factory=list)


def flops_per_sequence(linear_params: int, layers: int, hidden: int) -> Callable[[int], float]:
    """Forward FLOPs of one sequence of n tokens: 2 per weight and token, and causal attention, 2 n^2 D per layer."""
    return lambda n: 2.0 * linear_params * n + 2.0 * layers * hidden * n * n


def assign(lengths: Sequence[int], budget: int, ranks: int, cost: Callable[[int], float]) -> list[list[list[int]]]:
    """Decide which sequence goes to which pack of which rank.

    Args:
        lengths: tokens of every sequence, prompt included.
        budget: most tokens in a pack; a longer sequence gets a pack of its own.
        ranks: number of ranks.
        cost: work of a sequence of n tokens (any unit).
    Returns:
        [ranks][M] lists of indices into `lengths`; every rank has the same M; some packs may be empty.
    """
    return deal(lengths, [cost(n) for n in lengths], budget, ranks)


def assign_shared(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    budget: int,
    ranks: int,
    cost: Callable[[int], float],
) -> list[list[list[int]]]:
    """Do what `assign` does if the responses to a prompt share its tokens; those in one pack are neighbours.

    Args:
        prompts: token ids of every sequence's prompt.
        lengths, budget, ranks, cost: as in `assign`. The budget counts a prompt once per response, because attention
            gathers its keys for each: a pack never needs more memory than one that shares nothing.

    The responses to a prompt are dealt as one unit or as several, each of which computes the prompt again. Few units
    save work, many balance it better. So units of halving size are tried, from a rank's part of all tokens down to
    single sequences, and the plan in which the slowest rank has the least work is kept.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(i)
    place = {i: at for at, i in enumerate(i for members in groups.values() for i in members)}
    least = sum(shared_work(members, prompts, lengths, cost) for members in groups.values()) / ranks
    best: tuple[float, int, list[list[list[int]]]] | None = None
    size = sum(lengths) // ranks
    while True:
        units = [unit for members in groups.values() for unit in _cut(members, lengths, min(size, budget))]
        works = [shared_work(unit, prompts, lengths, cost) for unit in units]
        plan = deal([sum(lengths[i] for i in unit) for unit in units], works, budget, ranks)
        packs = [[sorted((i for u in pack for i in units[u]), key=place.__getitem__) for pack in rank] for rank in plan]
        slowest = max(sum(shared_work(pack, prompts, lengths, cost) for pack in rank) for rank in packs)
        if best is None or (slowest, len(packs[0])) < best[:2]:
            best = slowest, len(packs[0]), packs
        if not size or len(units) == len(lengths) or best[0] <= EVEN * least:
            return best[2]
        size //= 2


def _cut(members: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut a list of sequences into units of at most `size` tokens; a longer sequence is a unit of its own."""
    units: list[list[int]] = []
    tokens = 0
    for i in members:
        if units and tokens + lengths[i] <= size:
            units[-1].append(i)
            tokens += lengths[i]
        else:
            units.append([i])
            tokens = lengths[i]
    return units


def shared_work(
    pack: Sequence[int], prompts: Sequence[Sequence[int]], lengths: Sequence[int], cost: Callable[[int], float]
) -> float:
    """Work of a pack in which neighbours with equal prompts share them; arguments as in `assign_shared`."""
    work, before = 0.0, None
    for i in pack:
        work += cost(lengths[i]) - (cost(len(prompts[i])) if prompts[i] == before else 0.0)
        before = prompts[i]
    return work


def deal(lengths: Sequence[int], works: Sequence[float], budget: int, ranks: int) -> list[list[list[int]]]:
    """Deal items with `lengths` tokens and `works` to packs of at most `budget` tokens; return what `assign` does.

    The item with the most work comes first, each item to the rank with the least, and on it to the least loaded pack
    with room; M grows from its lower bound until all fit.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-works[i], i))
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
    ages: Sequence[Sequence[int]] | None = None,
    *,
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
        ages: of every response token, or None.
        shared: whether neighbours with equal prompts share the prompt's tokens.
    """
    ids: list[int] = []
    positions: list[int] = []
    cu = [0]
    prefixes: list[tuple[int, int]] = []
    rows: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    behavior: list[float] = []
    age: list[int] = []
    first, before = 0, None  # where the prompt that the next response may share begins, and that prompt
    for s in members:
        prompt, response = prompts[s], responses[s]
        start, n = len(ids), len(prompt) + len(response) - 1  # the last token is only ever a target
        if shared and prompt == before:
            ids += response[:-1]
            positions += range(len(prompt), n)
            rows += [first + len(prompt) - 1, *range(start, len(ids))][: len(response)]
            prefix = first, len(prompt)
        else:
            ids += [*prompt, *response][:n]
            positions += range(n)
            rows += range(start + len(prompt) - 1, start + n)
            prefix = 0, 0
            first, before = start, prompt if response else None  # without a response the prompt lacks its last token
        if len(ids) > start:
            cu.append(len(ids))
            prefixes.append(prefix)
        targets += response
        owner += [s] * len(response)
        if logprobs is not None:
            behavior += logprobs[s]
        if ages is not None:
            age += ages[s]
    if not ids:
        ids, positions, cu, prefixes = [0], [0], [0, 1], [(0, 0)]
    assert len(rows) == len(targets) and (logprobs is None or len(behavior) == len(rows))
    assert ages is None or len(age) == len(rows)
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
        prefixes if any(n for _, n in prefixes) else [],
    )


def efficiency(packed: list[list[list[int]]], work: Callable[[list[int]], float]) -> float:
    """Mean work over the slowest rank's: the part of the ranks' time that is not spent waiting for the slowest.

    `work` returns a pack's work from its members.
    """
    works = [sum(map(work, rank)) for rank in packed]
    return sum(works) / len(works) / max(works) if max(works) > 0 else 1.0
