"""Who generates: the interface, and the engine that every machine has, transformers' own generation.

An engine holds its own copy of the weights. A step is: wake, generate, sleep; then the policy trains, and
load_weights brings the new weights.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .config import Config, chosen_engine
from .distributed import Ranks
from .model import load_model
from .schema import Response


@dataclass(frozen=True)
class Sampling:
    """How to sample: temperature 0 is greedy; stop strings end a response and stay in it.

    end_repetition: end a response that repeats itself, where the engine can (vLLM); for training alone.
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
    """An engine died in the middle of a step; `whole` are the groups that it had finished, by prompt."""

    def __init__(self, reason: str, whole: dict[int, list[Response]]):
        super().__init__(reason)
        self.whole = whole


@dataclass
class Work:
    """The prompts of a step, handed out to engines as they ask: a counter in a store that all of them share.

    prompts: token ids; n: responses to each; seeds: one a prompt, so that a result does not depend on who made it.
    store, name: the counter and its key, new for every step; engines: how many take from it.
    begun: by prompt, responses that an earlier step left unfinished.
    want: stop as soon as so many groups are whole, over all engines; None: when all are.
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
    _turn: int = 0

    @property
    def share(self) -> int:
        """Prompts of an engine if all got the same number, rounded up."""
        return -(-len(self.prompts) // self.engines)

    def take(self, most: int) -> list[int]:
        """The next prompts, at most so many; none when all are handed out."""
        end = self._agree(lambda: self.store.add(f"{self.name}/taken", most))
        return list(range(min(end - most, len(self.prompts)), min(end, len(self.prompts))))

    def finish(self) -> None:
        """Count one whole group."""
        if self.want is not None and self.member == 0:
            self.store.add(f"{self.name}/whole", 1)

    def enough(self) -> bool:
        """As many groups are whole as are wanted."""
        if self.want is None:
            return False
        return self._agree(lambda: self.store.add(f"{self.name}/whole", 0)) >= self.want

    def _agree(self, decide: Callable[[], int]) -> int:
        """The first member's decision, for all that share its engine."""
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
class Checksum:
    """Of one of the engine's tensors: the names of the tensors that it holds, sum and sum of squares in fp64, size."""

    names: tuple[str, ...]
    total: float
    squares: float
    size: int


def fingerprint(tensors: list[torch.Tensor]) -> list[tuple[float, float, int]]:
    """Sum, sum of squares (both in fp64) and number of elements of each tensor; one copy from the device for all."""
    if not tensors:
        return []
    sums = torch.stack([t.sum(dtype=torch.float64) for t in tensors])
    norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors])
    values = torch.stack([sums, norms.square()], 1).tolist()
    return [(total, squares, t.numel()) for (total, squares), t in zip(values, tensors, strict=True)]


class Engine(Protocol):
    """What the loop asks of an engine."""

    def generate(self, work: Work, sampling: Sampling, progress: Progress = silent) -> dict[int, list[Response]]:
        """work.n responses to each prompt that this engine took, with the sampled tokens' log-probs as sampled.

        Raises:
            EngineFailure: the engine died on the way.
        """
        ...

    def load_weights(self, buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int) -> None:
        """Replace weights, given by Hugging Face names, whole tensors; they become policy version `version`."""
        ...

    def checksums(self) -> list[Checksum]:
        """Of every tensor that the engine computes with."""
        ...

    def sleep(self) -> None:
        """Give memory back while the policy trains; on a GPU the weights may be gone until the next load_weights."""
        ...

    def wake(self) -> None:
        """Be ready to generate; after sleep, load_weights comes first."""
        ...


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Engine:
    """The engine that `rollout.engine` means on the ranks' device."""
    if chosen_engine(config, ranks.device.type) == "vllm":
        from .vllm_engine import VllmEngine

        return VllmEngine(config, tokenizer, ranks)
    return TransformersEngine(config, tokenizer, ranks)


