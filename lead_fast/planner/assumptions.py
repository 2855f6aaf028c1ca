"""Data sheets, assumptions with their sources, and measurements that the planner's seconds and spare memory rest on.

Every assumption is stated once, here; results of bench/gpu.py replace those that it measures.
"""

import contextlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..learner.memory import SLEEPING_VLLM
from ..runtime.hardware import GIB


@dataclass(frozen=True)
class Device:
    """A GPU: bytes as torch sees them, dense bf16 FLOP/s, bytes/s of HBM, of NVLink one way and of its network card."""

    memory_bytes: float
    flops: float
    hbm: float
    nvlink: float
    network: float


NODE = 8  # GPUs per node
DEVICES = {  # NVIDIA's data sheets (SXM); usual networks: 400 Gb/s per GPU, 200 Gb/s per A100
    "h100": Device(79.1 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Device(139.7 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "a100": Device(79.1 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "h20": Device(95.0 * GIB, 148e12, 4.0e12, 450e9, 50e9),
}


# "h200": measured on one with large bf16 products and copies (790 TFLOP/s, 4.3 TB/s). "guess": neither measured nor
# published, to be replaced by a run's own metrics.
ASSUMPTIONS: dict[str, tuple[float, str]] = {
    # training
    "gemm": (0.80, "share of peak FLOP/s in matrix products; h200"),
    "attention": (0.50, "share of peak FLOP/s in flash attention; guess"),
    "copy": (0.90, "share of HBM bandwidth in everything but products and attention; h200"),
    "collective": (0.80, "share of link bandwidth in large collectives; guess"),
    "hop_s": (5e-6, "seconds per rank of a ring; guess"),
    "sync_passes": (8, "how often a weight's bf16 bytes are read or written between gather and engine; counted"),
    # generation: an iteration is one token, or one verification, of all running responses
    "weights_read": (0.85, "share of HBM bandwidth in products of few rows; guess"),
    "cache_read": (0.70, "share of HBM bandwidth in attention over a paged bf16 cache; guess"),
    "cache_read_fp8": (0.60, "the same over an fp8 cache; guess"),
    "fp8_products": (0.60, "share of twice the bf16 peak in fp8 products; guess"),
    "quantise_s": (25e-6, "seconds per block and iteration to round activations to fp8; guess: 4 short kernels"),
    "iteration_s": (1.5e-3, "seconds per iteration for scheduling, sampling and log-probs, not hidden; guess"),
    "allreduce_s": (9e-6, "seconds of a small all-reduce over NVLink, twice per block; guess"),
    "verify_s": (1.5e-3, "seconds per verification for rejection sampling, apart from the products; guess"),
    "draft_s": (0.8e-3, "seconds per proposed token, apart from the bytes that the drafter reads; guess"),
    "draft_tokens": (3, "tokens that a drafter proposes; the best of arXiv 2604.26779"),
    "draft_vocabulary": (32_000, "rows of an EAGLE-3 head's own output layer; published heads"),
    "accepted": (2.3, "tokens per verification, the model's own included; guess, arXiv 2604.26779 has 2.47"),
    "prefill": (0.60, "share of peak FLOP/s while prompts are read; guess"),
    "launch_s": (30e-6, "seconds per operator launched from Python, without CUDA graphs; gpt-fast's 25.5 tokens/s"),
    "operators": (25, "operators per block launched without CUDA graphs; guess"),
    # memory
    "fragmentation": (0.05, "memory that torch's allocator cannot use; guess"),
    "context": (2.0, "GiB for CUDA, NCCL and cuBLAS; guess"),
    "engine_asleep": (SLEEPING_VLLM / GIB, "GiB that a sleeping vLLM keeps (lead_fast/learner/memory.py); guess"),
    "engine_awake": (3.0, "GiB of a generating vLLM besides weights and key-value cache; guess"),
    # responses
    "median": (0.5, "median response as a share of rollout.max_tokens; guess"),
    "spread": (0.8, "sigma of the lognormal response length, cut at the limit; bench/packing.py's"),
    "prompt": (200, "tokens of a prompt; guess"),
}


@dataclass(frozen=True)
class Measured:
    """What bench/gpu.py measured on a device, in place of ASSUMPTIONS.

    rates: by name, as in ASSUMPTIONS; the text after the value names the file and its date.
    iterations: by tensor parallelism, (sequences at once, tokens held by all of them, seconds) of Qwen2.5-14B's shape,
        in ascending numbers of sequences.
    sources: by file, the device's full name and the date.
    """

    rates: dict[str, tuple[float, str]] = field(default_factory=dict)
    iterations: dict[int, list[tuple[int, float, float]]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def slowdown(self, tensor_parallel: int, sequences: int, predicted_s: Callable[[int, float], float]) -> float:
        """Measured over predicted seconds of an iteration, interpolated between the measured numbers of sequences.

        Args:
            predicted_s: seconds of an iteration of the measured shape, by number of sequences and of tokens held.
        Returns:
            1 for a tensor parallelism that was not measured.
        """
        points = self.iterations.get(tensor_parallel)
        if not points:
            return 1.0
        ratios = [seconds / predicted_s(n, held) for n, held, seconds in points]
        return float(np.interp(sequences, [n for n, *_ in points], ratios))


def read_measured(files: Sequence[Path], device: str) -> Measured:
    """Read rates and iteration times from results of bench/gpu.py; a file without any adds nothing.

    Raises:
        ValueError: a file cannot be read, is from another device, or holds a rate that is not a number above 0.
    """
    measured = Measured()
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            name, date = content["device"], content["date"]
            rates, rows = content.get("rates", {}), content.get("iterations", [])
            points = [(int(r["tensor_parallel"]), int(r["sequences"]), float(r["sequences"] * r["context_tokens"]),
                       r["ms"] / 1e3) for r in rows]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ValueError(f"--measured {file} is not a result of bench/gpu.py ({type(e).__name__}: {e}).") from e
        if not re.search(rf"\b{device}\b", name, re.I):
            raise ValueError(
                f"--measured {file} is from {name}, but --device is {device}: give results of that device."
            )
        source = f"measured; {file.name}, {date}"
        for key, value in [*rates.items(), *(("ms", seconds) for *_, seconds in points)]:
            known = key in ASSUMPTIONS or key == "ms"
            if not known or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"--measured {file} holds {key} = {value!r}: give known rates with numbers above 0.")
            if key in rates:
                measured.rates[key] = value, source
        by_parallelism = defaultdict(list, measured.iterations)
        for tensor_parallel, sequences, held, seconds in points:
            by_parallelism[tensor_parallel].append((sequences, held, seconds))
        measured.iterations.update({n: sorted(p) for n, p in by_parallelism.items()})
        if rates or points:
            measured.sources[str(file)] = f"{name}, {date}"
    return measured


MEASURED: ContextVar[Measured] = ContextVar("MEASURED", default=Measured())  # noqa: B039, nobody changes it


@contextlib.contextmanager
def using(measured: Measured) -> Iterator[None]:
    """Make `assumed` and the simulated iterations use what was measured, inside the context."""
    token = MEASURED.set(measured)
    try:
        yield
    finally:
        MEASURED.reset(token)


def assumed(name: str) -> float:
    """A value of ASSUMPTIONS, or the measurement that replaces it."""
    return (MEASURED.get().rates.get(name) or ASSUMPTIONS[name])[0]


def assumed_bytes(*names: str) -> float:
    """The sum in bytes of assumptions that are given in GiB."""
    return GIB * sum(map(assumed, names))
