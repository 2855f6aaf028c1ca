"""What a run needs and how long a step takes, before any GPU is bought: memory by kind, traffic, seconds, MFU.

    python -m lead_fast.plan --recipe lead-14b --gpus 8 --device h200 [--measured FILE ...] [--section.key=value ...]

Memory, traffic and work are those of the trainer itself, run without memory (learner/fake_step.py), for a pack of
parallel.pack_tokens or the longest sequence, whichever is more. Seconds rest on the table ASSUMPTIONS, and in its place
on what bench/gpu.py measured, where there are results of the device. Training and generation do not coincide: vLLM
sleeps (level 2) while the policy trains. It ends with code 1, and says what to change, where a run does not fit. Not
counted: a reference model (loss.kl_coef), a pass that recomputes old log-probs, what model.compile and model.liger
save, and the all-reduces of an engine over several GPUs unless its iterations were measured. Ranks that share a pack
(parallel.sequence) hold and compute its share each.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from .checks import check
from .cli import load_config
from .config import Config, ModelConfig
from .learner.checkpoint import write_atomic
from .learner.fake_step import COLLECTIVES, KINDS, SEGMENTS, Numbers, fake_job, line, track
from .learner.model import resolve
from .learner.packing import assign
from .machine import fit_engine


@dataclass(frozen=True)
class Device:
    """A GPU: bytes as torch sees them, dense bf16 FLOP/s, bytes/s of HBM, of NVLink one way and of its network card."""

    memory_bytes: float
    flops: float
    hbm: float
    nvlink: float
    network: float


GIB = 2**30
NODE = 8  # GPUs of a node
DEVICES = {  # NVIDIA's data sheets (SXM); networks as commonly built: 400 Gb/s a GPU, 200 Gb/s beside A100
    "h100": Device(79.1 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Device(139.7 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "a100": Device(79.1 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "h20": Device(95.0 * GIB, 148e12, 4.0e12, 450e9, 50e9),
}


# What seconds and spare memory rest on. "h200": measured there with large bf16 products and copies (790 TFLOP/s, 4.3
# TB/s); "guess": not measured by us, to be replaced by a run's own metrics.
ASSUMPTIONS = {
    "gemm": (0.80, "share of peak FLOP/s in matrix products; h200"),
    "attention": (0.50, "share of peak FLOP/s in flash attention; guess"),
    "copy": (0.90, "share of HBM bandwidth in all other operators, each its own kernel; h200"),
    "collective": (0.80, "share of link bandwidth in large collectives; guess"),
    "hop_s": (5e-6, "seconds per rank of a ring; guess"),
    "decode": (0.70, "share of HBM bandwidth while generating, scheduling included; guess"),
    "sync_passes": (8, "times that a weight's bf16 bytes are read or written between gather and engine; counted"),
    "fragmentation": (0.05, "memory that torch's allocator cannot use; guess"),
    "context": (2.0, "GiB for CUDA, NCCL and cuBLAS; guess"),
    "engine_asleep": (1.5, "GiB that a sleeping vLLM keeps; guess"),
    "engine_awake": (3.0, "GiB beside weights and key-value cache of a vLLM that generates; guess"),
    "median": (0.5, "median answer as a share of rollout.max_tokens; guess"),
    "spread": (0.8, "sigma of the lognormal answer length, cut at the limit; bench/packing.py's"),
    "prompt": (200, "tokens of a prompt; guess"),
}


RESULTS = Path(__file__).parents[1] / "bench" / "results"  # of a checkout; a wheel has none


@dataclass(frozen=True)
class Measured:
    """What bench/gpu.py measured on a device, in place of ASSUMPTIONS.

    rates: by name, as in ASSUMPTIONS; what follows the value names the file and its date.
    decode: by tensor parallelism, (sequences at once, share of HBM bandwidth) in growing numbers of sequences.
    sources: the device's own name, its date and the files.
    """

    rates: dict[str, tuple[float, str]] = field(default_factory=dict)
    decode: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def decode_share(self, tensor_parallel: int, sequences: int) -> float:
        """Share of HBM bandwidth while an engine generates; assumed for a tensor parallelism that was not measured."""
        points = self.decode.get(tensor_parallel)
        if not points:
            return assumed("decode")
        return float(np.interp(sequences, [n for n, _ in points], [share for _, share in points]))


def read_measured(files: Sequence[Path], device: str) -> Measured:
    """Rates and iteration times out of results of bench/gpu.py; a file without any adds nothing.

    Raises:
        ValueError: a file that cannot be read, is of another device, or holds a rate that is no number above 0.
    """
    measured = Measured()
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            name, date = content["device"], content["date"]
            rates, rows = content.get("rates", {}), content.get("iterations", [])
            points = [(int(r["tensor_parallel"]), int(r["sequences"]),
                       r["read_bytes"] / (r["ms"] / 1e3) / DEVICES[device].hbm) for r in rows]  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as e:
            raise ValueError(f"--measured {file} is no result of bench/gpu.py ({type(e).__name__}: {e}).") from e
        if not re.search(rf"\b{device}\b", name, re.I):
            raise ValueError(
                f"--measured {file} is of {name}, and --device is {device}: give the device's own results."
            )
        source = f"measured; {file.name}, {date}"
        for key, value in [*rates.items(), *(("decode", share) for *_, share in points)]:
            if key not in ASSUMPTIONS or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"--measured {file} holds {key} = {value!r}: give known rates with numbers above 0.")
            if key in rates:
                measured.rates[key] = value, source
        by_parallelism = defaultdict(list, measured.decode)
        for tensor_parallel, sequences, share in points:
            by_parallelism[tensor_parallel].append((sequences, share))
        measured.decode.update({n: sorted(p) for n, p in by_parallelism.items()})
        if rates or points:
            measured.sources[str(file)] = f"{name}, {date}"
    return measured


MEASURED: ContextVar[Measured] = ContextVar("MEASURED", default=Measured())  # noqa: B039, nobody changes it


@contextlib.contextmanager
def using(measured: Measured) -> Iterator[None]:
    """Let `assumed` and `decode_s` take what was measured, inside."""
    token = MEASURED.set(measured)
    try:
        yield
    finally:
        MEASURED.reset(token)


def assumed(name: str) -> float:
    """A value of ASSUMPTIONS, or what was measured in its place."""
    return (MEASURED.get().rates.get(name) or ASSUMPTIONS[name])[0]


# Shapes of the models that recipes name, from the config.json of their repositories, so that no hub is needed. R1's
# distillations have the shape of Qwen2.5-14B and Qwen2.5-Math-7B.
QWEN_14B = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
            "max_position_embeddings": 131072}  # fmt: skip
QWEN_7B = QWEN_14B | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                      "num_attention_heads": 28, "num_key_value_heads": 4}  # fmt: skip
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
           "max_position_embeddings": 8192}  # fmt: skip
SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": QWEN_14B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": QWEN_7B,
    "Qwen/Qwen2.5-14B": QWEN_14B,
    "Qwen/Qwen2.5-Math-7B": QWEN_7B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
}


def shape_of(model: ModelConfig) -> PretrainedConfig:
    """The model's configuration: of a local folder, else of the table, else of the hub.

    Raises:
        ValueError: none of them has it.
    """
    path = resolve(model.path)
    if not Path(path).is_dir() and path in SHAPES:
        return AutoConfig.for_model(**SHAPES[path])
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as e:
        raise ValueError(
            f"The shape of model.path {model.path} is not known here: give a folder with its config.json, or one of "
            f"{', '.join(SHAPES)}."
        ) from e


def peak(n: Numbers) -> tuple[str, dict[str, float]]:
    """The segment in which memory is highest, and its bytes by kind."""
    by = {s: {k: n[f"{s}/{k}"] for k in KINDS} for s in SEGMENTS}
    at = max(by, key=lambda s: sum(by[s].values()))
    return at, by[at]


def training_bytes(n: Numbers) -> float:
    """What a GPU must have for it: the peak, and what the allocator, CUDA and the sleeping engine take."""
    return sum(peak(n)[1].values()) * (1 + assumed("fragmentation")) + aside("context", "engine_asleep")


def aside(*names: str) -> float:
    return GIB * sum(assumed(n) for n in names)


GRANULE = 256  # tokens


def budget(tracked: Callable[[int], Numbers], limit_bytes: float, guess: int) -> tuple[int, dict[int, Numbers]]:
    """The largest pack, a multiple of GRANULE tokens, whose training_bytes are at most `limit_bytes`; 0 if none is.

    Args:
        tracked: numbers of a pack of T tokens.
        guess: the first size looked at.
    Returns:
        that size, and all that was tracked on the way, the answer among it.

    Memory is a maximum of straight lines in T, so the line through two sizes is solved until it names a size that was
    tracked and fits, with the next one up over the limit (by the line through it).
    """
    seen = {T: tracked(T) for T in (GRANULE * max(1, guess // GRANULE // 2), GRANULE * max(2, guess // GRANULE))}
    while True:
        sizes = sorted(seen)
        over = [T for T in sizes if training_bytes(seen[T]) > limit_bytes]
        b = sizes.index(over[0]) if over else len(sizes) - 1
        b = max(1, b)
        low, high = (training_bytes(seen[sizes[i]]) for i in (b - 1, b))
        slope = (high - low) / (sizes[b] - sizes[b - 1])
        T = GRANULE * math.floor((sizes[b - 1] + (limit_bytes - low) / slope) / GRANULE)
        if T < GRANULE:
            return 0, seen
        if T in seen:
            return T, seen
        seen[T] = tracked(T)


# ---------------------------------------------------------------------------------------------------------------- time


def response_tokens(c: Config) -> list[int]:
    """Lengths of a step's responses: lognormal as ASSUMPTIONS say, cut at rollout.max_tokens; always the same draw."""
    r = c.rollout
    z = torch.randn(r.problems * r.group_size, generator=torch.Generator().manual_seed(0))
    return (assumed("median") * r.max_tokens * torch.exp(assumed("spread") * z)).long().clamp(1, r.max_tokens).tolist()


