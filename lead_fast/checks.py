"""Checks of a configuration that need no model: ranges of values, and combinations that cannot work."""

import dataclasses
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from .cli import named_keys, ranges, wanted
from .config import Config, ModelConfig, ParallelConfig, RolloutConfig, SftConfig
from .reward.function import split_name

NEVER_EMPTY = ("model.path", "data.train", "data.test", "data.problem_column", "data.reference_column",
               "solution_column")  # fmt: skip


def chosen_engine(c: Config, device_type: str) -> str:
    """Resolve rollout.engine for device type "cuda" or "cpu": `auto` is vLLM on a GPU, whether installed or not."""
    if c.rollout.engine == "auto":
        return "vllm" if device_type == "cuda" else "transformers"
    return c.rollout.engine


def quantized(c: Config) -> bool:
    """Whether rollouts use rounded weights or a rounded cache, and so sample from another policy than the trainer's."""
    return c.rollout.quantization != "none" or c.rollout.kv_dtype != "auto"


IMPORTANCE_CAP = 2.0


def fit_quantized(c: Config, args: list[str]) -> tuple[Config, list[str]]:
    """With quantised rollouts, weight tokens by policy / engine up to IMPORTANCE_CAP, unless `args` say otherwise.

    The ratio's denominator is then the policy itself (with several updates, a pass before them): if it held the
    engine's log-probs, the importance weight would always be 1.

    Returns:
        the configuration, and sentences (without full stops) that say what was changed.
    """
    if not quantized(c):
        return c, []
    given = named_keys(args)
    changes: dict[str, Any] = {}
    if c.loss.importance_cap is None and "loss.importance_cap" not in given:
        changes |= {"importance_cap": IMPORTANCE_CAP, "importance_level": "token", "importance_mode": "truncate"}
    if c.loss.old_logprobs == "engine" and "loss.old_logprobs" not in given:
        changes["old_logprobs"] = "current" if c.optim.updates == 1 else "recompute"
    said = ", ".join(f"loss.{key} {value}" for key, value in changes.items())
    reasons = [f"{said}, because the rollout is quantised"] if changes else []
    return dataclasses.replace(c, loss=dataclasses.replace(c.loss, **changes)), reasons


