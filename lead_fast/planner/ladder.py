"""Search for engine settings, and the ladder: the gain of each mechanism, whether it exists in the code or not."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..config import RolloutConfig
from .assumptions import NODE, Device, assumed, assumed_bytes
from .rollout import Drafter, Engine, Job, RolloutTime, eagle, rollout_time
from .shapes import ModelSize

MECHANISMS = {  # prefixes of the keys in section `rollout` that control a mechanism
    "tensor parallelism": ("tensor_parallel",),
    "a drafter": ("speculative",),
    "fp8 weights and cache": ("quantization", "kv_dtype"),
    "extra problems": ("extra_problems",),
}
SIMULATED = 256  # responses to simulate at least
PESSIMISTIC_ACCEPTED = 1.8  # tokens per verification of a drafter that the policy has drifted away from


def exists(mechanism: str) -> bool:
    """Whether the configuration has all the keys that control a mechanism."""
    names = [f.name for f in dataclasses.fields(RolloutConfig)]
    return all(any(name.startswith(prefix) for name in names) for prefix in MECHANISMS[mechanism])


@dataclass(frozen=True)
class Setting:
    """How the GPUs generate: rollout.tensor_parallel, batch_size (per engine) and gpu_memory."""

    tensor_parallel: int
    batch_size: int
    gpu_memory: float


@dataclass(frozen=True)
class Generation:
    """The generation setup on `gpus` GPUs of a device for any setting: the model in its formats, and the job.

    heads: attention heads, which tensor parallelism must divide.
    free_bytes: of a GPU, after the trainer's states, CUDA and the allocator's loss.
    longest: tokens of the longest sequence, which the cache must hold.
    """

    model: ModelSize
    device: Device
    gpus: int
    job: Job
    heads: int
    free_bytes: float
    longest: int
    fp8_weights: bool = False
    fp8_cache: bool = False
    drafter: Drafter | None = None

    def engine(self, s: Setting) -> Engine:
        """The engine of a setting; a cache that would be too small has 0 bytes, never fewer."""
        bare = Engine(self.model, self.device, s.tensor_parallel, s.batch_size, 0.0, self.fp8_weights, self.fp8_cache,
                      self.drafter)  # fmt: skip
        embedding = 2 * self.model.head / s.tensor_parallel  # in memory, but not read
        cache = s.gpu_memory * self.device.memory_bytes - bare.weight_bytes - embedding - assumed_bytes("engine_awake")
        if self.drafter:
            cache -= self.drafter.bytes / s.tensor_parallel
        return dataclasses.replace(bare, cache_bytes=max(0.0, cache))

    def share(self, tensor_parallel: int) -> int:
        """Responses per engine if all got the same number of groups, rounded up."""
        engines = self.gpus // tensor_parallel
        return -(-(self.job.problems + self.job.extra) // engines) * self.job.group_size

    def time(self, s: Setting) -> RolloutTime | None:
        """The simulated rollout; None if the cache cannot hold one longest sequence.

        With many engines, an equal part of them with at least SIMULATED responses represents all.
        """
        engine, engines, job = self.engine(s), self.gpus // s.tensor_parallel, self.job
        if engine.cache_tokens < self.longest:
            return None
        divisor = math.gcd(engines, job.problems, job.extra)
        parts = max(k for k in range(1, divisor + 1)
                    if divisor % k == 0 and (k == 1 or job.problems * job.group_size >= k * SIMULATED))  # fmt: skip
        part = dataclasses.replace(job, problems=job.problems // parts, extra=job.extra // parts)
        t = rollout_time(engine, engines // parts, part)
        return dataclasses.replace(t, tokens=parts * t.tokens, preemptions=parts * t.preemptions)

    def search(self, given: Setting) -> list[tuple[Setting, RolloutTime]]:
        """Settings whose cache holds the longest sequence, fastest first; of equally fast ones the smaller first.

        Tensor parallelism stays within a node, and an engine runs its full part of a step at once. If the cache is then
        too small or evicts responses, also all available memory, and half the responses, are tried.
        """
        most = int(20 * self.free_bytes / self.device.memory_bytes) / 20
        memory = min(given.gpu_memory, most)
        parallel = [n for n in (1, 2, 4, 8) if n <= NODE and self.gpus % n == self.heads % n == 0]
        timed = {given: self.time(given)}
        for n in dict.fromkeys([*parallel, given.tensor_parallel]):
            part = self.share(n)
            setting = Setting(n, part, memory)
            timed[setting] = t = self.time(setting)
            if not t or t.preemptions:
                half = max(self.job.group_size, part // 2)
                timed |= {s: self.time(s) for s in (Setting(n, part, most), Setting(n, half, memory),
                                                    Setting(n, half, most))}  # fmt: skip
        feasible = [(s, t) for s, t in timed.items() if t]
        return sorted(feasible, key=lambda x: (round(x[1].seconds, 1), *dataclasses.astuple(x[0])))


@dataclass(frozen=True)
class Rung:
    """A row of the ladder: seconds of a step as assumed, and if iterations take twice as long.

    step_low_s: both with PESSIMISTIC_ACCEPTED tokens per verification; None without a drafter.
    missing: its mechanisms for which the configuration has no keys.
    """

    name: str
    setting: Setting
    rollout: RolloutTime
    train_s: float
    step_s: float
    step_twice_s: float
    step_low_s: tuple[float, float] | None
    missing: tuple[str, ...]


def ladder(
    base: Generation,
    today: Setting,
    train_s: Callable[[float], float],
    best_train_s: Callable[[float], float],
    sync: float,
    last: str,
) -> list[Rung]:
    """The rungs, each with all mechanisms of those above it.

    Args:
        base: the setup without any mechanism.
        today: the first rung's setting; those of the other rungs are found by search.
        train_s, best_train_s: seconds of training by a step's tokens, as configured and for the last rung.
        sync: seconds of the weight sync.
        last: the last rung's name.
    """
    m = base.model
    accepted = assumed("accepted")

    def drafted(g: Generation) -> Generation:
        return dataclasses.replace(g, drafter=eagle(m, accepted))

    def rounded(g: Generation) -> Generation:
        return dataclasses.replace(g, fp8_weights=True, fp8_cache=True)

    def doubled(g: Generation) -> Generation:
        return dataclasses.replace(g, job=dataclasses.replace(g.job, extra=g.job.problems))

    steps: list[tuple[str, str, Callable[[Generation], Generation]]] = [
        ("one GPU per engine", "", lambda g: g),
        ("best engines", "tensor parallelism", lambda g: g),
        (f"+ EAGLE-3 drafter, {accepted:g} accepted", "a drafter", drafted),
        ("+ fp8 weights and cache", "fp8 weights and cache", rounded),
        ("+ as many extra problems", "extra problems", doubled),
    ]
    out: list[Rung] = []
    g, missing = base, ()
    for name, mechanism, change in steps:
        g = change(g)
        if mechanism and not exists(mechanism):
            missing = (*missing, mechanism)
        settings = g.search(today) if mechanism else [(today, t)] if (t := g.time(today)) else []
        if not settings:
            continue
        setting, rollout = settings[0]
        out.append(_rung(name, g, setting, rollout, train_s(rollout.tokens), sync, missing))
    if out and best_train_s is not train_s:
        at = out[-1]
        out.append(_rung(last, g, at.setting, at.rollout, best_train_s(at.rollout.tokens), sync, missing))
    return out


def _rung(name: str, g: Generation, setting: Setting, rollout: RolloutTime, train_s: float, sync: float,
          missing: tuple[str, ...]) -> Rung:  # fmt: skip
    low = None
    if g.drafter:
        drafter = dataclasses.replace(g.drafter, accepted=PESSIMISTIC_ACCEPTED)
        slow = dataclasses.replace(g, drafter=drafter).time(setting)
        assert slow, "fewer accepted tokens must not change the cache that a drafter needs"
        low = (slow.seconds + train_s + sync, slow.slower(2) + train_s + sync)
    rest = train_s + sync
    return Rung(name, setting, rollout, train_s, rollout.seconds + rest, rollout.slower(2) + rest, low, missing)
