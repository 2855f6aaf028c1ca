"""Predict a run's memory by kind, traffic, seconds and MFU before any GPU is bought.

    python -m lead_fast.plan --recipe lead-14b --gpus 8 --device h200 [--measured FILE ...] [--section.key=value ...]

Memory, traffic and work come from the trainer itself, run without memory (learner/fake_step.py) on a pack of
parallel.pack_tokens or of the longest sequence, whichever is larger. The rollout is simulated (planner/rollout.py).
Seconds are computed from one table, planner/assumptions.py; results of bench/gpu.py on the device replace its entries
where they exist. The same table predicts published numbers, and the errors are printed. Training and generation never
run at the same time: vLLM sleeps (level 2) while the policy trains. If a run does not fit, the command says what to
change and exits with code 1. Not counted: grading, evaluation, checkpoints, a reference model (loss.kl_coef), a pass
that recomputes old log-probs, and what is saved by computing a shared prompt once (in float32 only). model.compile is
credited with the same gain as model.liger. Ranks that share a pack (parallel.sequence) each hold and compute a part of
it.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from .checks import check, responses_at_once
from .cli import load_config
from .config import Config, ModelConfig
from .learner.checkpoint import write_atomic
from .learner.fake_step import COLLECTIVES, Numbers, fake_job, track
from .machine import fit_engine
from .planner.assumptions import (
    ASSUMPTIONS,
    DEVICES,
    MEASURED,
    NODE,
    Device,
    Measured,
    assumed,
    assumed_bytes,
    read_measured,
    using,
)
from .planner.ladder import Generation, Rung, Setting, ladder
from .planner.memory import GRANULE, interpolated, largest_pack, peak, training_bytes
from .planner.published import published, worst
from .planner.rollout import Job, RolloutTime, eagle
from .planner.shapes import ModelSize, shape_of
from .planner.show import show
from .planner.training import TrainingTime, other_seconds_ratio, sync_s, training_time
from .runtime.hardware import GIB

RESULTS = Path(__file__).parents[1] / "bench" / "results"  # in a checkout; a wheel has none
GOALS = {"h200": 120.0, "h100": 140.0}  # seconds per step of lead-14b on 8 GPUs
LADDER_DEVICES = ("h200", "h100")
SHOWN = 4  # engine settings to print


def with_keys(c: Config, model: dict[str, Any], parallel: dict[str, Any]) -> Config:
    """The configuration with keys of its model and parallel sections replaced."""
    return dataclasses.replace(
        c, model=dataclasses.replace(c.model, **model), parallel=dataclasses.replace(c.parallel, **parallel)
    )


def checkpointing_settings() -> tuple[str, ...]:
    """The values of model.activation_checkpointing, from the most memory to the least."""
    return get_args(get_type_hints(ModelConfig)["activation_checkpointing"])


def check_plan(c: Config, gpus: int, device: str) -> None:
    """Refuse configurations that cannot be planned. Raises ValueError, one sentence."""
    if device not in DEVICES:
        raise ValueError(f"--device is {device!r}, an unknown device: give one of {', '.join(DEVICES)}.")
    if gpus < 1 or (gpus > NODE and gpus % NODE):
        raise ValueError(f"--gpus is {gpus}: give up to {NODE}, or a multiple of {NODE}.")
    if c.parallel.offload != "none":
        raise ValueError(f"parallel.offload is {c.parallel.offload}, whose memory cannot be predicted: give none.")
    parts = {"parallel.replicate": c.parallel.replicate, "parallel.sequence": c.parallel.sequence}
    for name, count in (parts | {"rollout.tensor_parallel": c.rollout.tensor_parallel}).items():
        if count < 1 or gpus % count:
            raise ValueError(f"{name} is {count}, which does not divide {gpus} GPUs: give a divisor of {gpus}.")
    check(c, gpus, device_type="cuda")


class Planner:
    """A configuration on a number of GPUs of one device, with the tracked numbers of its packs.

    Args:
        shape: the model's configuration.
        track: returns the numbers of a pack of T tokens under the configuration's checkpointing and resharding.
    """

    def __init__(self, c: Config, shape: Any, gpus: int, device: str, track: Callable[[Config, int], Numbers]):
        self.c, self.shape, self.gpus, self.device, self.d = c, shape, gpus, device, DEVICES[device]
        self.longest = min(c.data.max_prompt_tokens, shape.max_position_embeddings) + c.rollout.max_tokens - 1
        self._track, self._known = track, {}
        self.packs = {s: self.largest_pack(with_keys(c, {"activation_checkpointing": s}, {}))
                      for s in checkpointing_settings()}  # fmt: skip
        fits, tracked = self.packs[c.model.activation_checkpointing]
        self.c = with_keys(c, {}, {"pack_tokens": c.parallel.pack_tokens or max(GRANULE, fits)})
        self.largest = max(self.c.parallel.pack_tokens, self.longest)
        self.numbers = tracked.get(self.largest) or self.tracked(self.c, self.largest)
        self.size = ModelSize.of(shape, self.numbers["parameters"])

    def tracked(self, c: Config, tokens: int) -> Numbers:
        """Numbers of a pack, tracked once and cached."""
        key = c.model.activation_checkpointing, c.parallel.reshard, tokens
        if key not in self._known:
            self._known[key] = self._track(c, tokens)
        return self._known[key]

    def largest_pack(self, c: Config) -> tuple[int, dict[int, Numbers]]:
        """The largest pack that fits the device, and the numbers tracked to find it."""
        guess = max(self.longest, c.parallel.pack_tokens)
        return largest_pack(lambda T: self.tracked(c, T), self.d.memory_bytes, guess)

    @property
    def trainer_bytes(self) -> float:
        """Bytes of GPU memory that the trainer keeps while the engine generates."""
        kinds = peak(self.numbers)[1]
        return (kinds["parameters"] + kinds["optimiser"]) * (1 + assumed("fragmentation")) + assumed_bytes("context")

    def generation(self, d: Device, plain: bool = False) -> Generation:
        """The generation setup on such GPUs: as configured, or without any of the mechanisms (`plain`)."""
        r = self.c.rollout
        extra, max_age = (0, None) if plain else (r.extra_problems, getattr(r, "max_age", None))
        job = Job(r.problems, r.group_size, r.max_tokens, extra, max_age)
        g = Generation(self.size, d, self.gpus, job, self.shape.num_attention_heads,
                       d.memory_bytes - self.trainer_bytes, self.longest)  # fmt: skip
        if plain:
            return g
        speculates = getattr(getattr(r, "speculative", None), "method", "none") != "none"
        return dataclasses.replace(
            g,
            fp8_weights=getattr(r, "quantization", "none") != "none",
            fp8_cache=getattr(r, "kv_dtype", "auto") != "auto",
            drafter=eagle(self.size, assumed("accepted")) if speculates else None,
        )

    @property
    def setting(self) -> Setting:
        """The engine settings as configured."""
        r = self.c.rollout
        return Setting(r.tensor_parallel, r.batch_size or responses_at_once(r, self.gpus), r.gpu_memory)

    def training(self, checkpointing: str, d: Device) -> TrainingTime:
        """Seconds of the training half on such GPUs, for one fixed draw of responses."""
        c, r = with_keys(self.c, {"activation_checkpointing": checkpointing}, {}), self.c.rollout
        lengths = Job(r.problems, r.group_size, r.max_tokens).lengths(r.problems, np.random.default_rng(0)).ravel()
        sequences = [int(assumed("prompt") + t) - 1 for t in lengths]
        return training_time(c, self.shape, interpolated(self.packs[checkpointing][1]), self.gpus, sequences, d)

    def best_checkpointing(self, d: Device) -> str:
        """The checkpointing that keeps most activations while the largest pack fits; as configured if none does."""
        for s, (_, tracked) in self.packs.items():
            if training_bytes(interpolated(tracked)(self.largest)) <= d.memory_bytes:
                return s
        return self.c.model.activation_checkpointing

    def ladder(self, d: Device) -> list[Rung]:
        """The rungs on such GPUs; empty if the trainer does not fit."""
        kept = self.c.model.activation_checkpointing
        if training_bytes(interpolated(self.packs[kept][1])(self.largest)) > d.memory_bytes:
            return []
        most = self.best_checkpointing(d)
        as_configured, best = (self._by_tokens(s, d) for s in (kept, most))
        sync = sync_s(self.numbers, self.gpus // self.c.parallel.replicate, d)
        plain = self.generation(d, plain=True)
        today = Setting(1, plain.share(1), self.c.rollout.gpu_memory)
        return ladder(plain, today, as_configured, best if most != kept else as_configured, sync,
                      f"+ checkpointing {most}")  # fmt: skip

    def _by_tokens(self, checkpointing: str, d: Device) -> Callable[[float], float]:
        t = self.training(checkpointing, d)
        return lambda tokens: t.total_s * tokens / t.tokens


def plan(c: Config, gpus: int, device: str, measured: Measured | None = None) -> dict[str, Any]:
    """Compute everything that the command prints, as numbers under names.

    Args:
        measured: measurements of the device, in place of ASSUMPTIONS.
    Raises:
        ValueError: an unknown device, a number of GPUs that does not fill its nodes or copies, a model of unknown
            shape, or a configuration that `lead_fast.checks.check` refuses.
    """
    check_plan(c, gpus, device)
    c = with_keys(c, {"compile": False, "liger": c.model.liger or c.model.compile}, {})
    shape, together = shape_of(c.model), c.parallel.sequence
    with fake_job(gpus, c.parallel.replicate) as ranks, using(measured or Measured()):

        def tracked(x: Config, tokens: int) -> Numbers:
            per_rank = -(-tokens // together)
            return track(x, shape, ranks, [per_rank], per_rank)

        p = Planner(c, shape, gpus, device, tracked)
        out = memory_of(p)
        out |= time_of(p, out["fits"]["key-value cache"])
        out["ladder"] = {}
        for name in dict.fromkeys((device, *LADDER_DEVICES)):
            with using(MEASURED.get() if name == device else Measured()):
                out["ladder"][name] = [dataclasses.asdict(rung) for rung in p.ladder(DEVICES[name])]
        rows = published()
        out["published"] = [dataclasses.asdict(row) | {"error": row.error} for row in rows]
        out["worst"] = {kind: worst(rows, kind) for kind in ("rollout", "training")}
        out["goals"] = GOALS if gpus == 8 and p.size.layers == 48 and c.rollout.max_tokens == 14336 else {}
        out |= measured_of(c.rollout.tensor_parallel)
        out["remedy"] = None if all(out["fits"].values()) else remedy(p, out)
    return out


def memory_of(p: Planner) -> dict[str, Any]:
    """The plan's numbers on memory, and whether each phase fits."""
    c, r, n, d = p.c, p.c.rollout, p.numbers, p.d
    highest, kinds = peak(n)
    engine_bytes = r.gpu_memory * d.memory_bytes
    engine = p.generation(d).engine(p.setting)
    weights = engine.weight_bytes + 2 * p.size.head / r.tensor_parallel
    drafter = engine.drafter.bytes / r.tensor_parallel if engine.drafter else 0.0
    cache = engine_bytes - weights - drafter - assumed_bytes("engine_awake")
    token_bytes = engine.cache_token_bytes / r.tensor_parallel
    needs = {
        "loading": 4 * n["parameters"] + assumed_bytes("context"),
        "training": training_bytes(n),
        "generation": p.trainer_bytes + engine_bytes,
    }
    fits = {k: v <= d.memory_bytes for k, v in needs.items()}
    fits["key-value cache"] = cache >= p.longest * token_bytes
    generation = {"parameters and optimiser": kinds["parameters"] + kinds["optimiser"], "engine's weights": weights,
                  "engine beside them": assumed_bytes("engine_awake") + drafter, "key-value cache": cache}  # fmt: skip
    return {
        "recipe": c.recipe, "model": c.model.path, "parameters": n["parameters"], "gpus": p.gpus, "device": p.device,
        "activation_checkpointing": c.model.activation_checkpointing, "reshard": c.parallel.reshard,
        "replicate": c.parallel.replicate, "pack_tokens": c.parallel.pack_tokens, "longest_sequence": p.longest,
        "device_bytes": d.memory_bytes, "training_bytes": kinds, "training_peak": highest,
        "generation_bytes": generation, "kv_tokens": cache / token_bytes, "kv_token_bytes": token_bytes,
        "needs_bytes": needs, "fits": fits, "largest_pack_tokens": {s: most for s, (most, _) in p.packs.items()},
        "traffic_calls_per_pack": {k: n.get(f"{k}_calls", 0.0) for k in COLLECTIVES.values()},
    }  # fmt: skip


