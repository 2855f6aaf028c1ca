"""Simulate the seconds of a rollout, event by event: continuous batching on engines like vLLM's.

Between two events of an engine (a response ends, the cache is full, a group enters) the running responses stay the same
and the seconds of k iterations have a closed form. An iteration takes as long as reading the weights and the caches, or
as multiplying, whichever is longer; tensor parallelism divides both and adds two all-reduces per block; a drafter makes
an iteration longer and yields more tokens. Groups are handed out by a counter that all engines share. A response enters
when a slot is free and its tokens fit the cache; the newest one leaves a full cache, and is recomputed once it fits.

Legend: P groups, G responses of a group, n responses that run at once on an engine.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from .assumptions import MEASURED, Device, assumed
from .shapes import QWEN_14B, ModelSize

QWEN_14B_PARAMETERS = 14.77e9
WATERMARK = 0.01  # fraction of a cache that must stay free when a response enters


@dataclass(frozen=True)
class Drafter:
    """A model that proposes `tokens` per verification and reads `bytes` for each; on average `accepted` - 1 hold."""

    tokens: int
    accepted: float
    bytes: float


def eagle(m: ModelSize, accepted: float) -> Drafter:
    """An EAGLE-3 head: a block, a layer that joins three hidden states, and a separate output layer; in bf16."""
    weights = m.blocks / m.layers + 3 * m.hidden**2 + assumed("draft_vocabulary") * m.hidden
    return Drafter(int(assumed("draft_tokens")), accepted, 2 * weights)


@dataclass(frozen=True)
class Engine:
    """An engine over `tensor_parallel` GPUs.

    at_once: maximum running responses; cache_bytes: size of the key-value cache on each GPU; fp8_weights, fp8_cache:
    whether they have 8 bits (the output layer stays in bf16); graphs: whether iterations are CUDA graphs.
    """

    model: ModelSize
    device: Device
    tensor_parallel: int
    at_once: int
    cache_bytes: float
    fp8_weights: bool = False
    fp8_cache: bool = False
    drafter: Drafter | None = None
    graphs: bool = True

    @property
    def cache_token_bytes(self) -> float:
        """Bytes of one token, over all GPUs of the engine."""
        return self.model.cache_token_bytes / (2 if self.fp8_cache else 1)

    @property
    def cache_tokens(self) -> float:
        """Number of tokens that the engine's cache holds."""
        return self.cache_bytes * self.tensor_parallel / self.cache_token_bytes

    @property
    def weight_bytes(self) -> float:
        """Bytes of the blocks and the output layer, on each GPU."""
        return (self.model.blocks * (1 if self.fp8_weights else 2) + 2 * self.model.head) / self.tensor_parallel

    def iteration(self, n: int, held: float, drafted: bool = False) -> tuple[float, float]:
        """Seconds of an iteration of n responses that hold `held` tokens, and their increase per token held."""
        m, d, tp = self.model, self.device, self.tensor_parallel
        drafter = self.drafter if drafted else None
        rows = n * (1 + drafter.tokens if drafter else 1)
        block_flops = d.flops * (2 * assumed("fp8_products") if self.fp8_weights else assumed("gemm"))
        products_s = 2 * rows / tp * (m.blocks / block_flops + m.head / (d.flops * assumed("gemm")))
        seconds = max(self.weight_bytes / (d.hbm * assumed("weights_read")), products_s)
        seconds += 2 * n * m.state_bytes / tp / (d.hbm * assumed("copy"))
        if self.fp8_weights:
            seconds += m.layers * assumed("quantise_s")
        if tp > 1:
            size = rows * m.hidden * 2
            ring_s = 2 * (tp - 1) / tp * size / (d.nvlink * assumed("collective"))
            seconds += 2 * m.layers * (assumed("allreduce_s") + ring_s)
        read = assumed("cache_read_fp8" if self.fp8_cache else "cache_read")
        per_token = self.cache_token_bytes / tp / (d.hbm * read)
        launched_s = 0.0 if self.graphs else assumed("operators") * assumed("launch_s")  # per block
        if m.layers * launched_s > seconds + held * per_token:
            seconds, per_token = m.layers * launched_s, 0.0
        if drafter:
            draft_s = drafter.bytes / tp / (d.hbm * assumed("weights_read")) + assumed("draft_s") + launched_s
            seconds += drafter.tokens * draft_s + assumed("verify_s")
        return seconds + assumed("iteration_s"), per_token

    def pace(self, n: int, held: float) -> tuple[float, float, float]:
        """As `iteration`, corrected by measurements, plus tokens per response; uses the drafter only where it pays."""
        slower = MEASURED.get().slowdown(self.tensor_parallel, n, self._measured_shape_s)
        fixed, per_token = self.iteration(n, held)
        best, tokens = (fixed, per_token), 1.0
        if self.drafter:
            drafted = self.iteration(n, held, drafted=True)
            if (drafted[0] + drafted[1] * held) / self.drafter.accepted < fixed + per_token * held:
                best, tokens = drafted, self.drafter.accepted
        return slower * best[0], slower * best[1], tokens

    def _measured_shape_s(self, n: int, held: float) -> float:
        """Predicted seconds of the iteration that bench/gpu.py measures: Qwen2.5-14B in bf16, plain."""
        size = measured_size()
        plain = replace(self, model=size, fp8_weights=False, fp8_cache=False, drafter=None, graphs=True)
        fixed, per_token = plain.iteration(n, held)
        return fixed + per_token * held

    def prefill_s(self, tokens: float) -> float:
        """Seconds to read a prompt, or to recompute what a response held."""
        m = self.model
        return (2 * m.blocks * tokens + m.attention_flops(tokens)) / (
            self.device.flops * self.tensor_parallel * assumed("prefill")
        )


