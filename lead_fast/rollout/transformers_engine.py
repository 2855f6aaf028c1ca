"""The engine that runs on every machine: generation by transformers."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..checks import responses_at_once
from ..config import Config, ModelConfig
from ..learner.model import LayoutError, load_model, load_shape
from ..learner.model_check import (
    DRAWS,
    LIMIT,
    VOCABULARY,
    alone,
    first_line,
    quiet,
    sequences_of,
    small_copy,
)
from ..records import Response
from ..runtime.ranks import Ranks
from .decoding import Decoder, decode, decodes
from .engine import (
    Checksum,
    Progress,
    Sampling,
    Work,
    eos_ids,
    fingerprint,
    silent,
    token_id,
    visible_text,
)


class SampledLogprobs(LogitsProcessor):
    """Must be the last in the list: keeps each step's log-probs until the sampled token is known, one step later."""

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


def processors(s: Sampling) -> LogitsProcessorList:
    """Logits processors to apply before sampling."""
    steps = LogitsProcessorList()
    if s.temperature not in (0.0, 1.0):
        steps.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k > 0:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    if s.min_p > 0:
        steps.append(MinPLogitsWarper(s.min_p))
    return steps


@torch.inference_mode()
def sample(
    model: Any, prompts: list[list[int]], n: int, s: Sampling, eos: list[int], pad: int, tokenizer: Any = None
) -> tuple[list[list[int]], list[list[float]]]:
    """Sample n responses to each prompt, in one batch padded on the left.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids.
        n: responses to each prompt.
        s: how to sample.
        eos: token ids that end a response.
        pad: token id of padding.
        tokenizer: needed with stop strings.
    Returns:
        token ids and log-probs as sampled, [prompts x n], all of the longest response's length.
    """
    longest, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    keep = SampledLogprobs()
    generated = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=s.max_tokens,
            do_sample=s.temperature > 0,
            num_return_sequences=n if s.temperature > 0 else 1,
            temperature=1.0,
            top_k=0,
            eos_token_id=eos,
            pad_token_id=pad,
            stop_strings=list(s.stop) or None,
        ),
        logits_processor=LogitsProcessorList([*processors(s), keep]),
        tokenizer=tokenizer if s.stop else None,
    )
    keep.take(generated)
    new = generated[:, longest:].tolist()
    logprobs = torch.cat(keep.logprobs, 1).tolist()
    if s.temperature == 0:  # n greedy responses are identical
        new, logprobs = ([x for x in rows for _ in range(n)] for rows in (new, logprobs))
    return new, logprobs


