"""Who generates: the interface, and the engine that every machine has, transformers' own generation.

An engine holds its own copy of the weights. A step is: wake, generate, sleep; then the policy trains, and
load_weights brings the new weights.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .config import Config
from .distributed import Ranks
from .model import load_model
from .schema import Response


@dataclass(frozen=True)
class Sampling:
    """How to sample: temperature 0 is greedy; stop strings end a response and stay in it."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


Progress = Callable[[int, int], None]  # (done, total)


def silent(done: int, total: int) -> None:
    pass


class Engine(Protocol):
    """What the loop asks of an engine."""

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, progress: Progress = silent
    ) -> list[list[Response]]:
        """n responses to each prompt (token ids), with the sampled tokens' log-probs at the sampling temperature."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace weights, given by Hugging Face names, whole tensors; they become policy version `version`."""
        ...

    def sleep(self) -> None:
        """Give memory back while the policy trains."""
        ...

    def wake(self) -> None:
        """Be ready to take weights and to generate."""
        ...


def make_engine(config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Engine:
    if config.rollout.engine == "vllm":
        raise ValueError("rollout.engine=vllm is not in this version: give --rollout.engine=transformers.")
    return TransformersEngine(config, tokenizer, ranks)


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
    """transformers' `generate` on a copy of the weights; batches of `rollout.batch_size`, longest prompts first."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks):
        dtype = getattr(torch, config.model.dtype)
        self.model: Any = load_model(config.model, dtype).to(ranks.device).eval()
        self.tokenizer = tokenizer
        self.batch_size = config.rollout.batch_size
        self.device = ranks.device
        self.version = 0
        eos = self.model.generation_config.eos_token_id or []
        self.eos_ids: list[int] = sorted({*(eos if isinstance(eos, list) else [eos]), self._token("eos")})

    def _token(self, kind: str) -> int:
        token = getattr(self.tokenizer, f"{kind}_token_id")
        assert isinstance(token, int), f"the tokenizer has no {kind} token"
        return token

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                mine[name].copy_(tensor)
        self.version = version

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seed: int, progress: Progress = silent
    ) -> list[list[Response]]:
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        step = max(1, self.batch_size // n)
        out: list[list[Response]] = [[] for _ in prompts]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for i in range(0, len(order), step):
                progress(i, len(order))
                chunk = order[i : i + step]
                for j, responses in zip(chunk, self._batch([prompts[j] for j in chunk], n, sampling), strict=True):
                    out[j] = responses
        return out

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], n: int, s: Sampling) -> list[list[Response]]:
        longest = max(map(len, prompts))
        pad = self._token("pad")
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        keep = SampledLogprobs()
        steps: list[LogitsProcessor] = []
        if s.temperature not in (0.0, 1.0):
            steps.append(TemperatureLogitsWarper(s.temperature))
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