def eos_ids(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the model's own and the tokenizer's."""
    eos = generation.eos_token_id or []
    return sorted({*(eos if isinstance(eos, list) else [eos]), token_id(tokenizer, "eos")})


def token_id(tokenizer: PreTrainedTokenizerBase, kind: str) -> int:
    token = getattr(tokenizer, f"{kind}_token_id")
    assert isinstance(token, int), f"the tokenizer has no {kind} token"
    return token


class SampledLogprobs(LogitsProcessor):
    """Last in the list: keeps each step's log-probs until the sampled token is known, one step later."""

    def __init__(self) -> None:
        self.logprobs: list[torch.Tensor] = []
        self.pending: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.take(input_ids)
        self.pending = scores.float().log_softmax(-1)
        return scores

    def take(self, input_ids: torch.Tensor) -> None:
        if self.pending is not None:
            self.logprobs.append(self.pending.gather(1, input_ids[:, -1:]))


class TransformersEngine:
    """transformers' `generate` on a copy of the weights; batches of at most `rollout.batch_size` responses."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks):
        dtype = getattr(torch, config.model.dtype)
        self.model: Any = load_model(config.model, dtype).to(ranks.device).eval()
        self.tokenizer = tokenizer
        self.batch_size = config.rollout.batch_size
        self.device = ranks.device
        self.version = 0
        self.eos_ids = eos_ids(self.model.generation_config, tokenizer)

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def load_weights(self, buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int) -> None:
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for bucket in buckets:
                for name, tensor in bucket:
                    mine[name].copy_(tensor)
        self.version = version

    def checksums(self) -> list[Checksum]:
        named = list(self.model.named_parameters())
        values = fingerprint([p.detach() for _, p in named])
        return [Checksum((name,), *value) for (name, _), value in zip(named, values, strict=True)]

    def generate(self, work: Work, sampling: Sampling, progress: Progress = silent) -> dict[int, list[Response]]:
        """Prompts come in the order of the work, a batch at a time; a batch's seed is its first prompt's."""
        step = min(work.share, max(1, self.batch_size // work.n))
        out: dict[int, list[Response]] = {}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            while chunk := work.take(step):
                progress(len(out), work.share)
                torch.manual_seed(work.seeds[chunk[0]])
                out |= zip(chunk, self._batch([work.prompts[i] for i in chunk], work.n, sampling), strict=True)
        return out

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], n: int, s: Sampling) -> list[list[Response]]:
        longest = max(map(len, prompts))
        pad = token_id(self.tokenizer, "pad")
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        keep = SampledLogprobs()
        steps: list[LogitsProcessor] = []
        if s.temperature not in (0.0, 1.0):
            steps.append(TemperatureLogitsWarper(s.temperature))
        if s.top_k > 0:
            steps.append(TopKLogitsWarper(s.top_k))
        if s.top_p < 1:
            steps.append(TopPLogitsWarper(s.top_p))
        if s.min_p > 0:
            steps.append(MinPLogitsWarper(s.min_p))
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=s.max_tokens,
                do_sample=s.temperature > 0,
                num_return_sequences=n if s.temperature > 0 else 1,
                temperature=1.0,
                top_k=0,
                eos_token_id=self.eos_ids,
                pad_token_id=pad,
                stop_strings=list(s.stop) or None,
            ),
            logits_processor=LogitsProcessorList([*steps, keep]),
            tokenizer=self.tokenizer if s.stop else None,
        )
        keep.take(generated)
        new = generated[:, longest:].tolist()
        logprobs = torch.cat(keep.logprobs, 1).tolist()
        if s.temperature == 0:  # n greedy answers are n times the same
            new, logprobs = ([x for x in rows for _ in range(n)] for rows in (new, logprobs))
        responses = [self._response(t, lp, s) for t, lp in zip(new, logprobs, strict=True)]
        return [responses[i : i + n] for i in range(0, len(responses), n)]

    def _response(self, tokens: list[int], logprobs: list[float], s: Sampling) -> Response:
        end = next((i + 1 for i, t in enumerate(tokens) if t in self.eos_ids), None)
        if end is None and s.stop:  # stopped by a string: what follows is padding, which real text may also hold
            end = next((i + 1 for i in range(len(tokens)) if self._has_stop(tokens[: i + 1], s.stop)), None)
        stopped = end is not None
        tokens, logprobs = tokens[:end], logprobs[:end]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Response(tokens, logprobs, "stop" if stopped else "length", str(text), self.version)

    def _has_stop(self, tokens: list[int], stop: tuple[str, ...]) -> bool:
        tail = str(self.tokenizer.decode(tokens[-16:]))
        return any(word in tail for word in stop)