def collective_s(kind: str, size: float, calls: float, ranks: int, across_nodes: bool, d: Device) -> float:
    """Seconds of `calls` ring collectives of `size` bytes in all (of the whole tensors) over `ranks`.

    A ring moves (ranks - 1) / ranks of the bytes over every link, twice for an all-reduce. Over nodes NCCL lays a ring
    on each network card, so that a ring over all GPUs has what a node's cards do together; an all-reduce between copies
    of the model has the one card of its GPU.
    """
    if ranks == 1:
        return 0.0
    times = 2 if kind == "all_reduce" else 1
    link = d.nvlink if not across_nodes else d.network if kind == "all_reduce" else min(d.nvlink, NODE * d.network)
    return times * (ranks - 1) * (size / ranks / (link * assumed("collective")) + calls * assumed("hop_s"))


def decode_s(
    lengths: Sequence[int], slots: int, weight_bytes: float, token_bytes: float, d: Device, tensor_parallel: int = 1
) -> float:
    """Seconds to generate `lengths` tokens, at most `slots` answers at once, on one engine.

    Every token of all running answers costs one reading of the weights and of what their key-value caches hold.
    """
    quantum, waiting, running, seconds = 16, list(lengths)[::-1], [], 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append([assumed("prompt"), waiting.pop()])
        held = sum(have for have, _ in running) * token_bytes
        read_s = (weight_bytes + held) / (d.hbm * MEASURED.get().decode_share(tensor_parallel, len(running)))
        seconds += quantum * max(read_s, weight_bytes * len(running) / (d.flops * assumed("gemm")))
        running = [[have + quantum, left - quantum] for have, left in running if left > quantum]
    return seconds


