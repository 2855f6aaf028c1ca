"""What can be known wrong in a configuration before any model is loaded: ranges and combinations."""

from .config import Config, ModelConfig, OptimConfig, ParallelConfig, SftConfig


def chosen_engine(c: Config, device_type: str) -> str:
    """The engine that rollout.engine means on "cuda" or "cpu": `auto` is vLLM on a GPU, installed or not."""
    if c.rollout.engine == "auto":
        return "vllm" if device_type == "cuda" else "transformers"
    return c.rollout.engine


def check(c: Config, world: int, *, trains: bool = True, device_type: str = "cpu") -> None:
    """What can be known wrong before any model is loaded.

    Args:
        c: the configuration.
        world: number of ranks.
        trains: ranks share a step's problems, and packs; an evaluation's engines take prompts as they drain.
        device_type: "cuda" or "cpu", what the ranks compute on.
    Raises:
        ValueError: one sentence that names the value and the remedy.
    """
    r, a = c.rollout, c.advantage
    for name, value in {"rollout.problems": r.problems, "rollout.group_size": r.group_size, "steps": c.steps,
                        "rollout.max_tokens": r.max_tokens, "optim.updates": c.optim.updates,
                        "evaluate.samples": c.evaluate.samples,
                        "rollout.batch_size": r.batch_size, "rollout.tensor_parallel": r.tensor_parallel,
                        "rollout.sync_bucket_mib": r.sync_bucket_mib}.items():  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more.")
    check_parallel(c.model, c.parallel)
    check_optim(c.optim)
    for name, count in {"checkpoint_every": c.checkpoint_every, "evaluate.every": c.evaluate.every}.items():
        if count < 0:
            raise ValueError(f"{name} is {count}: give 1 or more, or 0 for never.")
    by_sequence = c.loss.ratio == "sequence" or (
        c.loss.importance_cap is not None and c.loss.importance_level == "sequence"
    )
    if c.parallel.sequence > 1 and by_sequence:
        raise ValueError(
            f"parallel.sequence is {c.parallel.sequence} with a ratio or importance weight per sequence, whose tokens "
            "are then on several ranks: give --parallel.sequence=1, or weights per token."
        )
    if trains and r.problems % world:
        raise ValueError(
            f"rollout.problems is {r.problems}, which {world} ranks cannot share evenly: give a multiple of {world}."
        )
    if r.problems % c.optim.updates:
        raise ValueError(
            f"rollout.problems is {r.problems}: it must be a multiple of optim.updates ({c.optim.updates})."
        )
    if r.group_size == 1 and a.std != "none":
        raise ValueError(
            f"rollout.group_size is 1 and advantage.std is {a.std}: one response has no spread to normalise by; "
            "give a group size of 2 or more, or --advantage.std=none."
        )
    if r.refill < 0 or (r.refill and a.group_filter == "none"):
        raise ValueError(
            f"rollout.refill is {r.refill} and advantage.group_filter {a.group_filter}: it replaces dropped groups; "
            "give 0, or --advantage.group_filter=uniform."
        )
    if r.group_size > 1024:
        raise ValueError(f"rollout.group_size is {r.group_size}: the kernels take groups of at most 1024.")
    if r.temperature <= 0:
        raise ValueError(f"rollout.temperature is {r.temperature}: training samples, so give a value above 0.")
    if not 0 < r.top_p <= 1 or not 0 <= r.min_p < 1:
        raise ValueError(f"rollout.top_p is {r.top_p} and min_p {r.min_p}: give 0 < top_p <= 1 and 0 <= min_p < 1.")
    if not 0 < c.evaluate.gpu_memory < 1:
        raise ValueError(f"evaluate.gpu_memory is {c.evaluate.gpu_memory}: give a share between 0 and 1.")
    if r.top_k < 0 or r.extra_problems < 0 or not 0 < r.gpu_memory < 1:
        raise ValueError(
            f"rollout.top_k is {r.top_k}, extra_problems {r.extra_problems} and gpu_memory {r.gpu_memory}: "
            "give 0 or more, 0 or more, and a share between 0 and 1."
        )
    if world % r.tensor_parallel:
        raise ValueError(
            f"rollout.tensor_parallel is {r.tensor_parallel}, which does not divide {world} ranks: "
            f"give a divisor of {world}."
        )
    if chosen_engine(c, device_type) != "vllm" and (r.tensor_parallel > 1 or r.extra_problems):
        raise ValueError(
            f"rollout.tensor_parallel is {r.tensor_parallel} and extra_problems {r.extra_problems}, "
            "which only vLLM can do: give --rollout.engine=vllm."
        )
    if c.optim.updates > 1 and c.loss.old_logprobs == "current":
        raise ValueError(
            f"optim.updates is {c.optim.updates} with loss.old_logprobs=current: later updates need the ratio; "
            "give --loss.old_logprobs=engine or recompute."
        )


def check_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    """What can be known wrong in how a model is laid out, whatever it is trained for. Raises ValueError."""
    if parallel.pack_tokens < 0:
        raise ValueError(f"parallel.pack_tokens is {parallel.pack_tokens}: give 1 or more, or 0 to have it measured.")
    if parallel.offload in ("activations", "both") and model.activation_checkpointing != "full":
        raise ValueError(
            f"parallel.offload is {parallel.offload} with model.activation_checkpointing="
            f"{model.activation_checkpointing}: it moves each block's input, so give full."
        )
    if model.compile and model.activation_checkpointing == "selective":
        raise ValueError(
            "model.compile is true with model.activation_checkpointing=selective, which must see single operators: "
            "give full or none."
        )


def check_optim(optim: OptimConfig) -> None:
    """What can be known wrong in the optimiser's settings. Raises ValueError."""
    for name, value in {"lr": optim.lr, "weight_decay": optim.weight_decay, "warmup_steps": optim.warmup_steps,
                        "max_skipped": optim.max_skipped}.items():  # fmt: skip
        if value < 0:
            raise ValueError(f"optim.{name} is {value}: give 0 or more.")
    if optim.grad_clip <= 0:
        raise ValueError(f"optim.grad_clip is {optim.grad_clip}: give a norm above 0; a large one clips nothing.")
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"optim.betas is {list(optim.betas)}: give two numbers from 0 to below 1.")


def check_sft(c: SftConfig) -> None:
    """What can be known wrong in SFT's configuration before a model is loaded. Raises ValueError."""
    for name, value in {"steps": c.steps, "batch_tokens": c.batch_tokens}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more.")
    for name, value, zero in (("validate_every", c.validate_every, "only after the last step"),
                              ("checkpoint_every", c.checkpoint_every, "no checkpoints"),
                              ("max_solution_tokens", c.max_solution_tokens, "no limit"),
                              ("watchdog_s", c.watchdog_s, "no watchdog")):  # fmt: skip
        if value < 0:
            raise ValueError(f"{name} is {value}: give 1 or more, or 0 for {zero}.")
    if c.from_scratch and c.model.path != "tiny":
        raise ValueError(
            f"from_scratch is true and model.path {c.model.path}: random weights are made for the embedded model's "
            "architecture only; give --from_scratch=false to train that model, or --model.path=tiny."
        )
    check_parallel(c.model, c.parallel)
    check_optim(c.optim)