def attention_of(shape: PretrainedConfig) -> dict[str, str]:
    """Keyword arguments for loading: attention that applies soft caps, which transformers' default (SDPA) omits."""
    capped = getattr(shape.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


FLAT = 8.0  # a temperature at which any token can be sampled; near-certain tokens would hide differences


def check_generation(shape: PretrainedConfig, c: ModelConfig, longest: int | None) -> None:
    """Refuse a model that this engine would sample differently from transformers, before its weights are loaded.

    On a small copy (learner/model_check.py), log-probs of responses to prompts of different lengths, sampled in one
    batch with a key-value cache, are compared with those of each sequence alone under eager attention.

    Args:
        shape: the model's configuration.
        c: uses path, trust_remote_code and unchecked.
        longest: tokens of the longest possible sequence, None if unknown.
    Raises:
        ValueError: one sentence that names the model type and the difference.
    """
    name = f"Model type {shape.model_type} ({c.path})"
    worst = 0.0
    for seed, dtype in DRAWS:
        with quiet():
            try:
                model = small_copy(shape, c.trust_remote_code, longest, seed).to(dtype)
                usual = "sdpa" if model._supports_sdpa else "eager"
                model.set_attn_implementation(attention_of(shape).get("attn_implementation", usual))
                prompts = [s[: len(s) // 2] for s in sequences_of(seed)]
                torch.manual_seed(seed)
                s, never = Sampling(12, FLAT), VOCABULARY + 1
                if decodes(model.config):
                    new, logprobs = decode(model, prompts, s.max_tokens, [never], processors(s))
                else:
                    new, logprobs = sample(model, prompts, 1, s, [never], 0)
            except LayoutError as e:
                raise ValueError(f"{name} cannot be used: {e}.") from e
            except Exception as e:  # anything that a model's code raises
                if worst:  # float32 has worked
                    break
                if c.unchecked:
                    return
                raise ValueError(
                    f"{name} cannot be checked: a small copy of it cannot be sampled from ({first_line(e)}); give "
                    "--rollout.engine=vllm, another model, or --model.unchecked."
                ) from e
            model.set_attn_implementation("eager")
            expected = [alone(model, [p + r], FLAT)[-len(r) :] for p, r in zip(prompts, new, strict=True)]
        worst = (torch.cat(expected) - torch.tensor(logprobs).flatten()).abs().nan_to_num(float("inf")).max().item()
        if worst <= LIMIT:
            return
    raise ValueError(
        f"{name} is sampled differently by the transformers engine, with a cache and padding, than without them: "
        f"log-probs differ by up to {worst:.2g} nats on a small copy; give --rollout.engine=vllm, or another model."
    )


class TransformersEngine:
    """transformers' models on a copy of the weights, with at most `rollout.batch_size` responses at once.

    Uses continuous batching (decoding.py) if the model's cache holds only keys and values of all positions; models with
    sliding windows, states and the like use transformers' `generate`, one batch at a time, which a line reports.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, ranks: Ranks):
        dtype = getattr(torch, config.model.dtype)
        more = attention_of(load_shape(config.model))
        self.model: Any = load_model(config.model, dtype, **more).to(ranks.device).eval()
        self.tokenizer = tokenizer
        self.batch_size = responses_at_once(config.rollout, ranks.world)
        self.device = ranks.device
        self.version = 0
        self.eos_ids = eos_ids(self.model.generation_config, tokenizer)
        self.continuous = decodes(self.model.config)
        if not self.continuous and ranks.main:
            print(
                f"Rollouts of {self.model.config.model_type} use transformers' generate, which waits for the longest "
                "response of a batch, because the model's cache holds more than keys and values of all positions.",
                flush=True,
            )

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def load_weights(self, buckets: Iterable[list[tuple[str, torch.Tensor]]], version: int) -> None:
        held = dict(self.model.named_parameters())
        with torch.no_grad():
            for bucket in buckets:
                for name, tensor in bucket:
                    held[name].copy_(tensor)
        self.version = version

    def checksums(self) -> list[Checksum]:
        named = list(self.model.named_parameters())
        values = fingerprint([p.detach() for _, p in named])
        return [Checksum((name,), *value) for (name, _), value in zip(named, values, strict=True)]

    def generate(self, work: Work, sampling: Sampling, progress: Progress = silent) -> dict[int, list[Response]]:
        """Take prompts in the order of the work; without continuous batching a batch's seed is its first prompt's."""
        if self.continuous:
            return self._decode(work, sampling, progress)
        step = min(work.prompts_per_engine, max(1, self.batch_size // work.n))
        out: dict[int, list[Response]] = {}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            while chunk := work.take(step):
                progress(len(out), work.prompts_per_engine)
                torch.manual_seed(work.seeds[chunk[0]])
                out |= zip(chunk, self._batch([work.prompts[i] for i in chunk], work.n, sampling), strict=True)
        return out

    @torch.inference_mode()
    def _decode(self, work: Work, s: Sampling, progress: Progress) -> dict[int, list[Response]]:
        """Decode this engine's equal share of the prompts, which enter as rows become free.

        The share is taken at once, so that what runs beside a prompt never depends on timing: a run that was stopped
        and resumed is bit-equal to one that was not.
        """
        greedy = s.temperature == 0
        rows = 1 if greedy else work.n  # n greedy responses are identical
        at_once = min(work.prompts_per_engine, max(1, self.batch_size // rows))
        decoder = Decoder(
            self.model,
            at_once * rows,
            s.max_tokens,
            self.eos_ids,
            processors(s),
            greedy,
            partial(self._has_stop, stop=s.stop) if s.stop else None,
        )
        running: dict[int, list[Response | None]] = {}
        out: dict[int, list[Response]] = {}
        waiting = work.take(work.prompts_per_engine)
        while waiting or running:
            if waiting and decoder.free >= rows:
                entering, waiting = waiting[: decoder.free // rows], waiting[decoder.free // rows :]
                decoder.add([(i, work.prompts[i], work.seeds[i]) for i in entering], rows)
                running |= {i: [None] * rows for i in entering}
            for (number, place), row in decoder.step().items():
                running[number][place] = self._response(row.tokens, row.logprobs, s)
                if None not in running[number]:
                    out[number] = [r for r in running.pop(number) for _ in range(work.n // rows) if r is not None]
                    progress(len(out), work.prompts_per_engine)
        return out

    @torch.inference_mode()
    def _batch(self, prompts: list[list[int]], n: int, s: Sampling) -> list[list[Response]]:
        pad = token_id(self.tokenizer, "pad")
        new, logprobs = sample(self.model, prompts, n, s, self.eos_ids, pad, self.tokenizer)
        responses = [self._response(t, lp, s) for t, lp in zip(new, logprobs, strict=True)]
        return [responses[i : i + n] for i in range(0, len(responses), n)]

    def _response(self, tokens: list[int], logprobs: list[float], s: Sampling) -> Response:
        end = next((i + 1 for i, t in enumerate(tokens) if t in self.eos_ids), None)
        if end is None and s.stop:  # stopped by a string: padding follows, whose token real text may also hold
            end = next((i + 1 for i in range(len(tokens)) if self._has_stop(tokens[: i + 1], s.stop)), None)
        stopped = end is not None
        tokens, logprobs = tokens[:end], logprobs[:end]
        text = visible_text(self.tokenizer, tokens, self.eos_ids)
        return Response(tokens, logprobs, "stop" if stopped else "length", text, self.version)

    def _has_stop(self, tokens: list[int], stop: tuple[str, ...]) -> bool:
        tail = str(self.tokenizer.decode(tokens[-16:]))
        return any(word in tail for word in stop)