def measured_size() -> ModelSize:
    """The size of the model whose iterations bench/gpu.py measures."""
    s = QWEN_14B
    width = s["hidden_size"] // s["num_attention_heads"]
    table = s["vocab_size"] * s["hidden_size"]
    return ModelSize(QWEN_14B_PARAMETERS - 2 * table, table, s["num_hidden_layers"], s["num_hidden_layers"],
                     s["hidden_size"], s["intermediate_size"], s["hidden_size"], s["num_key_value_heads"] * width,
                     s["vocab_size"])  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a step generates: `problems` groups of `group_size` responses of at most `limit` tokens.

    extra: groups asked in addition; the rollout ends when `problems` are complete, and the next one resumes the rest.
    max_age: steps that a group may wait until a rollout cannot end without it; None: any number.
    """

    problems: int
    group_size: int
    limit: int
    extra: int = 0
    max_age: int | None = None

    def lengths(self, groups: int, rng: np.random.Generator) -> np.ndarray:
        """Tokens of responses, [groups, G]: lognormal according to ASSUMPTIONS, cut at the limit."""
        z = rng.standard_normal((groups, self.group_size))
        return np.clip(np.floor(assumed("median") * self.limit * np.exp(assumed("spread") * z)), 1, self.limit)


@dataclass(frozen=True)
class RolloutTime:
    """Means over simulated steps: seconds (`prefill_s` of them for prompts and recomputed tokens), tokens of the
    sequences trained on, preemptions; and the age of their responses in updates, mean and maximum."""

    seconds: float
    prefill_s: float
    tokens: float
    preemptions: float
    staleness: float = 0.0
    stalest: int = 0

    def slower(self, times: float) -> float:
        """Seconds if every iteration took `times` times as long."""
        return self.prefill_s + times * (self.seconds - self.prefill_s)


@dataclass
class _Worker:
    """An engine at work: indices of responses, running ones in order of entry and waiting ones (last first)."""

    running: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    waiting: list[int] = field(default_factory=list)
    clock: float = 0.0  # time for which `running` is up to date
    prefill_s: float = 0.0
    due: float = math.inf  # time of the next event
    iterations: float = 0.0  # iterations until then
    pace: tuple[float, float, float] = (0.0, 0.0, 1.0)


class _Rollout:
    """One rollout over all engines.

    Args:
        engine: the engine that each of `engines` is.
        held_N, left_N: tokens that a response holds (its prompt included) and has yet to sample; modified in place.
        prompt: tokens of a prompt; a response that holds more is recomputed when it enters.
        group_size: G; responses N = P * G in the order of the groups.
        wanted: groups whose completion ends the rollout; due: the first `due` groups must be among them.
    """

    def __init__(self, engine: Engine, engines: int, held_N: np.ndarray, left_N: np.ndarray, prompt: float,
                 group_size: int, wanted: int, due: int = 0):  # fmt: skip
        self.engine, self.workers = engine, [_Worker() for _ in range(engines)]
        self.held, self.left, self.prompt, self.G = held_N, left_N, prompt, group_size
        self.open = (left_N.reshape(-1, group_size) > 0).sum(1)
        self.groups, self.wanted, self.must = len(self.open), wanted, due
        equal_part = math.ceil(self.groups / engines) * group_size
        self.room = max(group_size, min(engine.at_once, equal_part))
        self.taken = self.complete = self.complete_due = self.preemptions = 0

    def run(self) -> tuple[float, float]:
        """Seconds until it ends, and seconds of prefill on the engine that finishes last."""
        while any([self._take(w) for w in self.workers]):  # all begin at once and take turns
            pass
        for w in self.workers:
            self._fill(w)
        last = self.workers[0]
        while not self._enough():
            last = min(self.workers, key=lambda w: w.due)
            self._advance(last, last.iterations)
            last.clock = last.due
            ended = last.running[self.left[last.running] <= 0]
            last.running = last.running[self.left[last.running] > 0]
            for group in ended // self.G:
                self.open[group] -= 1
                self._close(group)
            self._fill(last)
        for w in self.workers:
            if w is not last and len(w.running) and w.clock < last.clock:
                self._advance(w, self._iterations_in(w, last.clock - w.clock))
        return last.clock, last.prefill_s

    def _enough(self) -> bool:
        return self.complete >= self.wanted and self.complete_due >= self.must

    def _close(self, group: int) -> None:
        if self.open[group] == 0:
            self.complete += 1
            self.complete_due += group < self.must

    def _take(self, w: _Worker) -> bool:
        """Take the next group if there is room for one."""
        if self.taken == self.groups or len(w.running) + len(w.waiting) + self.G > self.room:
            return False
        group, self.taken = self.taken, self.taken + 1
        self._close(group)
        first = group * self.G
        w.waiting[:0] = [i for i in range(first + self.G - 1, first - 1, -1) if self.left[i] > 0]
        return True

    def _fill(self, w: _Worker) -> None:
        """Take groups, let responses enter, make room in a full cache, and find the next event."""
        while self._take(w):
            pass
        cache, held = self.engine.cache_tokens, self.held[w.running].sum()
        entered = []
        while w.waiting and len(w.running) + len(entered) < self.engine.at_once:
            i = w.waiting[-1]
            alone = not len(w.running) and not entered
            if not alone and held + self.held[i] + WATERMARK * cache > cache:
                break
            entered.append(w.waiting.pop())
            held += self.held[i]
            shared = self.held[i] <= self.prompt  # a prompt is read once per group
            w.prefill_s += (seconds := self.engine.prefill_s(self.held[i]) / (self.G if shared else 1))
            w.clock += seconds
        w.running = np.concatenate([w.running, np.array(entered, dtype=np.int64)])
        n = len(w.running)
        if not n:
            w.due = math.inf
            return
        while True:
            w.pace = self.engine.pace(n, held)
            until_full = (cache - held) // (n * w.pace[2])
            if n == 1 or until_full >= 1:
                break
            i, w.running, n = int(w.running[-1]), w.running[:-1], n - 1
            w.waiting.append(i)
            held -= self.held[i]
            self.preemptions += 1
        until_end = math.ceil(self.left[w.running].min() / w.pace[2])
        w.iterations = until_end if n == 1 else min(until_end, until_full)
        w.due = w.clock + self._seconds(w, w.iterations, held)

    def _seconds(self, w: _Worker, iterations: float, held: float) -> float:
        fixed, per_token, tokens = w.pace
        grown = len(w.running) * tokens * iterations * (iterations - 1) / 2
        return iterations * fixed + per_token * (iterations * held + grown)

    def _iterations_in(self, w: _Worker, seconds: float) -> float:
        """The inverse of `_seconds`; may return a fraction of an iteration."""
        fixed, per_token, tokens = w.pace
        square = per_token * len(w.running) * tokens / 2
        linear = fixed + per_token * self.held[w.running].sum() - square
        return 2 * seconds / (linear + math.sqrt(linear * linear + 4 * square * seconds))

    def _advance(self, w: _Worker, iterations: float) -> None:
        sampled = np.minimum(iterations * w.pace[2], self.left[w.running])
        self.held[w.running] += sampled
        self.left[w.running] -= sampled


RESPONSES = 768  # responses to draw if a step leaves nothing to the next
STEADY_RESPONSES, WARM_UP = 4096, 8  # if it does: responses, after this many steps to reach the steady state


def rollout_time(engine: Engine, engines: int, job: Job, seed: int = 0) -> RolloutTime:
    """Simulated seconds of a step's rollout over `engines`; with extra problems, in the steady state."""
    rng, prompt = np.random.default_rng(seed), assumed("prompt")
    G, asked = job.group_size, job.problems + job.extra
    warm_up = WARM_UP if job.extra else 0
    steps = warm_up + max(1, (STEADY_RESPONSES if job.extra else RESPONSES) // (job.problems * G))
    held = left = np.zeros((0, G))
    begun: list[dict[int, float]] = []  # per waiting group: tokens, by the step that sampled them
    rows = []
    for step in range(steps):
        new = job.lengths(asked - len(held), rng)
        held, left = np.concatenate([held, np.full(new.shape, prompt)]), np.concatenate([left, new])
        begun += [{} for _ in new]
        due = sum(bool(b) and step - min(b) >= job.max_age for b in begun) if job.max_age is not None else 0
        before = held.sum(1)
        flat_held, flat_left = held.ravel(), left.ravel()
        r = _Rollout(engine, engines, flat_held, flat_left, prompt, G, job.problems, due)
        seconds, prefill_s = r.run()
        held, left = flat_held.reshape(-1, G), flat_left.reshape(-1, G)
        for ages, new_tokens in zip(begun, held.sum(1) - before, strict=True):
            if new_tokens > 0:
                ages[step] = new_tokens
        trained = np.flatnonzero((left <= 0).all(1))[: job.problems]
        sampled = sum(sum(begun[i].values()) for i in trained)
        old = sum((step - at) * count for i in trained for at, count in begun[i].items()) / sampled
        oldest = max(step - min(begun[i]) for i in trained)
        tokens = sampled + len(trained) * G * (prompt - 1)  # the last token is only ever a target
        rows.append((seconds, prefill_s, tokens, r.preemptions, old, oldest))
        kept = np.setdiff1d(np.arange(len(held)), trained)
        held, left, begun = held[kept], left[kept], [begun[i] for i in kept]
    mean, most = np.array(rows[warm_up:]).mean(0).tolist(), max(row[5] for row in rows[warm_up:])
    return RolloutTime(mean[0], mean[1], mean[2], mean[3], mean[4], most)
