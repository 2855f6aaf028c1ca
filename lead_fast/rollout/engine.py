"""The interface between the loop and an engine, and the distribution of prompts to engines.

An engine holds its own copy of the weights. A step is: wake, generate, sleep; then the policy trains, and
load_weights delivers the new weights.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from ..records import Response


@dataclass(frozen=True)
class Sampling:
    """How to sample: temperature 0 is greedy; stop strings end a response and remain part of it.

    end_repetition: stop a response that repeats itself, if the engine can (vLLM); only in training.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    top_k: int = 0
    end_repetition: bool = False


Progress = Callable[[int, int], None]  # (done, total)


def silent(done: int, total: int) -> None:
    pass


class EngineFailure(RuntimeError):
    """An engine died in the middle of a step; `complete` holds the groups that it had finished, by prompt."""

    def __init__(self, reason: str, complete: dict[int, list[Response]]):
        super().__init__(reason)
        self.complete = complete


@dataclass
class Work:
    """A step's prompts, handed out to engines on demand through a counter in a store that all engines share.

    prompts: token ids; n: responses to each; seeds: one per prompt, so that results do not depend on who sampled them.
    store, name: the counter and its key, new for every step; engines: how many take prompts from it.
    begun: by prompt, responses that an earlier step left unfinished.
    want: stop as soon as this many groups are complete over all engines; None: when all are.
    due: the first `due` prompts must be complete before that.
    member: index in the group of ranks that share an engine; the first decides, the others follow.
    """

    prompts: list[list[int]]
    n: int
    seeds: list[int]
    store: Store = field(default_factory=lambda: dist.HashStore())  # type: ignore[attr-defined]
    name: str = "work"
    engines: int = 1
    begun: dict[int, list[Response]] = field(default_factory=dict)
    want: int | None = None
    member: int = 0
    members: int = 1
    due: int = 0
    _turn: int = 0

    @property
    def prompts_per_engine(self) -> int:
        """Prompts per engine if all took the same number, rounded up."""
        return -(-len(self.prompts) // self.engines)

    def take(self, most: int) -> list[int]:
        """Take the next prompts, at most `most`; empty once all are handed out."""
        end = self._agree(lambda: self.store.add(f"{self.name}/taken", most))
        return list(range(min(end - most, len(self.prompts)), min(end, len(self.prompts))))

    def finish(self, prompt: int) -> None:
        """Count the group of a prompt as complete."""
        if self.want is not None and self.member == 0:
            self.store.add(f"{self.name}/complete", 1)
            if prompt < self.due:
                self.store.add(f"{self.name}/due", 1)

    def enough(self) -> bool:
        """Whether as many groups as wanted are complete, including all that are due."""
        want = self.want
        if want is None:
            return False
        return bool(self._agree(lambda: int(self._count("due") >= self.due and self._count("complete") >= want)))

    def _count(self, what: str) -> int:
        return self.store.add(f"{self.name}/{what}", 0)

    def _agree(self, decide: Callable[[], int]) -> int:
        """Apply the first member's decision to all ranks that share its engine."""
        if self.members == 1:
            return decide()
        key = f"{self.name}/turn-{self._turn}"
        self._turn += 1
        if self.member == 0:
            value = decide()
            self.store.set(key, str(value))
            return value
        return int(self.store.get(key))


@dataclass(frozen=True)
class Speculation:
    """Number of tokens that a drafter proposed and the model accepted, and number of verifications."""

    proposed: int = 0
    accepted: int = 0
    verifications: int = 0

    def __add__(self, other: "Speculation") -> "Speculation":
        return Speculation(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self) -> dict[str, float]:
        """Acceptance length (tokens per verification, the model's own included) and rate; empty without a drafter."""
        if not self.verifications:
            return {}
        rate = self.accepted / self.proposed if self.proposed else 0.0
        return {"acceptance_length": 1 + self.accepted / self.verifications, "acceptance_rate": rate}


@dataclass(frozen=True)
class Checksum:
    """Sum and sum of squares in fp64, and size, of one of the engine's tensors, with the names of the tensors in it."""

    names: tuple[str, ...]
    total: float
    squares: float
    size: int


SLICE = 1 << 22  # elements converted to fp64 at a time, 32 MiB


def fingerprint(tensors: list[torch.Tensor]) -> list[tuple[float, float, int]]:
    """Sum, sum of squares (both in fp64) and number of elements of each tensor; one device-to-host copy for all.

    Extra memory: SLICE elements in fp64, whatever the size of the tensors.
    """
    if not tensors:
        return []
    values = torch.stack([_sums(t) for t in tensors]).tolist()
    return [(total, squares, t.numel()) for (total, squares), t in zip(values, tensors, strict=True)]


def _sums(t: torch.Tensor) -> torch.Tensor:
    """Sum and sum of squares, [2] in fp64."""
    sums = torch.zeros(2, dtype=torch.float64, device=t.device)
    for piece in _slices(t):
        x = piece.reshape(-1).double()
        sums += torch.stack([x.sum(), torch.dot(x, x)])
    return sums


def _slices(t: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of all elements, SLICE at a time; a non-contiguous tensor is cut along its first dimensions."""
    if t.is_contiguous():
        yield from t.view(-1).split(SLICE)
    elif t.numel() <= SLICE:
        yield t
    elif len(t) == 1:
        yield from _slices(t[0])
    else:
        for half in t.tensor_split(2):
            yield from _slices(half)


class Engine(Protocol):
    """What the loop needs from an engine. With a drafter it also has `speculation`, the last generate's Speculation."""

    def generate(self, work: Work, sampling: Sampling, progress: Progress = silent) -> dict[int, list[Response]]:
        """Sample work.n responses to each prompt that this engine takes, with log-probs of the sampled tokens.

        Raises:
            EngineFailure: the engine died during the call.
        """
        ...

    def load_weights(self, buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int) -> None:
        """Replace the weights by unsharded tensors under Hugging Face names; they become policy version `version`."""
        ...

    def checksums(self) -> list[Checksum]:
        """Checksums of every tensor that the engine computes with, as of the last load_weights."""
        ...

    def sleep(self) -> None:
        """Release memory while the policy trains; on a GPU the weights may be gone until the next load_weights."""
        ...

    def wake(self) -> None:
        """Get ready to generate; after sleep, call load_weights first."""
        ...


def eos_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the model's own and the tokenizer's."""
    eos = generation.eos_token_id or []
    return sorted({*(eos if isinstance(eos, list) else [eos]), token_id(tokenizer, "eos")})


def visible_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], eos: list[int]) -> str:
    """Decode a response for grading: special tokens such as `</think>` are kept, ends and padding are not."""
    hidden = {*eos, token_id(tokenizer, "pad")}
    return str(tokenizer.decode([t for t in token_ids if t not in hidden], skip_special_tokens=False))


def token_id(tokenizer: PreTrainedTokenizerBase, kind: str) -> int:
    token = getattr(tokenizer, f"{kind}_token_id")
    assert isinstance(token, int), f"the tokenizer has no {kind} token"
    return token