def time_of(p: Planner, generates: bool) -> dict[str, Any]:
    """The plan's numbers on time: phases of a step, rates, and the best engine settings that the search found.

    Args:
        generates: whether the configured cache holds the longest sequence; if not, the best setting replaces it.
    """
    g, t = p.generation(p.d), p.training(p.c.model.activation_checkpointing, p.d)
    settings = g.search(p.setting)
    rollout = g.time(p.setting) if generates else None
    rollout = rollout or (settings[0][1] if settings else RolloutTime(math.inf, 0.0, t.tokens, 0.0))
    scale = rollout.tokens / t.tokens
    sync = sync_s(p.numbers, p.gpus // p.c.parallel.replicate, p.d)
    seconds = {"rollout": rollout.seconds, **{k: scale * v for k, v in t.seconds.items()}, "sync": sync}
    step_s, learn_s = sum(seconds.values()), scale * t.total_s
    fused = p.c.model.liger
    other = t.compute.other / t.compute.seconds
    ratio = other_seconds_ratio(p.size, p.c.model.activation_checkpointing != "none", t, p.gpus, p.d, fused)
    return {
        "seconds": seconds, "step_s": step_s, "responses": p.c.rollout.problems * p.c.rollout.group_size,
        "tokens": rollout.tokens, "packs_per_rank": t.packs, "balance": t.balance,
        "rollout_twice_s": rollout.slower(2), "staleness": [rollout.staleness, rollout.stalest],
        "preemptions": rollout.preemptions,
        "tokens_per_s_per_gpu": {k: rollout.tokens / s / p.gpus for k, s in (("training", learn_s), ("step", step_s))},
        "mfu": {"training": t.mfu, "step": {k: v * learn_s / step_s for k, v in t.mfu.items()}},
        "other_share": {"as configured": other, "fused": other if fused else ratio, "torch": ratio if fused else other},
        "fused": fused,
        "settings": [dataclasses.asdict(s) | {"seconds": x.seconds, "configured": s == p.setting}
                     for s, x in settings[:SHOWN]],
        "traffic_gb_per_step": t.traffic_gb | {"weight sync's all-gather": p.numbers["sync_bytes"] / 1e9},
    }  # fmt: skip


def measured_of(tensor_parallel: int) -> dict[str, Any]:
    """What was measured on the device, and what is still assumed."""
    known = MEASURED.get()
    out = {k: list(v) for k, v in known.rates.items()}
    if points := known.iterations.get(tensor_parallel):
        text = ", ".join(f"{1e3 * seconds:.1f} ms at {n}" for n, _, seconds in points)
        out["iteration"] = [points[-1][2], f"measured at tensor parallel {tensor_parallel}: {text} sequences"]
    assumptions = {k: list(v) for k, v in ASSUMPTIONS.items() if k not in out}
    return {"measured": out, "assumptions": assumptions, "measured_on": known.sources}


def remedy(p: Planner, out: dict[str, Any]) -> str:
    """One sentence that names the keys to change, with the values at which the run fits."""
    c, fits, d = p.c, out["fits"], p.d
    if not fits["loading"]:
        return f"Give a --device with more memory than {p.device}: loading puts the whole model in float32 on each."
    if not fits["training"]:
        options = list(p.packs)
        options = options[options.index(c.model.activation_checkpointing) :]
        for reshard in dict.fromkeys((c.parallel.reshard, True)):
            for kept in options:
                same = reshard == c.parallel.reshard
                x = with_keys(c, {"activation_checkpointing": kept}, {"reshard": reshard})
                most = p.packs[kept][0] if same else p.largest_pack(x)[0]
                if most < p.longest:
                    continue
                keys = {f"--model.activation_checkpointing={kept}": kept != c.model.activation_checkpointing}
                keys |= {
                    "--parallel.reshard=true": not same,
                    f"--parallel.pack_tokens={most}": most < c.parallel.pack_tokens,
                }
                return f"Training does not fit: give {' '.join(key for key, needed in keys.items() if needed)}."
        state = sum(out["training_bytes"][k] for k in ("parameters", "optimiser"))
        return (
            f"Training does not fit with any setting: give --gpus={NODE * -(-2 * p.gpus // NODE)}, which at least "
            f"halves the {state / GIB:.0f} GiB of parameters and optimiser on each, or a smaller --rollout.max_tokens."
        )
    most = math.floor(20 * (d.memory_bytes - p.trainer_bytes) / d.memory_bytes) / 20
    held = out["generation_bytes"]["engine's weights"] + out["generation_bytes"]["engine beside them"]
    if most * d.memory_bytes - held >= p.longest * out["kv_token_bytes"]:
        return f"Generation does not fit: give --rollout.gpu_memory={most:g}."
    return (
        "Generation does not fit: the engine's weights and one response need more than the trainer leaves; give "
        f"--rollout.engine=vllm --rollout.tensor_parallel={2 * c.rollout.tensor_parallel}."
    )


def main(args: list[str] | None = None) -> int:
    """Print the plan of a configuration; returns 1 if it does not fit."""
    parser = argparse.ArgumentParser(
        prog="lead_fast.plan", description="Predict memory, traffic and seconds of a planned run.", allow_abbrev=False,
        epilog="Any key of the configuration may follow; python -m lead_fast.train --help lists them.",
    )  # fmt: skip
    parser.add_argument("--gpus", default="8", help=f"number of GPUs in total, in nodes of {NODE}")
    parser.add_argument("--device", default="h100", help=", ".join(DEVICES))
    parser.add_argument("--measured", type=Path, nargs="+", help="results of bench/gpu.py; default: the device's in "
                        "bench/results")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
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
        measured = None  # plan() refuses the device
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
