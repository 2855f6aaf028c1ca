"""Continuous batching over transformers' own forward pass: finished responses leave, waiting prompts enter.

Every row of the batch is a response, with a row of one key-value cache. A step is one forward pass of one token per
row. When a row ends, the last row takes its place, so that the batch stays dense; free rows are filled from the waiting
prompts. A group's prompt is computed once, except its last token, and copied to the group's rows; the last token is
each row's first step.

The noise of a group depends only on its prompt's seed: which engine took the prompt, and what else is in the batch,
affects only the rounding of the matrix products. The sampled token is where the cumulative distribution exceeds a
uniform random number.

transformers' own continuous batching (`generate_batch`) is built for paged attention on GPUs.

Legend: B rows, L positions, T steps, V vocabulary, H key-value heads, K head dim, n responses per prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

GROW = 64  # a cache grows by a quarter, and by at least this many positions
PREFILL_TOKENS = 16_384  # maximum tokens, padding included, of the prompts computed at once


@dataclass(frozen=True)
class Row:
    """Tokens and log-probs of one finished response."""

    tokens: list[int]
    logprobs: list[float]


class RowLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, H, L, K]; every row is written at its own position."""

    is_sliding = False

    def __init__(self, cache: "RowCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        cache = self.cache
        self.keys, self.values = (
            x.new_zeros(cache.capacity, x.shape[1], cache.length, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both buffers. They exist once a prompt or a step has been computed."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def grow(self, length: int) -> None:
        """Make room for `length` positions; existing contents are kept."""
        if self.is_initialized:
            pad = (0, 0, 0, length - self.buffers()[0].shape[2])
            self.keys, self.values = (torch.nn.functional.pad(x, pad) for x in self.buffers())

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new token of every row, [B, H, 1, K]; returns everything that the rows attend to, [B, H, L, K]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, B = self.cache, key_states.shape[0]
        out = []
        for buffer, new in zip(self.buffers(), (key_states, value_states), strict=True):
            buffer[cache.index_B, :, cache.position_B] = new[:, :, 0]
            out.append(buffer[:B, :, : cache.seen])
        return out[0], out[1]

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen, 0


class RowCache(Cache):
    """A cache of `capacity` rows whose length grows as needed.

    index_B, position_B: row and position that the current step writes, int64 [B]; seen: number of positions in use.
    """

    def __init__(self, layers: int, capacity: int, device: torch.device):
        self.capacity, self.length, self.seen = capacity, 0, 0
        self.index_B = self.position_B = torch.zeros(0, dtype=torch.int64, device=device)
        self.row_layers = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.row_layers))

    def reserve(self, length: int) -> None:
        """Make room for `length` positions."""
        if length > self.length:
            self.length = max(length, self.length + max(GROW, self.length // 4))
            for layer in self.row_layers:
                layer.grow(self.length)

    def insert(self, prompts: DynamicCache, prompt: int, rows: slice, length: int) -> None:
        """Copy the first `length` positions of a computed prompt into these rows."""
        for layer, source in zip(self.row_layers, prompts.layers, strict=True):
            assert isinstance(source, DynamicLayer) and source.keys is not None and source.values is not None
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            for buffer, x in zip(layer.buffers(), (source.keys, source.values), strict=True):
                buffer[rows, :, :length] = x[prompt, :, :length]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows over others."""
        for layer in self.row_layers:
            for buffer in layer.buffers():
                buffer[targets, :, : self.seen] = buffer[sources, :, : self.seen]


def decodes(config: PretrainedConfig) -> bool:
    """Whether `Decoder` serves models of this configuration: every layer keeps keys and values of all positions."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class Decoder:
    """The running batch of a model.

    Args:
        model: a causal language model of transformers for which `decodes` holds.
        capacity: maximum responses at once.
        max_tokens: limit on a response.
        processors: applied to the logits before sampling; the result of the last one is the distribution sampled from.
        greedy: take the most likely token.
        ended: (tokens of a response so far) -> whether the last one ends it; None: only `eos_ids` do.
    """

    def __init__(
        self,
        model: Any,
        capacity: int,
        max_tokens: int,
        eos_ids: list[int],
        processors: LogitsProcessorList,
        greedy: bool = False,
        ended: Callable[[list[int]], bool] | None = None,
    ):
        self.model, self.capacity, self.max_tokens, self.greedy = model, capacity, max_tokens, greedy
        self.processors, self.ended = processors, ended
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(eos_ids, device=self.device)
        self.cache = RowCache(len(DynamicCache(config=model.config).layers), capacity, self.device)
        self.names: list[tuple[int, int]] = []  # per row: the caller's number of the prompt, index in its group
        self.lengths: list[int] = []  # per row: positions in the cache
        self.counts: list[int] = []  # per row: tokens sampled
        new = {"device": self.device}
        self.last_B = torch.zeros(capacity, dtype=torch.int64, **new)
        self.tokens_BT = torch.zeros(capacity, max_tokens, dtype=torch.int64, **new)
        self.logprobs_BT = torch.zeros(capacity, max_tokens, **new)
        self.noise_BT = torch.zeros(capacity, max_tokens, dtype=torch.float64, **new)

    @property
    def free(self) -> int:
        """Number of rows that are not in use."""
        return self.capacity - len(self.names)

    def add(self, prompts: list[tuple[int, list[int], int]], n: int) -> None:
        """Add prompts to the batch, with n responses each.

        Args:
            prompts: the caller's number, token ids (at least one) and seed of each.
        """
        at_once = max(1, PREFILL_TOKENS // max(len(ids) for _, ids, _ in prompts))
        for i in range(0, len(prompts), at_once):
            self._add(prompts[i : i + at_once], n)

    def _add(self, prompts: list[tuple[int, list[int], int]], n: int) -> None:
        known = [ids[:-1] for _, ids, _ in prompts]
        longest = max(map(len, known))
        cache = None
        if longest:  # padded on the right, where no token of a prompt attends to the padding
            ids = torch.tensor([p + [0] * (longest - len(p)) for p in known], device=self.device)
            cache = DynamicCache(config=self.model.config)
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.cache.reserve(longest + 1)
        for i, (number, ids, seed) in enumerate(prompts):
            rows = slice(len(self.names), len(self.names) + n)
            if cache is not None and known[i]:
                self.cache.insert(cache, i, rows, len(known[i]))
            self.last_B[rows] = ids[-1]
            if not self.greedy:
                noise = torch.rand(
                    n, self.max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
                )
                self.noise_BT[rows] = noise.to(self.device)
            self.names += [(number, place) for place in range(n)]
            self.lengths += [len(known[i])] * n
            self.counts += [0] * n

    def step(self) -> dict[tuple[int, int], Row]:
        """Sample one token for every row; remove the responses that ended and return them by number and index."""
        B, cache = len(self.names), self.cache
        cache.seen = max(self.lengths) + 1
        cache.reserve(cache.seen)
        cache.index_B = torch.arange(B, device=self.device)
        cache.position_B = torch.tensor(self.lengths, device=self.device)
        seen_BL = torch.arange(cache.seen, device=self.device) <= cache.position_B[:, None]
        logits = self.model(
            self.last_B[:B, None],
            attention_mask=self._mask(seen_BL)[:, None, None],
            position_ids=cache.position_B[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        processed_BV = self.processors(self.last_B[:B, None], logits)  # type: ignore[arg-type]
        logprobs_BV = processed_BV.float().log_softmax(-1)
        count_B = torch.tensor(self.counts, device=self.device)
        if self.greedy:
            token_B = logprobs_BV.argmax(-1)
        else:
            cumulative = logprobs_BV.double().exp().cumsum(-1)
            height = self.noise_BT[cache.index_B, count_B] * cumulative[:, -1]
            token_B = torch.searchsorted(cumulative, height[:, None], right=True)[:, 0]
        self.last_B[:B] = token_B
        self.tokens_BT[cache.index_B, count_B] = token_B
        self.logprobs_BT[cache.index_B, count_B] = logprobs_BV.gather(1, token_B[:, None])[:, 0]
        ended = torch.isin(token_B, self.eos).tolist()
        out = {}
        for i in range(B):
            self.lengths[i] += 1
            self.counts[i] += 1
            count = self.counts[i]
            ended[i] = ended[i] or count == self.max_tokens
            if self.ended and not ended[i]:
                ended[i] = self.ended(self.tokens_BT[i, max(0, count - 16) : count].tolist())
            if ended[i]:
                out[self.names[i]] = Row(self.tokens_BT[i, :count].tolist(), self.logprobs_BT[i, :count].tolist())
        if out:
            self._close([i for i in range(B) if ended[i]])
        return out

    def _mask(self, seen_BL: torch.Tensor) -> torch.Tensor:
        """The mask in the form that the model's attention needs: boolean for SDPA, additive for eager attention."""
        if self.model.config._attn_implementation == "sdpa":
            return seen_BL
        dtype = self.model.dtype
        return torch.zeros_like(seen_BL, dtype=dtype).masked_fill_(~seen_BL, torch.finfo(dtype).min)

    def _close(self, ended: list[int]) -> None:
        """Remove rows; the last rows take their places."""
        B = len(self.names) - len(ended)
        gone = set(ended)
        targets = [i for i in ended if i < B]
        sources = [i for i in range(B, len(self.names)) if i not in gone]
        if targets:
            self.cache.move(sources, targets)
            for x in (self.last_B, self.tokens_BT, self.logprobs_BT, self.noise_BT):
                x[targets] = x[sources]
        for of_row in (self.names, self.lengths, self.counts):
            for source, target in zip(sources, targets, strict=True):
                of_row[target] = of_row[source]  # type: ignore[index]
            del of_row[B:]


def decode(
    model: Any, prompts: list[list[int]], max_tokens: int, eos_ids: list[int], processors: LogitsProcessorList
) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and log-probs of one response per prompt, with the prompts' indices as seeds."""
    with torch.inference_mode():
        decoder = Decoder(model, len(prompts), max_tokens, eos_ids, processors)
        decoder.add([(i, ids, i) for i, ids in enumerate(prompts)], 1)
        rows: dict[tuple[int, int], Row] = {}
        while decoder.names:
            rows |= decoder.step()
    ordered = [rows[i, 0] for i in range(len(prompts))]
    return [r.tokens for r in ordered], [r.logprobs for r in ordered]