def responses_at_once(r: RolloutConfig, ranks: int) -> int:
    """Responses that an engine generates at once: rollout.batch_size, or with 0 the engine's full part of a step."""
    engines = max(1, ranks // r.tensor_parallel)
    return r.batch_size or -(-(r.problems + r.extra_problems) // engines) * r.group_size


def check_values(c: Config | SftConfig) -> None:
    """Refuse numbers outside their ranges (NaN and infinity always are), empty text, and an `output` that is a file.

    Raises:
        ValueError: one sentence that names key, value and range.
    """
    for key, allowed in ranges(type(c)).items():
        value = attrgetter(key)(c)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(x is None or x in allowed for x in numbers):
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{key} is {shown}: give {wanted(key, type(c))}.")
    for key in NEVER_EMPTY:
        owner, _, name = key.rpartition(".")
        section = getattr(c, owner) if owner else c
        if not getattr(section, name, "absent").strip():
            raise ValueError(f"{key} is empty: --help lists its values.")
    check_folder("output", c.output or "runs")


def check_folder(key: str, folder: str | Path) -> None:
    """Refuse a path that is not a folder, or one that cannot be created or written to.

    Raises:
        ValueError: one sentence that begins with `key`.
    """
    path = Path(folder).absolute()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not there.is_dir():
        what = "is a file" if there.exists() else "is a broken link"
        raise ValueError(f"{key} is {folder} and {there} {what}: give the path of a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key} is {folder} and {there} is not writable: give another folder.")


def check(c: Config, world: int, *, trains: bool = True, device_type: str = "cpu") -> None:
    """Refuse combinations of values that cannot work, before any model is loaded.

    Args:
        c: the configuration.
        world: number of ranks.
        trains: whether ranks share a step's problems and packs; in an evaluation, engines take prompts as they drain.
        device_type: "cuda" or "cpu", the device that the ranks compute on.
    Raises:
        ValueError: one sentence that names the value and the remedy.
    """
    check_values(c)
    r, a = c.rollout, c.advantage
    check_parallel(c.model, c.parallel)
    by_sequence = c.loss.ratio == "sequence" or (
        c.loss.importance_cap is not None and c.loss.importance_level == "sequence"
    )
    if c.loss.sparse_head and c.model.freeze_head:
        raise ValueError(
            "loss.sparse_head is true with model.freeze_head, whose head gets no gradient: set only one of the two."
        )
    if c.loss.dropped_mass and c.loss.entropy_coef:
        raise ValueError(
            f"loss.dropped_mass is {c.loss.dropped_mass} with loss.entropy_coef {c.loss.entropy_coef}, whose gradient "
            "is always computed in full: set only one of the two."
        )
    if c.parallel.sequence > 1 and by_sequence:
        raise ValueError(
            f"parallel.sequence is {c.parallel.sequence} with a ratio or importance weight per sequence, which needs "
            "all its tokens on one rank: give --parallel.sequence=1, or weights per token."
        )
    if trains and r.problems % world:
        raise ValueError(
            f"rollout.problems is {r.problems}, which {world} ranks cannot divide evenly: give a multiple of {world}."
        )
    if r.problems % c.optim.updates:
        raise ValueError(
            f"rollout.problems is {r.problems}: it must be a multiple of optim.updates ({c.optim.updates})."
        )
    if r.group_size == 1 and a.std != "none":
        raise ValueError(
            f"rollout.group_size is 1 and advantage.std is {a.std}: a single response has no standard deviation; "
            "give a group size of 2 or more, or --advantage.std=none."
        )
    if r.refill and a.group_filter == "none":
        raise ValueError(
            f"rollout.refill is {r.refill} and advantage.group_filter {a.group_filter}, which drops no groups: "
            "give --rollout.refill=0, or --advantage.group_filter=uniform."
        )
    if not all(r.stop):
        raise ValueError(f"rollout.stop is {list(r.stop)}: an empty string would end every response; leave it out.")
    if 0 < c.evaluate.temperature < 0.01:  # vLLM would sample at 0.01; transformers would divide by almost 0
        raise ValueError(f"evaluate.temperature is {c.evaluate.temperature}: give 0 (greedy), or 0.01 or more.")
    if c.reward.overlong_buffer > r.max_tokens:
        raise ValueError(
            f"reward.overlong_buffer is {c.reward.overlong_buffer} and rollout.max_tokens {r.max_tokens}: "
            "give a buffer no longer than that limit."
        )
    if trains and c.reward.function:
        check_function(c)
    if world % r.tensor_parallel:
        raise ValueError(
            f"rollout.tensor_parallel is {r.tensor_parallel}, which does not divide {world} ranks: "
            f"give a divisor of {world}."
        )
    if chosen_engine(c, device_type) != "vllm" and (r.tensor_parallel > 1 or r.extra_problems):
        raise ValueError(
            f"rollout.tensor_parallel is {r.tensor_parallel} and extra_problems {r.extra_problems}, "
            "which only vLLM supports: give --rollout.engine=vllm."
        )
    check_speculation(c, chosen_engine(c, device_type))
    if chosen_engine(c, device_type) != "vllm" and quantized(c):
        raise ValueError(
            f"rollout.quantization is {r.quantization} and kv_dtype {r.kv_dtype}, which only vLLM supports: give "
            "--rollout.engine=vllm, or --rollout.quantization=none and --rollout.kv_dtype=auto."
        )
    if trains and quantized(c) and (c.loss.importance_cap is None or c.loss.old_logprobs == "engine"):
        raise ValueError(
            f"rollout.quantization is {r.quantization} and kv_dtype {r.kv_dtype} with loss.importance_cap="
            f"{'none' if c.loss.importance_cap is None else c.loss.importance_cap} and loss.old_logprobs="
            f"{c.loss.old_logprobs}: quantised rollouts come from another policy and need importance weights; omit "
            "both options, or give a cap (2) and --loss.old_logprobs=current or recompute."
        )
    if r.extra_problems > r.problems * r.max_age:
        raise ValueError(
            f"rollout.extra_problems is {r.extra_problems}, more than {r.max_age} steps of {r.problems} problems can "
            f"train on: give at most {r.problems * r.max_age}, or a higher rollout.max_age."
        )
    if trains and a.length_guard and not c.evaluate.every:
        raise ValueError(
            f"advantage.length_guard is {a.length_guard} and evaluate.every 0: the guard needs held-out accuracy; "
            "give --evaluate.every=STEPS, or --advantage.length_guard=0."
        )
    if c.optim.updates > 1 and c.loss.old_logprobs == "current":
        raise ValueError(
            f"optim.updates is {c.optim.updates} with loss.old_logprobs=current: later updates need the ratio; "
            "give --loss.old_logprobs=engine or recompute."
        )


def check_speculation(c: Config, engine: str) -> None:
    """Refuse a drafter that the engine does not support, lacks or does not need. Raises ValueError."""
    s, key = c.rollout.speculative, "rollout.speculative"
    if s.method == "none":
        if s.model:
            raise ValueError(f"{key}.model is {s.model} and {key}.method none: give a method, or no model.")
        return
    if engine != "vllm":
        raise ValueError(f"{key}.method is {s.method}, which only vLLM supports: give --rollout.engine=vllm, or none.")
    own = s.method in ("ngram", "mtp")
    if own and s.model:
        raise ValueError(f"{key}.model is {s.model}, but {s.method} drafts without a second model: leave it out.")
    if not own and not s.model:
        raise ValueError(f"{key}.model is empty: {s.method} needs the path or hub name of a drafter.")
    if c.rollout.min_p:
        raise ValueError(
            f"rollout.min_p is {c.rollout.min_p} with {key}.method={s.method}: vLLM cannot verify under min_p; give "
            f"--rollout.min_p=0, or --{key}.method=none."
        )


def check_function(c: Config) -> None:
    """Refuse a reward function that does not exist, and rewards that mode `replace` would silently ignore.

    Raises:
        ValueError: one sentence.
    """
    split_name(c.reward.function)
    for name in ("truncated", "degenerate", "repetition") if c.reward.mode == "replace" else ():
        if getattr(c.reward, name) is not None:
            raise ValueError(
                f"reward.{name} is {getattr(c.reward, name)} with reward.mode=replace, where the function's value is "
                f"every response's reward: give --reward.{name}=none, or --reward.mode=add."
            )


def check_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse layouts that cannot work for RL or SFT. Raises ValueError."""
    if parallel.offload in ("activations", "both") and model.activation_checkpointing != "full":
        raise ValueError(
            f"parallel.offload is {parallel.offload} with model.activation_checkpointing="
            f"{model.activation_checkpointing}: it moves the block inputs that full checkpointing keeps; give full."
        )
    if model.compile and model.activation_checkpointing == "selective":
        raise ValueError(
            "model.compile is true with model.activation_checkpointing=selective, which must see single operations: "
            "give full or none."
        )


def check_sft(c: SftConfig) -> None:
    """Refuse values of SFT's configuration that cannot work, before a model is loaded. Raises ValueError."""
    check_values(c)
    if c.from_scratch and c.model.path != "tiny":
        raise ValueError(
            f"from_scratch is true and model.path {c.model.path}: random weights exist only for the embedded model's "
            "architecture; give --from_scratch=false to train that model, or --model.path=tiny."
        )
    check_parallel(c.model, c.parallel)
