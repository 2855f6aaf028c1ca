"""Predict published measurements from the same assumptions, to show how far off the planner is."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from .assumptions import DEVICES, GIB, Device, Measured, assumed, assumed_bytes, using
from .rollout import Drafter, Engine, Job, measured_size, rollout_time
from .shapes import ModelSize
from .training import forward_and_backward_s

LLAMA2_7B = ModelSize(6.476e9, 0.131e9, 32, 32, 4096, 11008, 4096, 4096, 32_000)
LLAMA3_8B = ModelSize(6.980e9, 0.525e9, 32, 32, 4096, 14336, 4096, 1024, 128_256)
# transformers' Qwen3_5TextConfig: 24 of 32 blocks keep a float32 state of 32 x 128 x 128 and no cache
QWEN35_9B = ModelSize(6.92e9, 1.017e9, 32, 8, 4096, 12288, 4096, 1024, 248_320, 24 * 32 * 128 * 128 * 4)
QWEN35_MTP = 2 * (0.210e9 + 2 * 4096**2 + QWEN35_9B.head)  # bytes: a block, the joining layer, the shared head


@dataclass(frozen=True)
class Published:
    """A measured number and its prediction. kind: rollout, training, or step (both, and the rest)."""

    what: str
    kind: str
    unit: str
    measured: float
    predicted: float
    source: str

    @property
    def error(self) -> float:
        """Error of the prediction relative to the measurement; a rate that is too high is a time that is too short."""
        return self.predicted / self.measured - 1

    @property
    def slower(self) -> float:
        """Measured time over predicted time."""
        return self.measured / self.predicted if self.unit == "s" else self.predicted / self.measured


def gpt_fast() -> list[Published]:
    """One response of Llama 2 7B in bf16, compiled, on 1 to 8 A100 (their 330 W limit does not affect HBM)."""
    source = "gpt-fast's README: A100-80GB, 330 W, batch 1"
    rows = []
    for parallel, rate in ((1, 104.9), (2, 168.84), (4, 254.02), (8, 328.43)):
        seconds, _ = Engine(LLAMA2_7B, DEVICES["a100"], parallel, 1, GIB).iteration(1, 0)
        rows.append(Published(f"Llama 2 7B, {parallel} x A100", "rollout", "tokens/s", rate, 1 / seconds, source))
    return rows


def skyrl() -> list[Published]:
    """DAPO of Qwen3.5-9B on 8 H100: 32 x 8 responses up to 8,192 tokens, without CUDA graphs, padded, Megatron TP 4."""
    d, job, source = DEVICES["h100"], Job(32, 8, 8192), "SkyRL's docs/content/docs/examples/spec_decode.mdx"
    padded = job.limit + assumed("prompt")
    tokens = job.problems * job.group_size * padded
    cache = 0.5 * d.memory_bytes - 2 * (QWEN35_9B.multiplied + QWEN35_9B.head) - assumed_bytes("engine_awake")
    plain = Engine(QWEN35_9B, d, 1, 32, cache, graphs=False)
    per_token = forward_and_backward_s(QWEN35_9B, d, padded, int(padded), True, 1)
    passed = forward_and_backward_s(QWEN35_9B, d, padded, int(padded), True, 1, forwards=1)  # 1 for old log-probs
    train_s, all_s = (w.seconds * tokens / 8 for w in (per_token, passed))
    rows = []
    drafted = dataclasses.replace(plain, drafter=Drafter(3, 3.32, QWEN35_MTP))
    for name, engine, measured in (
        ("plain", plain, (310.1, 57.3, 400.7)),
        ("MTP, 3.32", drafted, (152.4, 61.3, 246.8)),
    ):
        rollout_s = rollout_time(engine, 8, job).seconds
        for kind, value, predicted in zip(("rollout", "training", "step"), measured,
                                          (rollout_s, train_s, rollout_s + all_s), strict=True):  # fmt: skip
            rows.append(Published(f"SkyRL, 9B, {name}: {kind}", kind, "s", value, predicted, source))
    return rows


def authors() -> list[Published]:
    """GRPO-LEAD's stage 1: 100 steps in about 24 hours on 8 H20, with the keys of the released script."""
    d, job, m = DEVICES["h20"], Job(32, 8, 12288), measured_size()
    cache = 0.45 * d.memory_bytes - 2 * (m.multiplied + m.head) / 2 - assumed_bytes("engine_awake")
    rollout_s = rollout_time(Engine(m, d, 2, 256, cache), 4, job).seconds
    lengths = job.lengths(job.problems, np.random.default_rng(0)) + assumed("prompt")
    weighted = float((lengths**2).sum() / lengths.sum())
    passes = forward_and_backward_s(m, d, weighted, 13312, False, 1, forwards=2)  # old log-probs and the reference
    predicted = rollout_s + passes.seconds * float(lengths.sum()) / 8
    source = "arXiv 2504.09696: 24 hours; TP 2, 12,288 tokens, three forward passes: the released script"
    return [Published("the authors, 14B, 8 x H20: step", "step", "s", 864, predicted, source)]


# torchtitan's page: HBM2e of 2.4 TB/s and a limit of 500 W. Products are assumed to run at 500 / 700 of an SXM's rate,
# because power limits them there; a guess.
H100_500W = Device(94 * GIB, 989e12 * 500 / 700, 2.4e12, 450e9, 50e9)


def torchtitan() -> list[Published]:
    """Llama 3.1 8B on 8 H100, 2 x 8,192 tokens each, with every second product recomputed."""
    source = "torchtitan's benchmarks/llama3_h100_202412_torchtitan.md, table 1"
    rows = []
    for name, fused, rate in (("FSDP", False, 5762), ("FSDP + torch.compile", True, 6667)):
        work = forward_and_backward_s(LLAMA3_8B, H100_500W, 8192, 16384, fused, 0.5)
        update = 40 * LLAMA3_8B.multiplied / 8 / 16384 / (H100_500W.hbm * assumed("copy"))
        rows.append(Published(f"torchtitan, 8B, {name}", "training", "tokens/s per GPU", rate,
                              1 / (work.seconds + update), source))  # fmt: skip
    return rows


def published() -> list[Published]:
    """Every published number with its prediction, from the assumptions alone: measurements hold for one device only."""
    with using(Measured()):
        return [*gpt_fast(), *skyrl(), *torchtitan(), *authors()]


def worst(rows: list[Published], kind: str) -> float:
    """The largest ratio of measured to predicted time, at least 1."""
    return max([1.0, *(row.slower for row in rows if row.kind == kind)])