def mfu(lengths: Sequence[int], cost: Callable[[int], float], seconds: float, gpus: int, d: Device) -> dict[str, float]:
    """Useful FLOPs over what the GPUs could have done in `seconds`, nothing recomputed counted, in two conventions.

    causal: three times the forward's `cost`, 6 N a token and 6 L D n for attention in a sequence of n tokens;
    torchtitan: 12 L D n, as if every token looked at all the others.
    """
    quadratic = (cost(2) - 2 * cost(1)) / 2
    useful = 3 * sum(map(cost, lengths))
    extra = 3 * quadratic * sum(n * n for n in lengths)
    could = seconds * gpus * d.flops
    return {"causal": useful / could, "torchtitan": (useful + extra) / could}


def head_dim(shape: Any) -> int:
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def kv_token_bytes(shape: Any) -> int:
    """Of one token in a bf16 key-value cache: a key and a value per layer and key-value head."""
    return 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_dim(shape)


def step_time(
    c: Config, shape: Any, at: Callable[[int], Numbers], gpus: int, kv_bytes: float, d: Device
) -> dict[str, Any]:
    """Seconds of a step by phase, traffic, tokens/s and MFU.

    Args:
        at: numbers of a pack of T tokens.
        kv_bytes: of an engine's key-value cache on a GPU.
    """
    n, copies, together, r = at(c.parallel.pack_tokens), c.parallel.replicate, c.parallel.sequence, c.rollout
    shards, width = gpus // copies, shape.num_attention_heads * head_dim(shape)
    quadratic = (n["forward_flops_2"] - 2 * n["forward_flops_1"]) / 2
    responses = response_tokens(c)
    sequences = [int(assumed("prompt")) + t - 1 for t in responses]

    def cost(t: int) -> float:
        return (n["forward_flops_1"] - quadratic) * t + quadratic * t * t

    def compute_s(members: Sequence[int]) -> float:
        x = at(max(1, sum(members)))
        calls = 2 * x["attention_forward_calls"] + 5 * x["attention_backward_calls"]
        attention = calls * width * sum(t * t for t in members)
        products = x["gemm_flops"] / assumed("gemm") + attention / together / assumed("attention")
        return products / d.flops + x["moved_bytes"] / (d.hbm * assumed("copy"))

    def traffic_s(kind: str, what: str = "bytes") -> float:
        size, calls = n.get(f"{kind}_{what}", 0.0), n.get(f"{kind}_calls", 0.0) if what == "bytes" else 1
        ranks = copies if kind == "all_reduce" else shards
        return collective_s(kind, size, calls, ranks, kind == "all_reduce" or shards > NODE, d)

    def exchange_s(members: Sequence[int]) -> float:
        """Ulysses: q, k, v and out of every block change hands, forward, backward and where they are computed again."""
        passes = 2 + (c.model.activation_checkpointing != "none")
        size = 4 * 2 * width * shape.num_hidden_layers * sum(members) / together
        return passes * size * (together - 1) / together / (d.nvlink * assumed("collective"))

    train_s = exposed_s = ideal_s = 0.0
    packs = gathers = 0
    size = len(sequences) // c.optim.updates
    for first in range(0, len(sequences), size):
        part = sequences[first : first + size]
        plan = assign(part, c.parallel.pack_tokens, gpus // together, cost)
        for m in range(len(plan[0])):  # collectives keep ranks in step: the slowest pack counts
            work = [compute_s([part[i] for i in rank[m]]) for rank in plan]
            gathered = c.parallel.reshard or m == 0
            kinds = ["reduce_scatter", "all_reduce", *(["all_gather"] if gathered else [])]
            train_s, ideal_s = train_s + max(work), ideal_s + sum(work) / len(work)
            first_and_last = sum(traffic_s(k, "largest") for k in kinds)
            exposed_s += max(first_and_last, sum(map(traffic_s, kinds)) - max(work))
            exposed_s += max(exchange_s([part[i] for i in rank[m]]) for rank in plan)
            packs, gathers = packs + 1, gathers + gathered
    tp = r.tensor_parallel
    token_bytes = kv_token_bytes(shape) / tp
    slots = max(1, min(r.batch_size, int(kv_bytes / token_bytes / (sum(sequences) / len(sequences)))))
    engines = gpus // tp
    shares = [[t for g in range(e, r.problems, engines) for t in responses[g * r.group_size : (g + 1) * r.group_size]]
              for e in range(engines)]  # fmt: skip
    rollout_s = max(decode_s(x, slots, 2 * n["parameters"] / tp, token_bytes, d, tp) for x in shares)
    seconds = {
        "rollout": rollout_s,
        "train compute": train_s,
        "communication not hidden": exposed_s,
        # norm: 4 bytes a weight read; clipping: 8 read and written; AdamW: 16 read, 12 written
        "optimiser": c.optim.updates * 40 * n["parameters"] / shards / (d.hbm * assumed("copy")),
        "sync": collective_s("all_gather", n["sync_bytes"], 1, shards, shards > NODE, d)
        + assumed("sync_passes") * 2 * n["parameters"] / (d.hbm * assumed("copy")),
    }
    learn_s, step_s, tokens = sum(list(seconds.values())[1:4]), sum(seconds.values()), sum(sequences)
    GB = 1e9
    return {
        "seconds": seconds,
        "step_s": step_s,
        "responses": len(responses),
        "tokens": tokens,
        "packs_per_rank": packs,
        "balance": ideal_s / train_s,
        "generated_at_once": slots,
        "tokens_per_s_per_gpu": {"training": tokens / learn_s / gpus, "step": tokens / step_s / gpus},
        "mfu": {"training": mfu(sequences, cost, learn_s, gpus, d), "step": mfu(sequences, cost, step_s, gpus, d)},
        "traffic_gb_per_step": {
            "all-gather": gathers * n.get("all_gather_bytes", 0.0) / GB,
            "reduce-scatter": packs * n.get("reduce_scatter_bytes", 0.0) / GB,
            "all-reduce": packs * n.get("all_reduce_bytes", 0.0) / GB,
            "weight sync's all-gather": n["sync_bytes"] / GB,
        },
    }


# ---------------------------------------------------------------------------------------------------------------- plan


def with_keys(c: Config, model: dict[str, Any], parallel: dict[str, Any]) -> Config:
    return dataclasses.replace(
        c, model=dataclasses.replace(c.model, **model), parallel=dataclasses.replace(c.parallel, **parallel)
    )


def settings() -> tuple[str, ...]:
    """The values of model.activation_checkpointing, from most memory to least."""
    return get_args(get_type_hints(ModelConfig)["activation_checkpointing"])


def plan(c: Config, gpus: int, device: str, measured: Measured | None = None) -> dict[str, Any]:
    """Everything that the command prints, as numbers under names.

    Args:
        measured: what is known of the device in place of ASSUMPTIONS.
    Raises:
        ValueError: an unknown device, a number of GPUs that makes no whole nodes or copies, a model without a known
            shape, or what `lead_fast.checks.check` refuses.
    """
    if device not in DEVICES:
        raise ValueError(f"--device is {device!r}, which is not known: give one of {', '.join(DEVICES)}.")
    if gpus < 1 or (gpus > NODE and gpus % NODE):
        raise ValueError(f"--gpus is {gpus}: give up to {NODE}, or a multiple of {NODE}.")
    copies, together = c.parallel.replicate, c.parallel.sequence
    if c.parallel.offload != "none":
        raise ValueError(f"parallel.offload is {c.parallel.offload}, whose memory is not predicted: plan with none.")
    c = with_keys(c, {"compile": False}, {})
    shared = {"parallel.replicate": copies, "parallel.sequence": together}
    for name, parts in (shared | {"rollout.tensor_parallel": c.rollout.tensor_parallel}).items():
        if parts < 1 or gpus % parts:
            raise ValueError(f"{name} is {parts}, which does not divide {gpus} GPUs: give a divisor of {gpus}.")
    check(c, gpus, device_type="cuda")
    shape, d, r = shape_of(c.model), DEVICES[device], c.rollout
    longest = min(c.data.max_prompt_tokens, shape.max_position_embeddings) + r.max_tokens - 1
    with fake_job(gpus, copies) as ranks, using(measured or Measured()):

        def tracked(x: Config, T: int) -> Numbers:
            per_rank = -(-T // together)
            return track(x, shape, ranks, [per_rank], per_rank)

        def search(x: Config) -> tuple[int, dict[int, Numbers]]:
            return budget(lambda T: tracked(x, T), d.memory_bytes, max(longest, x.parallel.pack_tokens))

        budgets = {s: search(with_keys(c, {"activation_checkpointing": s}, {})) for s in settings()}
        most, seen = budgets[c.model.activation_checkpointing]
        c = with_keys(c, {}, {"pack_tokens": c.parallel.pack_tokens or max(GRANULE, most)})
        worst = max(c.parallel.pack_tokens, longest)
        n = seen.get(worst) or tracked(c, worst)
        low, high = sorted(seen)[0], sorted(seen)[-1]

        def at(T: int) -> Numbers:
            return line((low, seen[low]), (high, seen[high]), T)

        moment, by_kind = peak(n)
        engine_bytes = r.gpu_memory * d.memory_bytes
        weights = 2 * n["parameters"] / r.tensor_parallel
        kv_bytes = engine_bytes - weights - aside("engine_awake")
        trainer = by_kind["parameters"] + by_kind["optimiser"]
        token_bytes = kv_token_bytes(shape) / r.tensor_parallel
        needs = {
            "loading": 4 * n["parameters"] + aside("context"),
            "training": training_bytes(n),
            "generation": trainer * (1 + assumed("fragmentation")) + engine_bytes + aside("context"),
        }
        fits = {k: v <= d.memory_bytes for k, v in needs.items()}
        fits["key-value cache"] = kv_bytes >= longest * token_bytes
        out: dict[str, Any] = {
            "recipe": c.recipe, "model": c.model.path, "parameters": n["parameters"], "gpus": gpus, "device": device,
            "activation_checkpointing": c.model.activation_checkpointing, "reshard": c.parallel.reshard,
            "replicate": copies, "pack_tokens": c.parallel.pack_tokens, "longest_sequence": longest,
            "device_bytes": d.memory_bytes, "training_bytes": by_kind, "training_peak": moment,
            "generation_bytes": {"parameters and optimiser": trainer, "engine's weights": weights,
                                 "engine beside them": aside("engine_awake"), "key-value cache": kv_bytes},
            "kv_tokens": kv_bytes / token_bytes, "kv_token_bytes": token_bytes,
            "needs_bytes": needs, "fits": fits, "largest_pack_tokens": {s: b for s, (b, _) in budgets.items()},
            "traffic_calls_per_pack": {k: n.get(f"{k}_calls", 0.0) for k in COLLECTIVES.values()},
        }  # fmt: skip
        out |= step_time(c, shape, at, gpus, max(kv_bytes, 0.0), d)
        known = MEASURED.get()
        out["measured"] = {k: list(v) for k, v in known.rates.items() if k != "decode"}
        if points := known.decode.get(r.tensor_parallel):
            shares = ", ".join(f"{share:.2f} at {n}" for n, share in points)
            out["measured"]["decode"] = [points[-1][1], f"measured at tensor parallel {r.tensor_parallel}: {shares}"]
        out["assumptions"] = {k: list(v) for k, v in ASSUMPTIONS.items() if k not in out["measured"]}
        out["measured_on"] = known.sources
        out["remedy"] = None if all(fits.values()) else remedy(c, out, longest, search)
    return out


def remedy(
    c: Config, out: dict[str, Any], longest: int, search: Callable[[Config], tuple[int, dict[int, Numbers]]]
) -> str:
    """One sentence: the key and the value to change so that it fits."""
    fits, d = out["fits"], DEVICES[out["device"]]
    if not fits["loading"]:
        return (
            f"Give a --device with more memory than {out['device']}: loading puts the whole model in float32 on each."
        )
    if not fits["training"]:
        options = list(out["largest_pack_tokens"])
        options = options[options.index(c.model.activation_checkpointing) :]
        for reshard in dict.fromkeys((c.parallel.reshard, True)):
            for kept in options:
                x = with_keys(c, {"activation_checkpointing": kept}, {"reshard": reshard})
                same = reshard == c.parallel.reshard
                most = out["largest_pack_tokens"][kept] if same else search(x)[0]
                if most < longest:
                    continue
                words = {f"--model.activation_checkpointing={kept}": kept != c.model.activation_checkpointing}
                words |= {
                    "--parallel.reshard=true": not same,
                    f"--parallel.pack_tokens={most}": most < c.parallel.pack_tokens,
                }
                return f"Training does not fit: give {' '.join(w for w, needed in words.items() if needed)}."
        state = sum(out["training_bytes"][k] for k in ("parameters", "optimiser"))
        return (
            f"Training does not fit in any setting: give --gpus={NODE * -(-2 * out['gpus'] // NODE)}, which at least "
            f"halves the {state / GIB:.0f} GiB of parameters and optimiser on each, or a smaller --rollout.max_tokens."
        )
    spare = d.memory_bytes - (out["needs_bytes"]["generation"] - c.rollout.gpu_memory * d.memory_bytes)
    most = math.floor(20 * spare / d.memory_bytes) / 20
    room = most * d.memory_bytes - aside("engine_awake") - longest * out["kv_token_bytes"]
    if room >= out["generation_bytes"]["engine's weights"]:
        return f"Generation does not fit: give --rollout.gpu_memory={most:g}."
    return (
        "Generation does not fit: the engine's weights and one response need more than the trainer leaves; give "
        f"--rollout.engine=vllm --rollout.tensor_parallel={2 * c.rollout.tensor_parallel}."
    )


def table(rows: dict[str, float], unit: float = GIB, digits: int = 1) -> str:
    return "".join(f"    {name:28}{value / unit:10.{digits}f}\n" for name, value in rows.items())


def show(p: dict[str, Any]) -> str:
    """The plan as text."""
    g, t, f = p["generation_bytes"], p["tokens_per_s_per_gpu"], p["mfu"]

    def verdict(name: str) -> str:
        return f"{p['needs_bytes'][name] / GIB:.1f} GiB, {'fits' if p['fits'][name] else 'DOES NOT FIT'}"

    budgets = ", ".join(f"{k}: {v or 'none'}" for k, v in p["largest_pack_tokens"].items())
    calls = ", ".join(f"{v:.0f} {k}" for k, v in p["traffic_calls_per_pack"].items() if v)
    lines = [
        f"{p['recipe']}: {p['model']}, {p['parameters'] / 1e9:.2f} billion parameters, on {p['gpus']} x {p['device']} "
        f"of {p['device_bytes'] / GIB:.1f} GiB (predicted, not measured)",
        f"  activation checkpointing {p['activation_checkpointing']}, reshard {str(p['reshard']).lower()}, replicate "
        f"{p['replicate']}, packs of {p['pack_tokens']} tokens, longest sequence {p['longest_sequence']}",
        f"\nMemory of a GPU in training, GiB, at its peak ({p['training_peak']}):",
        table(p["training_bytes"]) + table({"sum": sum(p["training_bytes"].values())}),
        "Memory of a GPU while it generates, GiB (gradients and gathered parameters are gone, the engine is awake):",
        table(g) + table({"sum": sum(g.values())}) + f"    a cache of {max(0, p['kv_tokens']):,.0f} tokens"
        + ("" if p["fits"]["key-value cache"] else ", LESS THAN ONE RESPONSE"),
        "\nWith the allocator's loss, CUDA and a sleeping engine:",
        *(f"    {name:28}{verdict(name)}" for name in p["needs_bytes"]),
        f"\nLargest parallel.pack_tokens by activation checkpointing: {budgets}",
        f"\nTraffic of a GPU in a step, GB ({p['packs_per_rank']} packs per rank; first pack: {calls}):",
        table(p["traffic_gb_per_step"], 1.0),
        f"Seconds of a step of {p['responses']} responses, {p['tokens']:,} tokens:",
        table(p["seconds"], 1.0, 2) + table({"step": p["step_s"]}, 1.0, 2),
        f"    tokens/s per GPU: {t['training']:,.0f} in training (without rollout and sync), {t['step']:,.0f} in all",
        f"    MFU in training: {100 * f['training']['causal']:.1f} % (causal attention), "
        f"{100 * f['training']['torchtitan']:.1f} % (torchtitan's); over the step {100 * f['step']['causal']:.1f} %",
        f"    balance of the ranks {100 * p['balance']:.1f} %, {p['generated_at_once']} responses at once per engine",
        "\nMeasured:" if p["measured"] else f"\nMeasured: nothing; bench/results has no gpu-{p['device']} files, which "
        "make gpu writes.",
        *(f"    {k:16}{value:<8.3g}{why}" for k, (value, why) in p["measured"].items()),
        *(f"    from {file}, {of}" for file, of in p["measured_on"].items()),
        "\nStill assumed:" if p["measured"] else "\nAssumptions:",
        *(f"    {k:16}{value:<8g}{why}" for k, (value, why) in p["assumptions"].items()),
        "\nIt fits." if p["remedy"] is None else f"\nIt does not fit. {p['remedy']}",
    ]  # fmt: skip
    return "\n".join(lines)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lead_fast.plan", description="Memory, traffic and time of a run that has no GPU yet.", allow_abbrev=False,
        epilog="Any key of the configuration may follow; python -m lead_fast.train --help lists them.",
    )  # fmt: skip
    parser.add_argument("--gpus", default="8", help=f"how many in all, in nodes of {NODE}")
    parser.add_argument("--device", default="h100", help=", ".join(DEVICES))
    parser.add_argument("--measured", type=Path, nargs="+", help="results of bench/gpu.py; default: the device's in "
                        "bench/results")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    given, rest = parser.parse_known_args(args)
    if not given.gpus.isdecimal():
        raise ValueError(f"--gpus is {given.gpus!r}: give a number.")
    c = load_config(rest, default_recipe="lead-14b")
    if given.json and not given.json.absolute().parent.is_dir():
        raise ValueError(f"--json {given.json}: give a path in a folder that exists.")
    gpus = int(given.gpus)
    c, fitted = fit_engine(c, rest, gpus, min(gpus, NODE), "cuda") if gpus else (c, [])
    if given.device in DEVICES:
        files = given.measured or sorted(RESULTS.glob(f"gpu-{given.device}-[0-9]-*.json"))
        measured = read_measured(files, given.device)
    else:
        measured = None  # refused by plan
    planned = plan(c, gpus, given.device, measured)
    print("".join(f"Recipe {c.recipe}: {sentence}.\n" for sentence in fitted) + show(planned))
    if given.json:
        write_atomic(given.json, json.dumps(planned, indent=1) + "\n")
    return int(planned["remedy"] is not None)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as e:
        sys.exit(f"error: {e}")
